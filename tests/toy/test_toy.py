"""The toy's points, its network's tangent and its loss, against their definitions."""

import pytest
import torch
from torch import Tensor

from pmf.toy import (
    PREDICTIONS,
    SHAPES,
    Job,
    Mlp,
    Settings,
    draw_plane,
    draw_points,
    meanflow_loss,
    one_step,
    train_all,
    train_and_measure,
)

BATCH, DIM = 12, 6


@pytest.fixture
def network() -> Mlp:
    torch.manual_seed(0)
    return Mlp(DIM, width=16, depth=3, bottleneck=4).double()


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, noise, t, r in float64, t > r first; one of each kind is below the clip of t."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, BATCH, DIM, 1, 1, dtype=torch.float64, generator=generator)
    t = 0.1 + 0.9 * torch.rand(BATCH, dtype=torch.float64, generator=generator)
    t[0] = t[-1] = 0.03
    r = t * torch.rand(BATCH, dtype=torch.float64, generator=generator)
    r[BATCH // 2 :] = t[BATCH // 2 :]
    return x, noise, t, r


def velocity(name: str, z: Tensor, output: Tensor, t: Tensor) -> Tensor:
    return output if name == "u" else (z - output) / t.clamp(0.05, 1)[:, None, None, None]


def test_the_networks_tangent_is_its_central_difference(network: Mlp) -> None:
    x, noise, t, r = batch()
    z_t, t_t = noise[:7] - x[:7], torch.linspace(-1, 1, 7, dtype=torch.float64)
    output, output_t = network.jvp(noise, t, t - r, z_t, t_t)
    assert torch.equal(output, network(noise, t, t - r))
    step = 1e-7
    ahead, behind = (
        network(noise[:7] + s * z_t, t[:7] + s * t_t, (t - r)[:7] + s * t_t) for s in (step, -step)
    )
    assert not output_t.requires_grad
    torch.testing.assert_close(output_t, ((ahead - behind) / (2 * step)).detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_loss_and_its_gradients_match_the_paper(network: Mlp, name: str) -> None:
    """Written out from the paper, with forward mode over the whole batch."""
    x, noise, t, r = batch()
    given = meanflow_loss(network, PREDICTIONS[name], x, noise, t, r)
    given.backward()
    found = [parameter.grad for parameter in network.parameters()]

    def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return velocity(name, z, network(z, t, t - r), t)

    def over_pixels(values: Tensor) -> Tensor:
        return values[:, None, None, None]

    z = (1 - over_pixels(t)) * x + over_pixels(t) * noise
    direction = u(z, t, t).detach(), torch.ones_like(t), torch.zeros_like(r)
    value, du_dt = torch.func.jvp(u, (z, t, r), direction)
    error = value + over_pixels(t - r) * du_dt.detach() - velocity("x", z, x, t)
    loss = error.square().sum() / BATCH
    expected = torch.autograd.grad(loss, list(network.parameters()))
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(given, loss)
    assert float((over_pixels(t - r) * du_dt).detach().abs().max()) > 0.01  # there is a tangent


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_sample_is_noise_minus_its_average_velocity(network: Mlp, name: str) -> None:
    noise = batch()[1]
    one = torch.ones(BATCH, dtype=torch.float64)
    expected = noise - velocity(name, noise, network(noise, one, one), one)
    torch.testing.assert_close(one_step(network, PREDICTIONS[name], noise), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_points_have_mean_zero_and_variance_one(shape: str) -> None:
    points = draw_points(shape, 200_000, torch.Generator().manual_seed(0))
    assert points.dtype == torch.float32 and points.shape == (200_000, 2)
    assert points.mean(0).abs().max() < 0.02  # five standard errors are 0.011
    assert float(points.var(0).mean()) == pytest.approx(1, abs=0.01)


def test_a_plane_is_orthonormal() -> None:
    basis = draw_plane(512, torch.Generator().manual_seed(0))
    torch.testing.assert_close(basis.T @ basis, torch.eye(2))


def test_a_seed_determines_everything_without_the_global_generator() -> None:
    settings = Settings(steps=2, batch_size=8, width=4, depth=1, bottleneck=2, num_samples=16)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (train_and_measure(settings, seed, 3, "x") for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.points, same.points) and one.wasserstein == same.wasserstein
    assert not torch.equal(one.points, other.points)
    assert one.to_data >= one.off_plane > 0


def test_processes_give_what_one_thread_gives_and_stop_when_interrupted() -> None:
    settings = Settings(steps=2, num_samples=64)
    jobs = [Job(0, 2, "x"), Job(1, 3, "u")]
    counts: list[int] = []
    outcomes = train_all(settings, jobs, on_steps=counts.append)
    assert counts[-1] == 4
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job, outcome in zip(jobs, outcomes, strict=True):
            assert (outcome.seed, outcome.dim, outcome.prediction) == job
            assert torch.equal(outcome.points, train_and_measure(settings, *job).points)
    finally:
        torch.set_num_threads(threads)

    def interrupt(_steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # and not after the hours that these steps would take
        train_all(Settings(steps=10**7), jobs, on_steps=interrupt)
