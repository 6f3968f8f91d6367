"""Packed sequences and windows against what they replace: every contestant is correct before it is timed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pmf import ops
from pmf.bench import attention_packed
from pmf.bench.device import make_device
from pmf.bench.harness import Setting, run_case


def test_every_pass_of_every_kind_is_correct_and_counts_visible_pairs():
    setting = Setting(make_device(torch.device("cpu")), "tiny")
    planned = list(attention_packed.cases(setting))
    assert len(planned) == 2 * 4 * 3  # dtypes, passes, kinds
    flops = {}
    for case in planned:
        rows = run_case(case, setting.device, 0.01)
        assert len(rows) >= 2 and rows[0]["ours"]
        assert all(row["right"] and "median_ms" in row for row in rows), rows
        assert all(row["error"] > 0 for row in rows)  # measured: that of all keys was written as 0
        flops[case.facts["of"]] = rows[0]["flops"] / attention_packed.PASSES[case.label.split(",")[0]]
    (batch, heads, longest, width), ((_, many, tokens, _), window) = (
        attention_packed.PACKED["tiny"],
        attention_packed.WINDOWED["tiny"],
    )
    assert flops["equal lengths"] == 2 * batch * heads * longest**2 * width
    assert 0 < flops["uniform lengths"] < flops["equal lengths"]
    cut = sum(max(0, window // 2 - i) + max(0, i + window // 2 - tokens) for i in range(tokens))
    assert flops[f"window {window}"] == 2 * many * width * (tokens * window - cut)


@pytest.mark.parametrize("sequence", [0, -1])
def test_a_wrong_sequence_is_found(sequence: int, monkeypatch: pytest.MonkeyPatch):
    """Offsets that are off by a little spoil the last first."""
    right: Callable[..., Tensor] = ops.attention_varlen

    def wrong(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *others: Tensor) -> Tensor:
        out = right(query, key, value, offsets, *others)
        out[offsets[:-1][sequence]] += 1
        return out

    monkeypatch.setattr(ops, "attention_varlen", wrong)
    setting = Setting(make_device(torch.device("cpu")), "tiny")
    ours, *others = run_case(next(iter(attention_packed.cases(setting))), setting.device, 0.01)
    assert not ours["right"] and all(row["right"] for row in others)
