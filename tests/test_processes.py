"""Two processes train what one does; a run that is killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from ddil.solvers.sampler import Sampler
from ddil.distil.stages import carry_out, distil
from ddil.files import read_tensors
from ddil.diffusion.noise import Shard, Source
from ddil.rollins.mixture import Mixture
from ddil.rollins.teacher import Teacher
from ddil.diffusion.grids import uniform_grid
from ddil.training.parallel import make_accelerator
from ddil.training.checkpoints import latest_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = 2e-6  # of weights that training moves by 0.01 and more
TWO_STAGES = {"stages": (8, 4, 2)}
LAUNCHED = {"problem": "atoms", **tiny.OPTIONS, "processes": 2, "device": "cpu"}
Trained = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The folder of an arm's run in one or two processes, each made once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(arm: str, processes: int) -> Path:
        if (arm, processes) not in made:
            place = root / f"{arm}, {processes}"
            if (arm, processes) == ("PD + DDIL, sample", 2):  # the way that users go
                carry_out(tiny.plan(**tiny.ARMS[arm], **LAUNCHED, output=str(place)))
            else:
                tiny.trained(place, tiny.ARMS[arm], processes)
            made[arm, processes] = place
        return made[arm, processes]

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """An uninterrupted run of two stages in one or two processes, each made once."""
    root = tmp_path_factory.mktemp("whole")

    def run(processes: int) -> Path:
        place = root / str(processes)
        return place if place.exists() else tiny.trained(place, TWO_STAGES, processes)

    return run


# Two processes or one


EXACT = (
    "collected asked",
    "collected served",
    "collected driven by student asked",
    "collected driven by student served",
    "collected collected states",
    "collected reuse used",
)


def is_exact(name: str) -> bool:
    """Whether a figure of the log is the same to the last bit on two processes."""
    return name.split()[0] in ("forward", "update", "learning") or name in EXACT


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_two_processes_train_what_one_does(arm: str, run_of: Trained) -> None:
    """Weights agree to rounding, which is far less than what was learnt."""
    one, two = (tiny.stages(run_of(arm, processes))[0] for processes in (1, 2))
    assert [tiny.described(stage)["provenance"]["cost"]["processes"] for stage in (one, two)] == [1, 2]
    untrained = tiny.problem().student.network.state_dict()
    moved = {name: (value - untrained[name]).abs().max().item() for name, value in tiny.weights(one).items()}
    assert min(moved.values()) > 5000 * ROUNDING, f"training did not change {min(moved, key=moved.__getitem__)}"
    assert tiny.largest_difference(tiny.weights(one), tiny.weights(two)) < ROUNDING


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_two_processes_log_what_one_does(arm: str, run_of: Trained) -> None:
    """Losses agree to rounding, and used shares to the last bit."""
    one, two = (tiny.lines(tiny.stages(run_of(arm, processes))[0]) for processes in (1, 2))
    assert len(one) == 40
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys()
        for name in ("loss", "squared error of x", "gradient norm"):
            assert math.isclose(alone[name], shared[name], rel_tol=5e-6), (alone["update"], name)
        for name in filter(is_exact, alone):
            assert alone[name] == shared[name], (alone["update"], name)
    if arm != "PD":
        assert 0 < one[-1]["collected served"] < 1


def test_two_processes_share_the_work(run_of: Trained) -> None:
    """Each process keeps half of the replay's lanes, and not the same half."""
    place = latest_checkpoint(tiny.stages(run_of("PD + DDIL, batch", 2))[0])
    alone = latest_checkpoint(tiny.stages(run_of("PD + DDIL, batch", 1))[0])
    halves = [read_tensors(place / f"rollin-{rank}.safetensors")["collected.store.z"] for rank in (0, 1)]
    stored = read_tensors(alone / "rollin-0.safetensors")["collected.store.z"]
    assert [half.shape[1] for half in halves] == [2, 2]
    for half, rows in zip(halves, (slice(0, 2), slice(2, 4))):
        assert (half - stored[:, rows]).abs().max() < 10 * ROUNDING < 0.1 < stored.abs().max()


@pytest.mark.parametrize("name", ["collected age", "teacher evaluations", "student evaluations"])
def test_the_log_speaks_of_all_processes(name: str, run_of: Trained) -> None:
    """What the log says of shares, ages and evaluations holds for the global batch."""
    logs = [tiny.lines(tiny.stages(run_of("PD + DDIL, sample", processes))[0]) for processes in (1, 2)]
    one, two = ([line[name] for line in log if name in line] for log in logs)
    assert len(one) > 10
    assert one == pytest.approx(two, rel=1e-6)


