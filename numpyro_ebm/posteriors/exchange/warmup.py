# SPDX-License-Identifier: Apache-2.0
"""Warm-up of :class:`~numpyro_ebm.Exchange`: step sizes, covariances and the reference data sets.

A random walk adapts its step size by dual averaging and its covariance by Welford's algorithm in
windows that double, as NUTS does. A Langevin proposal is a random walk in the first half of the
warm-up; then the chain stands still while K fictitious data sets are drawn at the mean of what it
saw, and from there on their surrogate of log Z has a gradient. Every group of parameters has its
own step size and covariance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.mass_matrix import welford_algorithm
from blackjax.adaptation.staged_adaptation import build_schedule

from numpyro_ebm.mcmc.adaptation import acceptance_tuner

__all__ = ["ExchangeAdaptState", "Schedule", "Warmup"]

INIT_WELFORD, UPDATE_WELFORD, _ = welford_algorithm(is_diagonal_matrix=False)


class ExchangeAdaptState(NamedTuple):
    """What :class:`~numpyro_ebm.Exchange` adapts in warm-up, and keeps after it.

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
    tuner: object
    scale: jax.Array
    moments: object
    center: object
    reference: jax.Array
    references: object
    baselines: object
    has_gradient: jax.Array


class Schedule(NamedTuple):
    """What happens at every step of the warm-up, arrays of shape (steps,)."""

    in_window: np.ndarray
    ends_window: np.ndarray
    in_center: np.ndarray
    slot: np.ndarray  # which data set is drawn, or -1
    holds: np.ndarray  # whether the chain stands still
    begins: np.ndarray  # whether the last of them is there, and the step size starts anew


