# SPDX-License-Identifier: Apache-2.0
r"""Warm-up of the kernels, one step at a time, as NumPyro's ``MCMC`` runs it.

:class:`WindowAdaptation` is Stan's schedule on BlackJAX's parts: the step size follows the steps by
dual averaging, and whatever else a kernel adapts is gathered in windows that double and changes at
their ends. :class:`Adaptation` gathers variances for a diagonal preconditioner and the length of a
trajectory; the ladder of :mod:`numpyro_ebm.mcmc.replica_ladder` and the proposal of
:mod:`numpyro_ebm.posteriors.exchange.warmup` are adapted by other subclasses.

Reference: Hoffman, Gelman, *The No-U-Turn sampler*, 2014; Stan reference manual, *HMC algorithm
parameters*; for the unadjusted kernel, Robnik et al., *Microcanonical Hamiltonian Monte Carlo*,
2023.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ebm._compat import build_schedule, dual_averaging_adaptation, welford_algorithm

__all__ = [
    "AdaptState",
    "Adaptation",
    "Tuner",
    "WindowAdaptation",
    "acceptance_tuner",
    "adapted_steps",
    "energy_error_tuner",
    "running_mean",
    "search_tuner",
    "tree_where",
    "warmup_windows",
]

INIT_WELFORD, UPDATE_WELFORD, _ = welford_algorithm(is_diagonal_matrix=True)


class AdaptState(NamedTuple):
    """Quantities that a kernel adapts in warm-up.

    - **step_size** - ε in use, one a row, (rows,).
    - **tuner** - state of the adaptation of every row's step size (BlackJAX's dual averaging).
    - **inverse_mass_matrix** - diagonal preconditioner, one entry a coordinate of a row, sites in
      alphabetical order; ``None`` for a kernel without.
    - **trajectory_length** - L, in units of the preconditioner; ``None`` for a kernel without.
    - **moments** - running variances of every row in the present window; ``None`` if not needed.
    """

    step_size: jax.Array
    tuner: Any
    inverse_mass_matrix: jax.Array | None = None
    trajectory_length: jax.Array | None = None
    moments: Any = None


class Tuner(NamedTuple):
    """Functions that tune a step size to a statistic of the steps."""

    init: Callable[..., Any]  # step size -> state
    update: Callable[..., Any]  # state, statistic -> state
    current: Callable[..., Any]  # state -> step size
    final: Callable[..., Any]  # state -> step size


def acceptance_tuner(target: float, gamma: float = 0.05) -> Tuner:
    """BlackJAX's dual averaging of an acceptance probability.

    :param float target: the acceptance probability.
    :param float gamma: how little the step size follows single steps.
    """
    init, update, final = dual_averaging_adaptation(target, gamma=gamma)
    return Tuner(init, update, lambda state: jnp.exp(state.log_step_size), final)


class SearchState(NamedTuple):
    """State of :func:`search_tuner`: log ε, its average, and the number of steps."""

    log_step_size: jax.Array
    average: jax.Array
    num_steps: jax.Array

    def times(self, factor: jax.Array) -> "SearchState":
        """The state for steps in another unit."""
        log = jnp.log(factor)
        return self._replace(log_step_size=self.log_step_size + log, average=self.average + log)


def search_tuner(target: float, gain: float = 3.0) -> Tuner:
    r"""Stochastic approximation of the step size of an acceptance probability that is noisy.

    .. math:: \log ε_{t+1} = \log ε_t + g\, t^{-0.6} (α_t - α^*)

    Dual averaging has the gain of :math:`t^{-1/2} / γ`, and swings by factors of a hundred where
    the acceptance hardly changes with the step size. Averaged as there.

    :param float target: the acceptance probability.
    :param float gain: g, about that of Garthwaite, Fan, Sisson, *Adaptive optimal scaling of
        Metropolis-Hastings algorithms using the Robbins-Monro process*, 2016.
    """

    def init(step_size):
        log = jnp.log(step_size)
        return SearchState(log, log, jnp.zeros_like(log))

    def update(state, accept_prob):
        num = state.num_steps + 1
        log = state.log_step_size + gain * num**-0.6 * (accept_prob - target)
        weight = num**-0.75
        return SearchState(log, weight * log + (1 - weight) * state.average, num)

    def current(state):
        return jnp.exp(state.log_step_size)

    return Tuner(init, update, current, lambda state: jnp.exp(state.average))


class EnergyErrorState(NamedTuple):
    """State of :func:`energy_error_tuner`: weighted average of ξ / (ε/ε₀)⁶."""

    step_size: jax.Array
    initial: jax.Array
    weight: jax.Array
    average: jax.Array


def energy_error_tuner(trust: float = 1.5, num_effective: float = 150) -> Tuner:
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


def running_mean(mean: jax.Array, x: jax.Array, i: jax.Array, num_warmup: int) -> jax.Array:
    """The mean of a statistic over the steps since the warm-up, or the sampling, began.

    :param mean: the mean before step i.
    :param x: the statistic of step i.
    """
    count = jnp.where(i < num_warmup, i, i - num_warmup) + 1
    return (mean + (x - mean) / count).astype(mean.dtype)


def adapted_steps(num_warmup: int) -> int:
    """Steps of a warm-up in which the step sizes of MALA follow its rows: the first half.

    A step size that follows the acceptance of a row shrinks where the row is stuck, and so takes it
    away from there too soon: the law of a chain that adapts is not that of the model (E v² of
    exp(-5v⁴) is 18 % too small). The second half forgets it, at the step sizes found.
    """
    return num_warmup - num_warmup // 2


def warmup_windows(num_warmup: int) -> np.ndarray:
    """Stan's windows: which steps are in one, and which end one, two arrays of shape (steps,)."""
    if not num_warmup:
        return np.zeros((2, 0), bool)
    with jax.ensure_compile_time_eval():  # BlackJAX makes arrays of it
        return np.asarray(build_schedule(num_warmup), bool).T


