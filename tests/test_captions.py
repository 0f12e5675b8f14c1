"""Pictures with captions in every format, with nothing lost silently; and their cache: killed anywhere, made by two
processes, on a full disk, or asked for by another model.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import PROCESSES
from PIL import Image
from tiny import free_port
from torch import Tensor

from ddil import files
from ddil.distil.doctor import _data
from ddil.datasets import building
from ddil.datasets.building import build_cache
from ddil.datasets.cache import cache_content, CachedCaptions
from ddil.datasets.captions import CaptionedImages, Captioned, open_captions
from ddil.datasets.scenes import tiny_pipeline
from ddil.models.pipeline import TextToImage
from ddil.distil.problem import ModelOptions
from ddil.training.parallel import make_accelerator

SIZE = 16
CAPTIONS = [f"picture {i % 5}, {'näher' if i % 2 else 'farther'}" for i in range(12)]
OPTIONAL = {"shards": "webdataset", "dataset": "datasets"}


def need(format: str) -> None:
    """Skip where the optional package that reads this format is not installed."""
    if format in OPTIONAL:
        pytest.importorskip(
            OPTIONAL[format], reason=f"{OPTIONAL[format]} is an optional dependency: pip install 'ddil[data]'"
        )


def pixels(i: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8)


def png(i: int, height: int = SIZE, width: int = SIZE) -> bytes:
    into = io.BytesIO()
    Image.fromarray(pixels(i, height, width)).save(into, "png")
    return into.getvalue()


def beside(root: Path) -> str:
    for i, caption in enumerate(CAPTIONS):
        (root / f"{i:03}.png").write_bytes(png(i))
        (root / f"{i:03}.txt").write_text(caption + "\n", encoding="utf-8")
    return str(root)


def table_csv(root: Path) -> str:
    (root / "pictures").mkdir()
    for i in range(12):
        (root / "pictures" / f"{i:03}.png").write_bytes(png(i))
    (root / "captions.csv").write_text(
        "image,caption\n" + "".join(f'pictures/{i:03}.png,"{caption}"\n' for i, caption in enumerate(CAPTIONS)),
        encoding="utf-8-sig",
    )
    return str(root)


def table_jsonl(root: Path) -> str:
    table_csv(root)
    (root / "captions.csv").unlink()
    rows = [{"file_name": f"pictures/{i:03}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(root)


def coco(root: Path, year: int = 2014) -> str:
    """Five captions a picture, written down in no order."""
    name = f"val{year}"
    (root / name).mkdir()
    (root / "annotations").mkdir()
    for i in range(12):
        (root / name / f"{i:012}.png").write_bytes(png(i))
    told = [
        {"id": 100 * j + i, "image_id": i, "caption": f"{caption}{'!' * j}"}
        for i, caption in enumerate(CAPTIONS)
        for j in range(5)
    ]
    content = {"images": [{"id": i, "file_name": f"{i:012}.png"} for i in range(12)][::-1], "annotations": told[::-1]}
    (root / "annotations" / f"captions_{name}.json").write_text(json.dumps(content))
    (root / "annotations" / f"instances_{name}.json").write_text("{}")
    return str(root)


def shards(root: Path) -> str:
    """Four shards of three."""
    for shard in range(4):
        with tarfile.open(root / f"data-{shard:04}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                told = (
                    ("txt", CAPTIONS[i].encode()) if i % 2 else ("json", json.dumps({"caption": CAPTIONS[i]}).encode())
                )
                for ending, data in (("png", png(i)), told):
                    info = tarfile.TarInfo(f"{i:03}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(root / "data-{0000..0003}.tar")


def pipe(root: Path) -> str:
    return f"pipe:cat {shards(root)}"


def parquet(root: Path, broken: tuple[int, ...] = ()) -> str:
    import datasets

    for part in range(2):
        which = range(6 * part, 6 * part + 6)
        rows = {
            "image": [{"bytes": b"broken" if i in broken else png(i), "path": None} for i in which],
            "text": [CAPTIONS[i] for i in which],
        }
        kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(root / f"train-{part}.parquet")
    return str(root)


def json_lines(root: Path, files: int = 2) -> str:
    """Pictures, and rows in two files; those of another split do not count."""
    for i in range(12):
        (root / f"{i:03}.png").write_bytes(png(i))
    rows = [json.dumps({"image": f"{i:03}.png", "caption": caption}) for i, caption in enumerate(CAPTIONS)]
    each = 12 // files
    for part in range(files):
        (root / f"train-{part}.jsonl").write_text("\n".join(rows[each * part : each * (part + 1)]))
    if files > 1:
        (root / "test-0.jsonl").write_text(rows[0])
    return str(root)


LAYOUTS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "folder": ("folder", beside),
    "csv": ("table", table_csv),
    "jsonl": ("table", table_jsonl),
    "COCO 2014": ("coco", coco),
    "COCO 2017": ("coco", lambda root: coco(root, 2017)),
    "shards": ("shards", shards),
    "folder of shards": ("shards", lambda root: str(Path(shards(root)).parent)),
    "piped shards": ("shards", pipe),
    "parquet": ("dataset", parquet),
    "json lines": ("dataset", json_lines),
    "a lone table": ("table", lambda root: json_lines(root, 1)),
}


def layout(name: str, root: Path) -> str:
    """A data set in this layout, if what reads it is installed."""
    need(LAYOUTS[name][0])
    root.mkdir(exist_ok=True)
    return LAYOUTS[name][1](root)


# The formats


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_format_gives_the_same_items(name: str, tmp_path: Path) -> None:
    """Keys differ, captions and pictures do not; captions can be had alone; a limit ends the stream."""
    source, format = layout(name, tmp_path), LAYOUTS[name][0]
    items = open_captions(source, size=SIZE)
    assert items.identity["format"] == format
    found = list(items)
    assert [item.caption for item in found] == CAPTIONS
    assert all(np.array_equal(item.image, pixels(i)) for i, item in enumerate(found))
    assert [item.caption for item in items] == CAPTIONS, "a second reading"
    alone = list(open_captions(source, format, images=False))
    assert [(item.caption, item.image) for item in alone] == [(caption, None) for caption in CAPTIONS]
    assert [item.caption for item in open_captions(source, size=SIZE, limit=4)] == CAPTIONS[:4]
    assert str(tmp_path) not in json.dumps(items.identity)


def test_captions_alone(tmp_path: Path) -> None:
    """A caption in each line that is not empty."""
    (tmp_path / "captions.txt").write_text("\n\n".join(CAPTIONS), encoding="utf-8")
    items = open_captions(str(tmp_path / "captions.txt"), size=SIZE)
    assert [(item.caption, item.image) for item in items] == [(caption, None) for caption in CAPTIONS]


def test_five_captions(tmp_path: Path) -> None:
    """The first, all, or a seeded one."""
    source = coco(tmp_path)
    captions = lambda **how: [item.caption for item in open_captions(source, size=SIZE, **how)]
    assert captions(caption="all") == [f"{caption}{'!' * j}" for caption in CAPTIONS for j in range(5)]
    assert captions(caption="random") == captions(caption="random") != captions(caption="random", seed=1)
    assert {len(one) - len(plain) for one, plain in zip(captions(caption="random"), CAPTIONS)} > {0}


def test_columns_of_other_names(tmp_path: Path) -> None:
    """Columns can be named, and are asked for where they are not known."""
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "metadata.csv").write_text("where,title\n0.png,a title\n")
    with pytest.raises(ValueError, match="has the columns where, title; one of caption, text"):
        open_captions(str(tmp_path), size=SIZE)
    (item,) = open_captions(str(tmp_path), size=SIZE, file_column="where", caption_column="title")
    assert item.caption == "a title"


@pytest.mark.parametrize(("package", "source"), [("webdataset", "pipe:cat x.tar"), ("datasets", "someone/something")])
def test_optional_packages_are_asked_for(package: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command that installs them."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"needs the package {package}: pip install {package}, or pip install 'ddil\[data\]'"
    ):
        open_captions(source, "dataset" if package == "datasets" else "auto", size=SIZE, revision="abc")


def test_a_hub_needs_a_revision() -> None:
    """Before anything is asked of it."""
    need("dataset")
    with pytest.raises(ValueError, match="name its revision"):
        open_captions("someone/something", "dataset", size=SIZE)


def test_shards_that_are_not_there_or_break_off(tmp_path: Path) -> None:
    """Both are named; a broken shard is not the end of the data."""
    need("shards")
    source = shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"1 of 5 shards of .* are not there: .*data-0004.tar"):
        open_captions(source.replace("0003", "0004"), size=SIZE)
    whole = (tmp_path / "data-0001.tar").read_bytes()
    (tmp_path / "data-0001.tar").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"data-0001.tar cannot be read to its end"):
        list(open_captions(source, size=SIZE))


# Nothing is lost silently


@pytest.mark.parametrize("name", ["folder", "csv", "COCO 2014", "shards", "parquet"])
def test_unreadable_pictures_are_named_and_counted(name: str, tmp_path: Path) -> None:
    """An error by default; up to the limit they are skipped."""
    source = layout(name, tmp_path)
    for path in sorted(tmp_path.rglob("*.png"))[3:5]:
        path.write_bytes(png(3)[:100])
    if name == "shards":
        for path in sorted(tmp_path.glob("*.tar"))[1:2]:
            path.write_bytes(path.read_bytes().replace(png(3), b"x" * len(png(3))).replace(png(4), b"x" * len(png(4))))
    if name == "parquet":
        parquet(tmp_path, (3, 4))
    with pytest.raises(
        ValueError, match=r"1 items cannot be used, and skip_limit is 0: .*(3|4).* \(\w+Error: .*raise skip_limit"
    ):
        list(open_captions(source, size=SIZE))
    with pytest.raises(ValueError, match="2 items cannot be used, and skip_limit is 1"):
        list(open_captions(source, size=SIZE, skip_limit=1))
    items = open_captions(source, size=SIZE, skip_limit=2)
    assert [item.caption for item in items] == CAPTIONS[:3] + CAPTIONS[5:]
    assert dict(items.dropped) == {"unreadable": 2} and len(items.skipped) == 2


def test_pictures_without_a_caption(tmp_path: Path) -> None:
    """Named like the unreadable ones; and a folder without any caption says what it looked for."""
    source = beside(tmp_path)
    (tmp_path / "004.txt").unlink()
    (tmp_path / "005.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"004.png \(it has no caption\)"):
        list(open_captions(source, size=SIZE))
    items = open_captions(source, size=SIZE, skip_limit=2)
    assert len(list(items)) == 10 and items.dropped == {"without a caption": 2}
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    with pytest.raises(
        ValueError,
        match=r"has none of: annotations/captions_\*.json; a table .*It has 12 "
        r"pictures, and nothing that captions them",
    ):
        open_captions(source, size=SIZE)


def test_over_filtered(tmp_path: Path) -> None:
    """What was too small is counted; when nothing is left that is an error with the counts."""
    source = beside(tmp_path)
    for i in range(3):
        (tmp_path / f"{i:03}.png").write_bytes(png(i, 40, 50))
    items = open_captions(source, size=SIZE, minimum_side=20)
    assert [item.original for item in items] == [(40, 50)] * 3 and items.dropped == {"smaller than 20 pixels": 9}
    with pytest.raises(ValueError, match="no items are left of 12: 12 smaller than 60 pixels"):
        list(open_captions(source, size=SIZE, minimum_side=60))


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the imaging library would only warn."""
    source = beside(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "002.png").write_bytes(png(2, 40, 40))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="002.png .*40 x 40 pixels are more than Image.MAX_IMAGE_PIXELS"),
    ):
        list(open_captions(source, size=SIZE))


