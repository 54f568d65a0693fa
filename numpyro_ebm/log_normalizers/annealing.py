# SPDX-License-Identifier: Apache-2.0
r"""Annealing a fixed model from a reference: which reference, which moves, which temperatures.

.. math:: \log π_β = (1 - β) \log q + β \log\tilde p

The reference q is the base measure of the proper sites, the uniform law of flat discrete ones, and
for flat real sites a density fitted to chains of the model: a Gaussian where the energy is
quadratic in them, so that they can be drawn from their conditionals at every β, else a mixture of
Student-t, fitted a second time to the particles of a first annealing run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers.base_measure import reference
from numpyro_ebm.log_normalizers.divergence import divergence_error
from numpyro_ebm.log_normalizers.enumeration import gaussian_block
from numpyro_ebm.log_normalizers.exploration import explore
from numpyro_ebm.log_normalizers.gaussian import Gaussian
from numpyro_ebm.log_normalizers.integrand import Integrand
from numpyro_ebm.log_normalizers.mixture import Mixture, fit_mixture
from numpyro_ebm.log_normalizers.particles import by_problem, log_mean_weight
from numpyro_ebm.log_normalizers.path import Path
from numpyro_ebm.log_normalizers.schedule import AnnealingSchedule, adaptive_schedule
from numpyro_ebm.program.derivatives import once_differentiable, without_derivatives
from numpyro_ebm.program.devices import spread_draws
from numpyro_ebm.program.multi_affine import multi_affine
from numpyro_ebm.program.tempered_form import Tempered
from numpyro_ebm.samplers.gibbs_blocks import plan_block
from numpyro_ebm.samplers.positions import flatten_sites

__all__ = ["anneal"]

SCOUTS = 4_096  # particles that find modes and temperatures
WIDE_WEIGHTS = 0.7, 0.15  # of the wide component of the first reference, and of the next
WIDER = 1.2  # by what factor a Gaussian reference is wider than the model
TARGET_ESS = 0.95

NO_HESSIAN = (
    "log_normalizer: an annealed estimate of log Z has no second derivatives; its first ones are "
    "means over particles. Use method='enumerate' or 'quadrature' where they apply."
)


def anneal(
    rng_key: jax.Array,
    integrand: Integrand,
    weigh: Callable[..., Any],
    num_sweeps: int,
    sharding: NamedSharding | None = None,
) -> tuple[AnnealingSchedule, tuple[jax.Array, jax.Array, jax.Array]]:
    """log Z of every problem of a density from particles that are annealed to it.

    :param rng_key: random key.
    :param Integrand integrand: the density.
    :param weigh: ``(rng_key, path, schedule) -> (log-estimates, position, log-weights)``: N
        independent unbiased estimates of Z, of shape (N, problems), and weighted draws of the
        density, their weights of shape (particles, problems).
    :param int num_sweeps: sweeps at each temperature, of which finding the temperatures takes five
        at least.
    :param sharding: how the particles are spread over devices, or ``None``.
    :return: the :class:`AnnealingSchedule`; and log Z, its standard error and the effective sample
        size of the weights, of shape (problems,) each.
    :raises ModelError: if the density runs away, or the particles do not reach it.
    """
    key_plan, key_schedule, key_run = jax.random.split(rng_key, 3)
    plan = _plan(key_plan, integrand)._replace(sharding=sharding)
    num_scouts = max(SCOUTS // integrand.num_problems, 64)

    def scout(rng_key, path):
        return adaptive_schedule(rng_key, path, num_scouts, max(num_sweeps, 5), TARGET_ESS)

    def stage(refit, fitted, rng_key):
        """Anneal once from a reference; the next one is fitted to where that ends."""
        key_run, key_fit = jax.random.split(rng_key)
        schedule, position = scout(key_run, plan.path(fitted))
        return refit(key_fit, position), (fitted, schedule)

    @jax.jit
    def run():
        if plan.refit is None:
            path = plan.path(plan.fitted)
            schedule, _ = scout(key_schedule, path)
        else:  # the first reference knows of modes, the second also of their masses
            stage_of = partial(stage, plan.refit)
            stages = jax.lax.scan(stage_of, plan.fitted, jax.random.split(key_schedule))[1]
            fitted, schedule = jax.tree.map(lambda x: x[-1], stages)
            path = plan.path(fitted)
        log_estimates, *draws = weigh(key_run, path, schedule)
        return schedule, log_mean_weight(log_estimates), draws

    schedule, estimate, draws = without_derivatives(run)()
    if not_jax_tracer(schedule.beta) and not np.all(np.asarray(schedule.beta[-1]) == 1):
        last = np.min(np.nan_to_num(np.asarray(schedule.beta)).max(0))
        raise _stuck_error(key_run, plan, last)
    value, mcse, ess = estimate
    if integrand.is_traced:
        position, log_weights = draws
        value = _differentiable_at(plan.integrand, position, log_weights, value)
    return schedule, (value, mcse, ess)


def _differentiable_at(density, position, log_weights, value):
    """log Z with the derivative E ∂ log p̃ over weighted draws in the place of that of the value."""
    terms = by_problem(density.log_density(position), log_weights[0])
    mean = jnp.sum(jax.nn.softmax(log_weights, 0) * terms, 0)
    return value + once_differentiable(mean - jax.lax.stop_gradient(mean), NO_HESSIAN)


class _Plan(NamedTuple):
    """How a density is annealed.

    - **integrand** - the density, its discrete sites perhaps summed out.
    - **moved** - names of the real sites that MALA moves.
    - **groups** - tuples of names of sites that are drawn from their conditionals.
    - **cloud** - :class:`Gaussian` of all real sites, or ``None`` without them.
    - **fitted** - a first distribution of the flat real sites, or ``None`` without them.
    - **refit** - ``(rng_key, position) -> fitted``, the next one; ``None`` where one is enough.
    - **sharding** - how particles are spread over devices, or ``None``.
    """

    integrand: Integrand
    moved: tuple
    groups: tuple
    cloud: Gaussian | None = None
    fitted: Gaussian | Mixture | None = None
    refit: Callable | None = None
    sharding: NamedSharding | None = None

    def blocks(self, log_density):
        """How to draw every group from its conditionals under a log-density."""
        like = self.integrand.placeholder(self.integrand.row_model.num_rows)
        values = {name: self.integrand.values(name) for name in self.integrand.discrete}
        return tuple(plan_block(log_density, like, names, values) for names in self.groups)

    def path(self, fitted):
        """The path from the reference in which flat real sites have the ``fitted`` distribution."""
        log_densities, draw = reference(self.integrand, fitted)
        if self.sharding is not None:
            draw = spread_draws(draw, self.sharding)
        precondition = self.cloud if self.moved else None
        path = Path(log_densities, draw, self.moved, (), precondition, self.integrand.num_problems)
        # How blocks are drawn depends on the density between the two, the reference included.
        blocks = self.blocks(path.tempered(0.5))
        if any(block.kind in ("coloured", "sequential") for block in blocks):
            form = self.form(path)
            blocks = tuple(block._replace(form=form) for block in blocks)
        return path._replace(blocks=blocks)

    def form(self, path):
        """Both ends of a path in the indicators of the discrete sites, where they have the form."""
        like = self.integrand.placeholder(self.integrand.row_model.num_rows)
        values = {name: self.integrand.values(name) for name in self.integrand.discrete}
        hot, cold = (
            multi_affine(lambda _, x, i=i: path.log_densities(x)[i], {}, like, values)
            for i in (0, 1)
        )
        if hot is None or cold is None:
            return None
        return Tempered(cold, hot if hot.degree else None)


def _plan(rng_key, integrand):
    key_explore, key_fit = jax.random.split(rng_key)
    block = None
    if integrand.real:
        try:
            block = gaussian_block(integrand)
        except ModelError:
            integrand = _without_discrete(integrand)
    moved, together = (integrand.real, ()) if block is None else ((), (integrand.real,))
    plan = _Plan(integrand, moved, (*together, *((name,) for name in integrand.discrete)))
    if not integrand.real:
        return plan
    is_diagonal = block is not None and block.is_diagonal
    blocks = plan.blocks(integrand.log_density)
    found = explore(key_explore, integrand, moved, blocks, is_diagonal=is_diagonal)
    plan = plan._replace(cloud=found.cloud)
    if not integrand.flat_real:
        return plan
    names = integrand.coordinate_names()
    flat = np.array([i for i, name in enumerate(names) if name in integrand.flat_real])
    cloud = found.cloud.subset(flat)
    if block is not None:
        return plan._replace(fitted=cloud._replace(factor=WIDER * cloud.factor))

    def refit(rng_key, position):
        points = by_problem(flatten_sites(position, integrand.flat_real)[0], cloud.center)
        is_there = jnp.ones(points.shape[:2], bool)
        return fit_mixture(rng_key, cloud, points, is_there, WIDE_WEIGHTS[1])

    fitted = jax.jit(fit_mixture, static_argnums=4)(
        key_fit, cloud, found.points[..., flat], found.is_there, WIDE_WEIGHTS[0]
    )
    return plan._replace(fitted=fitted, refit=refit)


def _without_discrete(integrand):
    """The density with its discrete sites summed out, if that can be done."""
    if not integrand.discrete or any(name in integrand.proper for name in integrand.real):
        return integrand  # what the proper sites are drawn from may depend on the discrete ones
    try:
        return integrand.sum_out()
    except ModelError:
        return integrand  # too many states: they are drawn


def _stuck_error(rng_key, plan, last):
    """The error that the particles do not reach the density, and why."""
    integrand = plan.integrand
    position = plan.path(plan.fitted).draw(rng_key, 16 * integrand.num_problems)
    so_far = (
        f"the particles of {sorted(integrand.row_model.sites)} got from the reference (β = 0) to "
        f"β = {last:.3g} and no further: there the weights of their next step have no effective "
        "sample size"
    )
    if integrand.real and np.mean(np.isfinite(integrand.log_density(position))) > 0.5:
        # of finite weights the largest outweighs the rest
        return divergence_error(integrand.real, so_far)
    return ModelError(f"log_normalizer: {so_far}. Is the energy infinite almost everywhere?")
