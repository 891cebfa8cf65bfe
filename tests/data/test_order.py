"""Image order and random numbers: pure functions of seed and global sample number."""

from __future__ import annotations

import numpy as np
import pytest

from wsss.data.order import MicroBatchSampler, epoch_permutation, image_index, sample_rng


def test_every_epoch_is_a_permutation() -> None:
    order = [image_index(3, n, 7) for n in range(7 * 5)]
    epochs = [order[e * 7 : (e + 1) * 7] for e in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    forward = [image_index(0, n, 5) for n in range(40)]
    backward = [image_index(0, n, 5) for n in reversed(range(40))]
    assert forward == backward[::-1]


def test_seeds_differ() -> None:
    assert not np.array_equal(epoch_permutation(0, 0, 100), epoch_permutation(1, 0, 100))
    assert sample_rng(0, 5).random() != sample_rng(1, 5).random()
    assert sample_rng(0, 5).random() != sample_rng(0, 6).random()


def test_sample_numbers_are_reproducible_and_use_philox_keyed_by_seed_and_number() -> None:
    expected = np.random.Generator(np.random.Philox(key=[4, 9])).random(8)
    np.testing.assert_array_equal(sample_rng(4, 9).random(8), expected)


def test_permutation_stream_is_not_the_sample_stream() -> None:
    same_key = sample_rng(0, 0).permutation(50)
    assert not np.array_equal(epoch_permutation(0, 0, 50), same_key)


def test_cached_permutation_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_permutation(0, 0, 4)[0] = 1


@pytest.mark.parametrize(("seed", "n", "size"), [(-1, 0, 3), (0, -1, 3), (0, 0, 0)])
def test_impossible_numbers(seed: int, n: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"negative|no order"):
        image_index(seed, n, size)


def test_single_rank_counts_up() -> None:
    batches = list(MicroBatchSampler(4, 4, total_steps=3))
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (2, 3), (3, 2), (6, 1)])
def test_ranks_and_micro_batches_partition_every_step(world: int, accumulate: int) -> None:
    total, batch = 4, 12
    micro = batch // (world * accumulate)
    ranks = [
        list(MicroBatchSampler(batch, micro, rank, world, accumulate, total_steps=total))
        for rank in range(world)
    ]
    for step in range(total):
        seen = []
        for part in range(accumulate):
            for rank in range(world):
                seen += ranks[rank][step * accumulate + part]
        assert seen == list(range(step * batch, (step + 1) * batch))


def test_layout_of_micro_batches() -> None:
    sampler = MicroBatchSampler(8, 2, rank=1, world_size=2, accumulate=2, total_steps=2)
    assert list(sampler) == [[2, 3], [6, 7], [10, 11], [14, 15]]


def test_resume_continues_the_order_and_keeps_the_full_length() -> None:
    whole = MicroBatchSampler(4, 1, 1, 2, 2, total_steps=6)
    resumed = MicroBatchSampler(4, 1, 1, 2, 2, start_step=4, total_steps=6)
    assert list(resumed) == list(whole)[8:]
    assert len(resumed) == len(whole) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 4, "micro_batch": 3}, "not the global batch 4"),
        ({"global_batch": 0, "micro_batch": 0}, "at least 1"),
        ({"global_batch": 2, "micro_batch": 1, "world_size": 2, "rank": 2}, r"rank 2 .* 0\.\.1"),
        ({"global_batch": 1, "micro_batch": 1, "total_steps": 0}, "total_steps 0"),
    ],
)
def test_impossible_splits(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MicroBatchSampler(**arguments)
