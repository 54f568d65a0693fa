# SPDX-License-Identifier: Apache-2.0
r"""log Z of a fixed model by enumeration, with closed forms where the energy has them.

.. math:: \log Z = \log \sum_h \int \tilde p(v, h)\, dv

Discrete sites are summed state by state, but for those whose sum factorises given the others;
real sites in which the energy is quadratic are integrated as Gaussians, state by state. Exact:
take it wherever the states can be counted.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers.divergence import divergence_error, falling_sites
from numpyro_ebm.log_normalizers.integrand import Integrand
from numpyro_ebm.log_normalizers.nodes import log_sum_in_chunks
from numpyro_ebm.log_normalizers.options import Options
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model.finite_supports import joint_states, num_joint_states
from numpyro_ebm.samplers.gaussian_conditional import expand_quadratic
from numpyro_ebm.samplers.gibbs_blocks import Block, plan_block
from numpyro_ebm.samplers.positions import flatten_sites

__all__ = ["gaussian_block", "run_enumeration", "why_not_enumeration"]

CHUNK = 16_384  # points that are evaluated at once


def why_not_enumeration(integrand: Integrand, options: Options) -> str | None:
    """Why enumeration does not apply: a sentence, or ``None``.

    :param Integrand integrand: the density.
    :param Options options: with the most states that are enumerated.
    """
    try:
        if not integrand.real:
            states = _count_states(integrand, _split(integrand)[0])
        else:
            block = gaussian_block(integrand)
            states = _count_states(integrand, integrand.discrete)
            work = states * integrand.num_real ** (1 if block.is_diagonal else 2)
            if work > 256 * options.max_states:
                return f"{states:.3g} Gaussian integrals in {integrand.num_real} dimensions"
    except ModelError as error:
        return str(error)
    if states > options.max_states:
        return (
            f"the discrete sites {sorted(integrand.discrete)} have {states:.3g} states to sum "
            f"over, more than max_states={options.max_states}"
        )
    return None


def gaussian_block(integrand: Integrand) -> Block:
    """The block of all real sites, if they are jointly Gaussian given the discrete ones.

    :raises ModelError: if they are not.
    """
    for name in integrand.real:
        if not integrand.row_model.sites[name].is_real:
            raise ModelError(f"the site '{name}' is real with a bounded support")
    like = integrand.placeholder(integrand.row_model.num_rows)
    return plan_block(integrand.log_density, like, integrand.real, {})


def run_enumeration(rng_key: jax.Array, integrand: Integrand, options: Options) -> LogNormalizer:
    """log Z of every problem of a density by enumeration.

    :param rng_key: not looked at.
    :param Integrand integrand: the density.
    :param Options options: not looked at.
    :return: :class:`~numpyro_ebm.log_normalizers.LogNormalizer`.
    :raises ModelError: if a Gaussian integral diverges.
    """
    if integrand.real:
        value, num_states = _sum_gaussians(integrand)
        seen = jax.lax.stop_gradient(value)
        if not_jax_tracer(seen) and np.any(np.isnan(seen)):
            raise divergence_error(
                falling_sites(integrand), "the energy does not rise in all their directions"
            )
    else:
        value, num_states = _sum_discrete(integrand)
    return LogNormalizer(
        value,
        method="enumerate",
        diagnostics={"num_states": num_states},
        mcse=0.0,
        ess=math.inf,
        bias="none",
    )


def _sum_gaussians(integrand):
    """log of the sum over discrete states of the integrals over all real sites."""
    is_diagonal = gaussian_block(integrand).is_diagonal

    def log_terms(position):
        x, unflatten = flatten_sites(position, integrand.real)

        def of_real(x):
            return integrand.log_density({**position, **unflatten(x)})

        zero = jnp.zeros_like(x)
        constant = of_real(zero)
        return expand_quadratic(of_real, zero, is_diagonal).log_integral(constant)

    width = integrand.num_real ** (1 if is_diagonal else 2)
    return _sum_states(integrand, integrand.discrete, log_terms, width)


def _sum_discrete(integrand):
    """log of the sum over all discrete sites, some of them in closed form given the others."""
    counted, summed = _split(integrand)
    if not summed:
        return _sum_states(integrand, counted, integrand.log_density)
    row_model = integrand.row_model.with_latent(summed)
    marginal = exact_marginal(row_model)
    if not counted:  # everything in closed form
        value = jax.jit(lambda: marginal.log_density(row_model, {}, {}))()
        return value[: integrand.num_problems], 1

    def of_rows(rows):
        return marginal.log_density(row_model, {}, row_model.from_rows(rows))

    return _sum_states(integrand, counted, integrand.over_rows(of_rows))


def _sum_states(integrand, counted, log_terms, width=1):
    """log of the sum over the joint states of some discrete sites, and their number.

    :param tuple counted: names of the sites.
    :param log_terms: maps positions of n points, with placeholders of the real sites, to (n,).
    :param int width: how much more than a number a term takes to evaluate.
    """
    problems = integrand.num_problems
    states = joint_states(integrand.row_model, counted, "log_normalizer")
    num_states = int(_count_states(integrand, counted))

    def of_chunk(chunk):
        index, states = chunk
        like = integrand.placeholder(len(index) * problems)
        position = {name: like[name] for name in integrand.real}
        for name, x in states.items():
            position[name] = jnp.repeat(x, problems, axis=0).astype(like[name].dtype)
        return jnp.reshape(log_terms(position), (len(index), problems))

    chunk = max(1, CHUNK // (problems * max(1, width // 64)))
    total = jax.jit(lambda nodes: log_sum_in_chunks(of_chunk, nodes, chunk))
    return total((jnp.arange(num_states), states)), num_states


def _split(integrand):
    """Discrete sites to count, and those to sum in closed form given them."""
    names = integrand.discrete
    sizes = range(len(names) + 1) if len(names) <= 4 else (0, 1)
    best = names, ()
    for size in sizes:
        for summed in itertools.combinations(names, size):
            counted = tuple(name for name in names if name not in summed)
            if _count_states(integrand, counted) >= _count_states(integrand, best[0]):
                continue
            if _has_closed_form(integrand.row_model.with_latent(summed)):
                best = counted, summed
    return best


def _count_states(integrand, names):
    return num_joint_states(integrand.row_model, names, "log_normalizer")


def _has_closed_form(row_model):
    try:
        return exact_marginal(row_model).num_states(row_model) == 1
    except ModelError:
        return False
