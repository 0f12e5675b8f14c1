"""The way, not only where it ends: steps, draws and weights against values derived by hand, where an exact teacher or
a fixed point would not see the difference.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddil.diffusion.denoiser import Cond, Denoiser, split_inputs
from ddil.diffusion.exact import GaussianMixture
from ddil.diffusion.noise import sample_noise
from ddil.diffusion.schedule import Cosine, Schedule, Time, VarianceExploding
from ddil.diffusion.wrappers import Guided
from ddil.datasets.digits import digits
from ddil.measure.distances import density_coverage
from ddil.measure.images import NetworkFeatures
from ddil.measure.imitation import error_in_batches
from ddil.measure.protocols import Reference, judge
from ddil.models.unet import ClassDenoiser
from ddil.rollins.data import TensorData
from ddil.rollins.forward import ConditionDropout, Forward
from ddil.rollins.rollout import Rollout
from ddil.rollins.states import Origin, States, cat_states
from ddil.rollins.teacher import Teacher
from ddil.rollins.walk import Walk
from ddil.solvers import (
    AnalyticFirstStep,
    Memory,
    Solver,
    ancestral,
    consistency,
    ctm,
    ddim,
    dpm_solver_2,
    dpm_solver_pp_2m,
    heun,
    sample,
    tcd,
    walk,
)
from ddil.solvers.amed import AMED, insert_nodes, bottleneck_of, train_amed
from ddil.solvers.gits import trajectory_costs
from ddil.solvers.sampler import Sampler

SCHEDULES = {"variance preserving": Cosine(), "variance exploding": VarianceExploding()}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


class Still(Denoiser):
    """A denoiser whose estimate is `x` everywhere; it keeps the conditions that it was asked under."""

    inputs = ("end",)

    def __init__(self, schedule: Schedule, x: float = 0.7):
        super().__init__(schedule)
        self.x, self.conds = x, []

    def predict(self, z: Tensor, t: Time, cond: Cond) -> Tensor:
        self.conds.append(cond)
        return torch.full_like(z, self.x)

    @property
    def ends(self) -> list[float]:
        """The times that it was told a jump ends at."""
        return [split_inputs(cond)[1]["end"][0].item() for cond in self.conds]


class Echo(Denoiser):
    """A denoiser whose estimate is the condition."""

    def predict(self, z: Tensor, t: Time, cond: Cond) -> Tensor:
        return cond.expand(z.shape)


def states() -> Tensor:
    return torch.tensor([[1.3], [-0.4], [0.2]], dtype=torch.float64)


def noise(like: Tensor) -> Tensor:
    return torch.tensor([[0.5], [-1.2], [2.0]], dtype=torch.float64)


def no_noise(like: Tensor) -> Tensor:
    raise AssertionError("noise was drawn")


def ratio(schedule: Schedule, t: float) -> float:
    """sigma / alpha, the noise level in the variance-exploding form."""
    alpha, sigma = schedule.alpha_sigma(t)
    return sigma / alpha


def jumped_and_noised(schedule: Schedule, t: float, level: float, s: float, x: float = 0.7) -> Tensor:
    """By hand: z / alpha goes on the line to x until the noise level is `level`, and fresh noise fills up to s."""
    scaled = states() / schedule.alpha_sigma(t)[0]
    jumped = x + (scaled - x) * level / ratio(schedule, t)
    filled = jumped + (ratio(schedule, s) ** 2 - level**2) ** 0.5 * noise(jumped)
    return filled * schedule.alpha_sigma(s)[0]


# Stochastic solvers


@EVERY_SCHEDULE
@pytest.mark.parametrize("t_min", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.3, 0.6, 0.9])
def test_ctm_jumps_to_the_level_of_gamma(schedule: Schedule, t_min: float, gamma: float) -> None:
    """To sqrt(1 - gamma^2) (sigma_s - sigma_min) + sigma_min, and the student is told so."""
    student, t, s = Still(schedule), 0.8, 0.5
    least = ratio(schedule, t_min) if t_min else 0.0
    level = math.sqrt(1 - gamma**2) * (ratio(schedule, s) - least) + least
    z = ctm(student, states(), t, s, memory=Memory(noise, 2), gamma=gamma, t_min=t_min)
    torch.testing.assert_close(z, jumped_and_noised(schedule, t, level, s))
    assert ratio(schedule, student.ends[0]) == pytest.approx(level)


@EVERY_SCHEDULE
@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_tcd_in_continuous_time_jumps_to_the_rest_of_eta(schedule: Schedule, eta: float) -> None:
    """To the time (1 - eta) s, and the student is told so."""
    student, t, s = Still(schedule), 0.8, 0.5
    z = tcd(student, states(), t, s, memory=Memory(noise, 2), eta=eta, knots=None)
    torch.testing.assert_close(z, jumped_and_noised(schedule, t, ratio(schedule, (1 - eta) * s), s))
    assert student.ends == [pytest.approx((1 - eta) * s)]


@EVERY_SCHEDULE
def test_consistency_noises_from_its_least_time(schedule: Schedule) -> None:
    """The estimate is a state at t_min, of which the student is told, and has that much noise already."""
    student, t, s, t_min = Still(schedule), 0.8, 0.5, 0.1
    z = consistency(student, states(), t, s, memory=Memory(noise, 2), t_min=t_min)
    scaled = 0.7 / schedule.alpha_sigma(t_min)[0]
    level = (ratio(schedule, s) ** 2 - ratio(schedule, t_min) ** 2) ** 0.5
    torch.testing.assert_close(z, (scaled + level * noise(z)) * schedule.alpha_sigma(s)[0])
    assert student.ends == [t_min]
    last = consistency(student, states(), t, s, memory=Memory(no_noise, 1), t_min=t_min)
    torch.testing.assert_close(last, torch.full_like(last, scaled * schedule.alpha_sigma(s)[0]))


@EVERY_SCHEDULE
@pytest.mark.parametrize("solver", [ctm, tcd])
def test_the_last_step_draws_no_noise(schedule: Schedule, solver: Solver) -> None:
    """Also where the walk ends above 0: it is a jump to the end."""
    student = Still(schedule)
    last = solver(student, states(), 0.8, 0.5, memory=Memory(no_noise, 1))
    torch.testing.assert_close(last, ddim(student, states(), 0.8, 0.5))
    assert student.ends == [0.5, 0.5]
    with pytest.raises(AssertionError, match="noise was drawn"):
        solver(student, states(), 0.8, 0.5, memory=Memory(no_noise, 2))


@EVERY_SCHEDULE
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_ancestral_rows_that_end_at_0_get_no_noise(schedule: Schedule, gamma: float) -> None:
    """A batch of several end times gives each row what it gets alone."""
    ends = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)
    start = torch.full_like(ends, 0.8)
    step = partial(ancestral, Still(schedule), states(), memory=Memory(noise, 2), gamma=gamma)
    together = step(start, ends)
    torch.testing.assert_close(together[::2], step(0.8, 0.0)[::2])
    torch.testing.assert_close(together[1], step(0.8, 0.5)[1])


# Walks


def drawn(solver: Solver, ids: list[int], steps: int = 3, **options: object) -> Tensor:
    """Samples of a denoiser that estimates 0 everywhere, so that all that is left is noise."""
    grid = torch.linspace(1, 0.25, steps + 1, dtype=torch.float64)
    return sample(Still(VarianceExploding(), 0.0), ids, (4000,), grid, solver=solver, **options)


def test_samples_begin_with_the_schedule_s_noise() -> None:
    """Where the estimate is 0 one DDIM step multiplies the noise, which begins at sigma(1), by sigma(s) / sigma(1)."""
    schedule = VarianceExploding()
    expected = sample_noise([5], (4000,), 0) * schedule.sigma(torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(drawn(ddim, [5], 1), expected.float(), rtol=1e-4, atol=1e-5)


def test_the_noise_of_every_step_is_fresh() -> None:
    """A walk of the consistency solver leaves the noise of its last transition alone: it is neither that of the start
    nor that of the step before."""
    grid = torch.tensor([1.0, 0.8, 0.6, 0.4], dtype=torch.float64)
    path = sample(Still(Cosine(), 0.0), [2], (4000,), grid, solver=consistency, trajectory=True)[:, 0]
    correlation = torch.corrcoef(path[:3].double())
    assert correlation.fill_diagonal_(0).abs().max() < 0.08  # 5 / sqrt(4000)
    assert torch.count_nonzero(path[3]) == 0


def test_each_batch_has_its_own_conditions() -> None:
    """A denoiser that answers with its condition gives every sample its own, whatever the batch."""
    labels = torch.arange(7.0)[:, None]
    grid = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for batch_size in (2, 3, 7):
        x = sample(Echo(Cosine()), range(10, 17), (2,), grid, labels, batch_size=batch_size)
        torch.testing.assert_close(x, labels.expand(7, 2))


def test_the_analytic_step_is_at_its_time_alone() -> None:
    """Rows at other times, the largest of a batch among them, are asked of the network."""
    denoiser = GaussianMixture(torch.tensor([[1.0], [-2.0]]), 0.3)
    analytic, z = AnalyticFirstStep(denoiser, 1.0), states().float()
    t = torch.tensor([0.7, 0.4, 0.7], dtype=torch.float64)
    torch.testing.assert_close(analytic(z, t), denoiser(z, t))
    mixed = torch.tensor([1.0, 0.4, 0.7], dtype=torch.float64)
    torch.testing.assert_close(analytic(z, mixed)[1:], denoiser(z, mixed)[1:])
    assert not torch.allclose(analytic(z, mixed)[:1], denoiser(z, mixed)[:1])


# Learned steps


def unet() -> ClassDenoiser:
    """A small U-Net of ten classes, with random weights."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    options = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "norm_num_groups": 4, "num_class_embeds": 11}
    return ClassDenoiser(UNet2DModel(**options, **blocks, layers_per_block=1), Cosine()).eval()