def test_the_number_of_processes_does_not_change_the_rollin() -> None:
    """As many trajectories are collected at a time, however many processes share them; or the batch is refused."""
    made, plan = tiny.problem(), tiny.plan()
    teacher = Teacher(made.teacher, uniform_grid(8))

    def make(batch: int, world: int) -> Mixture:
        source = Source(shard=Shard(0, world))
        return plan.ddil.states(made.student, teacher, made.data, made.shape, plan.updates, batch, source)

    collected = [make(16, world).parts["collected"] for world in (1, 2, 4)]
    assert {replay.walks for replay in collected} == {4}
    with pytest.raises(ValueError, match="3 roll-outs per collection .* 12 .* 2 processes"):
        make(12, 2)


# Launching


def test_a_batch_that_cannot_be_shared(tmp_path: Path) -> None:
    """It is refused with the remedy, in the plan before anything is launched, and in the processes."""
    with pytest.raises(ValueError, match="batch = 15: cannot be shared by 2 processes .*: choose a multiple of 2"):
        tiny.plan(batch=15, **LAUNCHED, output=str(tmp_path / "launched"))
    with pytest.raises(ValueError, match="DDIL begins 3 roll-outs at a time.* 2 processes: choose a multiple of 8"):
        tiny.plan(batch=12, **LAUNCHED, output=str(tmp_path / "launched"))
    assert not (tmp_path / "launched").exists()
    for name, arm in {"pd": (0.0, 0.0), "ddil": (0.25, 0.5)}.items():
        with tiny.started(tmp_path / name, {"batch": 15, "collected": arm}, 2) as run:
            assert run.codes() == [1, 1]
        assert "batch = 15: cannot be shared by 2 processes" in run.output()
        assert "choose a multiple of 2" in run.output()
        assert not list((tmp_path / name).rglob("log.jsonl"))


def test_a_failure_in_the_processes_is_told(tmp_path: Path) -> None:
    """The error that the notebook shows names the cause, not only that some process failed."""
    digits = {"problem": "digits", "teacher": str(tmp_path / "nobody"), "processes": 2, "device": "cpu"}
    with pytest.raises(RuntimeError, match=f"there is no folder .*{tmp_path / 'nobody'}"):
        carry_out(tiny.plan(**digits, output=str(tmp_path / "run")))
    assert not tiny.stages(tmp_path / "run")


