# SPDX-License-Identifier: Apache-2.0
r"""Warm-up of the kernels: step size, diagonal preconditioner and trajectory length.

BlackJAX's and Stan's parts, one step at a time, as NumPyro's ``MCMC`` asks for them: dual averaging
of the rows' mean acceptance, and variances by Welford's algorithm in windows that double. The
variance of a coordinate is taken over time within each row, then averaged over rows: rows may have
different laws, where their energies read covariates or clamped sites.

Reference: Hoffman, Gelman, *The No-U-Turn sampler*, 2014; Stan reference manual, *HMC algorithm
parameters*; for the unadjusted kernel, Robnik et al., *Microcanonical Hamiltonian Monte Carlo*,
2023.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.mass_matrix import welford_algorithm
from blackjax.adaptation.staged_adaptation import build_schedule
from blackjax.adaptation.step_size import dual_averaging_adaptation

__all__ = ["AdaptState", "Adaptation", "acceptance_tuner", "energy_error_tuner"]

INIT_WELFORD, UPDATE_WELFORD, _ = welford_algorithm(is_diagonal_matrix=True)


class AdaptState(NamedTuple):
    """What a kernel adapts in warm-up.

    - **step_size** - ε in use.
    - **tuner** - state of the step size's adaptation (BlackJAX's dual averaging).
    - **inverse_mass_matrix** - diagonal preconditioner, one entry a coordinate of a row, sites in
      alphabetical order; ``None`` for a kernel without.
    - **trajectory_length** - L, in units of the preconditioner; ``None`` for a kernel without.
    - **moments** - running variances of every row in the present window; ``None`` if not needed.
    """

    step_size: jax.Array
    tuner: object
    inverse_mass_matrix: jax.Array | None = None
    trajectory_length: jax.Array | None = None
    moments: object = None


class Tuner(NamedTuple):
    """Functions that tune a step size to a statistic of the steps."""

    init: object  # step size -> state
    update: object  # state, statistic -> state
    current: object  # state -> step size
    final: object  # state -> step size


def acceptance_tuner(target):
    """Dual averaging of an acceptance probability, BlackJAX's."""
    init, update, final = dual_averaging_adaptation(target)
    return Tuner(init, update, lambda state: jnp.exp(state.log_step_size), final)


class EnergyErrorState(NamedTuple):
    """State of :func:`energy_error_tuner`: weighted average of ξ / (ε/ε₀)⁶."""

    step_size: jax.Array
    initial: jax.Array
    weight: jax.Array
    average: jax.Array


def energy_error_tuner(trust=1.5, num_effective=150):
    r"""Step size at which :math:`ξ`, the squared energy error over its target, is one.

    The squared error grows like ε⁶, so that each step gives the estimate :math:`ε ξ^{-1/6}`; they
    are averaged, those far off with little weight, as in BlackJAX's tuning of unadjusted MCLMC.
    """
    decay = (num_effective - 1) / (num_effective + 1)

    def init(step_size):
        zero = jnp.zeros_like(step_size)
        return EnergyErrorState(step_size, step_size, zero, zero)

    def update(state, xi):
        xi = xi + 1e-8  # a step without error says little: its weight vanishes
        weight = jnp.exp(-0.5 * (jnp.log(xi) / (6 * trust)) ** 2)
        ratio = state.step_size / state.initial
        total = decay * state.weight + weight
        average = decay * state.average + weight * xi / ratio**6
        step_size = state.initial * (average / total) ** (-1 / 6)
        return EnergyErrorState(step_size, state.initial, total, average)

    return Tuner(init, update, lambda state: state.step_size, lambda state: state.step_size)