def schedule(num_warmup, num_references):
    """The schedule of a warm-up that draws so many reference data sets (0: a random walk)."""

    def windows(num):
        if not num:
            return np.zeros((0, 2), bool)
        with jax.ensure_compile_time_eval():  # BlackJAX makes arrays of it
            return np.asarray(build_schedule(num), bool)

    if not num_references:
        in_window, ends_window = windows(num_warmup).T
        nothing = np.zeros(num_warmup, bool)
        none = np.full(num_warmup, -1)
        return Schedule(in_window, ends_window, nothing, none, nothing, nothing)
    walk = num_warmup // 2
    hold = num_references + 1  # one more to see the gradient of all of them
    pieces = (windows(walk), np.zeros((hold, 2), bool), windows(num_warmup - walk - hold))
    in_window, ends_window = np.concatenate(pieces).T
    step = np.arange(num_warmup)
    slot = np.where((step >= walk) & (step < walk + num_references), step - walk, -1)
    return Schedule(
        in_window,
        ends_window,
        (step >= walk // 2) & (step < walk),
        slot,
        (step >= walk) & (step < walk + hold),
        step == walk + num_references - 1,
    )


class Warmup:
    """The warm-up as pure functions of :class:`ExchangeAdaptState`.

    :param int num_warmup: its length.
    :param int num_references: K, or 0 for a random walk.
    :param float target: acceptance probability to adapt to.
    :param bool adapt_step_size: whether to adapt the step size.
    :param bool adapt_covariance: whether to adapt the covariance.
    :param float step_size: the initial step size.
    """

    def __init__(
        self, num_warmup, num_references, target, adapt_step_size, adapt_covariance, step_size
    ):
        self.num_warmup = num_warmup
        self.adapt_step_size, self.adapt_covariance = adapt_step_size, adapt_covariance
        self.tuner = acceptance_tuner(target)
        self.step_size = step_size
        self.schedule = schedule(num_warmup, num_references)

    def init(self, position, references, baselines):
        """State at the start, for a position of shape (groups, dimension)."""
        groups, dimension = position.shape
        moments = jax.vmap(lambda _: INIT_WELFORD(dimension))(jnp.arange(groups))
        step_size = jnp.full(groups, self.step_size, position.dtype)
        return ExchangeAdaptState(
            step_size=step_size,
            tuner=self._start_tuner(step_size),
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

    def _start_tuner(self, step_size):
        # Dual averaging aims at ten times its start; the start here is about right.
        return jax.vmap(self.tuner.init)(step_size / 10)

    def at(self, i, name, otherwise=False):
        """What the schedule says of step i."""
        if not self.num_warmup:
            return jnp.asarray(otherwise)
        values = jnp.asarray(getattr(self.schedule, name))
        return jnp.where(
            i < self.num_warmup, values[jnp.minimum(i, self.num_warmup - 1)], otherwise
        )

    def update(self, i, state, position, acceptance_rate):
        """State after step i.

        :param position: θ after the step, (groups, dimension).
        :param acceptance_rate: (groups,).
        """
        if not self.num_warmup:
            return state
        new = state
        if self.adapt_step_size:
            tuner = jax.vmap(self.tuner.update)(state.tuner, acceptance_rate)
            is_last = i == self.num_warmup - 1
            current, final = (jax.vmap(f)(tuner) for f in (self.tuner.current, self.tuner.final))
            moved = new._replace(tuner=tuner, step_size=jnp.where(is_last, final, current))
            new = _select(self.at(i, "holds"), new, moved)
        if self.adapt_covariance:
            moments = jax.vmap(UPDATE_WELFORD)(state.moments, position)
            moments = _select(self.at(i, "in_window"), moments, state.moments)
            new = new._replace(moments=moments)
            new = _select(self.at(i, "ends_window"), self._end_window(new), new)
        center = jax.vmap(UPDATE_WELFORD)(state.center, position)
        center = _select(self.at(i, "in_center"), center, state.center)
        seen = jnp.reshape(center[2] > 0, (-1, 1))
        new = new._replace(center=center, reference=jnp.where(seen, center[0], state.reference))
        begins = self.at(i, "begins")
        new = new._replace(has_gradient=state.has_gradient | begins)
        if self.adapt_step_size:
            again = jnp.full_like(new.step_size, self.step_size)
            fresh = new._replace(step_size=again, tuner=self._start_tuner(again))
            new = _select(begins, fresh, new)
        new = _select(i < self.num_warmup, new, state)
        return jax.tree.map(
            lambda x, like: jnp.asarray(x).astype(jnp.asarray(like).dtype), new, state
        )

    def remember(self, i, state, data, rows):
        """Keep a fictitious data set drawn at the reference, where step i drew one."""
        if state.references is None or not self.num_warmup:
            return state
        slot = self.at(i, "slot", -1)
        slot = jnp.where(slot < 0, len(state.baselines), slot)  # out of bounds: dropped
        references = jax.tree.map(
            lambda kept, x: kept.at[slot].set(x, mode="drop"), state.references, data
        )
        baselines = state.baselines.at[slot].set(rows, mode="drop")
        return state._replace(references=references, baselines=baselines)

    def _end_window(self, state):
        _, sums, counts = state.moments
        groups, dimension, _ = sums.shape
        count = jnp.reshape(counts, (-1, 1, 1))
        covariance = sums / jnp.maximum(count - 1, 1)
        # Towards the variances: a random walk has about one effective draw in ten times the
        # dimension, and correlations of few draws are noise.
        diagonal, effective = covariance * jnp.eye(dimension), count / (10 * dimension)
        covariance = (effective * covariance + 5 * diagonal) / (effective + 5)
        covariance = (count * covariance + 5e-3 * jnp.eye(dimension)) / (count + 5)  # Stan's
        moments = jax.vmap(lambda _: INIT_WELFORD(dimension))(jnp.arange(groups))
        new = state._replace(scale=jnp.linalg.cholesky(covariance), moments=moments)
        if self.adapt_step_size:
            again = jnp.full_like(state.step_size, self.step_size)
            new = new._replace(step_size=again, tuner=self._start_tuner(again))
        return new


def _select(condition, x, y):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)
