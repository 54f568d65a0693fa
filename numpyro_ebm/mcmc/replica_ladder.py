# SPDX-License-Identifier: Apache-2.0
"""The ladder of temperatures of :class:`~numpyro_ebm.ReplicaExchange`, and its warm-up.

Step sizes follow the acceptance of every replica. The inner temperatures move at the end of every
window of the warm-up to where all pairs would have swapped equally often in it; the ends stay.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.mcmc.adaptation import Tuner, WindowAdaptation, adapted_steps
from numpyro_ebm.samplers.tempering import equal_rejection_ladder

__all__ = ["LadderAdaptation", "LadderState", "parse_ladder"]


class LadderState(NamedTuple):
    """Quantities that :class:`~numpyro_ebm.ReplicaExchange` adapts in warm-up.

    - **step_size** - ε of every replica and row, (K, rows).
    - **inverse_temperatures** - β of every replica, (K,), the first is 1.
    - **tuner** - states of BlackJAX's dual averaging, (K, rows).
    - **rejection, num_steps** - summed 1 - α of every pair in the present window, and its steps.
    """

    step_size: jax.Array
    inverse_temperatures: jax.Array
    tuner: Any
    rejection: jax.Array
    num_steps: jax.Array


def parse_ladder(
    inverse_temperatures: npt.ArrayLike | None, num_replicas: int, min_inverse_temperature: float
) -> np.ndarray:
    """The ladder of the arguments of :class:`~numpyro_ebm.ReplicaExchange`, (K,).

    :raises ModelError: if they are out of range.
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


class LadderAdaptation(WindowAdaptation):
    """Step sizes of all replicas, and the temperatures between the ends of the ladder.

    :param int num_warmup: length of the warm-up.
    :param Tuner tuner: of one step size.
    :param bool adapt_step_size: whether step sizes move.
    :param bool adapt_ladder: whether temperatures do.
    """

    def __init__(self, num_warmup: int, tuner: Tuner, adapt_step_size: bool, adapt_ladder: bool):
        tuner = Tuner(*(jax.vmap(jax.vmap(function)) for function in tuner))
        super().__init__(adapted_steps(num_warmup), tuner, adapt_step_size, adapt_ladder)

    def init(self, ladder: np.ndarray, step_size: float, num_rows: int) -> LadderState:
        """State at the start.

        :param ladder: of :func:`parse_ladder`.
        :param float step_size: ε at β = 1.
        :param int num_rows: number of rows.
        """
        least = ladder[ladder > 0].min()  # β = 0 has the step size of the replica before it
        inverse_temperatures = jnp.asarray(ladder, float)
        step_sizes = step_size / jnp.maximum(inverse_temperatures, least)
        step_sizes = jnp.tile(step_sizes[:, None], num_rows)
        pairs = jnp.zeros(len(ladder) - 1)
        return LadderState(
            step_sizes, inverse_temperatures, self.tuner.init(step_sizes), pairs, jnp.zeros(())
        )

    def _gather(self, state, observed):
        return state._replace(
            rejection=state.rejection + (1 - observed), num_steps=state.num_steps + 1
        )

    def _end_window(self, state):
        old = state.inverse_temperatures
        rejection = state.rejection / jnp.maximum(state.num_steps, 1)
        ladder = equal_rejection_ladder(old, rejection)
        if self.adapt_step_size:
            interpolate = jax.vmap(lambda y: jnp.interp(-ladder, -old, y), 1, 1)
            step_size = jnp.exp(interpolate(jnp.log(state.step_size)))
            state = state._replace(step_size=step_size)
        return state._replace(
            inverse_temperatures=ladder,
            rejection=jnp.zeros_like(state.rejection),
            num_steps=jnp.zeros_like(state.num_steps),
        )
