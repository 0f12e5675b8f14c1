// What a page does beyond being read: contents on a small screen, light or dark, sorting of tables, copying of commands, search. No network, no library.
(() => {
  "use strict";
  const script = document.currentScript, page = document.documentElement, top = document.querySelector(".top");
  const remembered = { get: (key) => { try { return localStorage.getItem(key); } catch { return null; } }, set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* a browser that keeps nothing for files */ } } };
  page.classList.add("js");

  // Light or dark: the system's, until the button is pressed.
  const theme = top.querySelector(".theme"), dark = matchMedia("(prefers-color-scheme: dark)");
  if (["light", "dark"].includes(remembered.get("theme"))) page.dataset.theme = remembered.get("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const now = page.dataset.theme || (dark.matches ? "dark" : "light");
    page.dataset.theme = now === "dark" ? "light" : "dark";
    remembered.set("theme", page.dataset.theme);
  });

  // Contents, folded away on a small screen.
  const menu = top.querySelector(".menu"), pages = document.getElementById("pages");
  if (menu) {
    menu.hidden = false;
    menu.addEventListener("click", () => menu.setAttribute("aria-expanded", pages.classList.toggle("open")));
    const current = pages.querySelector("[aria-current]");
    if (current) pages.scrollTop = current.offsetTop - pages.clientHeight / 3;
  }

  // Tables: a press sorts by the column, another the other way round; cells without a value stay at the end.
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => a !== "" && b !== "" && isFinite(a) && isFinite(b) ? a - b : a.localeCompare(b);
  for (const button of document.querySelectorAll("table.sortable th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
      const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction);
      const rows = [...body.rows].map((row) => [value(row, column), row]);
      rows.sort(([a], [b]) => (a === "") - (b === "") || (direction === "ascending" ? 1 : -1) * compare(a, b));
      body.append(...rows.map(([, row]) => row));
    });
  }

  // A metric that is linked to is opened.
  const open = () => { const aim = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1))); if (aim && aim.tagName === "DETAILS") aim.open = true; };
  addEventListener("hashchange", open);
  open();

  // Search: every word must be found; titles count most. The index is a script, because a page in a folder may not fetch.
  const field = document.getElementById("search"), found = document.getElementById("found");
  if (!field) return;
  let index = null;
  const load = () => {
    if (index) return;
    index = [];
    const source = document.createElement("script");
    source.src = script.dataset.root + "search-index.js";
    source.addEventListener("load", () => { index = window.DDIL_SEARCH.map((entry) => ({ ...entry, heads: `${entry.page} ${entry.section}`.toLowerCase(), words: entry.text.toLowerCase() })); show(); });
    document.head.append(source);
  };
  const count = (text, word) => text.split(word).length - 1;
  const score = (entry, words) => words.reduce((sum, word) => {
    const here = 20 * count(entry.heads, word) + Math.min(count(entry.words, word), 10);
    return here && sum !== null ? sum + here : null;
  }, 0);
  const marked = (text, words) => {
    const out = document.createElement("span"), pattern = new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "i");
    const at = Math.max(0, Math.min(...words.map((word) => { const place = text.toLowerCase().indexOf(word); return place < 0 ? Infinity : place; }).concat(text.length)) - 60);
    const piece = (at ? "…" : "") + text.slice(at < text.length - 60 ? at : 0).slice(0, 180);
    for (const [i, part] of piece.split(pattern).entries()) {
      if (i % 2) { const strong = document.createElement("mark"); strong.textContent = part; out.append(strong); } else out.append(part);
    }
    return out;
  };
  const show = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    found.hidden = !words.length;
    if (!words.length) return;
    const hits = index.map((entry) => [score(entry, words), entry]).filter(([points]) => points).sort((a, b) => b[0] - a[0]).slice(0, 20);
    found.replaceChildren(...hits.map(([, entry]) => {
      const link = document.createElement("a"), name = document.createElement("b");
      link.href = script.dataset.root + entry.url;
      name.textContent = entry.section ? `${entry.page} › ${entry.section}` : entry.page;
      link.append(name, marked(entry.text, words));
      return link;
    }));
    if (!hits.length) { const none = document.createElement("p"); none.textContent = "Nothing has all these words."; found.append(none); }
  };
  const close = () => { found.hidden = true; };
  field.addEventListener("focus", load);
  field.addEventListener("input", () => { load(); show(); });
  document.addEventListener("keydown", (event) => {
    const links = [...found.querySelectorAll("a")], at = links.indexOf(document.activeElement);
    if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); field.focus(); }
    else if (event.key === "Escape" && !found.hidden) { close(); field.focus(); }
    else if (!found.hidden && (event.key === "ArrowDown" || event.key === "ArrowUp") && (at >= 0 || document.activeElement === field)) {
      event.preventDefault();
      (links[at + (event.key === "ArrowDown" ? 1 : -1)] ?? field).focus();
    } else if (event.key === "Enter" && document.activeElement === field && links.length && !found.hidden) links[0].click();
  });
  document.addEventListener("click", (event) => { if (!event.target.closest(".search")) close(); });
})();
