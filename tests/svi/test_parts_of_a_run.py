# SPDX-License-Identifier: Apache-2.0
"""A run whose program, batches and checkpoints are plain Python: who is told what, and when."""

from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.svi.endings import Why
from numpyro_ebm.svi.minibatch import CHUNK
from numpyro_ebm.svi.running import Run


class State(NamedTuple):
    step: np.ndarray
    ema: object = None
    objective_state: object = None


class Kept:
    """A folder of checkpoints, full after so many."""

    every, seconds = 4, None

    def __init__(self, room):
        self.room, self.written, self.finished = room, [], 0

    def write(self, rng_key, fit, position, settings):
        assert (rng_key, settings) == ("key", "settings")
        if len(self.written) == self.room:
            raise OSError("no space left on device")
        self.written.append((int(fit.state.step), len(fit.losses), position))

    def finish(self):
        self.finished += 1


def run_of(*, bad=99, batches=99, room=99, before=0, stable=False):
    """A run of ten rounds, with round ``bad`` not finite."""

    def chunk(state, batches, length, *, watched, stable, forward_mode, ema):
        start = int(state.step)
        taken = length if stable else min(length, bad - start)
        losses = np.zeros(CHUNK)
        losses[:length] = start + np.arange(length)
        if bad - start < length:
            losses[bad - start] = np.nan
        if not (watched or taken == length):
            return State(np.array(np.nan)), jnp.asarray(losses), length, None
        return State(np.array(start + float(taken))), jnp.asarray(losses), taken, taken == length

    run = object.__new__(Run)
    run.seen = []
    run._svi = SimpleNamespace(
        _compiled=SimpleNamespace(chunk=chunk),
        _length=3,
        _round=lambda: SimpleNamespace(ema_params=lambda state: {"a": 2.0}),
        _stated=lambda params: {**params, "fit_temperature": 0.5},
        get_params=lambda state: {"a": 1.0},
        loss=SimpleNamespace(has_statistics=lambda state: False, review_state=run.seen.append),
    )
    run._batches = SimpleNamespace(
        ready=lambda step: batches - step,
        read_ahead=lambda x: None,
        position="place",
        error=None if batches > 10 else OSError("gone"),
    )
    run._kept, run._key, run._settings, run._num_steps = Kept(room), "key", "settings", 10
    run._options = {"stable": stable, "forward_mode": False, "ema": 0.9}
    run._before, run._unwritten = np.arange(float(before)), None
    run._state = State(np.array(float(before)))
    return run


CTRL_C = SimpleNamespace(heard=lambda f: f, presses=0)


@pytest.mark.parametrize(
    "options, written, num_losses, why",
    [
        ({}, [(4, 4), (8, 8), (10, 10)], 10, Why.DONE),
        ({"before": 6}, [(8, 8), (10, 10)], 10, Why.DONE),
        ({"bad": 5}, [(4, 4), (5, 5)], 6, Why.NOT_FINITE),
        ({"batches": 7}, [(4, 4), (7, 7)], 7, Why.NO_BATCH),
        ({"room": 1}, [(4, 4)], 8, Why.CALLBACK),
    ],
)
def test_checkpoints_are_written_in_their_turn_and_at_the_end(options, written, num_losses, why):
    """The last one without the round that is not finite, which the result tells."""
    run = run_of(**options)
    result = run.take(CTRL_C, False, None, None)
    kept = run._kept
    assert kept.written == [(*x, "place") for x in written] and run._why is why
    assert len(result.losses) == num_losses and result.params == {"a": 1.0}
    assert result.ema_params == {"a": 2.0, "fit_temperature": 0.5}
    assert kept.finished == ("room" not in options)
    assert isinstance(run._unwritten, OSError) == ("room" in options)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({}, None, None),
        ({"bad": 5}, ebm.NonFiniteLossWarning, "step 6 of 10.*after 5 steps"),
        ({"batches": 7}, ebm.InterruptedWarning, "cannot take the next batch .OSError: gone"),
        ({"room": 1}, ebm.InterruptedWarning, "cannot write a checkpoint .OSError: no space"),
        ({"bad": 5, "stable": True}, ebm.NonFiniteLossWarning, "1 of 10 rounds were undone"),
    ],
)
def test_the_end_of_a_run_is_told(options, kind, message):
    """And only a run that came to its end is looked at."""
    run, ctrl_c = run_of(**options), SimpleNamespace(**vars(CTRL_C), answered=False)
    result = run.take(ctrl_c, False, None, None)
    if kind is None:
        run.tell(ctrl_c, result)
    else:
        with pytest.warns(kind, match=message) as told:
            run.tell(ctrl_c, result)
        assert told[0].message.result is result
    assert ctrl_c.answered and run.seen == [None] * (kind is None or "stable" in options)
