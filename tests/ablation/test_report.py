"""Means, verdicts and the judge, on hand-computed numbers."""

import math

import pytest
import torch

from pmf.ablation import Growth, Ordering, judge_orderings, summarise
from pmf.ablation.judge import Judge, Reference, Split, as_pixels, train_judge
from pmf.data import load_digits
from pmf.evaluation import open_space


def rows(**distances: list[float]) -> list[dict[str, object]]:
    rest = {"frechet_pixels": 1.0, "recognised": 0.5, "seconds": 2.0, "training_seconds": 1.0}
    return [
        {"variant": name, "seed": seed, "frechet": value, **rest}
        for name, values in distances.items()
        for seed, value in enumerate(values)
    ]


def test_mean_and_deviation_over_the_seeds() -> None:
    (line,) = summarise(rows(a=[1.0, 2.0, 6.0]), ["a"])
    assert line["seeds"] == [0, 1, 2]
    assert line["frechet"] == {"mean": 3.0, "each": [1.0, 2.0, 6.0], "sd": pytest.approx(math.sqrt(7))}
    assert line["recognised"]["sd"] == 0


def test_an_ordering_holds_in_every_seed_or_in_the_mean_or_not() -> None:
    given = rows(a=[1.0, 2.0, 3.0], b=[2.0, 3.0, 4.0], c=[0.5, 4.0, 4.0])
    claims = [
        Ordering("1", "a", "b"),
        Ordering("2", "a", "c"),
        Ordering("3", "c", "a"),
        Ordering("4", "a", "z"),
    ]
    judged = judge_orderings(given, claims)
    assert [(one["holds"], one["seeds_that_agree"]) for one in judged] == [
        ("yes", 3),
        ("in the mean", 2),
        ("no", 1),
    ]
    assert judged[0]["numbers"] == "2.00 against 3.00"


def test_small_distances_keep_three_digits() -> None:
    """A Frechet distance between normalised features is a few thousandths."""
    (one,) = judge_orderings(rows(a=[0.00554], b=[0.0213]), [Ordering("1", "a", "b")])
    assert one["numbers"] == "0.00554 against 0.02130"
    (diverged,) = judge_orderings(rows(a=[math.nan], b=[math.inf]), [Ordering("1", "a", "b")])
    assert (diverged["numbers"], diverged["holds"]) == ("nan against inf", "no")


def test_growth_is_that_of_the_ratios() -> None:
    growth = Growth("the more so", (("a", "b"), ("c", "d")))
    (one,) = judge_orderings(rows(a=[1.0, 2.0], b=[2.0, 2.0], c=[1.0, 1.0], d=[3.0, 3.0]), [growth])
    assert (one["means"], one["holds"], one["seeds_that_agree"]) == ([1.5, 3.0], "yes", 2)
    (one,) = judge_orderings(rows(a=[1.0, 1.0], b=[2.0, 4.0], c=[1.0, 1.0], d=[3.0, 3.0]), [growth])
    assert (one["means"], one["holds"], one["seeds_that_agree"]) == ([3.0, 3.0], "no", 1)


def test_the_judge_distinguishes_digits_from_noise() -> None:
    """Real images are closer than mirrored ones, and these closer than noise, in features and in pixels."""
    dataset = load_digits()
    split = Split.of(dataset, 500)
    assert not set(split.unseen) & set(split.seen) and not set(split.real) & set(split.others)
    reference = Reference.of(train_judge(dataset, split, 150).eval(), dataset, split)
    assert reference.accuracy > 0.9
    assert reference.real["recognised"] > 0.9
    images, _ = dataset.get(split.real)
    same = reference.measure(images)
    assert same["frechet"] < 1e-6 and same["frechet_pixels"] < 1e-6
    mirrored = reference.measure(images.flip(-1))
    noise = reference.measure(2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1)
    for name in ("frechet", "frechet_pixels"):
        assert reference.real[name] < mirrored[name] < noise[name]
    assert noise["recognised"] < 0.3 < mirrored["recognised"] < reference.real["recognised"]


def test_a_published_space_judges_in_place_of_the_classifier() -> None:
    dataset = load_digits()
    split = Split.of(dataset, 200)
    judge = train_judge(dataset, split, 20).eval()
    space = open_space("pixels", channels=1, size=8, device=torch.device("cpu"))
    alone, in_space = Reference.of(judge, dataset, split), Reference.of(judge, dataset, split, space)
    images = dataset.get(split.others)[0].flip(-1)
    own, its = alone.measure(images), in_space.measure(images)
    assert its["recognised"] == own["recognised"] and its["frechet"] != own["frechet"]
    # Pixels are what frechet_pixels compares, but for rounding to 8 bits.
    assert its["frechet"] == pytest.approx(its["frechet_pixels"], rel=1e-2)
    assert in_space.real["frechet"] < its["frechet"]


def test_the_judge_accepts_any_size_and_pixels_are_averaged_down() -> None:
    for channels, size in ((1, 8), (1, 28), (3, 32)):
        images = torch.randn(2, channels, size, size)
        assert Judge(channels, size, 4)(images).shape == (2, 4)
        assert as_pixels(images).shape[1] <= 1024
    assert torch.allclose(as_pixels(torch.ones(2, 3, 32, 32)), torch.ones(2, 768))