@pytest.mark.parametrize("name", ["folder", "COCO 2014", "shards", "parquet"])
def test_identity(name: str, tmp_path: Path) -> None:
    """It moves with the data and changes with them."""
    source = layout(name, tmp_path / "one")
    before = open_captions(source, size=SIZE).identity
    (tmp_path / "one").rename(tmp_path / "two")
    source = source.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert open_captions(source, size=SIZE).identity == before
    assert open_captions(source, size=SIZE, minimum_side=5).identity != before
    picture = next(
        path for path in sorted((tmp_path / "two").rglob("*")) if path.suffix in (".png", ".tar", ".parquet")
    )
    os.utime(picture, (1, 1))
    assert open_captions(source, size=SIZE).identity != before


# The cache


class Encoder:
    """What the cache asks of a model, in microseconds."""

    vae = None

    def __init__(self, name: str = "one", side: int = 4, channels: int = 4, two: bool = False):
        self.name, self.side, self.channels, self.two = name, side, channels, two
        self.text = SimpleNamespace(truncated=0)

    def identity(self, parts: list[str]) -> dict:
        return {part: self.name for part in parts}

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        return self.channels, self.side, self.side

    def encode_prompts(self, prompts: list[str]) -> Tensor | dict[str, Tensor]:
        self.text.truncated += sum(len(prompt) > 100 for prompt in prompts)
        found = torch.tensor(
            [[(sum(prompt.encode()) * (j + 1)) % 97 for j in range(6)] for prompt in prompts], dtype=torch.float32
        )
        return {"embeddings": found.view(-1, 3, 2), "text_embeds": found} if self.two else found.view(-1, 3, 2)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.nn.functional.adaptive_avg_pool2d(images, min(self.side, 16))
        mean = mean.repeat_interleave(self.side // mean.shape[-1], -1).repeat_interleave(
            self.side // mean.shape[-1], -2
        )
        mean = mean[:, torch.arange(self.channels) % 3]
        return mean, mean.abs() / 10


