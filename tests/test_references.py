"""Our solvers take the steps of k-diffusion's samplers, state by state, and our grids are its grids."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ddil.diffusion.denoiser import Denoiser
from ddil.diffusion.wrappers import Rescheduled
from ddil.diffusion.exact import Gaussian, GaussianMixture
from ddil.diffusion.grids import (
    karras_grid,
    karras_sigmas,
    log_snr_grid,
    sigma_grid,
    time_uniform_sigmas,
    with_clean_end,
)
from ddil.diffusion.schedule import RectifiedFlow, Schedule, VarianceExploding
from ddil.solvers import (
    Memory,
    Solver,
    adams_bashforth,
    ancestral,
    ddim,
    dpm_solver_2,
    dpm_solver_pp_2m,
    dpm_solver_pp_2s,
    dpm_solver_pp_3m,
    heun,
    walk,
)

TOLERANCE = 1e-9  # of a state's largest element
EDM = VarianceExploding()
GRIDS = {"to sigma_min": karras_grid(EDM, 12), "to 0": with_clean_end(karras_grid(EDM, 11))}
SCHEDULES = {"variance exploding": EDM, "rectified flow": RectifiedFlow()}
DENOISERS = {
    "Gaussian": Gaussian(torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.5, 1.0, 0.1]), EDM),
    "mixture": GaussianMixture(
        torch.tensor([[1.0, 0.5, -1.0], [-1.0, 0.3, 0.4], [0.2, -1.2, 0.7]]),
        torch.tensor([0.1, 0.3, 0.2]),
        schedule=EDM,
    ),
}
EVERYWHERE = pytest.mark.parametrize(
    ("denoiser", "grid", "schedule"),
    [
        pytest.param(denoiser, grid, schedule, id=f"{data}, {end}, {form}")
        for data, denoiser in DENOISERS.items()
        for end, grid in GRIDS.items()
        for form, schedule in SCHEDULES.items()
    ],
)


@pytest.fixture(scope="module")
def sampling() -> ModuleType:
    """k-diffusion's samplers, without the package's `__init__`, which imports what is not installed (the Makefile
    says why).
    """
    found = importlib.util.find_spec("k_diffusion") or pytest.skip(
        "k-diffusion is not installed: `make venv` does that"
    )
    sys.modules.setdefault("k_diffusion", importlib.util.module_from_spec(found))
    return importlib.import_module("k_diffusion.sampling")


@pytest.fixture
def in_float64() -> Iterator[None]:
    """k-diffusion computes its grids in the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def begin() -> Tensor:
    """The state at sigma = 80 that every walk starts from, four samples in the variance-exploding form."""
    return 80 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def same_noise() -> Callable[..., Tensor]:
    """Draws the same noise for both, whatever it is asked with."""
    generator = torch.Generator().manual_seed(1)
    return lambda *_: torch.randn(4, 3, dtype=torch.float64, generator=generator)


