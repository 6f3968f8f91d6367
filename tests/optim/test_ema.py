"""Weight averages against the formula, one number at a time."""

import math

import pytest
import torch
from helpers.kernels import PLACES, at_place
from torch import nn

from pmf.optim import EMA


def test_complex_parameters_and_a_changed_dtype():
    w = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    ema = EMA([("w", w)], [1.0])
    with torch.no_grad():
        w.mul_(2)
    ema.update(8)
    decay = ema.decay(1.0, 8)
    torch.testing.assert_close(ema.copies[0]["w"], torch.tensor([1 + 2j, 3 - 1j]) * (decay + 2 * (1 - decay)))
    model = nn.Linear(2, 2)
    ema = EMA(model, [1.0])
    model.double()
    ema.update(8)
    assert ema.copies[0]["weight"].dtype == torch.float32
    with pytest.raises(ValueError, match="w is torch.int64, which has no average"):
        EMA([("w", torch.ones(2, dtype=torch.int64))])


@pytest.mark.parametrize("replace", ["assign", "parametrize", "append"])
def test_parameters_that_were_replaced_or_added_are_named(replace):
    """Their averages would be those of tensors that nobody trains any more."""
    model = nn.Sequential(nn.Linear(2, 2))
    ema = EMA(model, [1.0])
    ema.update(8)
    if replace == "assign":
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    elif replace == "parametrize":
        nn.utils.parametrizations.weight_norm(model[0])
    else:
        model.append(nn.Linear(2, 2))
    name = {"assign": "0.weight", "parametrize": "0.parametrizations.*", "append": "1.weight"}[replace]
    with pytest.raises(RuntimeError, match=f"EMA: {name} was added or replaced .* create it afterwards"):
        ema.update(8)
    with pytest.raises(RuntimeError, match=name), ema.swapped_in(1.0):
        pass
    assert ema.updates == 1


def test_an_average_of_the_average_is_refused():
    ema = EMA(nn.Linear(2, 2), [1.0, 2.0])
    with ema.swapped_in(1.0):
        with ema.swapped_in(2.0):
            pass
        with pytest.raises(RuntimeError, match="EMA: inside swapped_in, update"):
            ema.update(8)
    ema.update(8)


def test_decay_is_that_of_the_recipe():
    """0.5^(B / min(H, 0.05 k B)): a ramp at first, then the half-life in images."""
    p = nn.Parameter(torch.zeros(3))
    ema = EMA([("p", p)], half_lives=(0.5, 2000.0))
    expected = {0.5: 0.0, 2000.0: 0.0}
    for k in range(1, 40):
        p.data.fill_(float(k))
        ema.update(100)
        for half_life in expected:
            d = 0.5 ** (100 / min(1000 * half_life, 0.05 * k * 100))
            expected[half_life] = d * expected[half_life] + (1 - d) * k
            assert ema.weights(half_life)["p"][0].item() == pytest.approx(expected[half_life], rel=1e-6)
    # After 39 updates of 100, 0.05 * 3900 images is still the ramp; a half-life of 0.1 thousand would not be.
    assert EMA([("p", p)], half_lives=(0.1,)).weights(0.1)["p"].tolist() == [39.0] * 3


def test_half_life_halves():
    p = nn.Parameter(torch.ones(1))
    ema = EMA([("p", p)], half_lives=(1.0,))
    ema.updates = 10**6  # far beyond the ramp
    p.data.zero_()
    for _ in range(10):
        ema.update(100)
    assert ema.weights(1.0)["p"].item() == pytest.approx(0.5, rel=1e-5)


def test_averages_are_float32_copies_of_a_16_bit_model():
    model = nn.Linear(3, 2).bfloat16()
    ema = EMA(model)
    assert ema.half_lives == (500.0, 1000.0, 2000.0) and len(ema.copies) == 3
    assert {n: w.dtype for n, w in ema.copies[0].items()} == {"weight": torch.float32, "bias": torch.float32}
    before = model.weight.clone()
    ema.update(8)
    ema.weights(500.0)["weight"].add_(1)
    assert torch.equal(model.weight, before)


