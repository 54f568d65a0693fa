# SPDX-License-Identifier: Apache-2.0
r"""Where the mass of an unnormalised density lies, and whether it lies anywhere.

Short chains run at the density itself, in rounds. After every round the cloud of their positions
gives the next preconditioner, so that its scale may grow (or shrink) by a factor a round: within a
few rounds it is that of the density, or it has run away. A density whose integral diverges has no
scale to settle at: along a flat or falling direction of the energy the cloud grows without end.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.log_normalizers.path import Gaussian, Tuning, flatten, sweeps

__all__ = ["Exploration", "explore"]

SWEEPS = 50
"""Sweeps in a round."""

MOST_ROUNDS = 60

CALM = 3
"""Rounds in a row that a cloud has to be at rest."""

SETTLED = 1.2
"""By what factor a scale may change in a round of a cloud at rest, noise aside."""

FAR = 1e6
"""How many times larger than at the start the scale of a cloud that ran away is."""


class Exploration(NamedTuple):
    """What the chains found.

    - **cloud** - :class:`Gaussian` with the chains' mean and covariance, outliers drawn in.
    - **position** - where the chains ended.
    - **points** - where they were after each of the last rounds, (points, problems, D).
    - **is_there** - which of the points have a finite log-density, (points, problems).
    - **growth** - how many times wider than at the start every coordinate is, (problems, D).
    """

    cloud: Gaussian
    position: dict
    points: jax.Array
    is_there: jax.Array
    growth: jax.Array


def explore(rng_key, path, position, names, *, is_diagonal=False):
    """Run chains at the target of a path until their cloud settles.

    :param rng_key: random key.
    :param Path path: whose target is explored; its reference is not looked at.
    :param dict position: where the chains start, arrays of shape (n, ...).
    :param names: the real sites, whose cloud is described.
    :param bool is_diagonal: leave correlations out.
    :return: an :class:`Exploration`.
    """
    at_target = path._replace(log_densities=lambda x: (jnp.zeros(()), path.log_densities(x)[1]))
    start = flatten(position, names)
    num_problems = path.num_problems
    num_chains = len(start) // num_problems
    # A covariance needs more chains than coordinates.
    is_diagonal = is_diagonal or num_chains < 4 * start.shape[1]
    beta = jnp.ones(len(start), start.dtype)
    settled = SETTLED + 4.0 / math.sqrt(num_chains)

    def describe(position):
        x = flatten(position, names)
        is_finite = jnp.isfinite(path.log_densities(position)[1]) & jnp.all(jnp.isfinite(x), -1)
        shape = (num_chains, num_problems)
        x, is_finite = jnp.reshape(x, (*shape, -1)), jnp.reshape(is_finite, shape)
        x = jnp.where(is_finite[..., None], x, jnp.nan)
        low, middle, high = jnp.nanquantile(x, jnp.array([0.16, 0.5, 0.84], x.dtype), axis=0)
        # Where chains are few or the same, there is no scale to be read off.
        width = jnp.where(high > low, 0.5 * (high - low), 1.0)
        gap = jnp.clip((x - middle) / width, -5.0, 5.0)
        center = jnp.nanmean(gap, 0)
        if is_diagonal:
            factor = width * jnp.sqrt(jnp.nanmean((gap - center) ** 2, 0) + 1e-6)
        else:
            gap = jnp.where(is_finite[..., None], gap - center, 0.0)
            covariance = jnp.einsum("ckd,cke->kde", gap, gap)
            covariance = covariance / jnp.sum(is_finite, 0)[:, None, None]
            covariance = covariance + 1e-4 * jnp.eye(gap.shape[-1], dtype=gap.dtype)
            factor = width[..., None] * jnp.linalg.cholesky(covariance)
        cloud = Gaussian(middle + width * center, factor)
        return cloud, width + jnp.abs(middle), jnp.where(is_finite[..., None], x, 0.0), is_finite

    cloud, first, points, is_finite = describe(position)
    points, is_there = (jnp.stack([x] * CALM) for x in (points, is_finite))
    tuning = Tuning(jnp.full(num_problems, math.log(0.1), start.dtype), jnp.ones_like(cloud.center))

    def unsettled(state):
        count, _, _, _, extent, _, calm, *_ = state
        running = jnp.all(jnp.isfinite(extent)) & jnp.all(extent < FAR * (1 + first))
        return (count < MOST_ROUNDS) & (calm < CALM) & running

    def one_round(state):
        count, rng_key, position, cloud, extent, tuning, calm, points, is_there = state
        rng_key, key_move = jax.random.split(rng_key)
        moving = at_target._replace(precondition=cloud)
        position, tuning, _ = sweeps(key_move, moving, position, beta, tuning, SWEEPS, adapt=True)
        cloud, new, *latest = describe(position)
        change = jnp.max(jnp.maximum(new / extent, extent / new))
        calm = jnp.where(change < settled, calm + 1, 0)
        points, is_there = (
            jnp.concatenate([old[1:], x[None]])
            for old, x in zip((points, is_there), latest, strict=True)
        )
        return count + 1, rng_key, position, cloud, new, tuning, calm, points, is_there

    state = (0, rng_key, position, cloud, first, tuning, 0, points, is_there)
    state = lax.while_loop(unsettled, one_round, state)
    _, _, position, cloud, extent, _, _, points, is_there = state
    points = jnp.reshape(points, (-1, *points.shape[2:]))
    growth = extent / (1 + first)
    return Exploration(cloud, position, points, jnp.reshape(is_there, (-1, num_problems)), growth)