@EVERY_SCHEDULE
@pytest.mark.parametrize("c", [0.9, 1.1])
def test_an_amed_plugin_scales_the_second_half_of_a_step(schedule: Schedule, c: float) -> None:
    """In the variance-exploding form the way from the point inside to the end is taken c times."""
    amed, denoiser = AMED(base="ddim", scale_direction=0.5), GaussianMixture(torch.tensor([[1.0], [-2.0]]), 0.3)
    denoiser.schedule = schedule
    with torch.no_grad():
        half = (c - 1) / 0.5 / 2 + 0.5  # c = 1 + scale (2 sigmoid - 1)
        amed.heads["direction"].bias.fill_(math.log(half / (1 - half)))
    t, s, z = 0.8, 0.5, states()
    level = math.sqrt(ratio(schedule, t) * ratio(schedule, s))  # r = 1/2
    u = schedule.time(torch.tensor(-2 * math.log(level), dtype=torch.float64)).item()
    inside = ddim(denoiser, z, t, u)
    end = ddim(denoiser, inside, u, s)
    alpha_u, alpha_s = schedule.alpha_sigma(u)[0], schedule.alpha_sigma(s)[0]
    expected = (inside / alpha_u + c * (end / alpha_s - inside / alpha_u)) * alpha_s
    torch.testing.assert_close(amed(denoiser, z, t, s), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", [None, "dpm_solver_pp_2m"])
def test_amed_learns_where_it_will_be_sampled(base: str | None) -> None:
    """Its losses are the distances to the teacher of its own walk, history and all, on a multistep base; elsewhere
    those of steps from the teacher's states."""
    denoiser = GaussianMixture(torch.tensor([[1.0], [-2.0]], dtype=torch.float64), 0.3)
    grid = torch.tensor([0.9, 0.6, 0.4, 0.2], dtype=torch.float64)
    learned = train_amed(denoiser, grid, (1,), base=base, samples=32, batch=32, learning_rate=0.0)
    z = sample_noise(range(32), (1,), 0, 1 << 40) * denoiser.schedule.prior_scale(0.9)
    inserted, solver = (1, heun) if base is None else (2, dpm_solver_pp_2m)
    teacher = list(walk(denoiser, z, insert_nodes(grid, inserted), solver=solver))[inserted :: inserted + 1]
    if base is None:
        starts = [z, *teacher[:-1]]
        ends = [learned(denoiser, *step) for step in zip(starts, grid.tolist(), grid.tolist()[1:])]
    else:
        ends = list(walk(denoiser, z, grid, solver=learned))
    alphas = [denoiser.schedule.alpha_sigma(s)[0] for s in grid.tolist()[1:]]
    losses = [((end - there) / a).square().sum().item() / 32 for end, there, a in zip(ends, teacher, alphas)]
    assert learned.provenance["loss at first"] == pytest.approx(losses, rel=1e-4)


def test_amed_listens_to_the_conditional_half() -> None:
    """Of a guided network's features, n of the condition and n of none, it takes the former."""
    teacher, labels = unet(), torch.tensor([3, 8])
    z = sample_noise([0, 1], (1, 8, 8), 0)
    with bottleneck_of(teacher) as features, torch.no_grad():
        teacher(z, 0.5, labels)
        Guided(teacher, 2.0)(z, 0.5, labels)
    torch.testing.assert_close(features[1][:2], features[0], rtol=1e-4, atol=1e-5)
    amed = AMED(features[0].shape[1], scale_direction=0.5)
    torch.manual_seed(0)
    for head in amed.heads.values():
        torch.nn.init.normal_(head.weight)
    heard = [amed.predict(part, 2.0, 1.0, z) for part in features]
    torch.testing.assert_close(heard[1], heard[0], rtol=1e-4, atol=1e-5)
    assert (heard[0][0][0] - heard[0][0][1]).abs().item() > 1e-4


def test_the_cost_of_jumps_is_a_mean_over_trajectories() -> None:
    """A last batch that is not full counts for what it holds."""
    denoiser = GaussianMixture(torch.tensor([[1.0], [-2.0]], dtype=torch.float64), 0.3)
    fine, options = torch.linspace(0.9, 0.1, 6, dtype=torch.float64), {"trajectories": 10, "metric": "l2"}
    costs = [trajectory_costs(denoiser, (1,), fine, batch_size=size, **options) for size in (4, 10)]
    torch.testing.assert_close(*costs)
    assert costs[0][0, 2] > 0.01


def test_a_forced_walk_keeps_the_ends_of_the_grid() -> None:
    """A student of other steps than it was made for begins and ends where it did."""
    student = Sampler(Still(VarianceExploding(), 0.0), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64), (3,))
    path = student.sample([0], steps=3, force=True, trajectory=True)[:, 0]
    levels = [ratio(VarianceExploding(), t) for t in (0.9, 0.9 - 0.7 / 3, 0.9 - 1.4 / 3, 0.2)]
    torch.testing.assert_close(path / path[:1], torch.tensor(levels)[:, None].expand(4, 3) / levels[0])