class WindowAdaptation:
    """Warm-up in windows, as pure functions of a state with ``step_size`` and ``tuner``.

    A subclass gathers statistics in a window and uses them at its end, where the adaptation of the
    step size restarts.

    :param int num_warmup: length of the warm-up.
    :param Tuner tuner: of the step size.
    :param bool adapt_step_size: whether the step size is adapted.
    :param bool in_windows: whether anything is gathered in windows.
    :param windows: of :func:`warmup_windows`, its default for this length if ``None``.
    """

    def __init__(
        self,
        num_warmup: int,
        tuner: Tuner,
        adapt_step_size: bool,
        in_windows: bool,
        windows: np.ndarray | None = None,
    ):
        self.num_warmup, self.tuner = num_warmup, tuner
        self.adapt_step_size, self.in_windows = adapt_step_size, in_windows
        if in_windows:
            self.windows = warmup_windows(num_warmup) if windows is None else windows

    @property
    def num_settling(self) -> int:
        """Steps before anything is gathered: rows come down from where they started."""
        if self.in_windows and self.windows[0].any():
            return int(np.argmax(self.windows[0]))
        return self.num_warmup

    def update(
        self,
        i: jax.Array,
        state: Any,
        statistic: jax.Array,
        observed: Callable[[], Any] | None = None,
    ) -> Any:
        """State after step i, which may be past the warm-up.

        :param i: index of the step, from 0.
        :param state: the state before.
        :param statistic: of the step, for the tuner, of the shape of the step size.
        :param observed: a function without arguments that returns the input of :meth:`_gather`.
        """
        if self.num_warmup == 0 or not (self.adapt_step_size or self.in_windows):
            return state
        return jax.lax.cond(
            i < self.num_warmup,
            lambda state: jax.tree.map(
                lambda new, old: jnp.asarray(new).astype(jnp.asarray(old).dtype),
                self._update(i, state, statistic, observed),
                state,
            ),
            lambda state: state,
            state,
        )

    def _update(self, i, state, statistic, observed):
        if self.adapt_step_size:
            tuner = self.tuner.update(state.tuner, statistic)
            is_last = i == self.num_warmup - 1
            step_size = jnp.where(is_last, self.tuner.final(tuner), self.tuner.current(tuner))
            state = state._replace(step_size=step_size, tuner=tuner)
        if self.in_windows:
            in_window, ends_window = (jnp.asarray(x)[i] for x in self.windows)
            state = tree_where(in_window, self._gather(state, observed()), state)
            state = tree_where(ends_window, self._restart(self._end_window(state)), state)
        return state

    def _restart(self, state):
        """Restart the adaptation of the step size at its present value."""
        if not self.adapt_step_size:
            return state
        return state._replace(tuner=self.tuner.init(state.step_size))

    def _gather(self, state, observed):
        """The state after a step of a window, its statistics updated."""
        raise NotImplementedError

    def _end_window(self, state):
        """The state after a window: adapted to its statistics, which are reset."""
        raise NotImplementedError


