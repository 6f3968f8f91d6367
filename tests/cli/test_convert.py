"""``pmf convert`` in both directions: same weights, same samples, and rejected input."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pmf import checkpoint, models
from pmf.cli import main
from pmf.data import read_image

GOLDEN = Path(__file__).parents[1] / "golden" / "objective.npz"


@pytest.fixture
def official(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A network from the authors' trainer, with their names, saved as their code does."""
    with np.load(GOLDEN) as arrays:
        weights = {
            f"net.{name.removeprefix('param/')}": torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith("param/")
        }
    torch.save({**weights, "net.rope_freqs": torch.zeros(3)}, tmp_path / "theirs.pth")
    return weights


def test_the_authors_file_round_trips(
    official: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours, again = (str(tmp_path / name) for name in ("theirs.pth", "ours.safetensors", "again.pth"))
    names = tmp_path / "names.txt"
    lines = "\r\n".join(f"breed {i}" for i in range(10))
    names.write_text(lines, encoding="utf-8-sig")  # as Windows writes it
    words = ["--noise-scale", "1", "--class-names", str(names)]
    assert main(["convert", theirs, ours, *words]) == 0
    assert main(["convert", ours, again]) == 0
    told = "not stored in a .pth file: class names, noise scale 1, omega 7, interval 0.1 to 0.7"
    assert told in capsys.readouterr().out
    back = torch.load(again, weights_only=True)
    assert {f"net.{name}" for name in back} == official.keys()
    for name, tensor in back.items():
        assert tensor.shape == official[f"net.{name}"].shape
        assert torch.equal(tensor, official[f"net.{name}"]), name

    # Samples by class, by number or by the given name, from either file.
    assert main(["convert", again, str(tmp_path / "third.safetensors"), "--noise-scale", "1"]) == 0
    third = str(tmp_path / "third.safetensors")
    for source, label, out in ((ours, "breed 7", "a"), (third, "7", "b")):
        words = ["--classes", label, label.replace("7", "0"), "--seeds", "3", "--out", str(tmp_path / out)]
        assert main(["sample", source, *words]) == 0
    named, numbered = tmp_path / "a/class0007-breed_7_seed0003.png", tmp_path / "b/class0007_seed0003.png"
    assert torch.equal(read_image(named, 32, 3), read_image(numbered, 32, 3))


def test_impossible_conversions_are_rejected(
    official: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    theirs, ours = str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors")
    assert main(["convert", theirs, ours, "--noise-scale", "1", "--class-names", str(names)]) == 2
    assert "has 2 different names, but the model has 10 classes" in capsys.readouterr().err
    assert main(["convert", theirs, ours, "--noise-scale", "1", "--class-names", str(tmp_path / "no")]) == 2
    assert "cannot be read as text" in capsys.readouterr().err

    model = models.create_model("digits", hidden_size=16, depth=2, head_depth=1, num_heads=2, prediction="u")
    content = checkpoint.weights_bytes(dict(model.named_parameters()), model.config, list("abcdefghij"))
    Path(ours).write_bytes(content)
    assert main(["convert", ours, str(tmp_path / "u.pth"), "--class-names", str(names)]) == 2
    assert "--class-names are stored in .safetensors only" in capsys.readouterr().err
    assert main(["convert", ours, str(tmp_path / "u.safetensors"), "--noise-scale", "2"]) == 2
    assert "--noise-scale is 2, but" in (said := capsys.readouterr().err) and "records 1: leave it" in said
    assert main(["convert", ours, str(tmp_path / "u.pth")]) == 2
    assert "would misread this model (prediction u," in capsys.readouterr().err
    torch.save({**official, "net.extra": torch.zeros(1)}, theirs)
    assert main(["convert", theirs, str(tmp_path / "x.safetensors"), "--noise-scale", "1"]) == 2
    assert "unknown extra" in capsys.readouterr().err
    assert not (tmp_path / "u.pth").exists() and not (tmp_path / "x.safetensors").exists()
