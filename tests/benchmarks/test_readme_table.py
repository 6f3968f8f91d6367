"""The generated tables, from records that may be incomplete."""

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
    for machine in (readme_table.AMD, readme_table.INTEL):
        (tmp_path / machine).mkdir()
    return tmp_path / readme_table.AMD


def test_training_table(results: Path):
    timed = {"hidden_size": 768, "depth": 4, "image_size": 256}
    record = {**HEADER, "rows": ROWS, "sizes": {"timed": timed, "batch_size": 8}}
    (results / "bench_training_step.json").write_text(json.dumps(record))
    table = readme_table.tables()["training"]
    assert "| fp32: objective, backward and optimizer | 3000 ms | 10000 ms | 0.30 |" in table
    assert "| bf16: without the optimizer | 500 ms | 2500 ms | 0.20 |" in table
    assert "| bf16: peak memory over the loaded model | 1024 MiB | 4096 MiB | 0.25 |" in table
    assert "| objective and backward at depth 16, batch 128 | 50.0 TFLOP | 100.0 TFLOP | 0.50 |" in table
    assert "0.62 without the products with zero tangents" in table
    assert "2e-15 (float64), 3e-06 (fp32) and 2e-02 (bf16)" in table


def test_speed_table(results: Path):
    """The README's table: attention, the training step and sampling, slower side over faster."""
    timed = {"hidden_size": 768, "depth": 4, "image_size": 256}
    case = "forward + JVP (1, 12, 1024, 64) bfloat16"
    attention = [
        {"case": case, "contestant": "pmf", "median_ms": 10.0},
        {"case": case, "contestant": "func.jvp", "median_ms": 120.0, "time_over_ours": 12.0},
        {"case": case, "contestant": "written out", "median_ms": 30.0, "time_over_ours": 3.0},
    ]
    samplers = [
        {"contestant": str(rate), "images_per_second": rate, "psnr_db": None} for rate in (9.0, 4.0, 1.5)
    ]
    records = {
        "attention": {**HEADER, "rows": attention},
        "training_step": {**HEADER, "rows": ROWS, "sizes": {"timed": timed, "batch_size": 8}},
        "sampling": {**HEADER, "batch_size": 8, "rows": samplers},
    }
    for name, record in records.items():
        assert "speed" not in readme_table.tables()
        (results / f"bench_{name}.json").write_text(json.dumps(record))
    table = readme_table.tables()["speed"]
    assert f"| attention {case} | 10.0 ms | 120.0 ms (`torch.func.jvp`, math) | 12.0 |" in table
    assert (
        "| training step, hidden 768, depth 4, 256 pixels, batch 8, fp32 | 3000 ms | 10000 ms | 3.3 |"
        in table
    )
    assert "| peak memory of that step, bf16 | 1024 MiB | 4096 MiB | 4.0 |" in table
    assert "| one-step sampling, pMF-B/16 | 9.0 images/s (bf16) | 1.5 images/s (fp32) | 6.0 |" in table
    attention[1]["time_over_ours"], attention[0]["median_ms"] = 8.0, 20.0
    for name, record in records.items():  # another machine adds its ratios
        path = results.parent / readme_table.INTEL / f"bench_{name}.json"
        path.write_text(json.dumps({**record, "device": "another"}))
    table = readme_table.tables()["speed"]
    assert "| | pmf | plain PyTorch | ratio | ratio on another |" in table
    assert f"| attention {case} | 10.0 ms | 120.0 ms (`torch.func.jvp`, math) | 12.0 | 8.0 |" in table


def test_sampling_table(results: Path):
    rows = [
        {"contestant": "pmf, bf16 (its default)", "images_per_second": 9.0, "psnr_db": 52.4},
        {"contestant": "plain sampler, fp32", "images_per_second": 1.5, "psnr_db": None},
    ]
    (results / "bench_sampling.json").write_text(json.dumps({**HEADER, "batch_size": 8, "rows": rows}))
    table = readme_table.tables()["sampling"]
    assert "| pmf, bf16 (its default) | 9.00 | 52.4 dB |" in table
    assert "| plain sampler, fp32 | 1.50 |  |" in table


def test_marks(results: Path):
    page = "a page\n<!-- table: sampling -->\nold\n<!-- end -->\nrest\n"
    assert readme_table.with_tables(page) == page  # no record, no table
    (results / "bench_sampling.json").write_text(json.dumps({**HEADER, "batch_size": 8, "rows": []}))
    filled = readme_table.with_tables(page)
    assert "old" not in filled and filled.startswith("a page\n") and filled.endswith("<!-- end -->\nrest\n")
    assert readme_table.with_tables(filled) == filled
    with pytest.raises(SystemExit, match="no table 'sampled'"):
        readme_table.with_tables(page.replace("sampling", "sampled"))
    with pytest.raises(SystemExit, match="closes it"):
        readme_table.with_tables(page.replace("<!-- end -->", ""))


