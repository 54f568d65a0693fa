# SPDX-License-Identifier: Apache-2.0
"""Many rounds of training in one compiled loop, their random numbers drawn ahead.

How many rounds one call takes follows the time they need: a progress bar moves and Ctrl-C is heard,
while the host is asked for as little as possible.
"""

import time
import warnings
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from numpyro.infer.svi import SVIRunResult
from tqdm import tqdm

from numpyro_ebm._compat import find_stack_level
from numpyro_ebm.errors import InterruptedWarning, NonFiniteLossWarning
from numpyro_ebm.program.draws import at, split_off_draws
from numpyro_ebm.svi.state import EnergySVIState, select

__all__ = [
    "CHUNK",
    "Callback",
    "Why",
    "run_chunks",
    "take_rounds",
    "warn_of_interruption",
    "warn_of_stop",
    "warn_of_undone",
]

Callback: TypeAlias = Callable[[int, EnergySVIState, np.ndarray], bool | None]

CHUNK = 1024
"""The most rounds between two looks at the losses; each chunk is one compiled call."""

SECONDS_PER_LOOK = 0.5
"""About how long a chunk may take, so that the progress bar moves and Ctrl-C is heard."""

DRAWN_AHEAD = 4 * 2**20
"""Bytes of random numbers that are drawn before the rounds they are for."""


class Why(Enum):
    """Why a run ended."""

    DONE = "all rounds are taken"
    NOT_FINITE = "the next round is not finite"
    CALLBACK = "a callback asked for it"
    INTERRUPTED = "the user interrupted it"


def take_rounds(
    one_round: Callable[..., tuple[EnergySVIState, jax.Array]],
    is_finite: Callable[..., jax.Array],
    state: EnergySVIState,
    length: ArrayLike,
    *,
    watched: bool,
    stable: bool,
) -> tuple[EnergySVIState, jax.Array, jax.Array, jax.Array | None]:
    """Up to CHUNK rounds in one loop.

    A state or a loss that is not finite is looked for after every round if ``watched``, which then
    ends the loop before it (or, with ``stable``, undoes the round, which counts), and otherwise at
    the end only: a parameter that is not finite never becomes finite again.

    :param one_round: ``(step_key, state, i) -> (state, loss)``, the i-th round of the chunk.
    :param is_finite: ``(state, loss, state before) -> bool``.
    :param EnergySVIState state: where to start.
    :param length: number of rounds, not over CHUNK; may be traced.
    :param bool watched: whether to look after every round.
    :param bool stable: whether to go on after a round that is not finite.
    :return: the last state, the losses, the number of rounds, and whether all are finite.
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
    ahead = max(1, min(CHUNK, DRAWN_AHEAD // max(size, 1)))
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
    if not watched:
        ok = is_finite(state, losses, first)
    return state, losses, taken, ok


def is_counter_based(rng_key: jax.Array) -> bool:
    """Whether numbers drawn for many keys at once are those drawn for each of them alone."""
    return jax.random.key_impl(rng_key) == "threefry2x32"


def run_chunks(
    take_chunk: Callable[..., Any],
    state: EnergySVIState,
    num_steps: int,
    length: int,
    *,
    watched: bool,
    progress_bar: bool,
    callback: Callback | None = None,
    every: int | None = None,
) -> tuple[EnergySVIState, np.ndarray, int, Why]:
    """Take rounds chunk by chunk, with a look at the losses in between.

    Ctrl-C ends the run at the last chunk that was finished.

    :param take_chunk: ``(state, length, watched) -> (state, losses, taken, ok)``, as
        :func:`take_rounds`.
    :param EnergySVIState state: where to start.
    :param int num_steps: number of rounds.
    :param int length: number of rounds in the first chunk.
    :param bool watched: whether to look after every round. Otherwise a chunk that ends with what is
        not finite is taken again, to find the first round that went wrong.
    :param bool progress_bar: whether to show a progress bar.
    :param callback: ``(step, state, losses)``, called on the host after every so many rounds; the
        run ends if it returns True.
    :param int every: how many.
    :return: the last finite state, the losses (with that of the round that was not finite, if there
        is one), the length for another chunk, and why the run ended.
    """
    losses, done, told, why = [], 0, 0, Why.DONE
    with tqdm(total=num_steps, disable=not progress_bar) as bar:
        try:
            while done < num_steps and why is Why.DONE:
                now = min(length, num_steps - done)
                if every is not None:
                    now = min(now, told + every - done)
                start = time.perf_counter()
                new, chunk_losses, taken, ok = take_chunk(state, now, watched)
                if not ok:
                    new, chunk_losses, taken, _ = take_chunk(state, now, True)
                taken = int(taken)
                seconds = time.perf_counter() - start
                found = np.asarray(chunk_losses)[: min(taken + 1, now)]
                state, done = new, done + taken
                losses.append(found)
                why = Why.NOT_FINITE if taken < now else Why.DONE
                bar.update(taken)
                if progress_bar:
                    bar.set_postfix_str(f"loss: {found.mean():.4f}", refresh=False)
                if now == length:  # a remainder says nothing about the time of a chunk
                    length = next_length(length, seconds)
                if callback is not None and why is Why.DONE and done == told + (every or done):
                    since, told = np.concatenate(losses)[told:], done
                    if callback(int(state.step), state, since):
                        why = Why.CALLBACK
        except KeyboardInterrupt:
            why = Why.INTERRUPTED
    return state, np.concatenate([np.zeros(0), *losses]), length, why


def warn_of_interruption(result: SVIRunResult, num_steps: int) -> None:
    """Say that a run was interrupted after so many of its rounds."""
    warning = InterruptedWarning(
        f"EnergySVI was interrupted after {len(result.losses)} of {num_steps} rounds. The result "
        "holds the state after them; `init_state=fit.state` goes on from there.",
        result,
    )
    warnings.warn(warning, stacklevel=find_stack_level())


def warn_of_stop(result: SVIRunResult, num_steps: int) -> None:
    """Say that a run stopped after so many of its rounds, since the next one is not finite."""
    done = len(result.losses) - 1
    warning = NonFiniteLossWarning(
        f"EnergySVI stopped: step {done + 1} of {num_steps} gave a loss of "
        f"{float(result.losses[-1])} or parameters, or numbers of an optimiser, that are not "
        f"finite. The result holds the last finite state, after {done} steps. Try a smaller "
        "learning rate, gradient clipping (`optax.chain(optax.clip_by_global_norm(1.0), ...)`), or "
        "a bounded parameterisation.",
        result,
    )
    warnings.warn(warning, stacklevel=find_stack_level())


def warn_of_undone(result: SVIRunResult, undone: int, num_steps: int) -> None:
    """Say how many rounds of a run were undone, if any were."""
    if not undone:
        return
    warning = NonFiniteLossWarning(
        f"EnergySVI: {undone} of {num_steps} rounds were undone (`stable_update`), since a loss, a "
        "parameter or a number of an optimiser was not finite after them; their losses are NaN. "
        "Try a smaller learning rate or gradient clipping.",
        result,
    )
    warnings.warn(warning, stacklevel=find_stack_level())


def next_length(length: int, seconds: float) -> int:
    """Longer chunks while they are quick, shorter ones where a chunk keeps the user waiting."""
    if seconds < SECONDS_PER_LOOK / 2:
        return min(4 * length, CHUNK)
    if seconds > SECONDS_PER_LOOK * 2:
        return max(1, int(length * SECONDS_PER_LOOK / seconds))
    return length
