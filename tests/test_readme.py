"""The README matches the committed records, and its commands are the ones that CI runs."""

import importlib.util
import re
from pathlib import Path

import pmf

ROOT = Path(__file__).resolve().parent.parent


def test_tables_match_the_committed_records():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page in module.pages():
        text = page.read_text()
        assert module.with_tables(text) == text, f"{page.name}: run python benchmarks/readme_table.py --write"


def test_the_digits_network_has_the_stated_size():
    sampling = sum(
        p.numel() for name, p in pmf.create_model("digits").named_parameters() if not name.startswith("v_")
    )
    assert f"{sampling / 1e6:.2f} million parameters" in (ROOT / "README.md").read_text()


def test_pictures_and_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), f"README.md links {target}"
