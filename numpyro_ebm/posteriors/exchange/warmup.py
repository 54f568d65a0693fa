# SPDX-License-Identifier: Apache-2.0
"""Warm-up of :class:`~numpyro_ebm.Exchange`: step sizes, covariances and the reference data sets.

A random walk searches its step size by stochastic approximation and gathers its covariance in
windows that double, as NUTS does; at the end of one its proposals keep their volume and change
their shape. A Langevin proposal is a random walk in the first half of the
warm-up; then the chain pauses while K fictitious data sets are drawn at the mean of what it
saw, and from there on their surrogate of log Z has a gradient. Every group of parameters has its
own step size and covariance.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ebm._compat import welford_algorithm
from numpyro_ebm.mcmc.adaptation import (
    Tuner,
    WindowAdaptation,
    search_tuner,
    tree_where,
    warmup_windows,
)
from numpyro_ebm.types import SiteValues

__all__ = ["ExchangeAdaptState", "ExchangeAdaptation"]

INIT_WELFORD, UPDATE_WELFORD, _ = welford_algorithm(is_diagonal_matrix=False)


class ExchangeAdaptState(NamedTuple):
    """Quantities that :class:`~numpyro_ebm.Exchange` adapts in warm-up.

    - **step_size** - of the proposal in units of ``scale``, (groups,).
    - **tuner** - state of its adaptation.
    - **scale** - Cholesky factor of the covariance, (groups, dimension, dimension).
    - **moments** - running moments of the present window.
    - **center** - running moments whose mean becomes the reference.
    - **reference** - θ̂, at which the reference data sets were drawn, (groups, dimension).
    - **references** - these data sets, K leading; ``None`` for a random walk.
    - **baselines** - log p̃ of their rows at θ̂, (K, rows).
    - **has_gradient** - whether they have been drawn.
    """

    step_size: jax.Array
    tuner: Any
    scale: jax.Array
    moments: Any
    center: Any
    reference: jax.Array
    references: Any
    baselines: Any
    has_gradient: jax.Array


class ReferenceSchedule(NamedTuple):
    """Steps of a warm-up that draws reference data sets, arrays of shape (steps,)."""

    in_center: np.ndarray  # whether the position counts in the mean that becomes the reference
    slot: np.ndarray  # index of the data set that is drawn, or -1
    is_paused: np.ndarray  # whether the chain keeps its position
    restarts: np.ndarray  # whether the last data set is drawn, and the step size restarts
    windows: np.ndarray  # of the covariance, before and after the data sets are drawn


def reference_schedule(num_warmup: int, num_references: int) -> ReferenceSchedule:
    """The schedule of a warm-up that draws so many reference data sets (0: a random walk)."""
    walk, hold = num_warmup, 0
    if num_references:
        walk, hold = num_warmup // 2, num_references + 1  # one more to see the gradient of them all
    step = np.arange(num_warmup)
    pieces = (
        warmup_windows(walk),
        np.zeros((2, hold), bool),
        warmup_windows(num_warmup - walk - hold),
    )
    return ReferenceSchedule(
        in_center=(step >= walk // 2) & (step < walk),
        slot=np.where((step >= walk) & (step < walk + num_references), step - walk, -1),
        is_paused=(step >= walk) & (step < walk + hold),
        restarts=step == walk + num_references - 1,
        windows=np.concatenate(pieces, axis=1),
    )


class ExchangeAdaptation(WindowAdaptation):
    """The warm-up as pure functions of :class:`ExchangeAdaptState`.

    :param int num_warmup: its length.
    :param int num_references: K, or 0 for a random walk.
    :param float target: acceptance probability to adapt to.
    :param bool adapt_step_size: whether to adapt the step size.
    :param bool adapt_covariance: whether to adapt the covariance.
    :param float step_size: the initial step size.
    """

    def __init__(
        self,
        num_warmup: int,
        num_references: int,
        target: float,
        adapt_step_size: bool,
        adapt_covariance: bool,
        step_size: float,
    ):
        tuner = Tuner(*map(jax.vmap, search_tuner(target)))
        self.step_size, self.num_references = step_size, num_references
        self.schedule = reference_schedule(num_warmup, num_references)
        super().__init__(
            num_warmup, tuner, adapt_step_size, adapt_covariance, self.schedule.windows
        )

    def init(self, position: jax.Array, references: Any, baselines: Any) -> ExchangeAdaptState:
        """State at the start, for a position of shape (groups, dimension)."""
        groups, dimension = position.shape
        moments = self._no_moments(groups, dimension)
        step_size = jnp.full(groups, self.step_size, position.dtype)
        return ExchangeAdaptState(
            step_size=step_size,
            tuner=self.tuner.init(step_size),
            scale=jnp.broadcast_to(
                jnp.eye(dimension, dtype=position.dtype), (groups, dimension, dimension)
            ),
            moments=moments,
            center=moments,
            reference=position,
            references=references,
            baselines=baselines,
            has_gradient=jnp.array(False),
        )

    def at(self, i: jax.Array, name: str, otherwise: ArrayLike = False) -> jax.Array:
        """An entry of the schedule at step i, ``otherwise`` after the warm-up."""
        if not self.num_warmup:
            return jnp.asarray(otherwise)
        values = jnp.asarray(getattr(self.schedule, name))
        return jnp.where(
            i < self.num_warmup, values[jnp.minimum(i, self.num_warmup - 1)], otherwise
        )

    def store_reference(
        self, i: jax.Array, state: ExchangeAdaptState, data: SiteValues, rows: jax.Array
    ) -> ExchangeAdaptState:
        """Store a fictitious data set drawn at the reference, if step i drew one."""
        if state.references is None or not self.num_warmup:
            return state
        slot = self.at(i, "slot", -1)
        slot = jnp.where(slot < 0, len(state.baselines), slot)  # out of bounds: dropped
        references = jax.tree.map(
            lambda kept, x: kept.at[slot].set(x, mode="drop"), state.references, data
        )
        baselines = state.baselines.at[slot].set(rows, mode="drop")
        return state._replace(references=references, baselines=baselines)

    def _update(self, i, state, statistic, observed):
        new = super()._update(i, state, statistic, observed)
        if not self.num_references:
            return new
        new = tree_where(self.at(i, "is_paused"), state, new)
        center = jax.vmap(UPDATE_WELFORD)(state.center, observed())
        center = tree_where(self.at(i, "in_center"), center, state.center)
        seen = jnp.reshape(center[2] > 0, (-1, 1))
        restarts = self.at(i, "restarts")
        new = new._replace(
            center=center,
            reference=jnp.where(seen, center[0], state.reference),
            has_gradient=state.has_gradient | restarts,
        )
        return tree_where(restarts, self._from_the_start(new), new)

    def _from_the_start(self, state):
        """The state with a search that begins anew, after the proposal has changed."""
        if not self.adapt_step_size:
            return state
        return super()._restart(
            state._replace(step_size=jnp.full_like(state.step_size, self.step_size))
        )

    def _restart(self, state):
        """Nothing: the volume of proposals does not change at the end of a window."""
        return state

    def _no_moments(self, groups, dimension):
        return jax.vmap(lambda _: INIT_WELFORD(dimension))(jnp.arange(groups))

    def _gather(self, state, observed):
        return state._replace(moments=jax.vmap(UPDATE_WELFORD)(state.moments, observed))

    def _end_window(self, state):
        (_, sums, counts), old = state.moments, state.scale
        groups, dimension, _ = sums.shape
        count = jnp.reshape(counts, (-1, 1, 1))
        covariance = sums / jnp.maximum(count - 1, 1)
        # Shrunk towards the variances: a random walk has about one effective draw in ten times
        # the dimension of steps, and correlations of few draws are noise.
        diagonal, effective = covariance * jnp.eye(dimension), count / (10 * dimension)
        covariance = (effective * covariance + 5 * diagonal) / (effective + 5)
        covariance = (count * covariance + 5e-3 * jnp.eye(dimension)) / (count + 5)  # Stan's
        scale = jnp.linalg.cholesky(covariance)
        state = state._replace(scale=scale, moments=self._no_moments(groups, dimension))
        if not self.adapt_step_size:
            return state
        # Proposals keep their volume and change their shape, so that the search may go on.
        factor = _root_volume(old) / _root_volume(scale)
        return state._replace(step_size=state.step_size * factor, tuner=state.tuner.times(factor))


def _root_volume(scale):
    """The geometric mean of the diagonals of triangular factors, (groups,)."""
    return jnp.exp(jnp.mean(jnp.log(jnp.diagonal(scale, axis1=-2, axis2=-1)), -1))
