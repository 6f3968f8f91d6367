"""The order of the images: an endless sequence of permutations, a pure function of seed and position."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from pmf.data.datasets import ImageDataset

_AHEAD = 2  # batches prefetched during training, for data in files

Batch = tuple[torch.Tensor, torch.Tensor]


class ShuffledStream:
    """Batches of a dataset, reshuffled every epoch; ``position`` (images seen so far) is the only state.

    The image at position p is entry p % n of the permutation drawn from (seed, p // n): a stream set to a
    position continues exactly like one that reached it, whatever the batch sizes were. With several ranks,
    each receives every ranks-th image of a batch, and the position counts all images.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        seed: int,
        position: int = 0,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.position = dataset, batch_size, seed, position
        self.mine = slice(rank, None, ranks)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._ahead: deque[Future[Batch]] = deque()
        self._reader = None if dataset.in_memory else ThreadPoolExecutor(1, thread_name_prefix="pmf-batch")

    def indices(self, position: int, count: int) -> list[int]:
        """Dataset indices of the ``count`` images starting at ``position``."""
        rows: list[int] = []
        while count > 0:
            epoch, start = divmod(position, len(self.dataset))
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
            taken = self._order[start : start + count].tolist()
            rows += taken
            position, count = position + len(taken), count - len(taken)
        return rows

    def next_batch(self) -> Batch:
        """This rank's next images [B, C, H, W] as stored, and labels [B]; files are prefetched."""
        if self._reader is None:
            batch = self.dataset.read(self.indices(self.position, self.batch_size)[self.mine])
        else:
            while len(self._ahead) <= _AHEAD:
                rows = self.indices(self.position + len(self._ahead) * self.batch_size, self.batch_size)
                self._ahead.append(self._reader.submit(self.dataset.read, rows[self.mine]))
            batch = self._ahead.popleft().result()
        self.position += self.batch_size
        return batch