def test_a_launcher_that_means_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two were launched, accelerate sees one: refused, as each would train on everything and write over the other."""
    make_accelerator("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "launched as 2 processes but accelerate sees 1: start with `python -m torch.distributed.run`"
    with pytest.raises(RuntimeError, match=message):
        make_accelerator("cpu")


def test_a_launcher_that_tells_half() -> None:
    """WORLD_SIZE alone ends at once with the name of what is missing, instead of training alone or waiting for ever."""
    ours = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in ours}
    code = "from ddil.training.parallel import make_accelerator; make_accelerator('cpu'); print('made')"
    env |= {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert end.returncode == 1
    assert "made" not in end.stdout
    assert re.search("MASTER_ADDR|torch.distributed.run", end.stderr.splitlines()[-1]), end.stderr


# Killed and resumed


def test_killed_at_any_moment(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """Killed wherever the log happens to be, in either stage, it ends as the run that was left alone."""
    place = tmp_path / "run"
    moments = [("8-to-4", 7), ("8-to-4", 23), ("8-to-4", 31), ("4-to-2", 12)]
    for stage, update in moments:
        with tiny.started(place, TWO_STAGES, pause=0.003) as run:
            run.until(lambda: tiny.progress_of(place / stage) >= update)
            run.kill()
        assert run.processes[0].exitcode == -signal.SIGKILL
        assert not (place / stage / "student").exists()
    tiny.assert_same(tiny.trained(place, TWO_STAGES), whole(1))


def test_killed_while_files_are_written(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """Killed in the middle of a checkpoint, its sealing, its removal, cutting the log, or saving: half does no harm."""
    place = tmp_path / "run"
    latest = {
        "write the optimiser of checkpoint 10": None,
        "seal checkpoint 20": 10,
        "rename the sealed checkpoint 20": 10,
        "remove the rest of checkpoint 10": 30,
        "cut the log": 30,
        "save the student": 40,
    }
    assert latest.keys() == {point for point in tiny.KILL_POINTS if "second process" not in point}
    for point, update in latest.items():
        with tiny.started(place, TWO_STAGES, kill_before=point) as run:
            assert run.codes() == [-signal.SIGKILL], f"was not killed: {point}\n{run.output()}"
        found = latest_checkpoint(place / "8-to-4")
        assert (found and found.name) == (update and f"update-{update:08d}"), point
        assert not (place / "8-to-4" / "student").exists()
        with open(place / "8-to-4" / "log.jsonl", "a") as log:
            log.write('{"update": 41, "loss": 0.')
    tiny.assert_same(tiny.trained(place, TWO_STAGES), whole(1))


def test_two_processes_are_killed(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    """Both at once, or one alone as it writes its share or seals: resumed, they end as if left alone."""
    place = tmp_path / "run"
    for rank, point in ((1, "write the second process' roll-in of checkpoint 20"), (0, "seal checkpoint 20")):
        with tiny.started(place, TWO_STAGES, 2, kill_before=point, rank=rank) as run:
            assert run.codes(first_end=True)[rank] == -signal.SIGKILL, f"was not killed: {point}\n{run.output()}"
        assert latest_checkpoint(place / "8-to-4").name == "update-00000010"
    for stage, update in (("8-to-4", 26), ("4-to-2", 14)):
        with tiny.started(place, TWO_STAGES, 2, pause=0.003) as run:
            run.until(lambda: tiny.progress_of(place / stage) >= update)
            run.kill()
    tiny.assert_same(tiny.trained(place, TWO_STAGES, 2), whole(2))


def stopped(folder: Path, at: int = 25, processes: int = 1, **changes) -> Path:
    """A run that was killed after update `at`. Returns the folder of its stage."""
    stage = folder / "8-to-4"
    with tiny.started(folder, changes, processes, pause=0.003) as run:
        run.until(lambda: tiny.progress_of(stage) >= at)
    return stage


def test_leftovers_are_ignored(tmp_path: Path, run_of: Trained) -> None:
    """Half a checkpoint, of an update to come or an old one, and half a student are neither read nor in the way."""
    arm = "PD + DDIL, batch"
    stage = stopped(tmp_path / "run", **tiny.ARMS[arm])
    for name in ("writing-00000030", "writing-00000010", "writing-99999999"):
        (stage / "checkpoints" / name).mkdir(exist_ok=True)
        (stage / "checkpoints" / name / "network-student.safetensors").write_bytes(b"half")
        (stage / "checkpoints" / name / "strange.safetensors").write_bytes(b"nobody's")
    (stage / ".student.writing-1").mkdir()
    (stage / ".log.jsonl.writing-1").write_text("half")
    tiny.assert_same(tiny.trained(tmp_path / "run", tiny.ARMS[arm]), run_of(arm, 1))
    assert not list((stage / "checkpoints").glob("update-*/strange.safetensors"))


def test_a_checkpoint_of_two_processes_is_not_for_one(tmp_path: Path, run_of: Trained) -> None:
    """Each process has its own part of the replay, so their number must be the same: refused, and nothing is lost."""
    source = tiny.stages(run_of("PD + DDIL, batch", 2))[0]
    stage = tmp_path / "run" / source.name
    shutil.copytree(source, stage, ignore=shutil.ignore_patterns("student"))
    kept = {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    message = "belongs to another run: processes 2 there, 1 here. Use another folder, or delete it"
    with pytest.raises(ValueError, match=message):
        distil(tiny.problem(), tiny.plan(**tiny.ARMS["PD + DDIL, batch"]), tmp_path / "run")
    assert {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()} == kept


def test_finished_students_are_for_any_number_of_processes(run_of: Trained) -> None:
    """What two processes have trained one process loads, samples and does not train again."""
    folder = run_of("PD + DDIL, batch", 2)
    sealed = tiny.stages(folder)[0] / "student" / "sealed.json"
    before = sealed.stat().st_mtime_ns
    students = distil(tiny.problem(), tiny.plan(**tiny.ARMS["PD + DDIL, batch"]), folder)
    assert sealed.stat().st_mtime_ns == before
    assert isinstance(students[4], Sampler)
    assert students[4].sample(range(3)).isfinite().all()


CHANGES: list[dict] = [{"beta": (0.5, 0.5)}, {"collected": (0.5, 0.5)}, {"mixing": "sample"}, {"reuse": 1.0}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_an_interrupted_stage_keeps_its_plan(change: dict, tmp_path: Path, half_done: Path) -> None:
    """A stage begun by one plan is not finished by another: its student would claim to be made by the second."""
    shutil.copytree(half_done, tmp_path / "run")
    with pytest.raises(ValueError, match=f"belongs to another run: .*{next(iter(change))} .* there, .* here"):
        distil(tiny.problem(), tiny.plan(**change), tmp_path / "run")


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed half way through its stage."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stopped(folder)
    assert latest_checkpoint(folder / "8-to-4") is not None
    return folder