class Adaptation:
    """Warm-up of a kernel, as pure functions of :class:`AdaptState`.

    :param int num_warmup: length of the warm-up.
    :param tuner: a :class:`Tuner`.
    :param bool adapt_step_size: whether to adapt the step size.
    :param bool adapt_mass_matrix: whether to adapt the diagonal preconditioner.
    :param float length_factor: L over the root of the summed variances, in units of the
        preconditioner, if L is to be adapted.
    """

    def __init__(
        self, num_warmup, tuner, adapt_step_size, adapt_mass_matrix=False, length_factor=None
    ):
        self.num_warmup = num_warmup
        self.tuner = tuner
        self.adapt_step_size = adapt_step_size
        self.adapt_mass_matrix = adapt_mass_matrix
        self.length_factor = length_factor
        schedule = np.zeros((num_warmup, 2), bool)
        if self._needs_moments and num_warmup:
            with jax.ensure_compile_time_eval():  # BlackJAX makes arrays of it
                schedule = np.asarray(build_schedule(num_warmup), bool)
        self.in_window, self.ends_window = schedule.T

    @property
    def _needs_moments(self):
        return self.adapt_mass_matrix or self.length_factor is not None

    def init(self, step_size, num_rows, dimension, has_mass_matrix, trajectory_length):
        """Initial state, for rows of ``dimension`` coordinates."""
        moments = None
        if self._needs_moments:
            moments = jax.vmap(lambda _: INIT_WELFORD(dimension))(jnp.arange(num_rows))
        if self.length_factor is not None:
            trajectory_length = self.length_factor * dimension**0.5
        return AdaptState(
            step_size=step_size,
            tuner=self.tuner.init(step_size),
            inverse_mass_matrix=jnp.ones(dimension) if has_mass_matrix else None,
            trajectory_length=None if trajectory_length is None else jnp.asarray(trajectory_length),
            moments=moments,
        )

    def update(self, i, state, rows, statistic):
        """State after a step.

        :param i: index of the step, from 0.
        :param AdaptState state: the state before.
        :param rows: coordinates after the step, (rows, dimension), a function without arguments.
        :param statistic: what the tuner wants to know of the step, a scalar.
        """
        if self.num_warmup == 0 or not (self.adapt_step_size or self._needs_moments):
            return state
        return jax.lax.cond(
            i < self.num_warmup,
            lambda state: self._update(i, state, rows, statistic),
            lambda state: state,
            state,
        )

    def _update(self, i, state, rows, statistic):
        new = state
        if self.adapt_step_size:
            tuner = self.tuner.update(state.tuner, statistic)
            is_last = i == self.num_warmup - 1
            step_size = jnp.where(is_last, self.tuner.final(tuner), self.tuner.current(tuner))
            new = new._replace(step_size=step_size, tuner=tuner)
        if self._needs_moments:
            moments = jax.vmap(UPDATE_WELFORD)(state.moments, rows())
            moments = _select(jnp.asarray(self.in_window)[i], moments, state.moments)
            new = new._replace(moments=moments)
            new = _select(jnp.asarray(self.ends_window)[i], self._end_window(new), new)
        return jax.tree.map(lambda x, like: jnp.asarray(x).astype(like.dtype), new, _arrays(state))

    def _end_window(self, state):
        _, sums, counts = state.moments
        num_rows, dimension = sums.shape
        total = num_rows * counts[0]
        variance = jnp.mean(sums, 0) / jnp.maximum(counts[0] - 1, 1)
        variance = (total * variance + 5e-3) / (total + 5)  # Stan's shrinkage towards 0.001
        if self.adapt_mass_matrix:
            state = state._replace(inverse_mass_matrix=variance)
        if self.length_factor is not None:
            length = jnp.sqrt(jnp.sum(variance / state.inverse_mass_matrix))
            state = state._replace(trajectory_length=self.length_factor * length)
        if self.adapt_step_size:
            state = state._replace(tuner=self.tuner.init(state.step_size))
        moments = jax.vmap(lambda _: INIT_WELFORD(dimension))(jnp.arange(num_rows))
        return state._replace(moments=moments)


def _arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def _select(condition, x, y):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)
