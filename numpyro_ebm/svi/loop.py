# SPDX-License-Identifier: Apache-2.0
"""Many rounds of training in one compiled loop, their random numbers drawn ahead.

How many rounds one call takes follows the time they need: a progress bar moves and Ctrl-C is heard,
while the host is asked for as little as possible.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from tqdm import tqdm

from numpyro_ebm.program.draws import at, split_off_draws
from numpyro_ebm.svi.endings import Why
from numpyro_ebm.svi.minibatch import CHUNK
from numpyro_ebm.svi.state import EnergySVIState, is_finite, is_finite_on_host, select

__all__ = [
    "Callback",
    "Look",
    "run_chunks",
    "take_rounds",
]

Callback: TypeAlias = Callable[[int, EnergySVIState, np.ndarray], bool | None]

SECONDS_PER_LOOK = 0.5
"""About how long a chunk may take, so that the progress bar moves and Ctrl-C is heard."""

DRAWN_AHEAD = 4 * 2**20
"""Bytes of random numbers that are drawn before the rounds they are for."""

ROUNDS_AHEAD = 64
"""For how many rounds at most: a chunk of few draws no more than these."""


def take_rounds(
    one_round: Callable[..., tuple[EnergySVIState, jax.Array]],
    state: EnergySVIState,
    length: ArrayLike,
    *,
    watched: bool,
    stable: bool,
) -> tuple[EnergySVIState, jax.Array, jax.Array, jax.Array | None]:
    """Up to CHUNK rounds in one loop.

    A state or a loss that is not finite is looked for after every round if ``watched``, which then
    ends the loop before it (or, with ``stable``, undoes the round, which counts), and otherwise at
    the end only: a parameter that is not finite never becomes finite again. That look is part of
    the loop's program, or on a CPU, in one process, left to :func:`run_chunks`.

    :param one_round: ``(step_key, state, i) -> (state, loss)``, the i-th round of the chunk.
    :param EnergySVIState state: where to start.
    :param length: number of rounds, not over CHUNK; may be traced.
    :param bool watched: whether to look after every round.
    :param bool stable: whether to go on after a round that is not finite.
    :return: the last state, the losses, the number of rounds, and whether all are finite, or
        ``None`` where nobody looked.
    """

    def looked_at(step_key, state, i):
        new_state, loss = one_round(step_key, state, i)
        if not watched:
            return new_state, loss, None
        ok = is_finite(new_state, loss, state)
        kept = select(ok, new_state, state)
        if stable:
            kept = kept._replace(step=new_state.step)
            return kept, jnp.where(ok, loss, jnp.nan), jnp.array(True)
        return kept, loss, ok

    first = state
    draw, finish, size = split_off_draws(looked_at, state.rng_key, state, jnp.array(0))
    ahead = max(1, min(ROUNDS_AHEAD, DRAWN_AHEAD // max(size, 1)))
    if not is_counter_based(state.rng_key):
        ahead = 1  # drawn for several rounds at once, its numbers are others

    def goes_on(carry, end):
        i, ok, *_ = carry
        return i < end if ok is None else ok & (i < end)

    def rounds(carry):
        start, ok, state, losses = carry
        step = state.step
        keys = jax.vmap(partial(jax.random.fold_in, state.rng_key))(step + jnp.arange(ahead))
        draws = jax.vmap(draw)(keys)

        def one(carry):
            i, _, state, losses = carry
            mine = [at(x, state.step - step) for x in draws]
            state, loss, ok = finish(mine, state, i)
            losses = losses.at[i].set(loss, mode="promise_in_bounds", wrap_negative_indices=False)
            return i + (1 if ok is None else ok), ok, state, losses

        end = jnp.minimum(start + ahead, length)
        return lax.while_loop(partial(goes_on, end=end), one, carry)

    losses = jnp.zeros(CHUNK, jnp.result_type(float))
    ok = jnp.array(True) if watched else None
    taken, ok, state, losses = lax.while_loop(
        partial(goes_on, end=length), rounds, (jnp.array(0), ok, state, losses)
    )
    if not watched and (jax.default_backend() != "cpu" or jax.process_count() > 1):
        ok = is_finite(state, losses, first)
    return state, losses, taken, ok


def is_counter_based(rng_key: jax.Array) -> bool:
    """Whether numbers drawn for many keys at once are those drawn for each of them alone."""
    return jax.random.key_impl(rng_key) == "threefry2x32"


class Look(NamedTuple):
    """What is done on the host from time to time while a run goes on.

    - **call** - a function of the state and of the losses since the run began; the run ends if it
      returns True.
    - **rounds** - how many lie between two calls, or ``None``.
    - **seconds** - after how many seconds it is called at the next occasion, or ``None``.
    """

    call: Callable[[EnergySVIState, np.ndarray], bool | None]
    rounds: int | None = None
    seconds: float | None = None


class _Losses:
    """The losses so far, in an array that is doubled when it is full: views of it never change."""

    def __init__(self, before: np.ndarray | None):
        self._held, self._number = np.empty(0, jnp.result_type(float)), 0
        self.add(self._held if before is None else before)

    def add(self, found: np.ndarray) -> None:
        end = self._number + len(found)
        if end > len(self._held):
            held = np.empty(max(end, 2 * self._number), self._held.dtype)
            held[: self._number] = self.so_far()
            self._held = held
        self._held[self._number : end] = found
        self._number = end

    def so_far(self) -> np.ndarray:
        return self._held[: self._number]


def run_chunks(
    take_chunk: Callable[..., Any],
    ready: Callable[[EnergySVIState], int],
    state: EnergySVIState,
    num_steps: int,
    length: int,
    *,
    watched: bool,
    progress_bar: bool,
    looks: Sequence[Look] = (),
    before: np.ndarray | None = None,
) -> tuple[EnergySVIState, np.ndarray, int, Why]:
    """Take rounds chunk by chunk, with a look at the losses in between.

    ``KeyboardInterrupt`` ends the run at the last chunk that was finished.

    :param take_chunk: ``(state, length, watched, seconds) -> (state, losses, taken, ok)``, as
        :func:`take_rounds`; ``seconds`` is what the chunk before took, inf of the first one.
    :param ready: how many rounds from a state on have their batches; 0 if there are no more.
    :param EnergySVIState state: where to start.
    :param int num_steps: number of rounds.
    :param int length: number of rounds in the first chunk.
    :param bool watched: whether to look after every round. Otherwise a chunk that ends with what is
        not finite is taken again, to find the first round that went wrong.
    :param bool progress_bar: whether to show a progress bar.
    :param looks: what is done in between.
    :param before: losses of rounds that the run took before it was stopped; they count.
    :return: the last finite state, the losses (with that of the round that was not finite, if there
        is one), the length for another chunk, and why the run ended.
    """
    losses, why, seconds = _Losses(before), Why.DONE, math.inf
    done = len(losses.so_far())
    last = [(done - done % (look.rounds or 1), time.perf_counter()) for look in looks]
    with tqdm(total=num_steps, initial=done, disable=not progress_bar) as bar:
        try:
            while done < num_steps and why is Why.DONE:
                available = ready(state)
                if not available:
                    why = Why.NO_BATCH
                    break
                now = min(length, num_steps - done, available)
                for look, (told, _) in zip(looks, last, strict=True):
                    if look.rounds is not None:
                        now = min(now, told + look.rounds - done)
                start = time.perf_counter()
                new, chunk_losses, taken, ok = take_chunk(state, now, watched, seconds)
                if ok is None:
                    ok = is_finite_on_host(new, chunk_losses, state)
                if not ok:
                    new, chunk_losses, taken, _ = take_chunk(state, now, True, seconds)
                taken = int(taken)
                seconds = time.perf_counter() - start
                found = np.asarray(chunk_losses)[: min(taken + 1, now)]
                losses.add(found)
                state, done = new, done + taken  # at once: an interruption may come between lines
                why = Why.NOT_FINITE if taken < now else Why.DONE
                bar.update(taken)
                if progress_bar:
                    bar.set_postfix_str(f"loss: {found.mean():.4f}", refresh=False)
                if now == length:  # a remainder says nothing about the time of a chunk
                    length = next_length(length, seconds)
                for i, look in enumerate(looks if why is not Why.NOT_FINITE else ()):
                    if _is_due(look, done, *last[i]):
                        last[i] = done, time.perf_counter()
                        if look.call(state, losses.so_far()):
                            why = Why.CALLBACK
        except KeyboardInterrupt:
            why = Why.INTERRUPTED
    known = done + (why is Why.NOT_FINITE)
    return state, losses.so_far()[:known].copy(), length, why


def _is_due(look, done, told, then):
    after_rounds = look.rounds is not None and done == told + look.rounds
    return after_rounds or (look.seconds is not None and time.perf_counter() - then >= look.seconds)


def next_length(length: int, seconds: float) -> int:
    """Longer chunks while they are quick, shorter ones where a chunk keeps the user waiting."""
    if seconds < SECONDS_PER_LOOK / 2:
        return min(4 * length, CHUNK)
    if seconds > SECONDS_PER_LOOK * 2:
        return max(1, int(length * SECONDS_PER_LOOK / seconds))
    return length