def given(count: int = 40, broken: tuple[int, ...] = (), **options) -> CaptionedImages:
    """Pictures that are made as they are asked for."""

    def picture(i: int) -> Image.Image:
        if i in broken:
            raise OSError("a broken one")
        return Image.fromarray(pixels(i))

    entries = [Captioned(f"picture-{i}", CAPTIONS[i % 12], lambda i=i: picture(i)) for i in range(count)]
    return CaptionedImages(lambda: entries, {"given": count, "broken": list(broken)}, SIZE, count=count, **options)


def dealt(count: int = 40) -> CaptionedImages:
    """The same in eight shards, of which nobody knows the lengths."""
    entries = given(count).entries()
    cuts = [0, 1, 4, 9, 16, 25, 30, 36, count]
    parts = [lambda first=first, last=last: iter(entries[first:last]) for first, last in zip(cuts, cuts[1:])]
    return CaptionedImages(lambda: iter(entries), {"dealt": count}, SIZE, shards=parts)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a cache; none is hidden."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.filterwarnings("ignore:.*longer than the tokenizer takes")
def test_rows_agree_with_direct_encoding(tmp_path: Path) -> None:
    """A whole pipeline, SDXL's, with pictures that are not square: latents, embeddings and sizes as the encoder and
    diffusers' training script say.
    """
    source = layout("folder", tmp_path / "data")
    for i in (0, 5):
        (tmp_path / "data" / f"{i:03}.png").write_bytes(png(i, 64, 96))
    encoder = TextToImage.load(tiny_pipeline(tmp_path / "model", "StableDiffusionXL"))
    items = open_captions(source, size=32)
    data = build_cache(tmp_path / "cache", items, encoder, 32, part=5, batch_size=3, dtype="float32")
    rows = np.array([11, 0, 5, -1, 0])
    latents, cond = data[rows]
    direct = encoder.encode_images(torch.stack([item.pixels() for item in items]))[rows]
    assert torch.allclose(latents, direct, atol=1e-5) and latents.dtype == torch.float32
    expected = encoder.encode_prompts([CAPTIONS[i] for i in rows])
    for name in expected:
        assert torch.allclose(cond[name], expected[name], atol=1e-5), name
    # the picture of 64 x 96 is resized to 32 x 48, then cut from column 8
    assert cond["time_ids"].tolist() == [
        [16, 16, 0, 0, 32, 32],
        [64, 96, 0, 8, 32, 32],
        [64, 96, 0, 8, 32, 32],
        [16, 16, 0, 0, 32, 32],
        [64, 96, 0, 8, 32, 32],
    ]
    assert data.captions[3:6] == CAPTIONS[3:6] and len(data) == 12
    with pytest.raises(IndexError, match="has 12 rows"):
        data[np.array([12])]


