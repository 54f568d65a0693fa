# SPDX-License-Identifier: Apache-2.0
"""Batches of iterables and of arrays on disk, read without a run: which, when, and how many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.svi import sources, streamed
from numpyro_ebm.svi.minibatch import Minibatches
from numpyro_ebm.svi.sources import find_source
from numpyro_ebm.svi.streamed import StreamedBatches


class Loader:
    """Batches whose numbers are their places in all epochs; every third one is short."""

    def __init__(self, num=6, short=3):
        self.num, self.short, self.epochs = num, short, 0

    def __iter__(self):
        self.epochs += 1
        for i in range(self.num):
            yield np.full((2 if (i + 1) % self.short == 0 else 4, 3), float(i))


def numbers(source, step, many):
    source.first(step)
    batches = source.read(jax.random.key(2))
    return [float(next(batches)[0][0, 0]) for _ in range(many)]


@pytest.mark.parametrize("step", [0, 1, 5])
def test_short_batches_are_left_out_in_every_epoch(step):
    loader = Loader()
    found = numbers(find_source((loader, jnp.ones(2)), {}, None), step, 9)
    assert found == [0, 1, 3, 4][step % 4 :] + ([0, 1, 3, 4] * 3)[: 9 - 4 + step % 4]
    assert loader.epochs == -(-(step + 9) // 4)


def test_an_iterator_goes_on_from_where_it_is():
    batches = iter(Loader())
    next(batches)
    assert numbers(find_source((batches,), {}, None), 3, 3) == [1, 3, 4]
    assert list(find_source((iter(Loader()),), {}, None).first(0)[0][0][0]) == [0, 0, 0]


def test_so_many_short_batches_in_a_row_are_no_ends_of_epochs(monkeypatch):
    monkeypatch.setattr(sources, "MOST_SHORT", 5)
    source = find_source((Loader(20, short=2),), {}, None)  # one at a time, ten in all
    assert numbers(source, 0, 12) == [*range(0, 20, 2), 0, 2]
    first = [np.ones((4, 3)), *[np.ones((2, 3))] * 6, np.ones((4, 3))]
    source = find_source((iter(first),), {}, None)
    with pytest.raises(ebm.ModelError, match="All batches have one form"):
        numbers(source, 0, 2)


def test_arrays_on_disk_are_batches_of_all_their_rows(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(7, 2))
    x[:] = np.arange(14.0).reshape(7, 2)
    source = find_source((x, np.arange(7.0), np.ones(3)), {"k": 2}, 3)
    args, kwargs = source.first(4)
    assert [np.shape(y) for y in args] == [(3, 2), (3,), (3,)] and kwargs == {"k": 2}
    plan = source.minibatches(args, kwargs)
    assert (plan.num_rows, plan.batch_size, plan.total_rows, source.num_rows) == (7, 3, 7, 7)
    assert plan.kinds == ("step", "step", "array", "static")
    batches, seen = source.read(jax.random.key(2)), []
    for _ in range(4):  # of the rounds 4 to 7, in epochs of two
        rows, places = next(batches)
        np.testing.assert_array_equal(rows[:, 0], 2 * places)
        seen.append(places)
    for epoch in (seen[:2], seen[2:]):
        assert len(np.unique(epoch)) == 6
    assert not np.array_equal(seen[:2], seen[2:])
    whole = find_source((x,), {}, 7)
    whole.first(0)
    np.testing.assert_array_equal(next(whole.read(jax.random.key(2)))[0], x)
    for wrong in (8, 0):
        with pytest.raises(ebm.ModelError):
            find_source((x,), {}, wrong)


class Numbers:
    """A source of batches of two equal numbers, which tells how many it gave."""

    num_rows = None

    def __init__(self, num):
        self.num, self.given = num, 0

    def minibatches(self, args, kwargs):
        return Minibatches.streamed(args, kwargs, [True, False], 2, 2)

    def read(self, rng_key):
        for i in range(self.num):
            self.given += 1
            yield [np.full(2, float(i))]

    def position(self):
        return self.given


@pytest.mark.parametrize(
    "num, bad, blocks", [(99, 99, [4, 1, 4, 1]), (6, 99, [4, 1, 1, 0]), (99, 7, [4, 1, 2, 0])]
)
def test_batches_are_read_in_blocks(monkeypatch, num, bad, blocks):
    """No more than there are rounds; until they end, or one cannot be used.

    What is read while a chunk runs is there when the chunk is: one batch, of a chunk that is done.
    """
    monkeypatch.setattr(streamed, "BLOCK_BYTES", 4 * 16)
    source, other = Numbers(num), np.arange(3.0)
    args = np.zeros(2), other
    one = StreamedBatches(source, args, {}, jax.random.key(2), 20, 10, None, {})
    one._are_possible = lambda arrays: arrays[0][:, 0] != bad

    class Impossible:
        def check_data(self, *_):
            raise ebm.ModelError("off its support")

    one._at = lambda args, kwargs: Impossible()
    step, told = 20, 0
    for i, block in enumerate(blocks):
        if i == 1:
            one.read_ahead(jnp.zeros(2))
        assert one.ready(step) == one.ready(step) == block
        told = step - 20 if block else told
        assert one.position == told  # where a run that goes on finds the batch of its next round
        for j in range(block):
            arrays, place = one.chunk(step + j, 1)
            (batch, held), _ = one.minibatches.batch(arrays, place, 0)
            np.testing.assert_array_equal(batch, [step + j - 20.0] * 2)
            np.testing.assert_array_equal(held, other)
        step += block
    assert source.given == min(num, 10) if bad == 99 else isinstance(one.error, ebm.ModelError)