def test_a_second_order_step_by_hand() -> None:
    """x = x0 + (sigma_s - sigma_t) ((1 - 1 / 2r) d + d' / 2r), where d' is the slope at the point inside."""
    denoiser = GaussianMixture(torch.tensor([[1.0], [-2.0]], dtype=torch.float64), 0.3, schedule=VarianceExploding())
    schedule, t, s, r = denoiser.schedule, 0.7, 0.5, 0.3
    begin, end = ratio(schedule, t), ratio(schedule, s)
    middle = begin ** (1 - r) * end**r
    u = schedule.time(torch.tensor(-2 * math.log(middle), dtype=torch.float64)).item()
    z = states()
    slope = (z - denoiser(z, t)) / begin
    inside = z + (middle - begin) * slope
    there = (inside - denoiser(inside, u)) / middle
    expected = z + (end - begin) * ((1 - 1 / (2 * r)) * slope + there / (2 * r))
    torch.testing.assert_close(dpm_solver_2(denoiser, z, t, s, r=r), expected)


# Roll-ins

GRID = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)


class Coupled(TensorData):
    """Samples that say their number, with as many conditions, and noises that say it, too."""

    def __init__(self, n: int):
        number = torch.arange(float(n))[:, None]
        super().__init__(number, number)

    def noise(self, rows: np.ndarray) -> Tensor:
        return 100 + torch.from_numpy(rows).float()[:, None]