def test_each_caption_and_each_picture_once(tmp_path: Path) -> None:
    """Of five captions a picture: sixty rows, twelve latents, and the embeddings of the distinct captions."""
    items = open_captions(coco(tmp_path), size=SIZE, caption="all")
    data = build_cache(tmp_path / "cache", items, Encoder(), SIZE)
    assert (
        len(data) == 60
        and data.table["pictures"] == [12]
        and data.table["distinct"] == len({item.caption for item in items})
    )
    assert np.load(data.folder / "part-00000-00000" / "latents.npy").shape == (12, 4, 4, 4)
    latents = data[np.arange(60)][0]
    assert torch.equal(latents[0::5], latents[4::5]) and not torch.equal(latents[0], latents[5])
    across = build_cache(tmp_path / "cache", items, Encoder(), SIZE, part=7)  # parts that end amid a picture's captions
    assert torch.equal(across[np.arange(60)][0], latents)


def _dying(folder: Path, posterior: str, before: bool, streamed: bool) -> None:
    """Build, and be killed by SIGKILL at the second folder that is to get its name, before it has it; or after the
    first has it.
    """
    replace, seen = os.replace, []

    def replacing(source: Path, place: Path) -> None:
        seen.append(".writing-" in Path(source).name and Path(source).is_dir())
        if before and sum(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, place)
        if not before and sum(seen) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace = replacing
    build_cache(folder, dealt() if streamed else given(), Encoder(), SIZE, part=8, posterior=posterior)


