# SPDX-License-Identifier: Apache-2.0
r"""log Z by tempered sequential Monte Carlo (SMC).

.. math:: \hat Z = \prod_t \frac1N \sum_{i=1}^N
    \left[\frac{\tilde p(x_t^i)}{q(x_t^i)}\right]^{β_{t+1} - β_t}

Particles follow the path from the reference q to :math:`\tilde p`: they are weighted, resampled,
and moved. Where the temperatures lie is found by a first run, which takes each as far from the last
as the effective sample size allows and tunes the moves on its way (BlackJAX's solver and
resampling). With temperatures and tuning then held fixed :math:`\hat Z` is unbiased, whatever the
number of particles: independent runs are averaged, and their spread is the standard error. Its
logarithm is too small in expectation (Jensen).

Reference: Del Moral, Doucet, Jasra, *Sequential Monte Carlo samplers*, JRSSB 2006; Jasra et al.,
*Inference for Lévy-driven stochastic volatility models via adaptive sequential Monte Carlo*, 2011.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.ess import ess_solver
from blackjax.smc.resampling import systematic
from blackjax.smc.solver import dichotomy
from jax import lax
from jax.nn import softmax
from jax.scipy.special import logsumexp

from numpyro_ebm.log_normalizers.path import Tuning, by_problem, flatten, sweeps, to_particles

__all__ = ["Schedule", "adaptive_schedule", "log_mean_weight", "sequential_monte_carlo"]

MOST_TEMPERATURES = 500


class Schedule(NamedTuple):
    """Temperatures and tuning, found by :func:`adaptive_schedule`.

    - **beta** - inverse temperatures, of shape (temperatures + 1, problems); from 0 to 1, and 1
      from there on.
    - **tuning** - :class:`Tuning` at each of them, leading; ``None`` where nothing needs any.
    - **num_temperatures** - number of steps until every problem is at 1.
    - **log_normalizer** - the first run's own estimate, (problems,).
    """

    beta: jax.Array
    tuning: Tuning | None
    num_temperatures: jax.Array
    log_normalizer: jax.Array


def log_mean_weight(log_weights):
    r"""log of the mean of independent unbiased estimates, its standard error, and their ESS.

    .. math:: \log \frac1N \sum_i w_i, \qquad
        \mathrm{mcse}^2 = \frac{1}{N - 1}\left(\frac{N}{\mathrm{ESS}} - 1\right), \qquad
        \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}

    :param log_weights: of shape (N, ...).
    :return: three arrays of shape (...).

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.log_normalizers.smc import log_mean_weight
    >>> [round(float(x), 4) for x in log_mean_weight(jnp.log(jnp.array([1.0, 3.0])))]
    [0.6931, 0.5, 1.6]
    """
    num = len(log_weights)
    total = logsumexp(log_weights, 0)
    ess = jnp.exp(2 * total - logsumexp(2 * log_weights, 0))
    mcse = jnp.sqrt(jnp.maximum(num / ess - 1, 0.0) / (num - 1))
    return total - math.log(num), mcse, ess


def adaptive_schedule(rng_key, path, num_particles, num_sweeps, target_ess):
    """Run adaptive tempered SMC once to find temperatures and tuning.

    :param rng_key: random key.
    :param Path path: the path.
    :param int num_particles: particles of each problem.
    :param int num_sweeps: sweeps at each temperature.
    :param float target_ess: effective sample size after each step, as a share of the particles.
    :return: a :class:`Schedule`, and where the particles are at its end. Its last ``beta`` is below
        1 (or NaN) where they did not get there.
    """
    key_draw, key_run = jax.random.split(rng_key)
    num = num_particles * path.num_problems
    position = path.draw(key_draw, num)
    log_ratio = by_problem(path.log_ratio(position), jnp.empty(path.num_problems))
    dtype, size = log_ratio.dtype, (MOST_TEMPERATURES + 1, path.num_problems)
    tuning, tunings = None, None
    if path.real:
        dimension = path.precondition.center.shape[1]
        tuning = Tuning(
            jnp.full(path.num_problems, -math.log(dimension) / 3, dtype),
            jnp.ones((path.num_problems, dimension), dtype),
        )
        tunings = jax.tree.map(lambda x: jnp.zeros((size[0], *x.shape), dtype), tuning)

    def furthest(log_ratio, beta):
        step = ess_solver(lambda x: x, log_ratio, target_ess, 1 - beta, dichotomy)
        return jnp.where(beta + step < 1, beta + step, 1.0)  # NaN goes on as NaN

    def unfinished(state):
        count, _, _, beta, *_ = state
        return (count < MOST_TEMPERATURES) & jnp.any(beta[count] < 1) & ~jnp.any(jnp.isnan(beta))

    def step(state):
        count, rng_key, position, beta, tuning, tunings, log_normalizer = state
        rng_key, key_resample, key_move = jax.random.split(rng_key, 3)
        log_ratio = by_problem(path.log_ratio(position), log_normalizer)
        new = jax.vmap(furthest, (1, 0))(log_ratio, beta[count])
        new = jnp.where(jnp.all(log_ratio == -jnp.inf, 0), jnp.nan, new).astype(dtype)
        position, increment = _reweight(key_resample, position, log_ratio, new - beta[count])
        if path.real:
            flat = path.precondition.standardize(flatten(position, path.real))
            scale = jnp.std(by_problem(flat, log_normalizer), 0)
            tuning = tuning._replace(scale=jnp.where(scale > 0, scale, tuning.scale))
        position, tuning, _ = sweeps(
            key_move, path, position, to_particles(new, num), tuning, num_sweeps, adapt=True
        )
        beta = _fill(beta, count, new)
        tunings = jax.tree.map(lambda xs, x: xs.at[count + 1].set(x), tunings, tuning)
        return count + 1, rng_key, position, beta, tuning, tunings, log_normalizer + increment

    start = jnp.zeros(size, dtype), tuning, tunings, jnp.zeros(path.num_problems, dtype)
    state = lax.while_loop(unfinished, step, (jnp.array(0), key_run, position, *start))
    count, _, position, beta, _, tunings, log_normalizer = state
    return Schedule(beta, tunings, count, log_normalizer), position


def sequential_monte_carlo(rng_key, path, schedule, num_particles, num_sweeps, num_replicates):
    """Run tempered SMC along a schedule, several times.

    :param rng_key: random key.
    :param Path path: the path.
    :param Schedule schedule: temperatures and tuning.
    :param int num_particles: particles of each replicate of each problem.
    :param int num_sweeps: sweeps at each temperature.
    :param int num_replicates: independent runs.
    :return: unbiased estimates of Z, as logarithms, of shape (replicates, problems).
    """
    key_draw, key_run = jax.random.split(rng_key)
    runs = num_replicates * path.num_problems
    num = num_particles * runs
    position = path.draw(key_draw, num)
    dtype = schedule.beta.dtype

    def step(state):
        count, rng_key, position, total = state
        rng_key, key_resample, key_move = jax.random.split(rng_key, 3)
        log_ratio = by_problem(path.log_ratio(position), total)
        old, new = schedule.beta[count], schedule.beta[count + 1]
        delta = to_particles(new - old, runs)
        position, increment = _reweight(key_resample, position, log_ratio, delta)
        tuning = jax.tree.map(lambda x: x[count + 1], schedule.tuning)
        beta = to_particles(new, num)
        position, _, _ = sweeps(key_move, path, position, beta, tuning, num_sweeps)
        return count + 1, rng_key, position, total + increment

    start = jnp.array(0), key_run, position, jnp.zeros(runs, dtype)
    running = lambda state: state[0] < schedule.num_temperatures  # noqa: E731
    total = lax.while_loop(running, step, start)[3]
    return jnp.reshape(total, (num_replicates, path.num_problems))


def _reweight(rng_key, position, log_ratio, delta):
    """Weigh and resample the particles of every run; their log-mean weights."""
    num_particles, runs = log_ratio.shape
    # A run that has arrived is not weighed: zero times infinity is no number.
    log_weights = jnp.where(delta > 0, delta * log_ratio, 0.0)
    increment = logsumexp(log_weights, 0) - math.log(num_particles)
    keys = jax.random.split(rng_key, runs)
    weights = softmax(log_weights, 0)
    index = jax.vmap(systematic, (0, 1, None), 1)(keys, weights, num_particles)

    index = jnp.clip(index, 0, num_particles - 1)  # where no weight is a number

    def choose(x):
        grouped = by_problem(x, delta)
        at = jnp.reshape(index, (*index.shape, *(1,) * (grouped.ndim - 2)))
        return jnp.reshape(jnp.take_along_axis(grouped, at, axis=0), x.shape)

    return jax.tree.map(choose, position), increment


def _fill(beta, count, new):
    """Set all temperatures after the ``count``-th."""
    later = jnp.arange(len(beta))[:, None] > count
    return jnp.where(later, new, beta)
