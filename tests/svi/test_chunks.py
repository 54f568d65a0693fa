# SPDX-License-Identifier: Apache-2.0
"""Rounds chunk by chunk, of a program whose state is the number of its rounds."""

from types import SimpleNamespace

import numpy as np
import pytest

from numpyro_ebm.svi.endings import Why
from numpyro_ebm.svi.loop import Look, next_length, run_chunks
from numpyro_ebm.svi.minibatch import CHUNK, Minibatches
from numpyro_ebm.svi.running import _with_losses_since


class Program:
    """Round ``bad`` is not finite; of a chunk that is not watched nothing after it is either."""

    def __init__(self, bad=99, batches=99):
        self.bad, self.batches, self.chunks, self.told = bad, batches, [], []

    def take(self, state, length, watched, seconds):
        start = int(state["rounds"])
        self.chunks.append(length)
        assert (seconds == np.inf) == (len(self.chunks) == 1)
        losses, taken = np.zeros(CHUNK), min(length, self.bad - start)
        losses[:length] = np.where(np.arange(length) < taken, start + np.arange(length), np.nan)
        if watched:
            return {"rounds": np.array(start + taken, float)}, losses, taken, taken == length
        rounds = start + length if taken == length else np.nan
        return {"rounds": np.array(rounds)}, losses, length, None

    def run(self, num_steps, *looks, begin=0, end=99, **options):
        def call(state, losses):
            assert int(state["rounds"]) == len(losses)
            np.testing.assert_array_equal(losses, np.arange(len(losses)))
            self.told.append(len(losses))
            return len(losses) >= end

        state, losses, _, why = run_chunks(
            *(self.take, lambda state: self.batches - int(state["rounds"])),
            *({"rounds": np.array(begin, float)}, num_steps, 2),
            **{"watched": False, "progress_bar": False},
            **{"looks": [Look(call, **look) for look in looks], "before": np.arange(float(begin))},
            **options,
        )
        return int(state["rounds"]), list(losses), why


FIVES = {"rounds": 5}


@pytest.mark.parametrize(
    "program, options, looks, chunks, told, rounds, why",
    [
        ({}, {}, [], [2, 8, 2], [], 12, Why.DONE),
        ({}, {}, [FIVES], [2, 3, 5, 2], [5, 10], 12, Why.DONE),
        ({}, {"end": 5}, [FIVES], [2, 3], [5], 5, Why.CALLBACK),
        ({}, {"begin": 7}, [FIVES], [2, 1, 2], [10], 12, Why.DONE),
        ({}, {}, [{"seconds": 0.0}], [2, 8, 2], [2, 10, 12], 12, Why.DONE),
        ({"batches": 6}, {}, [FIVES], [2, 3, 1], [5], 6, Why.NO_BATCH),
        ({"bad": 3}, {}, [{"seconds": 0.0}], [2, 8, 8], [2], 3, Why.NOT_FINITE),
        ({"bad": 2}, {}, [], [2, 8, 8], [], 2, Why.NOT_FINITE),
    ],
)
def test_a_run_is_made_of_chunks(program, options, looks, chunks, told, rounds, why):
    one = Program(**program)
    found, losses, end = one.run(12, *looks, **options)
    assert (found, end, one.chunks, one.told) == (rounds, why, chunks, told)
    expected = [*range(rounds), *[np.nan] * (why is Why.NOT_FINITE)]
    np.testing.assert_array_equal(losses, expected)


@pytest.mark.parametrize("before, since", [(0, 0), (5, 5), (7, 5)])
def test_a_callback_gets_the_losses_since_the_last_call(before, since):
    """Also of a run that went on: since the last of the rounds at which it is called."""
    told, losses = [], np.arange(20.0)
    call = _with_losses_since(lambda *x: told.append(x), 5, before)
    state = SimpleNamespace(step=np.array(30))
    for end in (10, 15):
        assert call(state, losses[:end]) is None
    np.testing.assert_array_equal(told[0][2], losses[since:10])
    np.testing.assert_array_equal(told[1][2], losses[10:15])
    assert [x[:2] for x in told] == [(30, state)] * 2 and told[0][2].base is None


def test_a_look_at_other_numbers_of_rows():
    """Fewer than there are are cut as a batch is; all of them are not cut."""
    rows = SimpleNamespace(num_rows=7, total_rows=7, plate="data")
    plan = Minibatches.of(rows, (np.arange(7), np.arange(3)), {"k": 2}, 3)
    found = [plan.resized(n) for n in (3, 5, 7, 99)]
    assert [x.batch_size for x in found] == [3, 5, 7, 7]
    cut, whole = ("rows", "array", "static"), ("array", "array", "static")
    assert [x.kinds for x in found] == [cut, cut, whole, whole] and found[0].static == (2,)
    assert found[1].indices(lambda epoch: np.arange(7) + 10 * epoch, 1, 1).tolist() == [
        [10, 11, 12, 13, 14]
    ]
    assert found[2].indices(None, 0, 1) is None


def test_a_chunk_is_as_long_as_it_takes_half_a_second():
    assert [next_length(100, seconds) for seconds in (0.1, 0.5, 2.0)] == [400, 100, 25]
    assert next_length(CHUNK, 0.01) == CHUNK and next_length(1, 60.0) == 1