def _killed_again_and_again(told: "PROCESSES.SimpleQueue", *how: object) -> None:
    """Tells how often a build was killed before one came to its end. Each is a fork of this process, which has
    imported everything and has one thread.
    """
    torch.set_num_threads(1)
    for killed in range(100):
        process = os.fork()
        if process == 0:
            try:
                _dying(*how)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code != -signal.SIGKILL:
            break
    told.put((killed, code))


@pytest.mark.parametrize(("before", "posterior", "streamed"), [(True, "sample", False), (False, "mean", True)])
def test_killed_at_every_part(tmp_path: Path, before: bool, posterior: str, streamed: bool) -> None:
    """Again and again, until there is nothing more to make: the cache is that of a run left in peace, to the last
    byte.
    """
    whole = build_cache(
        tmp_path / "whole", dealt() if streamed else given(), Encoder(), SIZE, part=8, posterior=posterior
    )
    queue = PROCESSES.SimpleQueue()
    process = PROCESSES.Process(
        target=_killed_again_and_again, args=(queue, tmp_path / "parts", posterior, before, streamed)
    )
    process.start()
    killed, code = queue.get()
    process.join()
    made = len(whole.table["parts"]) + len(whole.table["texts"]) + 1
    assert (killed, code) == (made - 1 if before else made, 0)
    assert contents(tmp_path / "parts" / whole.folder.name) == contents(whole.folder)


@pytest.mark.parametrize("full_at", [1, 4, 7, 9])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int) -> None:
    """Amid any file: told how much is needed, nothing half-written, and the same call goes on when there is room."""
    whole = build_cache(tmp_path / "whole", given(), Encoder(), SIZE, part=16, posterior="sample")
    save, calls = np.save, []

    def filling(path: Path, array: np.ndarray, **options) -> None:
        calls.append(path)
        if len(calls) > full_at:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array, **options)

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", filling)
        with pytest.raises(OSError, match=r"is full. About .* are still needed, and .* are free") as told:
            build_cache(tmp_path / "full", given(), Encoder(), SIZE, part=16, posterior="sample")
    assert told.value.errno == errno.ENOSPC
    place = tmp_path / "full" / whole.folder.name
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    assert contents(place).items() <= contents(whole.folder).items()
    assert contents(
        build_cache(tmp_path / "full", given(), Encoder(), SIZE, part=16, posterior="sample").folder
    ) == contents(whole.folder)


