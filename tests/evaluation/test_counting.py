"""Sums over many images: batch by batch, interrupted and resumed, on one process and on several."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pmf_process import environment
from torch import Tensor

from pmf.errors import UserError
from pmf.evaluation import count_features
from pmf.evaluation.features import Pixels
from pmf.ranks import Ranks

COUNT, BATCH = 70, 8  # nine batches, the last of six


class Noise:
    """Image i is drawn from seed i. After `patience` batches reading stops as if by Ctrl-C."""

    shape = (1, 4, 4)

    def __init__(self, patience: int = 1000, from_files: bool = False) -> None:
        self.patience, self.from_files, self.read_batches = patience, from_files, 0

    def __len__(self) -> int:
        return COUNT

    def identity(self) -> dict[str, Any]:
        return {"source": "noise", "images": COUNT}

    def read(self, indices: Sequence[int]) -> Tensor:
        if self.read_batches == self.patience:
            raise KeyboardInterrupt
        self.read_batches += 1
        generator = torch.Generator()
        return torch.stack(
            [
                torch.randint(256, self.shape, generator=generator.manual_seed(i), dtype=torch.uint8)
                for i in indices
            ]
        )


class Scored(Pixels):
    """Pixels that serve as class logits, so that Inception Score is computed too."""

    @property
    def classes(self) -> int:
        return self.width

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, _ = super().__call__(pixels)
        return features, 4 * features


class OneOf(Ranks):
    """One of several processes stopped before they communicate: none knows the earlier counts."""

    def together(self, action: Callable[[], Any]) -> Any:
        return action()

    def from_first(self, value: Any) -> Any:
        return value


def space() -> Scored:
    return Scored(1, 4, torch.device("cpu"))


def count(file: Path, source: Noise, ranks: Ranks | None = None, **options: Any) -> list[Tensor]:
    sums = count_features(source, space(), BATCH, file, ranks or Ranks(), **options)
    return [*sums.tensors().values()]


@pytest.fixture
def whole(tmp_path: Path) -> list[Tensor]:
    return count(tmp_path / "whole.safetensors", Noise())


@pytest.mark.parametrize("from_files", [False, True])
def test_the_sums_equal_those_of_all_images_at_once(tmp_path: Path, from_files: bool) -> None:
    heard: list[int] = []
    source = Noise(from_files=from_files)
    sums = count_features(source, space(), BATCH, tmp_path / "a.safetensors", Ranks(), heard.append)
    pixels = Noise().read(range(COUNT))
    features = space()(pixels)[0].double()
    mean, covariance = sums.moments.mean_and_covariance()
    torch.testing.assert_close(mean, features.mean(0))
    torch.testing.assert_close(covariance, torch.cov(features.T))
    assert sums.score is not None and sums.score.count.sum() == COUNT
    assert sum(heard) == COUNT and sums.done.all()


@pytest.mark.parametrize("save_seconds", [0.0, 1000.0])
def test_an_interrupted_count_resumes_and_ends_with_the_same_bits(
    tmp_path: Path, whole: list[Tensor], save_seconds: float
) -> None:
    file = tmp_path / "sums.safetensors"
    with pytest.raises(KeyboardInterrupt):
        count(file, Noise(patience=4), save_seconds=save_seconds)
    rest, heard = Noise(), []
    again = count(file, rest, on_images=heard.append)
    assert rest.read_batches == 5 and heard[0] == 4 * BATCH and sum(heard) == COUNT
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    finished = Noise(patience=0)  # nothing is read a third time
    assert all(torch.equal(a, b) for a, b in zip(count(file, finished), whole, strict=True))


def test_one_process_finishes_the_counts_of_three(tmp_path: Path, whole: list[Tensor]) -> None:
    file = tmp_path / "sums.safetensors"
    for rank, patience in ((0, 1), (1, 2), (2, 2)):
        with pytest.raises(KeyboardInterrupt):
            count(file, Noise(patience=patience), OneOf(rank, 3))
    assert len(list(tmp_path.glob("sums*"))) == 3
    rest = Noise()
    again = count(file, rest)
    assert rest.read_batches == 9 - 1 - 2 - 2
    assert [path.name for path in tmp_path.glob("sums*")] == ["sums.safetensors"]
    for ours, other in zip(again, whole, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-13, atol=1e-12)


def test_a_stop_between_merging_and_removing_files_counts_nothing_twice(
    tmp_path: Path, whole: list[Tensor]
) -> None:
    file, part = tmp_path / "sums.safetensors", tmp_path / "sums-rank1.safetensors"
    with pytest.raises(KeyboardInterrupt):
        count(file, Noise(patience=2), OneOf(1, 2))
    left = part.read_bytes()
    count(file, Noise())
    part.write_bytes(left)
    for ours, other in zip(count(file, Noise(patience=0)), whole, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-13, atol=1e-12)


_TWO = """
import sys
sys.path[:0] = {paths}
from pathlib import Path
from evaluation.test_counting import BATCH, Noise, space
from pmf.evaluation import count_features
from pmf.ranks import joined_ranks
source = Noise()
with joined_ranks() as ranks:
    sums = count_features(source, space(), BATCH, Path(sys.argv[1]), ranks)
print(source.read_batches, float(sums.moments.count), float(sums.moments.products.sum()), flush=True)
"""


def test_two_processes_finish_the_count_of_one(tmp_path: Path, whole: list[Tensor]) -> None:
    file = tmp_path / "sums.safetensors"
    with pytest.raises(KeyboardInterrupt):
        count(file, Noise(patience=3))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    code = _TWO.format(paths=[str(Path(__file__).parents[1])])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(file)],
            env=environment() | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), ends
    assert [out.split()[0] for out, _ in ends] == ["3", "3"]  # the six batches that were left
    for out, _ in ends:
        assert float(out.split()[1]) == COUNT
        assert float(out.split()[2]) == pytest.approx(float(whole[2].sum()), rel=1e-13)
    assert os.listdir(tmp_path).count("sums.safetensors") == 1 and not list(tmp_path.glob("*rank*"))
    again = count(file, Noise(patience=0))
    for ours, other in zip(again, whole, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-13, atol=1e-12)


def test_sums_of_another_evaluation_are_rejected_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "sums.safetensors"
    count(file, Noise())
    before = file.read_bytes()
    with pytest.raises(
        UserError, match=r"another evaluation \(its batch_size is 8, now it is 4\): give another"
    ):
        count_features(Noise(), space(), 4, file, Ranks())
    with pytest.raises(UserError, match=r"another evaluation \(its size is \[4, 4\], now it is \[2, 2\]\)"):
        count_features(Noise(), Scored(1, 2, torch.device("cpu")), BATCH, file, Ranks())
    assert file.read_bytes() == before
    file.write_bytes(before[:-20])
    with pytest.raises(UserError, match="is truncated"):
        count(file, Noise())
