# SPDX-License-Identifier: Apache-2.0
r"""Particles of several problems side by side: their order, weights and resampling.

Several *problems*, one log Z each, are computed at the same time. Particles come in the order of
the problems: particle i belongs to problem i modulo their number.

Reference, for systematic resampling: Douc, Cappé, Moulines, *Comparison of resampling schemes for
particle filtering*, 2005.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import softmax
from jax.scipy.special import logsumexp

from numpyro_ebm._compat import systematic
from numpyro_ebm.types import SiteValues

__all__ = ["by_problem", "log_mean_weight", "resample", "student_factor", "to_particles"]


def by_problem(x: jax.Array, like: Any) -> jax.Array:
    """Particles (n, ...) as (particles, problems, ...), with the problems of ``like``."""
    return jnp.reshape(x, (-1, jnp.shape(like)[0], *jnp.shape(x)[1:]))


def to_particles(x: jax.Array, num: int) -> jax.Array:
    """What every problem has, (problems, ...), for each of ``num`` particles."""
    repeated = jnp.broadcast_to(x, (num // len(x), *jnp.shape(x)))
    return jnp.reshape(repeated, (num, *jnp.shape(x)[1:]))


def log_mean_weight(log_weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""log of the mean of independent unbiased estimates, its standard error, and their ESS.

    .. math:: \log \frac1N \sum_i w_i, \qquad
        \mathrm{mcse}^2 = \frac{1}{N - 1}\left(\frac{N}{\mathrm{ESS}} - 1\right), \qquad
        \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}

    :param log_weights: of shape (N, ...).
    :return: three arrays of shape (...).

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.log_normalizers.particles import log_mean_weight
    >>> [round(float(x), 4) for x in log_mean_weight(jnp.log(jnp.array([1.0, 3.0])))]
    [0.6931, 0.5, 1.6]
    """
    num = len(log_weights)
    total = logsumexp(log_weights, 0)
    ess = jnp.exp(2 * total - logsumexp(2 * log_weights, 0))
    mcse = jnp.sqrt(jnp.maximum(num / ess - 1, 0.0) / (num - 1))
    return total - math.log(num), mcse, ess


def student_factor(num: int) -> float:
    """By how much a standard error from ``num`` values is too small for a 95 % interval."""
    from scipy.stats import norm, t

    return float(t.ppf(0.975, num - 1) / norm.ppf(0.975))


def resample(
    rng_key: jax.Array, position: SiteValues, log_ratio: jax.Array, delta: jax.Array
) -> tuple[SiteValues, jax.Array]:
    """Weigh the particles of every run, and resample them systematically.

    :param rng_key: random key.
    :param dict position: arrays of shape (n, ...).
    :param log_ratio: target over reference, of shape (particles, runs).
    :param delta: step of the inverse temperature, of shape (runs,).
    :return: new position, and the log-mean weight of every run, of shape (runs,).
    """
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
