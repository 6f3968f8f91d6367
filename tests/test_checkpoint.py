"""Weights on disk: round trips, and every file that must be rejected."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pmf import checkpoint, models, sample
from pmf.errors import UserError
from pmf.training.initial import initialise

GOLDEN = Path(__file__).parent / "golden" / "objective.npz"


def tiny_model(**settings: object) -> models.PixelMeanFlow:
    shape = {"hidden_size": 16, "depth": 2, "head_depth": 1, "num_heads": 2, "bottleneck": 4} | settings
    return models.create_model("digits", **shape)


def write_weights(path: Path, model: models.PixelMeanFlow) -> None:
    weights = dict(model.named_parameters())
    path.write_bytes(checkpoint.weights_bytes(weights, model.config, list("abcdefghij")))


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    write_weights(tmp_path / "weights.safetensors", tiny_model())
    return tmp_path / "weights.safetensors"


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {
            name.removeprefix("param/"): torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith("param/")
        }


def test_own_file_builds_the_same_model(tmp_path: Path) -> None:
    model = tiny_model(noise_scale=1.5, sample_omega=3.0, sample_interval=(0.2, 0.6))
    with torch.no_grad():
        model.u_final.linear.weight.normal_()
    write_weights(tmp_path / "weights.safetensors", model)
    loaded = checkpoint.load_model(tmp_path / "weights.safetensors")
    assert loaded.model.config == model.config and loaded.class_names == list("abcdefghij")
    samples = [sample(m, [0, 3], generator=torch.Generator().manual_seed(0)) for m in (model, loaded.model)]
    assert torch.equal(*samples)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_authors_state_dict_loads_without_its_preset(
    tmp_path: Path, official: dict[str, torch.Tensor], prefix: str
) -> None:
    torch.save({prefix + name: tensor for name, tensor in official.items()}, tmp_path / "theirs.pth")
    model = checkpoint.load_checkpoint(tmp_path / "theirs.pth", noise_scale=1.0)
    assert (model.config.hidden_size, model.config.depth, model.config.num_classes) == (64, 4, 10)
    assert torch.equal(model.position, official["pos_embed"])
    assert not model.training


def test_the_v_head_can_be_left_out(tmp_path: Path, official: dict[str, torch.Tensor]) -> None:
    whole = tiny_model()
    with torch.no_grad():
        whole.u_final.linear.weight.normal_()
    write_weights(tmp_path / "ours.safetensors", whole)
    for prefix in ("", "net."):
        renamed = {prefix + name: tensor for name, tensor in official.items()}
        torch.save(renamed, tmp_path / "theirs.pth")
        for name in ("ours.safetensors", "theirs.pth"):
            full, half = (
                checkpoint.load_checkpoint(tmp_path / name, noise_scale=1.0, v_head=v_head)
                for v_head in (True, False)
            )
            assert full.config.v_head and not half.config.v_head
            assert not [weight for weight, _ in half.named_parameters() if weight.startswith("v_")]
            images = [sample(m, [1], generator=torch.Generator().manual_seed(0)) for m in (full, half)]
            assert torch.equal(*images)


def test_authors_file_matching_no_preset_asks_for_its_noise_scale(
    tmp_path: Path, official: dict[str, torch.Tensor]
) -> None:
    torch.save(official, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match="noise_scale"):
        checkpoint.load_checkpoint(tmp_path / "theirs.pth")


@pytest.mark.parametrize("kept", [0, 7, 100, -100])
def test_truncated_own_file_is_named(weights_file: Path, kept: int) -> None:
    weights_file.write_bytes(weights_file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"weights\.safetensors is truncated"):
        checkpoint.load_checkpoint(weights_file)


@pytest.mark.parametrize("kept", [0, 10, 5000, -100])
def test_truncated_authors_file_is_named(
    tmp_path: Path, official: dict[str, torch.Tensor], kept: int
) -> None:
    path = tmp_path / "theirs.pth"
    torch.save(official, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"theirs\.pth is truncated"):
        checkpoint.load_checkpoint(path)


class Payload:
    """Unpickling an instance runs code."""

    executed = False

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _run_payload, ("run",)


def _run_payload(word: str) -> str:
    Payload.executed = True
    return word


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_is_refused_and_never_run(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"pos_embed": Payload()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="more than tensors"):
        checkpoint.load_checkpoint(path)
    assert not Payload.executed


def test_a_plain_pickle_with_code_is_refused_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"pos_embed": Payload()}))
    with pytest.raises(UserError, match=r"evil\.pth"):
        checkpoint.load_checkpoint(path)
    assert not Payload.executed


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"pos_embed": torch.zeros(1), "epoch": 3}, "contains 'epoch' of type int"),
        ({"state_dict": {"pos_embed": torch.zeros(1)}}, "contains 'state_dict' of type dict"),
        ([torch.zeros(1)], "contains a list, not a state dict"),
        (torch.zeros(3), "contains a Tensor, not a state dict"),
        ({"fc.weight": torch.zeros(3)}, "fc.weight"),
    ],
)
def test_foreign_pytorch_files_are_named(tmp_path: Path, content: object, sentence: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=sentence):
        checkpoint.load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "convert",
    [torch.Tensor.char, torch.Tensor.bool, torch.Tensor.cfloat, torch.Tensor.to_sparse, torch.Tensor.sum],
    ids=["int8", "bool", "complex", "sparse", "0-d"],
)
def test_tensors_that_are_no_weights_are_named(
    tmp_path: Path, official: dict[str, torch.Tensor], convert: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """They were copied number by number, or ended in a traceback."""
    torch.save(official | {"pos_embed": convert(official["pos_embed"])}, tmp_path / "theirs.pth")
    for load in (
        lambda path: checkpoint.load_checkpoint(path, noise_scale=1.0),
        lambda path: initialise(tiny_model(), path, list("abcdefghij")),
    ):
        with pytest.raises(UserError, match="pos_embed is .*: weights must be dense tensors of a floating"):
            load(tmp_path / "theirs.pth")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, official: dict[str, torch.Tensor]) -> None:
    """Their samples were black images, and had a Frechet distance."""
    for value in (float("nan"), float("inf")):
        broken = official["pos_embed"].clone()
        broken[0, 0, 0] = value
        torch.save(official | {"pos_embed": broken}, tmp_path / "theirs.pth")
        with pytest.raises(UserError, match=r"theirs\.pth has weights position that are not finite"):
            checkpoint.load_checkpoint(tmp_path / "theirs.pth", noise_scale=1.0)


def test_foreign_safetensors_are_named(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"not written by pixelmeanflow, .*: give weights alone as a \.pth"):
        checkpoint.load_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hidden_size": 32}, "belongs to another model.*shape"),
        ({"depth": 3}, "belongs to another model: it lacks 'shared_blocks.1"),
        ({"v_head": False}, "belongs to another model: it contains 'v_"),
    ],
)
def test_weights_of_another_shape_are_named(
    weights_file: Path, settings: dict[str, object], sentence: str
) -> None:
    tensors, _ = checkpoint.read_tensors(weights_file)
    with pytest.raises(UserError, match=sentence):
        checkpoint.assign_weights(tiny_model(**settings), tensors, weights_file)


def test_a_run_folder_gives_its_newest_checkpoint_and_the_requested_average(tmp_path: Path) -> None:
    models_by_file = {}
    for step in (9, 10):
        folder = checkpoint.step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"sampling": {"sample_ema": 50.0}}')
        for name in ("weights", "ema-50", "ema-0.5"):
            models_by_file[step, name] = tiny_model()
            write_weights(folder / f"{name}.safetensors", models_by_file[step, name])
    (tmp_path / "checkpoints" / ".step-00000011.partial").mkdir()
    for ema, name in {None: "ema-50", "0.5": "ema-0.5", "none": "weights"}.items():
        loaded = checkpoint.load_checkpoint(tmp_path, ema)
        assert torch.equal(loaded.position, models_by_file[10, name].position)
    with pytest.raises(UserError, match=r"--ema can be none, 0\.5, 50"):
        checkpoint.load_checkpoint(tmp_path, "7")
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match="contains no complete checkpoint: give a folder written by pmf train"
    ):
        checkpoint.load_checkpoint(tmp_path / "checkpoints")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match="contains no complete checkpoint: wait for its first, or start it again"
    ):
        checkpoint.load_checkpoint(tmp_path / "new")


def test_junk_instead_of_a_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    """The unpickler reads "junk" as an instruction, and struct fails."""
    (tmp_path / "x.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="truncated or not a PyTorch file"):
        checkpoint.load_checkpoint(tmp_path / "x.pth")
