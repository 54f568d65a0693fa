# SPDX-License-Identifier: Apache-2.0
r"""log Z of a fixed model by enumeration, with closed forms where the energy has them.

.. math:: \log Z = \log \sum_h \int \tilde p(v, h)\, dv

Discrete sites are summed state by state, but for those whose sum factorises given the others;
real sites in which the energy is quadratic are integrated as Gaussians, state by state.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.util import not_jax_tracer

from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers.exact import log_gaussian_integral, log_sum_in_chunks
from numpyro_ebm.log_normalizers.exploring import diverges, falling
from numpyro_ebm.log_normalizers.path import flatten, unflatten
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.samplers.gibbs_blocks import plan_block

__all__ = ["enumerated", "gaussian_block", "why_not_enumerated"]

CHUNK = 16_384  # points that are evaluated at once


def _num_states(target, names):
    return math.prod(float(len(target.values(name))) ** target.size(name) for name in names)


def why_not_enumerated(target, max_states):
    """Why enumeration does not apply, or an empty string."""
    try:
        if not target.real:
            states = _num_states(target, _split(target)[0])
        else:
            block = gaussian_block(target)
            states = _num_states(target, target.discrete)
            work = states * target.size_real ** (1 if block.is_diagonal else 2)
            if work > 256 * max_states:
                return f"{states:.3g} Gaussian integrals in {target.size_real} dimensions"
    except ModelError as error:
        return str(error)
    if states > max_states:
        return (
            f"the discrete sites {sorted(target.discrete)} have {states:.3g} states to sum over, "
            f"more than max_states={max_states}"
        )
    return ""


def gaussian_block(target):
    """The block of all real sites, if they are jointly Gaussian given the discrete ones.

    :raises ModelError: if they are not.
    """
    for name in target.real:
        if not target.row_model.sites[name].is_real:
            raise ModelError(f"the site '{name}' is real with a bounded support")
    like = target.placeholder(target.row_model.num_rows)
    return plan_block(target.log_density, like, target.real, {})


def _split(target):
    """Discrete sites to count, and those to sum in closed form given them."""
    names = target.discrete
    sizes = range(len(names) + 1) if len(names) <= 4 else (0, 1)
    best = names, ()
    for size in sizes:
        for inner in itertools.combinations(names, size):
            outer = tuple(name for name in names if name not in inner)
            if _num_states(target, outer) >= _num_states(target, best[0]):
                continue
            if _has_closed_form(target.row_model.with_latent(inner)):
                best = outer, inner
    return best


def _has_closed_form(row_model):
    try:
        return exact_marginal(row_model).num_states(row_model) == 1
    except ModelError:
        return False


def enumerated(target):
    """log Z of every problem of a target, a :class:`~numpyro_ebm.log_normalizers.LogNormalizer`.

    :raises ModelError: if a Gaussian integral diverges.
    """
    outer, inner = _split(target) if not target.real else (target.discrete, ())
    row_model = target.row_model.with_latent(inner)
    marginal = exact_marginal(row_model) if inner else None
    problems = target.num_problems
    block = gaussian_block(target) if target.real else None
    sizes = [target.size(name) for name in outer]
    columns = [
        target.values(name) for name, size in zip(outer, sizes, strict=True) for _ in range(size)
    ]
    states = (
        np.stack([x.ravel() for x in np.meshgrid(*columns, indexing="ij")], 1)
        if columns
        else np.zeros((1, 0), int)
    )

    def log_density(position):
        if not inner:
            return target.log_density(position)

        def of_rows(rows):
            return marginal.log_density(row_model, {}, row_model.from_rows(rows))

        return target.over_rows(of_rows)(position)

    def log_terms(chunk):
        num = len(chunk) * problems
        discrete = jnp.repeat(chunk, problems, axis=0)
        like = target.placeholder(num)
        position = unflatten(discrete, like, outer) if outer else {}
        position = {k: x.astype(like[k].dtype) for k, x in position.items()}
        if target.real:
            zero = flatten(like, target.real)

            def of_real(x):
                return log_density({**position, **unflatten(x, like, target.real)})

            terms = log_gaussian_integral(of_real, zero, block.is_diagonal)
        elif outer:
            terms = log_density(position)
        else:  # everything in closed form
            terms = marginal.log_density(row_model, {}, {})[:problems]
        return jnp.reshape(terms, (len(chunk), problems))

    width = max(1, target.size_real) ** (1 if block is None or block.is_diagonal else 2)
    chunk = max(1, CHUNK // (problems * max(1, width // 64)))
    value = jax.jit(lambda nodes: log_sum_in_chunks(log_terms, nodes, chunk))(jnp.asarray(states))
    if target.real and not_jax_tracer(value) and np.any(np.isnan(value)):
        raise diverges(falling(target), "the energy does not rise in all their directions")
    return LogNormalizer(
        value,
        method="enumerate",
        diagnostics={"num_states": len(states)},
        mcse=0.0,
        ess=math.inf,
        bias="none",
    )
