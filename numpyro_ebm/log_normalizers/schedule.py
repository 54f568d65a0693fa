# SPDX-License-Identifier: Apache-2.0
r"""Temperatures of an annealing run, found by adaptive tempered sequential Monte Carlo.

.. math:: β_{t+1} = \max\{β : \mathrm{ESS}(w_t^{β - β_t}) \ge α N\}, \qquad
    w_t^i = \tilde p(x_t^i) / q(x_t^i)

Each temperature is taken as far from the last as the effective sample size allows, and the moves
are tuned on the way (BlackJAX's solver and resampling). Runs that estimate log Z then hold both
fixed, and are unbiased for it.

Reference: Jasra, Stephens, Doucet, Tsagaris, *Inference for Lévy-driven stochastic volatility
models via adaptive sequential Monte Carlo*, Scandinavian Journal of Statistics 2011.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm._compat import dichotomy, ess_solver
from numpyro_ebm.log_normalizers.particles import by_problem, resample, to_particles
from numpyro_ebm.log_normalizers.path import Path, Tuning, sweep_particles
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import SiteValues

__all__ = ["AnnealingSchedule", "adaptive_schedule"]

MOST_TEMPERATURES = 500


class AnnealingSchedule(NamedTuple):
    """Temperatures and tuning, found by :func:`adaptive_schedule`.

    - **beta** - inverse temperatures, of shape (temperatures + 1, problems); from 0 to 1, and 1
      from there on.
    - **tuning** - :class:`Tuning` at each of them, leading; ``None`` where nothing needs any.
    - **num_temperatures** - number of steps until every problem is at 1.
    """

    beta: jax.Array
    tuning: Tuning | None
    num_temperatures: jax.Array


def adaptive_schedule(
    rng_key: jax.Array, path: Path, num_particles: int, num_sweeps: int, target_ess: float
) -> tuple[AnnealingSchedule, SiteValues]:
    """Run adaptive tempered SMC once to find temperatures and tuning.

    :param rng_key: random key.
    :param Path path: the path.
    :param int num_particles: particles of each problem.
    :param int num_sweeps: sweeps at each temperature.
    :param float target_ess: effective sample size after each step, as a share of the particles.
    :return: an :class:`AnnealingSchedule`, and where the particles are at its end. Its last
        ``beta`` is below 1 (or NaN) where they did not get there.
    """
    key_draw, key_run = jax.random.split(rng_key)
    num = num_particles * path.num_problems
    position = path.draw(key_draw, num)
    dtype = jax.eval_shape(path.log_ratio, position).dtype
    size = MOST_TEMPERATURES + 1, path.num_problems
    tuning, tunings = None, None
    if path.precondition is not None:
        dimension = path.precondition.center.shape[1]
        tuning = Tuning(
            jnp.full(path.num_problems, -math.log(dimension) / 3, dtype),
            jnp.ones((path.num_problems, dimension), dtype),
        )
        tunings = jax.tree.map(lambda x: jnp.zeros((size[0], *x.shape), dtype), tuning)

    def furthest(log_ratio, beta):
        step = ess_solver(lambda x: x, log_ratio, target_ess, 1 - beta, dichotomy)
        return jnp.where(beta + step < 1, beta + step, 1.0)  # NaN goes on as NaN

    def is_unfinished(state):
        count, _, _, beta, *_ = state
        return (count < MOST_TEMPERATURES) & jnp.any(beta[count] < 1) & ~jnp.any(jnp.isnan(beta))

    def step(state):
        count, rng_key, position, beta, tuning, tunings = state
        rng_key, key_resample, key_move = jax.random.split(rng_key, 3)
        old = beta[count]
        log_ratio = by_problem(path.log_ratio(position), old)
        new = jax.vmap(furthest, (1, 0))(log_ratio, old)
        new = jnp.where(jnp.all(log_ratio == -jnp.inf, 0), jnp.nan, new).astype(dtype)
        position, _ = resample(key_resample, position, log_ratio, new - old)
        if path.precondition is not None:
            flat = path.precondition.standardize(flatten_sites(position, path.real)[0])
            scale = jnp.std(by_problem(flat, old), 0)
            tuning = tuning._replace(scale=jnp.where(scale > 0, scale, tuning.scale))
        position, tuning = sweep_particles(
            key_move, path, position, to_particles(new, num), tuning, num_sweeps, adapt=True
        )
        later = jnp.arange(len(beta))[:, None] > count
        tunings = jax.tree.map(lambda xs, x: xs.at[count + 1].set(x), tunings, tuning)
        return count + 1, rng_key, position, jnp.where(later, new, beta), tuning, tunings

    start = jnp.array(0), key_run, position, jnp.zeros(size, dtype), tuning, tunings
    count, _, position, beta, _, tunings = lax.while_loop(is_unfinished, step, start)
    return AnnealingSchedule(beta, tunings, count), position