def test_forward_states_keep_sample_noise_and_condition_together() -> None:
    """z = alpha x + sigma eps of one row, whose condition it is; at t = 1 the noise itself, at its scale. Only where a
    step leads from there to 0 is the sample the answer."""
    for schedule in SCHEDULES.values():
        for grid in (GRID, torch.tensor([1.0, 0.0], dtype=torch.float64)):
            states = Forward(Coupled(9), schedule, grid, 3).sample(9, 0)
            torch.testing.assert_close(states.cond, states.x)
            alpha, sigma = (part.float()[:, None] for part in schedule.alpha_sigma(states.t))
            expected = alpha * states.x + sigma * (100 + states.x)
            start = (states.t == 1)[:, None]
            expected = torch.where(start, schedule.prior_scale() * (100 + states.x), expected)
            torch.testing.assert_close(states.z, expected)
            assert sorted(states.x.flatten().tolist()) == list(range(9))
            assert states.known.tolist() == [len(grid) == 2] * 9
            assert start.any()


def test_the_seed_orders_the_data() -> None:
    """Two seeds go through the data in two orders; one seed in one."""
    orders = [Forward(Coupled(50), Cosine(), GRID, seed).sample(50, 0).x.flatten().tolist() for seed in (0, 1, 0)]
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]


