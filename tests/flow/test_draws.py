"""Random draws: their distributions, and that they alone determine the loss."""

import math

import pytest
import torch
from torch import Tensor

from pmf.flow import Draws, IntervalGuidance, Objective, PlaneTimes

BATCH = 40_000


def draw(objective: Objective, batch: int = BATCH, seed: int = 0) -> Draws:
    images, labels = torch.zeros(batch, 1, 1, 1), torch.zeros(batch, dtype=torch.long)
    return objective.draw(images, labels, torch.Generator().manual_seed(seed))


def assert_uniform(values: Tensor, low: float = 0.0, high: float = 1.0) -> None:
    """Kolmogorov-Smirnov: the largest gap to the distribution function, at a level of about 1e-6."""
    u = (values.double().sort().values - low) / (high - low)
    expected = (torch.arange(len(u)) + 0.5) / len(u)
    assert float((u - expected).abs().max()) < 2.7 / math.sqrt(len(u))


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def test_shapes_dtypes_and_the_same_numbers_for_the_same_seed() -> None:
    images, labels = torch.zeros(5, 3, 8, 8), torch.zeros(5, dtype=torch.long)
    first, again = (Objective().draw(images, labels, torch.Generator().manual_seed(7)) for _ in range(2))
    other = Objective().draw(images, labels, torch.Generator().manual_seed(8))
    assert first.noise.shape == images.shape
    assert first.crop is None
    for name in ("t", "r", "omega", "t_min", "t_max", "drop"):
        assert getattr(first, name).shape == (5,)
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.t, other.t)
    assert first.drop.dtype == torch.bool


def test_without_a_generator_the_global_one_is_used() -> None:
    images, labels = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    torch.manual_seed(5)
    first = Objective().draw(images, labels)
    torch.manual_seed(5)
    assert torch.equal(first.noise, Objective().draw(images, labels).noise)


@pytest.mark.parametrize("proportion", [0.0, 0.25, 0.5, 1.0])
def test_the_first_samples_are_flow_matching_ones(proportion: float) -> None:
    d = draw(Objective(times=PlaneTimes(data_proportion=proportion)), batch=64)
    flow_matching = torch.arange(64) < int(64 * proportion)
    assert torch.equal(d.t == d.r, flow_matching)
    assert (d.t >= d.r).all() and (d.r >= 0).all() and (d.t <= 1).all()
    assert (d.t_min[flow_matching] == 0).all() and (d.t_max[flow_matching] == 1).all()
    assert (d.t_min[~flow_matching] < 0.5).all() and (d.t_max[~flow_matching] >= 0.5).all()


def test_times_are_logit_normal() -> None:
    d = draw(Objective(times=PlaneTimes(mean=0.8, std=0.6)))
    half = BATCH // 2
    assert_uniform(normal_cdf((torch.logit(d.t[:half].double()) - 0.8) / 0.6))
    # The larger and the smaller of two times: squares of the distribution function and its complement.
    assert_uniform(normal_cdf((torch.logit(d.t[half:].double()) - 0.8) / 0.6) ** 2)
    assert_uniform((1 - normal_cdf((torch.logit(d.r[half:].double()) - 0.8) / 0.6)) ** 2)


def test_a_share_of_the_pairs_is_uniform() -> None:
    far = PlaneTimes(mean=20.0, std=0.0, data_proportion=1.0, uniform_fraction=0.1)  # all others are at t = 1
    t = draw(Objective(times=far)).t
    uniform = t[t < 0.999]
    assert abs(len(uniform) / BATCH - 0.1) < 5 * math.sqrt(0.09 / BATCH)
    assert_uniform(uniform, high=0.999)


def test_guidance_has_the_documented_density() -> None:
    def cdf(omega: Tensor, beta: float) -> Tensor:
        if beta == 1:
            return omega.double().log() / math.log(8)
        return (omega.double() ** (1 - beta) - 1) / (8 ** (1 - beta) - 1)

    for beta in (0.0, 1.0, 2.0):
        d = draw(Objective(guidance=IntervalGuidance(max_omega=8.0, beta=beta)))
        assert_uniform(cdf(d.omega, beta))
        assert_uniform(d.t_min[BATCH // 2 :], 0.0, 0.5)
        assert_uniform(d.t_max[BATCH // 2 :], 0.5, 1.0)
    assert (draw(Objective(guidance=IntervalGuidance(max_omega=1.0))).omega == 1).all()


def test_effective_guidance() -> None:
    t = torch.tensor([0.1, 0.3, 0.5, 0.9, 0.9])
    flow_matching = torch.tensor([False, False, False, False, True])
    ones = torch.ones(5)
    omega = IntervalGuidance().effective_omega(t, 3 * ones, 0.3 * ones, 0.5 * ones, flow_matching)
    assert omega.tolist() == [1, 3, 3, 1, 3]


def test_dropped_labels_are_the_first_ones_and_binomial() -> None:
    counts = []
    for seed in range(200):
        drop = draw(Objective(class_dropout=0.1), batch=100, seed=seed).drop
        counts.append(int(drop.sum()))
        assert drop[: counts[-1]].all()
    counts_t = torch.tensor(counts, dtype=torch.float64)
    assert abs(float(counts_t.mean()) - 10) < 5 * 3 / math.sqrt(200)
    assert 2 < float(counts_t.std()) < 4  # sqrt(100 * 0.1 * 0.9) = 3
    assert not draw(Objective(class_dropout=0.0)).drop.any()
    assert draw(Objective(class_dropout=1.0)).drop.all()


def test_noise_is_scaled() -> None:
    noise = draw(Objective(noise_scale=4.0)).noise.flatten()
    assert_uniform(normal_cdf(noise.double() / 4))