def tree_where(condition: jax.Array, x: Any, y: Any) -> Any:
    """``jnp.where`` of two trees."""
    return jax.tree.map(partial(jnp.where, condition), x, y)


class Adaptation(WindowAdaptation):
    """Step sizes, diagonal preconditioner and trajectory length of a kernel on rows.

    Every row has a step size of its own, which follows the row's own statistic: a row that starts
    where the energy is steep finds small steps and comes down, whatever the others do, and rows may
    have different laws, where their energies read covariates or clamped sites. The variance of a
    coordinate is taken over time within each row, then averaged over rows.

    :param int num_warmup: length of the warm-up.
    :param Tuner tuner: of one step size.
    :param bool adapt_step_size: whether to adapt the step sizes.
    :param bool adapt_mass_matrix: whether to adapt the diagonal preconditioner.
    :param float length_factor: L over the root of the summed variances, in units of the
        preconditioner, if L is to be adapted.
    """

    def __init__(
        self,
        num_warmup: int,
        tuner: Tuner,
        adapt_step_size: bool,
        adapt_mass_matrix: bool = False,
        length_factor: float | None = None,
    ):
        self.adapt_mass_matrix = adapt_mass_matrix
        self.length_factor = length_factor
        in_windows = adapt_mass_matrix or length_factor is not None
        tuner = Tuner(*map(jax.vmap, tuner))
        # The windows of a preconditioner need all steps, and kernels with momentum little else.
        num_adapted = num_warmup if in_windows else adapted_steps(num_warmup)
        super().__init__(num_adapted, tuner, adapt_step_size, in_windows)

    def init(
        self,
        step_size: ArrayLike,
        num_rows: int,
        dimension: int,
        has_mass_matrix: bool,
        trajectory_length: ArrayLike | None,
    ) -> AdaptState:
        """Initial state, for rows of ``dimension`` coordinates, all with one step size."""
        step_size = jnp.full(num_rows, step_size, float)
        if self.length_factor is not None:
            trajectory_length = self.length_factor * dimension**0.5
        return AdaptState(
            step_size=step_size,
            tuner=self.tuner.init(step_size),
            inverse_mass_matrix=jnp.ones(dimension) if has_mass_matrix else None,
            trajectory_length=None if trajectory_length is None else jnp.asarray(trajectory_length),
            moments=self._no_moments(num_rows, dimension) if self.in_windows else None,
        )

    def _no_moments(self, num_rows, dimension):
        return jax.vmap(lambda _: INIT_WELFORD(dimension))(jnp.arange(num_rows))

    def _gather(self, state, observed):
        return state._replace(moments=jax.vmap(UPDATE_WELFORD)(state.moments, observed))

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
        return state._replace(moments=self._no_moments(num_rows, dimension))
