# SPDX-License-Identifier: Apache-2.0
"""Rounds chunk by chunk, of a program whose state is the number of its rounds."""

import numpy as np
import pytest

from numpyro_ebm.svi.endings import Why
from numpyro_ebm.svi.loop import Look, next_length, run_chunks
from numpyro_ebm.svi.minibatch import CHUNK


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


def test_a_chunk_is_as_long_as_it_takes_half_a_second():
    assert [next_length(100, seconds) for seconds in (0.1, 0.5, 2.0)] == [400, 100, 25]
    assert next_length(CHUNK, 0.01) == CHUNK and next_length(1, 60.0) == 1
