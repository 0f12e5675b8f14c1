"""A figure depends neither on the batch nor on the number of processes that made the pictures; and nothing holds
them all.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from forked import PROCESSES

from ddil.solvers.sampler import Sampler
from ddil.datasets.digits import digits, digits_classifier, digits_teacher
from ddil.measure.images import features_of, moments_of, NetworkFeatures
from ddil.measure.protocols import Figure, judge, Reference
from ddil.diffusion.grids import uniform_grid

COUNT = 61  # not a multiple of batches or processes


def figures(batch_size: int, accelerator=None) -> dict[str, Figure]:
    """The figures of a few digits, drawn in two steps, and the trace of moments that were never kept."""
    classifier, teacher = digits_classifier(), digits_teacher()
    sampler, extractor = (
        Sampler(teacher.denoiser, uniform_grid(2), (1, 8, 8)),
        NetworkFeatures(classifier, classifier.features, "digits classifier"),
    )
    draw = lambda ids: sampler.sample(ids, torch.tensor(ids) % 10)
    data = Reference("digits", lambda ids: digits().x[list(ids)], 100, extractor)
    found = judge(draw, COUNT, data, nfe=2, batch_size=batch_size, accelerator=accelerator)
    moments = moments_of(draw, COUNT, extractor, batch_size, accelerator)
    return found | {
        "count": Figure(moments.n, found["FID"].protocol),
        "trace": Figure(moments.covariance.trace().item(), found["FID"].protocol),
    }


def _process(rank: int, port: int, path: Path) -> None:
    from ddil.training.parallel import make_accelerator

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    accelerator, told = make_accelerator("cpu"), []
    found = figures(7, accelerator)
    classifier = digits_classifier()
    extractor, draw = (
        NetworkFeatures(classifier, classifier.features, "digits classifier"),
        lambda ids: torch.full((len(ids), 1, 8, 8), torch.nan if rank else 0.0),
    )
    for measure in (features_of, moments_of):  # only the second process has pictures that are not finite
        with pytest.raises(ValueError) as error:
            measure(draw, COUNT, extractor, 7, accelerator)
        told.append(str(error.value))
    torch.save(
        {name: figure.value for name, figure in found.items()} | {"told": told}, path.with_name(f"{path.name}-{rank}")
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, Figure]:
    return figures(64)


def close(found: dict[str, float], alone: dict[str, Figure]) -> None:
    """The same to the rounding of networks whose batches differ."""
    assert found.keys() == alone.keys() and found["count"] == COUNT
    for name, value in found.items():
        assert value == pytest.approx(alone[name].value, rel=2e-4, abs=2e-5), name


def test_batches_of_7_and_64(alone: dict[str, Figure]) -> None:
    close({name: figure.value for name, figure in figures(7).items()}, alone)


def test_two_processes_and_one(alone: dict[str, Figure], tmp_path: Path) -> None:
    """Both get the figure of all pictures, and the same; and where one has pictures that cannot be judged, both say
    so instead of waiting for each other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [PROCESSES.Process(target=_process, args=(rank, port, tmp_path / "figures")) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = [torch.load(tmp_path / f"figures-{rank}", weights_only=True) for rank in (0, 1)]
    told = [part.pop("told") for part in found]
    assert all(message.startswith("digits classifier gave features that are not finite") for message in told[1])
    assert all(
        message.startswith("other processes could not") and "process 1: ValueError: digits classifier gave" in message
        for message in told[0]
    )
    assert found[0] == found[1]
    close(found[0], alone)