def as_theirs(denoiser: Denoiser) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser as k-diffusion calls it, with the noise levels of the samples."""
    return lambda x, sigma: denoiser(x, denoiser.schedule.time(-2 * sigma.log()))


def theirs(
    sampler: Callable[..., Tensor], denoiser: Denoiser, grid: Tensor, **options: object
) -> tuple[list[Tensor], list[Tensor]]:
    """All states of a walk by k-diffusion, and its estimates of the data at all but the last."""
    seen: list[dict] = []
    end = sampler(as_theirs(denoiser), begin(), EDM.sigma(grid), callback=seen.append, disable=True, **options)
    return [*(step["x"] for step in seen), end], [step["denoised"] for step in seen]


def ours(solver: Solver, denoiser: Denoiser, grid: Tensor, schedule: Schedule = EDM) -> list[Tensor]:
    """All states of our walk, taken under `schedule` and brought back to the variance-exploding form."""
    noisy, clean = grid[grid > 0], grid[grid == 0]
    matched = torch.cat([sigma_grid(schedule, EDM.sigma(noisy)), clean])
    scale = schedule.alpha(matched)
    states = walk(Rescheduled(denoiser, schedule), begin() * scale[0], matched, solver=solver, noise=same_noise())
    return [begin(), *(z / alpha for z, alpha in zip(states, scale[1:]))]


def assert_same(mine: list[Tensor], other: list[Tensor]) -> None:
    """Every state agrees."""
    assert len(mine) == len(other)
    apart = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, other)]
    assert max(apart) < TOLERANCE, apart


# Steps

PAIRS: dict[str, tuple[Solver, str, dict[str, object]]] = {
    "ddim": (ddim, "sample_euler", {}),
    "heun": (heun, "sample_heun", {}),
    "dpm_solver_2": (dpm_solver_2, "sample_dpm_2", {}),
    "dpm_solver_pp_2s": (dpm_solver_pp_2s, "sample_dpmpp_2s_ancestral", {"eta": 0}),
    # Away from r = 1/2 both evaluations count. Their noise is multiplied by eta.
    "dpm_solver_pp_2s, r = .3": (
        partial(dpm_solver_pp_2s, r=0.3),
        "sample_dpmpp_sde",
        {"eta": 0, "r": 0.3, "noise_sampler": same_noise()},
    ),
    "dpm_solver_pp_2s, r = 1": (
        partial(dpm_solver_pp_2s, r=1.0),
        "sample_dpmpp_sde",
        {"eta": 0, "r": 1.0, "noise_sampler": same_noise()},
    ),
    # Theirs lowers the order only where a step ends at 0; there, ours does so whatever the rule.
    "dpm_solver_pp_2m": (partial(dpm_solver_pp_2m, lower_order_final=False), "sample_dpmpp_2m", {}),
    **{
        f"adams_bashforth {order}": (partial(adams_bashforth, order=order), "sample_lms", {"order": order})
        for order in (1, 2, 3, 4)
    },
}


@EVERYWHERE
@pytest.mark.parametrize("name", PAIRS)
def test_walk(sampling: ModuleType, name: str, denoiser: Denoiser, grid: Tensor, schedule: Schedule) -> None:
    """A walk passes through the same states."""
    solver, sampler, options = PAIRS[name]
    assert_same(
        ours(solver, denoiser, grid, schedule), theirs(getattr(sampling, sampler), denoiser, grid, **options)[0]
    )


@EVERYWHERE
def test_ancestral(sampling: ModuleType, denoiser: Denoiser, grid: Tensor, schedule: Schedule) -> None:
    """A step down to sigma_down = sigma_s^2 / sigma_t and noise of variance sigma_s^2 - sigma_down^2 is the
    ancestral step with the lower variance.
    """
    assert_same(
        ours(ancestral, denoiser, grid, schedule),
        theirs(sampling.sample_euler_ancestral, denoiser, grid, noise_sampler=same_noise())[0],
    )


@pytest.mark.parametrize("r", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)
def test_dpm_solver_2(sampling: ModuleType, denoiser: Denoiser, r: float) -> None:
    """DPM-Solver-2 for any place of the second evaluation, against their class for adaptive steps."""
    grid = GRIDS["to sigma_min"]
    states, reference = [begin()], sampling.DPMSolver(as_theirs(denoiser))
    for t, s in pairwise(reference.t(EDM.sigma(grid))):
        states.append(reference.dpm_solver_2_step(states[-1], t, s, r1=r)[0])
    assert_same(ours(partial(dpm_solver_2, r=r), denoiser, grid), states)


@pytest.mark.parametrize("end", GRIDS)
@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)
def test_dpm_solver_pp_3m(sampling: ModuleType, denoiser: Denoiser, end: str) -> None:
    """DPM-Solver++(3M): the same from the third step on. The second is 2M's here, as in diffusers; theirs
    integrates the slope exactly.
    """
    grid, step = GRIDS[end], partial(dpm_solver_pp_3m, lower_order_final=False)
    states, estimates = theirs(sampling.sample_dpmpp_3m_sde, denoiser, grid, eta=0, noise_sampler=same_noise())
    assert_same(ours(step, denoiser, grid)[:3], theirs(sampling.sample_dpmpp_2m, denoiser, grid)[0][:3])

    times = grid.tolist()
    h, before = math.log(EDM.sigma(times[1]) / EDM.sigma(times[2])), math.log(EDM.sigma(times[0]) / EDM.sigma(times[1]))
    slope = (estimates[1] - estimates[0]) / before
    assert_same([math.exp(-h) * states[1] - math.expm1(-h) * estimates[1] + (math.expm1(-h) + h) * slope], [states[2]])

    memory, walked = (
        Memory(steps=len(times) - 1, history=[(times[1], estimates[1]), (times[0], estimates[0])]),
        [states[2]],
    )
    for t, s in pairwise(times[2:]):
        walked.append(step(denoiser, walked[-1], t, s, None, memory))
    assert_same(walked, states[2:])


# Grids


def assert_grid(mine: Tensor, other: Tensor) -> None:
    """Every noise level agrees, and theirs ends with a 0 more."""
    assert other[-1] == 0
    torch.testing.assert_close(mine, other[:-1], rtol=1e-12, atol=0)


def test_karras_sigmas(sampling: ModuleType, in_float64: None) -> None:
    """Karras et al.'s noise levels, from the default ends and others, as numbers and as times."""
    for steps, low, high, rho in ((12, 0.002, 80.0, 7.0), (5, 0.03, 14.6, 3.0)):
        reference = sampling.get_sigmas_karras(steps + 1, low, high, rho)
        assert_grid(karras_sigmas(steps, low, high, rho), reference)
        torch.testing.assert_close(
            EDM.sigma(with_clean_end(karras_grid(EDM, steps, low, high, rho))), reference, rtol=1e-12, atol=0
        )


def test_log_snr_grid(sampling: ModuleType, in_float64: None) -> None:
    """Equal steps in log-SNR are equal steps in log sigma."""
    grid = log_snr_grid(EDM, 12, t_min=EDM.time(torch.tensor(-2 * math.log(0.002))).item())
    assert_grid(EDM.sigma(grid), sampling.get_sigmas_exponential(13, 0.002, 80.0))


def test_time_uniform_sigmas(sampling: ModuleType, in_float64: None) -> None:
    """Noise levels equally spaced in the time of a linear-beta diffusion, whose betas we find from the ends."""
    reference = sampling.get_sigmas_vp(13)
    assert_grid(time_uniform_sigmas(12, reference[-2].item(), reference[0].item(), 1e-3), reference)
