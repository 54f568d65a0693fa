# SPDX-License-Identifier: Apache-2.0
r"""log Z by annealed importance sampling (AIS).

.. math:: \hat Z = \frac1N \sum_{i=1}^N w_i, \qquad
    w = \prod_{t=1}^{T} \left[\frac{\tilde p(x_{t-1})}{q(x_{t-1})}\right]^{β_t - β_{t-1}}

Every particle starts at a draw of the reference q and is moved at one temperature after the other
by a kernel that leaves :math:`π_{β_t}` invariant. The weights are independent and unbiased for Z
however badly the moves mix, so that their spread is an honest standard error as long as no rare
weight dominates: the effective sample size tells. :math:`\log\hat Z` is too small in expectation
(Jensen), by about half its variance. Use it where every row has a log Z of its own, or moves mix
badly; SMC resamples, which is better where modes weigh unequally along the path.

Reference: Neal, *Annealed importance sampling*, Statistics and Computing 2001; Salakhutdinov,
Murray, *On the quantitative analysis of deep belief networks*, ICML 2008.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.log_normalizers.annealing import anneal
from numpyro_ebm.log_normalizers.integrand import Integrand
from numpyro_ebm.log_normalizers.options import Options
from numpyro_ebm.log_normalizers.particles import by_problem, to_particles
from numpyro_ebm.log_normalizers.path import Path, sweep_particles
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.log_normalizers.schedule import AnnealingSchedule
from numpyro_ebm.types import SiteValues

__all__ = ["annealed_importance_sampling", "run_ais"]


def run_ais(rng_key: jax.Array, integrand: Integrand, options: Options) -> LogNormalizer:
    """log Z of every problem of a density by AIS.

    :param rng_key: random key.
    :param Integrand integrand: the density.
    :param Options options: numbers of particles (1,024 if ``None``) and sweeps (1), and
        temperatures.
    :return: :class:`~numpyro_ebm.log_normalizers.LogNormalizer`.
    :raises ModelError: if the density runs away, or the particles do not reach it.
    """
    num_particles, num_sweeps = options.num_particles or 1_024, options.num_sweeps or 1

    with options.progress("AIS", rng_key) as progress:

        def weigh(rng_key, path, schedule):
            return annealed_importance_sampling(
                rng_key,
                path,
                schedule,
                num_particles,
                options.num_temperatures,
                num_sweeps,
                told=progress.reach,
            )

        _, (value, mcse, ess) = anneal(rng_key, integrand, weigh, num_sweeps, options.sharding)
    diagnostics = {"num_temperatures": options.num_temperatures}
    return LogNormalizer(value, mcse, ess, "ais", "below", diagnostics)


def annealed_importance_sampling(
    rng_key: jax.Array,
    path: Path,
    schedule: AnnealingSchedule,
    num_particles: int,
    num_temperatures: int,
    num_sweeps: int,
    *,
    told: Callable[[jax.Array], None] = lambda fraction: None,
) -> tuple[jax.Array, SiteValues, jax.Array]:
    """Run AIS along a refined schedule.

    :param rng_key: random key.
    :param Path path: the path.
    :param AnnealingSchedule schedule: the temperatures that adaptive SMC took. Each of its steps
        was as difficult as the next, and is cut into the same number of smaller ones.
    :param int num_particles: particles of each problem.
    :param int num_temperatures: T.
    :param int num_sweeps: sweeps at each temperature.
    :param told: is told at each temperature which part is done.
    :return: unbiased estimates of Z, as logarithms; where the particles end, and their log-weights,
        which are these estimates: of shape (particles, problems).
    """
    key_draw, key_run = jax.random.split(rng_key)
    num = num_particles * path.num_problems
    position = path.draw(key_draw, num)

    def at(xs, t):
        """A quantity of the schedule after ``t`` of the T steps, linear in between."""
        where = t * schedule.num_temperatures / num_temperatures
        low = jnp.minimum(where.astype(int), schedule.num_temperatures - 1)
        share = jnp.asarray(where - low, xs.dtype)
        return (1 - share) * xs[low] + share * xs[low + 1]

    def step(carry, x):
        position, log_weight, old = carry
        rng_key, t = x
        beta = at(schedule.beta, t)
        log_ratio = by_problem(path.log_ratio(position), beta)
        # A problem that has arrived is not weighed: zero times infinity is no number.
        log_weight = log_weight + jnp.where(beta > old, (beta - old) * log_ratio, 0.0)
        tuning = jax.tree.map(lambda xs: at(xs, jnp.maximum(t, first)), schedule.tuning)
        position, _ = sweep_particles(
            rng_key, path, position, to_particles(beta, num), tuning, num_sweeps
        )
        told(t / num_temperatures)
        return (position, log_weight, beta), None

    # The schedule knows no tuning at its reference, which needs no moves.
    first = num_temperatures / schedule.num_temperatures
    start = jnp.zeros_like(schedule.beta[0])
    log_weight = jnp.zeros((num_particles, path.num_problems), schedule.beta.dtype)
    steps = jnp.arange(1, num_temperatures + 1)
    keys = jax.random.split(key_run, num_temperatures)
    carry, _ = lax.scan(step, (position, log_weight, start), (keys, steps))
    position, log_weight, _ = carry
    return log_weight, position, log_weight