def test_other_rows_lose_their_condition_in_every_update() -> None:
    """About a tenth of all pairs of update and row; and not the same rows each time."""
    dropout = ConditionDropout(Forward(Coupled(40), Cosine(), GRID), lambda cond: cond * 0 - 1, 0.1)
    lost = torch.stack([(dropout.sample(40, step).cond < 0).flatten() for step in range(30)])
    assert 0.06 < lost.double().mean() < 0.14
    assert lost.any(0).sum() > 30


def test_a_teacher_answers_under_each_state_s_condition() -> None:
    """The end of its walk is the condition, for a denoiser that answers with it; asked for the missing labels alone, it
    leaves the known ones."""
    teacher = Teacher(Echo(Cosine()), GRID, 4)
    labels = torch.arange(6.0)[:, None]
    states = teacher.states_at(0, torch.randn(6, 1), labels, np.full(6, Origin.NOISE))
    torch.testing.assert_close(teacher.label(states), labels)
    known = np.array([True, False, False, True, False, True])
    some = replace(states, teacher_z=torch.full((6, 1), -5.0), known=known)
    expected = torch.where(torch.from_numpy(known)[:, None], -5.0, labels)
    torch.testing.assert_close(teacher.label(some), expected)


def numbered(begin: int, end: int) -> States:
    """States that say their number in every part."""
    number = torch.arange(begin, end)
    values = number.float()[:, None]
    cond = {"embeddings": values, "class": number}
    origin = number.numpy() % 4
    return States(values, number.double() / 10, number.double() / 20, cond, origin, values, values, origin > 1)


def assert_numbered(states: States, numbers: list[int]) -> None:
    """Every part of each row says its number."""
    for name, value in numbered(0, 10).flat().items():
        torch.testing.assert_close(states.flat()[name], value[numbers], msg=name)


@pytest.mark.parametrize("plain", [True, False])
def test_rows_stay_rows(plain: bool) -> None:
    """Parts put together, picked and sliced keep all that belongs to a state in one row."""
    parts = [numbered(0, 3), numbered(3, 10)]
    together = cat_states(parts)
    assert_numbered(together, list(range(10)))
    assert_numbered(together[np.array([7, 2, 2, 9])], [7, 2, 2, 9])
    assert_numbered(together[4:6], [4, 5])
    if plain:
        alone = cat_states([replace(part, cond=part.cond["class"]) for part in parts])
        assert alone.cond.tolist() == list(range(10))


class Steps(Still):
    """A student that is told its number of steps."""

    inputs = ("steps",)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_walk_tells_its_number_of_steps(stride: int) -> None:
    """As many as the student makes to the end of the grid."""
    walk = Walk(Steps(Cosine()), Teacher(Still(Cosine()), GRID, stride), (1,))
    for update in range(3):
        assert walk.sample(2, update).cond["steps"].tolist() == [4 / stride] * 2


