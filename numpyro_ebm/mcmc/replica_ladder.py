# SPDX-License-Identifier: Apache-2.0
"""The ladder of temperatures of :class:`~numpyro_ebm.ReplicaExchange`, and its warm-up.

Step sizes follow the acceptance of every replica by dual averaging. The inner temperatures move at
the end of every window of BlackJAX's schedule, which double, to where all pairs would have swapped
equally often in it; the ends stay.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.staged_adaptation import build_schedule

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.mcmc.adaptation import Tuner
from numpyro_ebm.samplers.tempering import equal_rejection_ladder

__all__ = ["LadderState", "LadderWarmup", "read_ladder"]


class LadderState(NamedTuple):
    """What :class:`~numpyro_ebm.ReplicaExchange` adapts in warm-up.

    - **step_size** - ε of every replica, (K,).
    - **inverse_temperatures** - β of every replica, (K,), the first is 1.
    - **tuner** - states of BlackJAX's dual averaging, (K,).
    - **rejection, count** - summed 1 - α of every pair in the present window, and its steps.
    """

    step_size: jax.Array
    inverse_temperatures: jax.Array
    tuner: object
    rejection: jax.Array
    count: jax.Array


def read_ladder(inverse_temperatures, num_replicas, min_inverse_temperature):
    """The ladder that the arguments of :class:`~numpyro_ebm.ReplicaExchange` mean, (K,).

    :raises ModelError: if they mean none.
    """
    if inverse_temperatures is None:
        check_integer("ReplicaExchange", 2, num_replicas=num_replicas)
        if not 0 < min_inverse_temperature < 1:
            raise ModelError(
                "ReplicaExchange: `min_inverse_temperature` must be between 0 and 1, got "
                f"{min_inverse_temperature}; give `inverse_temperatures` to end with 0."
            )
        inverse_temperatures = np.geomspace(1.0, min_inverse_temperature, num_replicas)
    ladder = np.asarray(inverse_temperatures, float)
    if (
        ladder.ndim != 1
        or len(ladder) < 2
        or ladder[0] != 1
        or not np.all(np.diff(ladder) < 0)
        or not ladder[-1] >= 0
    ):
        raise ModelError(
            "ReplicaExchange: `inverse_temperatures` must be two or more numbers that decrease "
            f"from 1 and stay above or at 0, got {ladder.tolist()}."
        )
    return ladder


class LadderWarmup(NamedTuple):
    """The warm-up as pure functions of :class:`LadderState`.

    - **step_size** - ε at β = 1 at its start; ``None`` where the user gave none.
    - **tuner** - of the step sizes.
    - **adapt_step_size, adapt_ladder** - whether step sizes and temperatures move.
    """

    step_size: float | None
    tuner: Tuner
    adapt_step_size: bool
    adapt_ladder: bool

    def check(self, num_warmup):
        """Somebody has to choose the step size.

        :raises ModelError: if neither the user nor a warm-up of this length does.
        """
        if self.step_size is None and not (self.adapt_step_size and num_warmup > 0):
            raise ModelError(
                "ReplicaExchange: without warm-up adaptation (`num_warmup` > 0 and "
                "`adapt_step_size=True`) pass a `step_size`."
            )

    def init(self, ladder):
        """State at the start, from a ladder of :func:`read_ladder`."""
        step_size = 0.1 if self.step_size is None else self.step_size
        least = ladder[ladder > 0].min()  # β = 0 has the step size of the replica before it
        ladder = jnp.asarray(ladder, float)
        step_sizes = step_size / jnp.maximum(ladder, least)
        pairs = jnp.zeros(len(ladder) - 1)
        tuner = jax.vmap(self.tuner.init)(step_sizes)
        return LadderState(step_sizes, ladder, tuner, pairs, jnp.zeros(()))

    def update(self, i, num_warmup, state, accept, swap_prob):
        """State after step i, which may be past the warm-up.

        :param accept: mean acceptance probability of every replica, (K,).
        :param swap_prob: mean swap probability of every pair, (K - 1,).
        """
        if num_warmup == 0 or not (self.adapt_step_size or self.adapt_ladder):
            return state
        return jax.lax.cond(
            i < num_warmup,
            lambda: self._update(i, num_warmup, state, accept, swap_prob),
            lambda: state,
        )

    def _update(self, i, num_warmup, state, accept, swap_prob):
        new = state
        if self.adapt_step_size:
            tuner = jax.vmap(self.tuner.update)(state.tuner, accept)
            is_last = i == num_warmup - 1
            final, current = (jax.vmap(f)(tuner) for f in (self.tuner.final, self.tuner.current))
            new = new._replace(step_size=jnp.where(is_last, final, current), tuner=tuner)
        if self.adapt_ladder:
            with jax.ensure_compile_time_eval():  # BlackJAX makes arrays of it
                schedule = np.asarray(build_schedule(num_warmup), bool)
            in_window, ends = (jnp.asarray(x)[i] for x in schedule.T)
            new = new._replace(
                rejection=state.rejection + in_window * (1 - swap_prob),
                count=state.count + in_window,
            )
            moved = self._end_window(new)
            new = jax.tree.map(lambda a, b: jnp.where(ends, a, b), moved, new)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), new, state)

    def _end_window(self, state):
        old = state.inverse_temperatures
        rejection = state.rejection / jnp.maximum(state.count, 1)
        ladder = equal_rejection_ladder(old, rejection)
        state = state._replace(
            inverse_temperatures=ladder,
            rejection=jnp.zeros_like(state.rejection),
            count=jnp.zeros_like(state.count),
        )
        if not self.adapt_step_size:
            return state
        step_size = jnp.exp(jnp.interp(-ladder, -old, jnp.log(state.step_size)))
        return state._replace(step_size=step_size, tuner=jax.vmap(self.tuner.init)(step_size))
