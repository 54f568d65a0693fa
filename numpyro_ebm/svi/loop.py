# SPDX-License-Identifier: Apache-2.0
"""Many rounds of training in one compiled loop, their random numbers drawn ahead.

How many rounds one call takes follows the time they need: a progress bar moves and Ctrl-C is heard,
while the host is asked for as little as possible.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.program.draws import at, split_off_draws

__all__ = ["CHUNK", "next_length", "select", "take_rounds"]

CHUNK = 1024
"""The most rounds between two looks at the losses; each chunk is one compiled call."""

SECONDS_PER_LOOK = 0.5
"""About how long a chunk may take, so that the progress bar moves and Ctrl-C is heard."""

DRAWN_AHEAD = 4 * 2**20
"""Bytes of random numbers that are drawn before the rounds they are for."""


def take_rounds(one_round, is_finite, state, length, *, watched, stable):
    """Up to CHUNK rounds in one loop.

    A state or a loss that is not finite is looked for after every round if ``watched``, which then
    ends the loop before it (or, with ``stable``, undoes the round), and otherwise at the end only:
    a parameter that is not finite never becomes finite again.

    :param one_round: ``(step_key, state, i) -> (state, loss)``, the i-th round of the chunk.
    :param is_finite: ``(state, loss) -> bool``.
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
        ok = is_finite(new_state, loss)
        new_state = select(ok, new_state, state)
        if stable:
            return new_state, jnp.where(ok, loss, jnp.nan), jnp.array(True)
        return new_state, loss, ok

    draw, finish, size = split_off_draws(looked_at, state.rng_key, state, jnp.array(0))
    ahead = max(1, min(CHUNK, DRAWN_AHEAD // max(size, 1)))

    def goes_on(carry, end):
        i, ok, *_ = carry
        return i < end if ok is None else ok & (i < end)

    def rounds(carry):
        start, ok, state, losses = carry
        # A state that stays keeps its step and so its key: the step counts, not the round.
        step = state.optim_state[0]
        keys = jax.vmap(partial(jax.random.fold_in, state.rng_key))(step + jnp.arange(ahead))
        draws = jax.vmap(draw)(keys)

        def one(carry):
            i, _, state, losses = carry
            mine = [at(x, state.optim_state[0] - step) for x in draws]
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
        ok = is_finite(state, losses)
    return state, losses, taken, ok


def next_length(length, seconds):
    """Longer chunks while they are quick, shorter ones where a chunk keeps the user waiting."""
    if seconds < SECONDS_PER_LOOK / 2:
        return min(4 * length, CHUNK)
    if seconds > SECONDS_PER_LOOK * 2:
        return max(1, int(length * SECONDS_PER_LOOK / seconds))
    return length


def select(condition, new, old):
    """The new state where the condition holds, else the old one."""

    def leaf(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x  # the key of a run never changes
        return jnp.where(condition, x, y)

    return jax.tree.map(leaf, new, old)