def test_too_small_a_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is counted, not what is already there."""
    usage = lambda free: lambda place: shutil._ntuple_diskusage(10**12, 10**12 - free, free)
    needed = building.bytes_of_cache(given(), Encoder(), cache_content(given(), Encoder(), SIZE))
    assert needed == 2 * (40 * 4 * 4 * 4 + len(set(CAPTIONS)) * 6)
    monkeypatch.setattr(shutil, "disk_usage", usage(needed - 1))
    with pytest.raises(OSError, match=f"needs {needed / 1000:.1f} kB"):
        build_cache(tmp_path, given(), Encoder(), SIZE)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", usage(needed))
    build_cache(tmp_path, given(), Encoder(), SIZE)


def test_foreign_caches(tmp_path: Path) -> None:
    """Another model, size or data set gets a folder of its own; one under a foreign name is refused with what
    differs; a damaged one is found.
    """
    ours = build_cache(tmp_path, given(), Encoder(), SIZE)
    theirs = build_cache(tmp_path, given(), Encoder("two"), SIZE)
    assert ours.folder != theirs.folder and len(list(tmp_path.iterdir())) == 2
    shutil.rmtree(ours.folder)
    theirs.folder.rename(ours.folder)
    with pytest.raises(
        ValueError, match=r"made of something else: text is 'two' there, 'one' here; vae is 'two' there, 'one' here"
    ):
        build_cache(tmp_path, given(), Encoder(), SIZE)
    with pytest.raises(ValueError, match="is not what its name says"):
        CachedCaptions(ours.folder)
    theirs = build_cache(tmp_path, given(), Encoder("two"), SIZE)
    path = theirs.folder / "part-00000-00000" / "latents.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00" if path.read_bytes()[-1] else path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        ValueError, match="latents.npy in .* is damaged .* delete the folder part-00000-00000 and build the cache again"
    ):
        theirs.verify()
    shutil.rmtree(path.parent)
    with pytest.raises(ValueError, match="part-00000-00000 is missing"):
        CachedCaptions(theirs.folder)
    build_cache(tmp_path, given(), Encoder("two"), SIZE).verify()


def test_skipped_while_caching(tmp_path: Path) -> None:
    """The limit holds over all parts, for a run that goes on, and for a cache that is there."""
    broken = (3, 17, 33)
    with pytest.raises(
        ValueError, match="3 items cannot be used, and skip_limit is 2: picture-3 .*; picture-17 .*; picture-33"
    ):
        build_cache(tmp_path, given(broken=broken, skip_limit=2), Encoder(), SIZE, part=8)
    with pytest.raises(ValueError, match="skip_limit is 1"):
        build_cache(tmp_path, given(broken=broken, skip_limit=1), Encoder(), SIZE, part=8)
    data = build_cache(tmp_path, given(broken=broken, skip_limit=3), Encoder(), SIZE, part=8)
    assert len(data) == 37 and data.table["dropped"] == {"unreadable": 3} and data.captions[3] == CAPTIONS[4]
    with pytest.raises(ValueError, match="3 items could not be used when this cache was made"):
        build_cache(tmp_path, given(broken=broken), Encoder(), SIZE, part=8)
    with pytest.raises(ValueError, match="no items are left of 40: 40 smaller than 100 pixels"):
        build_cache(tmp_path, given(minimum_side=100), Encoder(), SIZE, part=8)
    with pytest.raises(ValueError, match="pictures of 16 pixels, and the cache was asked for 32"):
        build_cache(tmp_path, given(), Encoder(), 32)


def test_what_half_precision_cannot_hold(tmp_path: Path) -> None:
    """Is refused, with the remedy; captions that were cut are counted once, over all."""
    large = Encoder()
    large.encode_prompts = lambda prompts: torch.full((len(prompts), 2, 2), 1e6)
    with pytest.raises(
        ValueError, match="embeddings reach 1e[+]06, more than float16 can hold: ask for dtype='float32'"
    ):
        build_cache(tmp_path, given(), large, SIZE)
    assert build_cache(tmp_path, given(), large, SIZE, dtype="float32").conditions(np.arange(2)).max() == 1e6
    entries = [Captioned(str(i), f"{i}" + " and so on" * (10 * (i % 2) + 1)) for i in range(30)]
    with pytest.warns(UserWarning, match="15 of 30 distinct captions are longer") as told:
        data = build_cache(tmp_path, CaptionedImages(lambda: entries, {"long": 1}, count=30), Encoder(), None, part=7)
    assert len(told) == 1 and data.table["cut"] == 15


def _resident() -> dict[str, int]:
    """Bytes of memory of this process, its own and mapped from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile")}


