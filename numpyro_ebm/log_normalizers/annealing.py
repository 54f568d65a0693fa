# SPDX-License-Identifier: Apache-2.0
r"""log Z of a fixed model by annealing: which reference, which moves, which particles.

.. math:: \log π_β = (1 - β) \log q + β \log\tilde p

The reference q is the base measure of the proper sites, the uniform law of flat discrete ones, and
for flat real sites a density fitted to chains of the model: a Gaussian where the energy is
quadratic in them, so that they can be drawn from their conditionals at every β, else a mixture of
Student-t, fitted a second time to the particles of a first annealing run.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.util import not_jax_tracer

from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers.ais import annealed_importance_sampling
from numpyro_ebm.log_normalizers.enumeration import gaussian_block
from numpyro_ebm.log_normalizers.exploring import diverges, explored
from numpyro_ebm.log_normalizers.mixture import fit_mixture
from numpyro_ebm.log_normalizers.path import Path, by_problem, flatten
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.log_normalizers.smc import (
    adaptive_schedule,
    log_mean_weight,
    sequential_monte_carlo,
)
from numpyro_ebm.samplers.gibbs_blocks import plan_block

__all__ = ["annealed"]

SCOUTS = 4_096  # particles that find modes and temperatures
WIDE_WEIGHTS = 0.7, 0.15  # of the wide component of the first reference, and of the next
WIDER = 1.2  # by what factor a Gaussian reference is wider than the model
TARGET_ESS = 0.95


def annealed(rng_key, target, method, options):
    """log Z of every problem of a target, by ``"ais"`` or ``"smc"``.

    :param rng_key: random key.
    :param Target target: the target.
    :param str method: which of the two.
    :param Options options: numbers of particles, temperatures, sweeps and replicates.
    :return: :class:`~numpyro_ebm.log_normalizers.LogNormalizer`.
    :raises ModelError: if the density runs away, or the particles do not reach it.
    """
    key_explore, key_schedule, key_run = jax.random.split(rng_key, 3)
    target, path_from, reference, refit = _path(key_explore, target)
    smc = method == "smc"
    num_particles = options.num_particles or (512 if smc else 1_024)
    num_sweeps = options.num_sweeps or (5 if smc else 1)
    num_scouts = max(SCOUTS // target.num_problems, 64)

    def stage(reference, rng_key):
        """Anneal once from a reference; the next one is fitted to where that ends."""
        key_run, key_fit = jax.random.split(rng_key)
        schedule, position = adaptive_schedule(
            key_run, path_from(reference), num_scouts, max(num_sweeps, 5), TARGET_ESS
        )
        return refit(key_fit, position), (reference, schedule)

    @jax.jit
    def run():
        if refit is None:
            path = path_from(reference)
            schedule, _ = adaptive_schedule(
                key_schedule, path, num_scouts, max(num_sweeps, 5), TARGET_ESS
            )
        else:  # the first reference knows of modes, the second also of their masses
            stages = jax.lax.scan(stage, reference, jax.random.split(key_schedule))[1]
            last, schedule = jax.tree.map(lambda x: x[-1], stages)
            path = path_from(last)
        if smc:
            log_weights = sequential_monte_carlo(
                key_run, path, schedule, num_particles, num_sweeps, options.num_replicates
            )
        else:
            log_weights = annealed_importance_sampling(
                key_run, path, schedule, num_particles, options.num_temperatures, num_sweeps
            )
        return schedule, log_mean_weight(log_weights)

    schedule, (value, mcse, ess) = run()
    if not_jax_tracer(value) and not np.all(np.asarray(schedule.beta[-1]) == 1):
        last = np.min(np.nan_to_num(np.asarray(schedule.beta)).max(0))
        raise _stuck(key_run, target, path_from(reference), last)
    count = schedule.num_temperatures if smc else options.num_temperatures
    ess = ess * num_particles if smc else ess
    return LogNormalizer(value, mcse, ess, method, "below", {"num_temperatures": count})


def _stuck(rng_key, target, path, last):
    """The error that the particles do not reach the target, and why."""
    position = path.draw(rng_key, 16 * target.num_problems)
    so_far = (
        f"the particles of {sorted(target.row_model.sites)} got from the reference (β = 0) to β = "
        f"{last:.3g} and no further: there the weights of their next step have no effective sample "
        "size"
    )
    if target.real and np.mean(np.isfinite(target.log_density(position))) > 0.5:
        return diverges(target.real, so_far)  # of finite weights the largest outweighs the rest
    return ModelError(f"log_normalizer: {so_far}. Is the energy infinite almost everywhere?")


def _path(rng_key, target):
    """The way to the target.

    :return: the target, perhaps with its discrete sites summed out; the path from a reference; a
        first reference; and how to fit another one to positions, or ``None``.
    """
    key_explore, key_fit = jax.random.split(rng_key)
    values = {name: target.values(name) for name in target.discrete}
    block = None
    if target.real:
        try:
            block = gaussian_block(target)
        except ModelError:
            target = _without_discrete(target)
    like = target.placeholder(target.row_model.num_rows)
    real = target.real if block is None else ()
    together = () if block is None else (target.real,)
    groups = (*together, *((name,) for name in target.discrete))
    reference, refit, cloud = None, None, None
    if target.real:
        blocks = tuple(plan_block(target.log_density, like, names, values) for names in groups)
        is_diagonal = block is not None and block.is_diagonal
        found = explored(key_explore, target, real, blocks, is_diagonal=is_diagonal)
        cloud = found.cloud
    if target.flat_real:
        names = target.coordinate_names()
        flat = [i for i, name in enumerate(names) if name in target.flat_real]
        part = cloud.subset(np.array(flat))
        if block is not None:
            reference = part._replace(factor=WIDER * part.factor)
        else:

            def refit(rng_key, position):
                points = by_problem(flatten(position, target.flat_real), part.center)
                there = jnp.ones(points.shape[:2], bool)
                return fit_mixture(rng_key, part, points, there, WIDE_WEIGHTS[1])

            points = found.points[..., np.array(flat)]
            reference = jax.jit(fit_mixture, static_argnums=4)(
                key_fit, part, points, found.is_there, WIDE_WEIGHTS[0]
            )

    def path_from(reference):
        log_densities, draw = target.reference(reference)
        path = Path(log_densities, draw, real, (), cloud if real else None, target.num_problems)
        # What is between the two decides how blocks are drawn: the reference counts too.
        between = path.tempered(0.5)
        return path._replace(
            blocks=tuple(plan_block(between, like, names, values) for names in groups)
        )

    return target, path_from, reference, refit


def _without_discrete(target):
    """The target with its discrete sites summed out, if that can be done."""
    if not target.discrete or any(name in target.proper for name in target.real):
        return target  # what the proper sites are drawn from may depend on the discrete ones
    try:
        return target.sum_out()
    except ModelError:
        return target  # too many states: they are drawn
