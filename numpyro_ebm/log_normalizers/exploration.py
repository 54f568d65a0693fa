# SPDX-License-Identifier: Apache-2.0
r"""Where the mass of an unnormalised density lies, and whether its integral can be finite.

Short chains run at the density itself, in rounds. After every round the cloud of their positions
gives the next preconditioner, so that its scale may grow (or shrink) by a factor a round: within a
few rounds it is that of the density, or it has run away. A density whose integral diverges has no
scale to settle at: along a flat or falling direction of the energy the cloud grows without end.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers.base_measure import draw_base_measure
from numpyro_ebm.log_normalizers.divergence import divergence_error, falling_sites
from numpyro_ebm.log_normalizers.gaussian import Gaussian
from numpyro_ebm.log_normalizers.integrand import Integrand
from numpyro_ebm.log_normalizers.path import Path, Tuning, sweep_particles
from numpyro_ebm.program.derivatives import without_derivatives
from numpyro_ebm.samplers.gibbs_blocks import Block
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import SiteValues

__all__ = ["Exploration", "explore"]

CHAINS = 512
"""Chains of all problems together; each has 64 at least."""

SWEEPS = 50
"""Sweeps in a round."""

MOST_ROUNDS = 60

CALM = 3
"""Rounds in a row that a cloud has to be at rest."""

SETTLED = 1.2
"""By what factor a scale may change in a round of a cloud at rest, noise aside."""

FAR = 1e6
"""How many times larger than at the start the scale of a cloud that ran away is."""

HUGE = 1e15
"""No model has values like this; chains that follow a falling energy do."""


class Exploration(NamedTuple):
    """What the chains found.

    - **cloud** - :class:`Gaussian` with the chains' mean and covariance, outliers drawn in.
    - **position** - where the chains ended.
    - **points** - where they were after each of the last rounds, (points, problems, D).
    - **is_there** - which of the points have a finite log-density, (points, problems).
    - **growth** - how many times wider than at the start every coordinate is, (problems, D).
    """

    cloud: Gaussian
    position: SiteValues
    points: jax.Array
    is_there: jax.Array
    growth: jax.Array


def explore(
    rng_key: jax.Array,
    integrand: Integrand,
    moved: tuple[str, ...],
    blocks: tuple[Block, ...],
    *,
    is_diagonal: bool = False,
) -> Exploration:
    """Run chains at a density until their cloud settles.

    :param rng_key: random key.
    :param Integrand integrand: the density, with real sites.
    :param tuple moved: names of the sites that MALA moves.
    :param tuple blocks: blocks of sites that are drawn from their conditionals.
    :param bool is_diagonal: leave correlations of the cloud out.
    :return: an :class:`Exploration`, its cloud over all real sites.
    :raises ModelError: if the cloud runs away, or starts where the density is zero everywhere. Not
        under ``jax.jit``.
    """
    key_start, key_run = jax.random.split(rng_key)
    num = max(64, -(-CHAINS // integrand.num_problems)) * integrand.num_problems

    def log_densities(position):
        return jnp.zeros(()), integrand.log_density(position)

    def draw(rng_key, num):
        return _starting_points(rng_key, integrand, num)

    path = Path(log_densities, draw, moved, blocks, None, integrand.num_problems)

    @jax.jit
    def run():
        found = _settle(key_run, path, path.draw(key_start, num), integrand.real, is_diagonal)
        return found, _are_moderate(integrand, found.position)

    found, are_moderate = without_derivatives(run)()
    if not_jax_tracer(are_moderate):
        _check_exploration(integrand, found, np.asarray(are_moderate))
    return found


def _starting_points(rng_key, integrand, num):
    """Where chains start: at data, where there are some, else widely spread."""
    key_scale, key_rows, key_draw, *keys = jax.random.split(rng_key, 3 + len(integrand.real))
    scale = jnp.exp(jax.random.uniform(key_scale, (num,), float, -1.0, 1.5))
    like, position = integrand.placeholder(1), {}
    for name, key in zip(integrand.real, keys, strict=True):
        noise = jax.random.normal(key, (num, *like[name].shape[1:]), like[name].dtype)
        factor = jnp.reshape(scale, (-1,) + (1,) * (noise.ndim - 1))
        position[name] = noise * factor.astype(noise.dtype)
    if integrand.proper or integrand.discrete:
        position = {**position, **draw_base_measure(key_draw, integrand, num, position)}
    if integrand.data:
        rows = len(next(iter(integrand.data.values())))
        at = jax.random.randint(key_rows, (num,), 0, rows)
        if integrand.num_problems > 1:
            at = jnp.arange(num) % rows
        position |= {k: x[at].astype(position[k].dtype) for k, x in integrand.data.items()}
    return position


def _settle(rng_key, path, position, names, is_diagonal):
    """Rounds of chains until the cloud of the named sites is at rest, or has run away."""
    num_problems = path.num_problems
    num_chains = len(position[names[0]]) // num_problems

    def describe(position):
        x = flatten_sites(position, names)[0]
        is_finite = jnp.isfinite(path.log_densities(position)[1]) & jnp.all(jnp.isfinite(x), -1)
        shape = (num_chains, num_problems)
        x, is_finite = jnp.reshape(x, (*shape, -1)), jnp.reshape(is_finite, shape)
        # A covariance needs more chains than coordinates.
        diagonal = is_diagonal or num_chains < 4 * x.shape[-1]
        cloud, extent = _robust_gaussian(x, is_finite, diagonal)
        return cloud, extent, jnp.where(is_finite[..., None], x, 0.0), is_finite

    cloud, first, points, is_finite = describe(position)
    dtype = points.dtype
    beta = jnp.ones(num_chains * num_problems, dtype)
    settled = SETTLED + 4.0 / math.sqrt(num_chains)
    points, is_there = (jnp.stack([x] * CALM) for x in (points, is_finite))
    tuning = Tuning(jnp.full(num_problems, math.log(0.1), dtype), jnp.ones_like(cloud.center))

    def is_unsettled(state):
        count, _, _, _, extent, _, calm, *_ = state
        running = jnp.all(jnp.isfinite(extent)) & jnp.all(extent < FAR * (1 + first))
        return (count < MOST_ROUNDS) & (calm < CALM) & running

    def run_round(state):
        count, rng_key, position, cloud, extent, tuning, calm, points, is_there = state
        rng_key, key_move = jax.random.split(rng_key)
        moving = path._replace(precondition=cloud)
        position, tuning = sweep_particles(
            key_move, moving, position, beta, tuning, SWEEPS, adapt=True
        )
        cloud, new, *latest = describe(position)
        change = jnp.max(jnp.maximum(new / extent, extent / new))
        calm = jnp.where(change < settled, calm + 1, 0)
        points, is_there = (
            jnp.concatenate([old[1:], x[None]])
            for old, x in zip((points, is_there), latest, strict=True)
        )
        return count + 1, rng_key, position, cloud, new, tuning, calm, points, is_there

    state = (0, rng_key, position, cloud, first, tuning, 0, points, is_there)
    _, _, position, cloud, extent, _, _, points, is_there = lax.while_loop(
        is_unsettled, run_round, state
    )
    points = jnp.reshape(points, (-1, *points.shape[2:]))
    growth = extent / (1 + first)
    return Exploration(cloud, position, points, jnp.reshape(is_there, (-1, num_problems)), growth)


def _robust_gaussian(x, is_finite, is_diagonal):
    """A robust Gaussian of points (n, problems, D), and how far they reach from the origin."""
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
    return Gaussian(middle + width * center, factor), width + jnp.abs(middle)


def _are_moderate(integrand, position):
    """Whether the values of every point are of a size that a model could mean."""
    row_model = integrand.row_model

    def of_rows(rows):
        values, _ = row_model.constrain(row_model.from_rows(rows))
        size = sum(
            jnp.max(jnp.abs(jnp.reshape(x, (row_model.num_rows, -1))), 1)
            for x in row_model.to_rows(values).values()
        )
        return size < HUGE

    return integrand.over_rows(of_rows)({name: position[name] for name in integrand.real})


def _check_exploration(integrand, found, are_moderate):
    names = integrand.coordinate_names()
    growth = np.asarray(found.growth)
    away = ~np.isfinite(growth) | (growth > FAR)
    ran_away = np.any(away) or np.mean(are_moderate) < 0.5
    if not np.any(found.is_there) and not ran_away:
        raise ModelError(
            f"log_normalizer: the energy is not finite anywhere that chains of {sorted(set(names))}"
            " started. Pass data to the model, for the chains to start at."
        )
    if ran_away:
        at = np.any(away, 0)
        if np.all(at):  # no draw of a Gaussian, perhaps because of one of its coordinates
            raise divergence_error(falling_sites(integrand), "the energy does not rise in them")
        worst = [name for name, is_away in zip(names, at, strict=True) if is_away] or names
        raise divergence_error(worst, "chains that follow the energy run away without end")
