"""A batch on a real SLURM: six runs, of which one fails, one is killed and one trains on two nodes; and a runner
that is killed, too. Started by run.sh.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_batch import CHECK, PARAMETERS, ROOT, RUNNER, WORK, notebook, until  # noqa: E402

from ddil.lab.executors import Slurm  # noqa: E402
from ddil.lab.job import read_json  # noqa: E402
from ddil.lab.precheck import check_batches  # noqa: E402
from ddil.lab.runner import Scheduler  # noqa: E402

# Two processes on each of two nodes add up their ranks.
MODULE = """
import json, os, sys, torch
from pathlib import Path
torch.distributed.init_process_group("gloo")
total = torch.tensor(float(torch.distributed.get_rank()))
torch.distributed.all_reduce(total)
output = json.loads(Path(sys.argv[1]).read_text())["output"]
place = Path(output, f"rank-{torch.distributed.get_rank()}")
place.write_text(f"{total.item()} {os.environ['SLURMD_NODENAME']}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
LAUNCH = """
import json
from pathlib import Path
from ddil.training.launch import launch
task = Path(output) / "task.json"
task.write_text(json.dumps({"output": output}))
launch(task, "together", processes=2, nodes=nodes, device="cpu")
(Path(output) / "results.json").write_text("{}")
"""
RUNS = """
notebook: tiny.ipynb
defaults: {steps: 4}
resources: {minutes: 2, memory: 1}
runs:
  - {name: first}
  - {name: reader, parameters: {reads: "{first}/at"}}
  - {name: failing, parameters: {mode: fails}}
  - {name: killed, parameters: {steps: 100, pause: 0.2}}
  - {name: slow, parameters: {steps: 60, pause: 0.2}}
  - {name: wide, notebook: wide.ipynb, parameters: {nodes: 2, steps: 1}, resources: {cores: 2}}
"""


def queue() -> dict[str, str]:
    """Jobs in SLURM's queue and their states."""
    told = subprocess.run(
        ["squeue", "--noheader", "--array", "--format", "%i|%T"], capture_output=True, text=True, check=True
    )
    return dict(line.split("|") for line in told.stdout.split())


def job(name: str) -> str | None:
    return read_json(Path(f"runs/small/{name}/.run/slurm.json")).get("id")


def at(name: str) -> int:
    path = Path(f"runs/small/{name}/at")
    return int(path.read_text()) if path.exists() else 0


def show(schedule_or_text: object) -> None:
    print(f"{time.strftime('%H:%M:%S')} {schedule_or_text}", flush=True)


def main() -> None:
    """Everything, in order. An assertion that fails ends it."""
    notebook(Path("tiny.ipynb"), PARAMETERS, CHECK, WORK)
    notebook(Path("wide.ipynb"), "nodes: int = 1\nsteps: int = 1\noutput: str = ''", LAUNCH)
    Path("together.py").write_text(MODULE)
    Path("small.yaml").write_text(RUNS)
    command = [sys.executable, "-c", RUNNER, "small.yaml", "--executor", "slurm", "--partition", "main"]

    refused = subprocess.run([*command[:-1], "nowhere"], capture_output=True, text=True)
    assert refused.returncode == 2 and "SLURM refuses" in refused.stderr and "invalid partition" in refused.stderr, (
        refused.stderr
    )
    show("a runner sends all, and is killed while two runs are at work")
    one = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until(lambda: at("killed") >= 3 and at("slow") >= 3, 90)
    one.kill()
    one.wait()
    jobs = {name: job(name) for name in ("first", "failing", "killed", "slow", "wide")}
    assert None not in jobs.values(), jobs
    show(f"jobs {jobs}; in the queue {queue()}")
    subprocess.run(["scancel", "--signal=KILL", "--full", jobs["killed"]], check=True)
    until(lambda: jobs["killed"] not in queue(), 60)
    lost = at("killed")
    show(f"one run was killed after {lost} steps; a second runner takes over")

    two = subprocess.run(command, capture_output=True, text=True)
    print(two.stdout, two.stderr)
    assert two.returncode == 1
    assert Path("runs/small/wide/done.json").exists(), Path("runs/small/wide/.run/log.txt").read_text()
    steps = {
        name: [line.split() for line in Path(f"runs/small/{name}/trace").read_text().splitlines()]
        for name in ("first", "reader", "failing", "killed", "slow")
    }
    assert job("slow") == jobs["slow"] and [int(step) for step, _ in steps["slow"]] == list(range(60)), (
        "the run that went on was taken over, not begun again"
    )
    assert len({process for _, process in steps["slow"]}) == 1
    assert sorted({int(step) for step, _ in steps["killed"]}) == list(range(100)) and len(steps["killed"]) <= 101, (
        "the killed run lost its step alone"
    )
    assert [int(step) for step, _ in steps["failing"]] == [0, 1] and read_json(Path("runs/small/failing/failed.json"))[
        "error"
    ].startswith("RuntimeError")
    ranks = sorted(path.read_text().split() for path in Path("runs/small/wide").glob("rank-*"))
    assert ranks == [["6.0", "one"], ["6.0", "one"], ["6.0", "two"], ["6.0", "two"]], ranks
    show("the failing one is mended, and asked for again")
    Path("mended").touch()
    three = subprocess.run([*command, "--retry"], capture_output=True, text=True)
    print(three.stdout, three.stderr)
    assert three.returncode == 0 and not queue()
    schedule = Scheduler(check_batches(["small.yaml"]), Slurm())
    schedule.round()
    assert {task.state for task in schedule.tasks} == {"done"} or [
        task.run.name for task in schedule.tasks if task.state != "done"
    ] == ["reader"]
    show("all is as it should be")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(
        dir=os.environ.get("SHARED")
    ) as place:  # on a cluster SHARED must name a folder that all nodes see
        os.chdir(place)
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{place}"
        main()