def test_kernels_table(results: Path):
    """A rate is divided by that of torch's copy or product of the same dtype in the same record."""
    rows = [
        {"case": "copy float32", "contestant": "torch copy_", "median_ms": 1.0, "gbyte_per_s": 80.0},
        {
            "case": "forward [2, 3] float32",
            "contestant": "pmf rms_norm",
            "median_ms": 2.0,
            "gbyte_per_s": 60.0,
        },
        {"case": "forward [2, 3] float32", "contestant": "plain", "median_ms": 5.0, "time_over_ours": 2.5},
        {
            "case": "forward [2, 3] bfloat16",
            "contestant": "pmf rms_norm",
            "median_ms": 1.0,
            "gbyte_per_s": 9.0,
        },
        {"case": "backward [2, 3] float32", "contestant": "pmf", "median_ms": 4.0, "gbyte_per_s": 50.0},
        {"case": "backward [2, 3] float32", "contestant": "plain", "time_over_ours": 3.0},
        {"case": "backward [2, 3] float32", "contestant": "torch clone", "gbyte_per_s": 100.0},
    ]
    for name in ("attention", "rms_norm"):
        content = {**HEADER, "rows": rows if name == "rms_norm" else []}
        (results / f"bench_{name}.json").write_text(json.dumps(content))
    table = readme_table.tables()["kernels"]
    assert "| rms_norm | forward [2, 3] float32 | 2.00 ms | 60 GB/s | 75% | plain: 2.5 |" in table
    assert "| rms_norm | forward [2, 3] bfloat16 | 1.00 ms | 9 GB/s |  |  |" in table
    assert "| rms_norm | backward [2, 3] float32 | 4.00 ms | 50 GB/s | 50% | plain: 3.0 |" in table
    assert "copy_" not in table and table.count("a processor, 2 cores") == 1


def test_gpu_table_without_a_record_has_no_numbers(results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readme_table, "GPU_RECORD", results / "run_all.json")
    rows = readme_table.tables()["gpu"].splitlines()[4:]
    assert len(rows) == len(readme_table.GPU_ROWS)
    assert all(row.count(readme_table.NOT_MEASURED) == 3 for row in rows)


def test_gpu_table_of_a_record(results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readme_table, "GPU_RECORD", results / "run_all.json")
    facts = {"case": "c", "op": "attention forward", "shape": [256, 12, 276, 64], "dtype": "bfloat16"}
    target = {"target": "as fast as torch's best correct backend", "found": "1.50x torch cudnn", "met": True}
    case = [
        {**facts, "contestant": "pmf.ops.attention", "ours": True, "median_ms": 0.2, "targets": [target]},
        {**facts, "contestant": "torch flash", "median_ms": 0.1, "right": False},
        {**facts, "contestant": "torch cudnn", "median_ms": 0.3, "right": True},
        {**facts, "contestant": "torch mem-efficient", "failed": "RuntimeError: no"},
    ]
    record = {
        "device": "a GPU",
        "nvidia_smi": {"driver_version": "580.1"},
        "versions": {"torch": "2.13.0"},
        "rates": {"copy_gbyte_per_s": 3000.0, "matrix_gflop_per_s": {"bfloat16": 8e5}},
        "sections": [{"name": "attention", "rows": case}],
    }
    (results / "run_all.json").write_text(json.dumps(record))
    table = readme_table.tables()["gpu"]
    assert (
        "a GPU (driver 580.1, torch 2.13.0); copies ran at 3.00 TB/s, bf16 products at 800 TFLOP/s" in table
    )
    assert (
        "64 | 0.2 ms | 0.3 ms (torch cudnn) | 1.5 | as fast as torch's best correct backend: 1.50x" in table
    )
    assert table.count("not measured |") == 3 * (len(readme_table.GPU_ROWS) - 1)


def test_any_network_table(results: Path):
    """Contestants in the record's order; missing measurements are marked."""
    rows = []
    for network, base in (("vit", 1000.0), ("dit", 8000.0)):
        for name, ratio in (("ours", 0.5), ("ours, compiled", 0.25), ("torch.func.jvp, math", 1.0)):
            row = {"network": network, "contestant": name, "rounds": 5, "median_ms": base * ratio}
            row["time_over_math"] = ratio
            if "compiled" not in name:
                row["memory_over_math"] = ratio / 2
            rows.append(row)
    path = results.parent / readme_table.INTEL / "bench_any_network.json"
    path.write_text(json.dumps({**HEADER, "rows": rows}))
    table = readme_table.tables()["any_network"]
    assert (
        "5 rounds on a processor, 2 cores, torch 2.13.0, relative to torch.func.jvp, math (1 s, 8 s):"
        in table
    )
    assert "| ours | 0.50 | 0.25 | 0.50 | 0.25 |" in table
    assert "| ours, compiled | 0.25 | not measured | 0.25 | not measured |" in table