def test_swapping_in_is_undone_even_after_an_error():
    model = nn.Linear(3, 2)
    ema = EMA(model, half_lives=(1.0,))
    ema.weights(1.0)["weight"].fill_(7)
    own = model.weight.detach().clone()
    with ema.swapped_in(1.0):
        assert model.weight.eq(7).all()
    assert torch.equal(model.weight, own)
    with pytest.raises(KeyboardInterrupt), ema.swapped_in(1.0):
        raise KeyboardInterrupt
    assert torch.equal(model.weight, own)


def test_a_saved_average_continues_bitwise():
    model = nn.Linear(3, 2)
    first = EMA(model, half_lives=(0.1, 1.0))
    for i in range(5):
        model.weight.data.normal_(generator=torch.Generator().manual_seed(i))
        first.update(32)
    second = EMA(nn.Linear(3, 2), half_lives=(0.1, 1.0))
    second._parameters = first._parameters
    second.load_state_dict(first.state_dict())
    model.weight.data.zero_()
    first.update(32)
    second.update(32)
    assert second.updates == first.updates == 6
    for half_life in (0.1, 1.0):
        for name, average in first.weights(half_life).items():
            assert torch.equal(average, second.weights(half_life)[name])


@pytest.mark.parametrize("place", PLACES)
def test_one_kernel_updates_all_averages(place):
    """Tensors of all dtypes and of any size and alignment, and more averages than fit in one launch."""
    half_lives = (0.1, 0.3, 1.0, 3.0, 10.0)

    def averaged(device: torch.device) -> EMA:
        generator = torch.Generator().manual_seed(0)
        weights = {
            f"{size}, {dtype}": torch.randn(size, generator=generator).to(device, dtype)
            for size in ((20, 70), (7,), (3, 4099), (1,))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        weights["off by one element"] = torch.randn(101, generator=generator).to(device)[1:]
        ema = EMA(weights.items(), half_lives)
        for _ in range(3):
            for p in weights.values():
                p.add_(torch.randn(p.shape, generator=generator).to(device, p.dtype))
            ema.update(100)
        return ema

    plain = averaged(torch.device("cpu"))
    with at_place(place) as device:
        found = averaged(device)
    for half_life in half_lives:
        for name, average in found.weights(half_life).items():
            torch.testing.assert_close(average.cpu(), plain.weights(half_life)[name])


def test_a_state_that_does_not_fit_changes_nothing():
    """The averages before the one that does not fit were overwritten already."""
    p = nn.Parameter(torch.zeros(3))
    ema = EMA([("p", p)], (1, 2))
    state = {**ema.state_dict(), "copies": [{"p": torch.ones(3)}, {"p": torch.ones(4)}]}
    with pytest.raises(ValueError, match=r"p has shape \[4\], not \[3\]"):
        ema.load_state_dict(state)
    assert all((copy["p"] == 0).all() for copy in ema.copies)


def test_bad_arguments_are_named():
    model = nn.Linear(3, 2)
    ema = EMA(model, half_lives=(1.0,))
    for half_lives in ((1.0, 1.0), (math.nan,), (0.0,), ("5",), "5", 500.0):
        with pytest.raises(ValueError, match="EMA: (half-lives|a half-life) must be a"):
            EMA(model, half_lives=half_lives)
    assert EMA(model, half_lives=torch.tensor([1.0, 2.0])).half_lives == (1.0, 2.0)
    with pytest.raises(TypeError, match=r"give the module, or its named_parameters\(\)"):
        EMA(model.parameters())
    with pytest.raises(ValueError, match="no parameters"):
        EMA(nn.ReLU())
    with pytest.raises(ValueError, match="EMA: two parameters are called weight"):
        EMA([*model.named_parameters(), *model.named_parameters()])
    with pytest.raises(ValueError, match="no average has half-life 2"):
        ema.weights(2.0)
    for batch_size in (0, math.nan, "8", True):
        with pytest.raises(ValueError, match="batch_size must be a finite number, greater than 0, got"):
            ema.update(batch_size)
    assert ema.updates == 0
    with pytest.raises(ValueError, match="has no copies"):
        ema.load_state_dict({})
    with pytest.raises(ValueError, match="belong to another model: weight has shape"):
        ema.load_state_dict(EMA(nn.Linear(4, 2), half_lives=(1.0,)).state_dict())
    with pytest.raises(ValueError, match="saved half-lives"):
        ema.load_state_dict(EMA(model, half_lives=(2.0,)).state_dict())
