"""A study folder belongs to one dataset."""

from pathlib import Path

import pytest

from pmf.ablation import Study, Variant
from pmf.errors import UserError
from pmf.training import get_preset


def test_a_judge_of_other_data_is_rejected(tmp_path: Path) -> None:
    base = get_preset("digits", steps=1, minutes=None)
    study = Study(base, [Variant("a")], [0], tmp_path, samples=16, judge_steps=1)
    expected = study.prepare().accuracy
    assert study.prepare().accuracy == expected  # read from the folder
    study.base = base.with_settings(data="elsewhere")
    with pytest.raises(UserError, match="other --judge-steps or --data"):
        study.prepare()
