"""A study folder belongs to one dataset."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from pmf.ablation import Study, Variant
from pmf.ablation.judge import Split
from pmf.data import MemoryImages
from pmf.errors import UserError
from pmf.training import get_preset


def test_a_judge_of_other_data_is_rejected(tmp_path: Path) -> None:
    base = get_preset("digits", steps=1, minutes=None)
    study = Study(base, [Variant("a")], [0], tmp_path, samples=16, judge_steps=1)
    expected = study.prepare().accuracy
    assert study.prepare().accuracy == expected  # read from the folder
    study.base = base.with_settings(data="elsewhere")
    with pytest.raises(UserError, match="other --judge-steps, --samples or images"):
        study.prepare()


def test_a_variant_that_diverges_is_named(tmp_path: Path) -> None:
    base = get_preset("digits", steps=3, minutes=None, hidden_size=16, num_heads=2, batch_size=8)
    study = Study(base, [Variant("fast", {"lr": 1e30})], [4], tmp_path, samples=16, judge_steps=1)
    reference = study.prepare()
    with pytest.raises(UserError, match=r"variant 'fast', seed 4: the loss became .*; --only runs the"):
        study.run(study.variants[0], 4, reference)
    with pytest.raises(ValueError, match="finite"):  # as samples of its weights may become
        reference.measure(torch.full((16, 1, 8, 8), torch.nan))


def test_a_study_of_two_images_says_how_many_samples_it_would_draw(tmp_path: Path) -> None:
    """The sentence ended with None."""
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / name / "1.png")
    base = get_preset("digits", steps=1, minutes=None, data=str(tmp_path / "photos"))
    with pytest.raises(UserError, match="--samples must lie between 2 and the 2 images, got 1"):
        Study(base, [Variant("a")], [0], tmp_path / "study")


@pytest.mark.parametrize(("images", "samples"), [(100, 50), (100, 20), (100, 8), (100, 60), (3, 2)])
def test_the_judge_has_not_seen_the_other_real_images(images: int, samples: int) -> None:
    """One that was trained on them recognised all, which is no measure of perfect samples."""
    split = Split.of(MemoryImages(torch.zeros(images, 1, 8, 8), torch.zeros(images), ["0"]), samples)
    assert sorted(split.seen + split.unseen) == list(range(images))
    assert set(split.others) <= set(split.unseen) and not set(split.others) & set(split.real)
    assert len(split.real) == samples and len(split.others) == (samples if 2 * samples <= images else 0)
    assert len(split.unseen) == max(len(split.others), images // 10, 1)
