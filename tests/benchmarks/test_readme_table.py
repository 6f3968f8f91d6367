"""Tables of records that may not have been made on the machine that the README speaks of."""

import json
from pathlib import Path

import pytest
import readme_table

ROWS = [
    {"part": "agreement", "precision": p, "case": "c", "error": e}
    for p, e in (("fp64", 2e-15), ("fp32", 1e-6), ("fp32", 3e-6), ("bf16", 2e-2))
]
for precision, ours, port in (("fp32", 3000.0, 10000.0), ("bf16", 1000.0, 5000.0)):
    ratio = {"step_ratio": ours / port, "backward_ratio": ours / port}
    for contestant, step in (("pmf", ours), ("plain port", port)):
        times = {"step_ms": step, "backward_ms": step / 2}
        ROWS.append({"part": "time", "precision": precision, "contestant": contestant, **times, **ratio})
    for contestant, size, part in (("pmf", 2**30, 1.0), ("plain port", 2**32, 0.25)):
        peak = {"contestant": contestant, "bytes": size, "ratio": part}
        ROWS.append({"part": "memory", "precision": precision, **peak})
ROWS.append({
    "part": "flops", "depth": 16, "batch_size": 128, "ratio": 0.5,
    "flops": {"ours": 5e13, "port": 1e14, "port, without products with zero tangents": 8e13},
})  # fmt: skip
HEADER = {"device": "a processor", "threads": 2, "versions": {"torch": "2.13.0"}}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    return tmp_path


def test_training_table(results: Path):
    timed = {"hidden_size": 768, "depth": 4, "image_size": 256}
    record = {**HEADER, "rows": ROWS, "sizes": {"timed": timed, "batch_size": 8}}
    (results / "bench_training_step.json").write_text(json.dumps(record))
    table = readme_table.tables()["training"]
    assert "| fp32: objective, backward and optimizer | 3000 ms | 10000 ms | 0.30 |" in table
    assert "| bf16: without the optimizer | 500 ms | 2500 ms | 0.20 |" in table
    assert "| bf16: peak memory over the loaded model | 1024 MB | 4096 MB | 0.25 |" in table
    assert "| objective and backward at depth 16, batch 128 | 50.0 TFLOP | 100.0 TFLOP | 0.50 |" in table
    assert "0.62 without the products with zero tangents" in table
    assert "2e-15 (float64), 3e-06 (fp32) and 2e-02 (bf16)" in table


def test_sampling_table(results: Path):
    rows = [
        {"contestant": "pmf, bf16 (its default)", "images_per_second": 9.0, "psnr_db": 52.4},
        {"contestant": "plain sampler, fp32", "images_per_second": 1.5, "psnr_db": None},
    ]
    (results / "bench_sampling.json").write_text(json.dumps({**HEADER, "batch_size": 8, "rows": rows}))
    table = readme_table.tables()["sampling"]
    assert "| pmf, bf16 (its default) | 9.00 | 52.4 dB |" in table
    assert "| plain sampler, fp32 | 1.50 |  |" in table


def test_a_record_without_its_mark_is_an_error(results: Path):
    assert readme_table.with_tables("a readme") == "a readme"
    record = {**HEADER, "batch_size": 8, "rows": []}
    (results / "bench_sampling.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="table: sampling"):
        readme_table.with_tables("a readme")
    filled = readme_table.with_tables("<!-- table: sampling -->\nold\n<!-- end -->\nrest\n")
    assert "old" not in filled and filled.endswith("<!-- end -->\nrest\n")