def _reading(folder: Path, told: "PROCESSES.SimpleQueue") -> None:
    data = CachedCaptions(folder)
    data[np.arange(2)]
    before = _resident()
    for step in range(8):
        data[np.random.default_rng(step).integers(len(data), size=4)]
    after = _resident()
    told.put({name: after[name] - before[name] for name in before} | {"open": len(os.listdir("/proc/self/fd"))})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
def test_memory_mapped(tmp_path: Path) -> None:
    """Of 21 MB of latents a reader has in memory what it read and its neighbourhood, none of it its own; nor does
    it keep 600 files open.
    """
    data = build_cache(tmp_path, given(320), Encoder(side=128, channels=1), SIZE, part=1, dtype="float32")
    assert sum(path.stat().st_size for path in data.folder.rglob("latents.npy")) > 320 * 4 * 128 * 128
    queue = PROCESSES.SimpleQueue()
    process = PROCESSES.Process(target=_reading, args=(data.folder, queue))
    process.start()
    found = queue.get()
    process.join()
    assert found["RssAnon"] < 4e6 and found["RssFile"] < 10e6
    data[np.arange(320)]
    assert len(os.listdir("/proc/self/fd")) < 400 and found["open"] < 400


# Two processes


def _shared(rank: int, port: int, folder: Path, which: str, output: Path) -> None:
    """One of two processes that build a cache together."""
    os.environ.update(
        {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
    )
    torch.set_num_threads(1)
    made = []
    replace = os.replace
    files.os.replace = lambda source, place: (
        made.append(Path(place).name) if ".writing-" in Path(source).name else None,
        replace(source, place),
    )[1]
    items = {
        "list": given,
        "shards": dealt,
        "broken": lambda: given(broken=(12,)),
        "different": lambda: given(40 + rank),
    }[which]()
    try:
        build_cache(folder, items, Encoder(), SIZE, part=8, accelerator=make_accelerator("cpu"))
        (output / str(rank)).write_text(json.dumps(made))
    except Exception as error:
        (output / str(rank)).write_text(f"{type(error).__name__}: {error}")


def both(tmp_path: Path, which: str) -> list[str]:
    """What two processes say."""
    output, port = tmp_path / "output", free_port()
    output.mkdir()
    processes = [
        PROCESSES.Process(target=_shared, args=(rank, port, tmp_path / "two", which, output), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [(output / str(rank)).read_text() for rank in range(2)]


@pytest.mark.parametrize("which", ["list", "shards"])
def test_two_processes_make_what_one_does(tmp_path: Path, which: str) -> None:
    """Each makes parts of its own, and the cache is the same to the last byte."""
    made = [json.loads(said) for said in both(tmp_path, which)]
    one = build_cache(tmp_path / "one", given() if which == "list" else dealt(), Encoder(), SIZE, part=8)
    assert contents(tmp_path / "two" / one.folder.name) == contents(one.folder)
    parts = [{name for name in names if name.startswith(("part-", "text-"))} for names in made]
    assert all(len(names) >= 2 for names in parts) and not parts[0] & parts[1]
    assert parts[0] | parts[1] == {*one.table["parts"], *one.table["texts"]}


def test_where_one_fails_both_do(tmp_path: Path) -> None:
    """The second process meets a broken picture: both say so, and none waits for the other."""
    first, second = both(tmp_path, "broken")
    assert "picture-12 (OSError: a broken one)" in second and second.startswith("ValueError")
    assert (
        first.startswith("RuntimeError")
        and "another process failed: process 1: ValueError: 1 items cannot be used" in first
    )


def test_processes_must_see_the_same_data(tmp_path: Path) -> None:
    assert all(
        "the processes do not see the same data or model: data: given is 40 there, 41 here" in said
        for said in both(tmp_path, "different")
    )


def test_doctor_looks_at_the_data(tmp_path: Path) -> None:
    """It reads one item."""
    (tmp_path / "data").mkdir()
    line, items = _data(ModelOptions(model="model", data=beside(tmp_path / "data"), size=32), True)
    assert line == f"12 entries, the first is {CAPTIONS[0]!r}"
    assert items.count == 12