@pytest.mark.parametrize("driver", ["student", "teacher"])
def test_a_walk_goes_on_under_its_conditions(driver: str) -> None:
    """From node to node the estimate is the condition, so that each row is on the line from its noise to it."""
    data = Coupled(12)
    data.noise = None
    walk = Walk(Echo(Cosine()), Teacher(Echo(Cosine()), GRID, 1), (1,), data, driver=driver)
    first = walk.sample(5, 0)
    for update in range(1, 4):
        states = walk.sample(5, update)
        torch.testing.assert_close(states.cond, first.cond)
        alpha, sigma = Cosine().alpha_sigma(GRID[update].item())
        torch.testing.assert_close(states.z, alpha * first.cond + sigma * first.z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("labeller", ["trajectory", "teacher"])
def test_a_walk_resumes_at_its_node(labeller: str) -> None:
    """It goes on with the next node of the same walk, and with the teacher's states there."""
    make = lambda: Walk(Still(Cosine(), 0.2), Teacher(Still(Cosine()), GRID, 1), (1,), labeller=labeller)
    whole = make()
    expected = [whole.sample(3, update).flat() for update in range(6)]
    for stop in range(1, 6):
        first, second = make(), make()
        for update in range(stop):
            first.sample(3, update)
        second.load_state_dict(first.state_dict())
        states = second.sample(3, stop).flat()
        assert states.keys() == expected[stop].keys()
        for name, value in states.items():
            torch.testing.assert_close(value, expected[stop][name], msg=f"{name} after {stop}")


@EVERY_SCHEDULE
def test_roll_outs_begin_with_noise_sample_and_condition_of_one_row(schedule: Schedule) -> None:
    """The noise at its scale, which the data couple with the sample."""
    student = Still(schedule)
    states = Rollout(student, Teacher(Still(schedule), GRID, 4), (1,), Coupled(30)).sample(8, 0)
    assert states.t.tolist() == [1.0] * 8
    torch.testing.assert_close(states.z, (100 + states.x) * schedule.prior_scale())
    torch.testing.assert_close(states.cond, states.x)
    assert states.x.unique().numel() > 4


@pytest.mark.parametrize(("stride", "look"), [(4, 2), (4, 1), (2, 1)])
def test_roll_outs_stop_where_labels_begin(stride: int, look: int) -> None:
    """At the nodes of the label's grid, all of them, with the label `look` of the teacher's steps on."""
    teacher = Teacher(Still(Cosine()), GRID, stride, look=look)
    rollout = Rollout(Still(Cosine()), teacher, (1,), beta=0.5, mixing="sample")
    seen = set()
    for update in range(30):
        states = rollout.sample(4, update)
        places = [GRID.tolist().index(t) for t in states.t.tolist()]
        assert states.s.tolist() == [GRID[place + look] for place in places]
        torch.testing.assert_close(states.teacher_z, teacher.advance(states.z, states.t))
        seen |= set(places)
    assert seen == set(range(0, 4, look))


def test_who_drives_does_not_change_a_row_s_noise() -> None:
    """The rows that the student moved go where they go if it moves all of them."""
    student, teacher = Still(Cosine(), 0.0), Teacher(Still(Cosine()), GRID, 1)
    options = {"mixing": "sample", "solver": consistency}
    some, every = (Rollout(student, teacher, (1,), beta=beta, **options).trajectories(64, 0) for beta in (0.5, 1.0))
    by_student = some[1].origin == Origin.STUDENT
    assert 10 < by_student.sum() < 54
    torch.testing.assert_close(some[1][np.flatnonzero(by_student)].z, every[1][np.flatnonzero(by_student)].z)


# Measures


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Digits as points of 64 numbers."""
    extractor = NetworkFeatures(torch.nn.Identity().eval(), lambda x: x, "pixels")
    return Reference("digits", lambda ids: digits().x[list(ids)], 60, extractor)


def test_a_figure_says_how_it_was_made(reference: Reference) -> None:
    """Neighbours and seed that are asked for decide the figures, and stand in their protocols."""
    made = lambda ids: digits().x[[100 + i for i in ids]] + 0.1
    figures = judge(made, 50, reference, k=3, seed=7)
    features = made(range(50)).flatten(1)
    for name, value in density_coverage(reference.features, features, 3).items():
        assert figures[name].value == pytest.approx(value)
        assert figures[name].protocol.further == {"k": 3}
    assert density_coverage(reference.features, features, 5)["density"] != figures["density"].value
    assert {figure.protocol.seed for figure in figures.values()} == {7}


def test_one_step_errors_in_batches_keep_their_conditions() -> None:
    """Each state is asked under its own condition, whatever the batch."""
    grid = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    student, labels = Sampler(Echo(Cosine()), grid, (2,)), torch.arange(6.0)[:, None]
    teacher = Teacher(Still(Cosine()), grid, 1)
    some = [torch.randn(6, 2, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    expected = (labels - 0.7).square().mean().expand(2)
    for batch_size in (2, 4, 6):
        error = error_in_batches(student, teacher, some, labels, None, batch_size)
        torch.testing.assert_close(error, expected, rtol=1e-4, atol=0)
