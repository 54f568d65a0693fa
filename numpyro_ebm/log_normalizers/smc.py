# SPDX-License-Identifier: Apache-2.0
r"""log Z by tempered sequential Monte Carlo (SMC).

.. math:: \hat Z = \prod_t \frac1N \sum_{i=1}^N
    \left[\frac{\tilde p(x_t^i)}{q(x_t^i)}\right]^{β_{t+1} - β_t}

Particles follow the path from the reference q to :math:`\tilde p`: they are weighted, resampled,
and moved. Temperatures and tuning come from a first run, see
:mod:`numpyro_ebm.log_normalizers.schedule`, and are then held fixed, so that :math:`\hat Z` is
unbiased whatever the number of particles: independent runs are averaged, and their spread is the
standard error. They are few, so that it is widened by the ratio of the 97.5 % quantiles of
Student's law and the normal law: ± 1.96 of it cover at their rate. The logarithm of the estimate is
too small in expectation (Jensen). Use it where the moves mix; AIS needs fewer particles where every
row has a log Z of its own.

Reference: Del Moral, Doucet, Jasra, *Sequential Monte Carlo samplers*, JRSSB 2006.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.log_normalizers.annealing import anneal
from numpyro_ebm.log_normalizers.integrand import Integrand
from numpyro_ebm.log_normalizers.options import Options
from numpyro_ebm.log_normalizers.particles import (
    by_problem,
    resample,
    student_factor,
    to_particles,
)
from numpyro_ebm.log_normalizers.path import Path, sweep_particles
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.log_normalizers.schedule import AnnealingSchedule
from numpyro_ebm.types import SiteValues

__all__ = ["run_smc", "sequential_monte_carlo"]


def run_smc(rng_key: jax.Array, integrand: Integrand, options: Options) -> LogNormalizer:
    """log Z of every problem of a density by SMC.

    :param rng_key: random key.
    :param Integrand integrand: the density.
    :param Options options: numbers of particles (512 if ``None``) and sweeps (5), and replicates.
    :return: :class:`~numpyro_ebm.log_normalizers.LogNormalizer`. Its effective sample size is that
        of the replicates' weights times their particles.
    :raises ModelError: if the density runs away, or the particles do not reach it.
    """
    num_particles, num_sweeps = options.num_particles or 512, options.num_sweeps or 5

    with options.progress("SMC", rng_key) as progress:

        def weigh(rng_key, path, schedule):
            return sequential_monte_carlo(
                rng_key,
                path,
                schedule,
                num_particles,
                num_sweeps,
                options.num_replicates,
                told=progress.reach,
            )

        schedule, (value, mcse, ess) = anneal(
            rng_key, integrand, weigh, num_sweeps, options.sharding
        )
    mcse = mcse * student_factor(options.num_replicates)
    diagnostics = {"num_temperatures": schedule.num_temperatures}
    return LogNormalizer(value, mcse, ess * num_particles, "smc", "below", diagnostics)


def sequential_monte_carlo(
    rng_key: jax.Array,
    path: Path,
    schedule: AnnealingSchedule,
    num_particles: int,
    num_sweeps: int,
    num_replicates: int,
    *,
    told: Callable[[jax.Array], None] = lambda fraction: None,
) -> tuple[jax.Array, SiteValues, jax.Array]:
    """Run tempered SMC along a schedule, several times.

    :param rng_key: random key.
    :param Path path: the path.
    :param AnnealingSchedule schedule: temperatures and tuning.
    :param int num_particles: particles of each replicate of each problem.
    :param int num_sweeps: sweeps at each temperature.
    :param int num_replicates: independent runs.
    :param told: is told at each temperature which part is done.
    :return: unbiased estimates of Z, as logarithms, of shape (replicates, problems); where the
        particles end, and their log-weights, of shape (particles, problems).
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
        position, increment = resample(key_resample, position, log_ratio, delta)
        tuning = jax.tree.map(lambda x: x[count + 1], schedule.tuning)
        beta = to_particles(new, num)
        position, _ = sweep_particles(key_move, path, position, beta, tuning, num_sweeps)
        told((count + 1) / schedule.num_temperatures)
        return count + 1, rng_key, position, total + increment

    start = jnp.array(0), key_run, position, jnp.zeros(runs, dtype)
    running = lambda state: state[0] < schedule.num_temperatures  # noqa: E731
    _, _, position, total = lax.while_loop(running, step, start)
    total = jnp.reshape(total, (num_replicates, path.num_problems))
    return total, position, jnp.tile(total, (num_particles, 1))
