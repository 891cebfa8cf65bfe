"""Which image comes when, and with which random numbers.

Everything here is a pure function of the seed and the *global sample number* ``n``: samples are
counted from 0 over the whole run, step k of global batch B holds ``k*B .. (k+1)*B - 1``. Workers,
ranks, accumulation and restarts only decide who computes a sample, never what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Philox is counter-based: one key gives one stream of 2^256 blocks. Permutations start in the
# middle of theirs, so they cannot meet the samples' numbers, which start at 0, even where the
# keys (seed, epoch) and (seed, n) are the same.
_PERMUTATION_START = (0, 0, 0, 1 << 63)


def _key(seed: int, number: int) -> NDArray[np.uint64]:
    if seed < 0 or number < 0:
        raise ValueError(f"seed {seed} and sample number {number} must not be negative")
    return np.array([seed, number], np.uint64)


def sample_rng(seed: int, n: int) -> np.random.Generator:
    """Random numbers of global sample ``n``, the same wherever and whenever it is computed."""
    return np.random.Generator(np.random.Philox(key=_key(seed, n)))


@lru_cache(maxsize=4)  # a batch may straddle two epochs; more are never in use at once
def epoch_permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Image order of one pass over the data: (size,) int64, a permutation, read-only."""
    counter = np.array(_PERMUTATION_START, np.uint64)
    generator = np.random.Generator(np.random.Philox(key=_key(seed, epoch), counter=counter))
    permutation = generator.permutation(size)
    permutation.setflags(write=False)
    return permutation


def image_index(seed: int, n: int, size: int) -> int:
    """Index, in a data set of ``size`` images, of the image that global sample ``n`` shows.

    Every image comes once in samples ``e*size .. (e+1)*size - 1``; a batch may straddle epochs.

    Raises:
        ValueError: ``size`` is not positive, or ``seed`` or ``n`` is negative.
    """
    if size <= 0:
        raise ValueError(f"a data set of {size} images has no order")
    epoch, position = divmod(n, size)
    return int(epoch_permutation(seed, epoch, size)[position])


class MicroBatchSampler:
    """Batch sampler that yields this rank's global sample numbers, micro-batch by micro-batch.

    In optimizer step k, micro-batch j of rank r holds the ``micro_batch`` numbers from
    ``k*B + j*(micro_batch*world_size) + r*micro_batch`` on, where B is the global batch. So the
    ranks together see the same samples per step for every split of B.

    Args:
        global_batch: B, samples of one optimizer step over all ranks and micro-batches.
        micro_batch: samples of one forward pass on one rank.
        rank: this rank, 0-based.
        world_size: number of ranks.
        accumulate: micro-batches of one optimizer step.
        start_step: first step to yield, the number of steps done before a resume.
        total_steps: steps of the whole run.

    Raises:
        ValueError: the sizes do not multiply to the global batch, or a number is out of range.
    """

    def __init__(
        self,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        start_step: int = 0,
        total_steps: int = 1,
    ) -> None:
        if min(global_batch, micro_batch, world_size, accumulate) < 1:
            raise ValueError(
                f"global_batch {global_batch}, micro_batch {micro_batch}, world_size {world_size} "
                f"and accumulate {accumulate} must be at least 1"
            )
        if micro_batch * world_size * accumulate != global_batch:
            raise ValueError(
                f"micro_batch {micro_batch} x world_size {world_size} x accumulate {accumulate} "
                f"is {micro_batch * world_size * accumulate}, not the global batch {global_batch}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside 0..{world_size - 1}")
        if start_step < 0 or total_steps < 1:
            raise ValueError(f"start_step {start_step} and total_steps {total_steps}: bad range")
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate
        self.start_step = start_step
        self.total_steps = total_steps

    def __len__(self) -> int:
        """Micro-batches of the whole run, also after a resume.

        Lightning adds the batches done before the checkpoint to those it fetches now, and stops
        when the sum reaches this length.
        """
        return self.total_steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.total_steps):
            for part in range(self.accumulate):
                first = (
                    step * self.global_batch
                    + part * self.micro_batch * self.world_size
                    + self.rank * self.micro_batch
                )
                yield list(range(first, first + self.micro_batch))


def evenly(total: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``total`` indices, spread over all, first and last among them."""
    if total <= wanted:
        return list(range(total))
    return [int(i) for i in np.linspace(0, total - 1, wanted).round()]
