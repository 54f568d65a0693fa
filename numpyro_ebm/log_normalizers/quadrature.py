# SPDX-License-Identifier: Apache-2.0
r"""log Z of a fixed model with one or two real coordinates, by quadrature.

.. math:: \log Z ≈ \log \sum_m w_m\, \tilde p(x_m), \qquad x_m = m + L \sinh t_m

on a grid of equidistant t, in the coordinates of a cloud of chains that found the mass. Discrete
sites are summed out; where there are more than two real coordinates, sites that are Gaussian given
the rest are integrated in closed form. The grid is refined until it makes no difference, and a
coarse one looks for mass far out.

Reference: Trefethen, Weideman, *The exponentially convergent trapezoidal rule*, SIAM Review 2014.
"""

import math
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from numpyro_ebm._compat import find_stack_level, not_jax_tracer
from numpyro_ebm.errors import ModelError, QuadratureWarning
from numpyro_ebm.log_normalizers.divergence import divergence_error
from numpyro_ebm.log_normalizers.exploration import explore
from numpyro_ebm.log_normalizers.integrand import Integrand
from numpyro_ebm.log_normalizers.nodes import REACH, sinh_nodes, weighted_grid
from numpyro_ebm.log_normalizers.options import Options
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.marginals import integrable
from numpyro_ebm.program.derivatives import without_derivatives
from numpyro_ebm.samplers.positions import flatten_sites

__all__ = ["quadrature_rank", "run_quadrature", "why_not_quadrature"]

MOST_REAL = 2  # real coordinates
MAX_INTEGRATED = 50  # coordinates of a real site that is integrated out at every node
MOST_NODES = {1: 65_537, 2: 1_025}  # for each coordinate, by their number
TRACED_NODES = 513  # for each coordinate, where nothing can be refined under `jax.jit`
CHUNK = 16_384  # nodes that are evaluated at once
SUM_CHUNK = 1_024  # terms whose sum is rounded before it joins the others
FARTHEST = 1e8  # reach of a grid that looks for mass far out, in units of the model's scale
TOLERANCE = 1e-3  # an error that is worth a warning
NO_MASS = 1e4  # nats below the heaviest node
DIVERGES = 0.05  # growth of log Z far out that is no rounding error


def why_not_quadrature(integrand: Integrand, options: Options) -> str | None:
    """Why a quadrature does not apply: a sentence, or ``None``.

    :param Integrand integrand: the density.
    :param Options options: not looked at.
    """
    if not integrand.real:
        return "the model has no real coordinates"
    try:
        rest = _on_nodes(integrand)
    except ModelError as error:
        return str(error)
    if rest.num_real > MOST_REAL:
        return (
            f"the real sites {sorted(rest.real)} have {rest.num_real} coordinates in a row, more "
            f"than {MOST_REAL}"
        )
    return None


def quadrature_rank(integrand: Integrand) -> float:
    """After enumeration, which has no error, where real sites are integrated in closed form."""
    return 2 if integrand.num_real <= MOST_REAL else 3.5


def _on_nodes(integrand):
    """The density with its other sites out: discrete ones, real ones where there are too many."""
    if integrand.num_real <= MOST_REAL:
        return integrand.sum_out() if integrand.discrete else integrand
    names = integrable(integrand.row_model, MAX_INTEGRATED)
    return integrand.sum_out(names) if names else integrand


def run_quadrature(rng_key: jax.Array, integrand: Integrand, options: Options) -> LogNormalizer:
    """log Z of every problem of a density by quadrature.

    :param rng_key: random key of the chains that look for the mass.
    :param Integrand integrand: the density.
    :param Options options: not looked at.
    :return: :class:`~numpyro_ebm.log_normalizers.LogNormalizer`.
    :raises ModelError: if the integral diverges.
    """
    integrand = _on_nodes(integrand)
    cloud = explore(rng_key, integrand, integrand.real, ()).cloud
    if cloud.is_diagonal:
        cloud = cloud._replace(factor=jax.vmap(jnp.diag)(cloud.factor))
    reach, beyond = _choose_reach(integrand, cloud)
    value, change, num_nodes = _refine(integrand, cloud, reach)
    mcse = jnp.maximum(change, _rounding(value)) + beyond
    if integrand.is_traced:
        value = _differentiable(integrand, cloud, num_nodes, reach)
    if not_jax_tracer(mcse) and np.any(np.asarray(mcse) > TOLERANCE):
        warnings.warn(
            QuadratureWarning(
                f"log_normalizer: the last doubling of the nodes of a quadrature (now {num_nodes} "
                f"for each coordinate) moved log Z by {np.max(change):.2g}. Compare with "
                "`method=['quadrature', 'smc']`."
            ),
            stacklevel=find_stack_level(),
        )
    diagnostics = {"num_nodes": num_nodes, "reach": reach}
    return LogNormalizer(value, mcse, math.inf, "quadrature", "none", diagnostics)


def _choose_reach(integrand, cloud):
    """How far the nodes have to reach, by a coarse grid that goes very far.

    :return: the reach, and what log Z may gain beyond it, of shape (problems,).
    """
    values, distance = _evaluate(integrand, cloud, 192, FARTHEST)
    near, far, farthest = (
        _log_sum(values, distance <= r) for r in (REACH, FARTHEST**0.5, FARTHEST)
    )
    growth = farthest - far
    if not not_jax_tracer(growth):
        return FARTHEST, jnp.maximum(growth, 0.0)
    if np.any(np.asarray(growth) > DIVERGES):
        raise divergence_error(
            integrand.real, "the further the nodes of a quadrature reach, the larger it is"
        )
    if np.any(np.asarray(farthest - near) > TOLERANCE / 100):
        return FARTHEST, jnp.maximum(growth, 0.0)
    return REACH, 0.0


def _refine(integrand, cloud, reach):
    """Quarter the spacing of the nodes until halving it makes no difference, or they are too many.

    :return: log Z, what the last halving changed, of shape (problems,) each, and the number of
        nodes for each coordinate.
    """
    size, is_traced = integrand.num_real, not not_jax_tracer(cloud.center)
    num_nodes, most = (TRACED_NODES,) * 2 if is_traced else (129, MOST_NODES[size])
    while True:
        values, _ = _evaluate(integrand, cloud, num_nodes, reach)
        value = _log_sum(values)
        is_coarse = np.zeros((num_nodes,) * size, bool)
        is_coarse[(slice(None, None, 2),) * size] = True
        change = jnp.abs(value - (_log_sum(values, is_coarse.ravel()) + size * math.log(2)))
        is_finest = 4 * num_nodes - 3 > most
        if is_finest or np.all(np.asarray(change < 2 * _rounding(value))):
            return value, change, num_nodes
        num_nodes = 4 * num_nodes - 3


def _differentiable(integrand, cloud, num_nodes, reach):
    """log Z as a function of all that the density depends on, nodes aside, of shape (problems,).

    The derivative of an energy at a node without mass may be infinite, and zero times that is no
    number: such nodes are moved to where the mass is.
    """
    values, _ = _evaluate(integrand, cloud, num_nodes, reach)
    heaviest = jnp.argmax(values, 0)
    has_mass = values > jnp.max(values, 0) - NO_MASS
    values = _log_terms(integrand, cloud, num_nodes, reach)(has_mass, heaviest)
    return _log_sum(jnp.where(has_mass, values, -jnp.inf))


def _evaluate(integrand, cloud, num_nodes, reach):
    """Log-terms of the nodes of a grid, (nodes, problems), and how far out each node is."""
    nodes, _ = _grid(integrand, num_nodes, reach)
    values = without_derivatives(_log_terms(integrand, cloud, num_nodes, reach))()
    distance = np.max(np.abs(nodes), -1)
    return _without_overflow(integrand, values, distance, num_nodes), distance


def _grid(integrand, num_nodes, reach):
    columns, log_weights = zip(*[sinh_nodes(num_nodes, reach)] * integrand.num_real, strict=True)
    return weighted_grid(columns, log_weights)


def _log_terms(integrand, cloud, num_nodes, reach):
    """A function that gives the log-terms of the nodes, (nodes, problems).

    With the heaviest node of every problem in the place of those without mass, where these are
    given.
    """
    problems, dtype = integrand.num_problems, cloud.center.dtype
    nodes, log_weights = (jnp.asarray(x, dtype) for x in _grid(integrand, num_nodes, reach))
    _, unflatten = flatten_sites(integrand.placeholder(problems), integrand.real)

    def at_node(node, heaviest):
        z, log_weight, keep = node
        z = jnp.repeat(z[None], problems, axis=0)
        flat = cloud.restore(z if keep is None else jnp.where(keep[:, None], z, nodes[heaviest]))
        return integrand.log_density(unflatten(flat)) + log_weight + cloud.log_det

    @jax.jit
    def terms(has_mass=None, heaviest=None):
        at = partial(at_node, heaviest=heaviest)
        batch_size = max(1, CHUNK // problems)
        return jax.lax.map(at, (nodes, log_weights, has_mass), batch_size=batch_size)

    return terms


def _log_sum(values, keep=None):
    """log Σ exp over the nodes to ``keep`` (all if ``None``), in chunks, of shape (problems,)."""
    if keep is not None:
        values = jnp.where(keep[:, None], values, -jnp.inf)
    pad = -len(values) % SUM_CHUNK
    values = jnp.pad(values, ((0, pad), (0, 0)), constant_values=-jnp.inf)
    parts = logsumexp(jnp.reshape(values, (-1, SUM_CHUNK, values.shape[1])), 1)
    return logsumexp(parts, 0)


def _rounding(value):
    """What rounding may change in log Z."""
    eps = float(jnp.finfo(value.dtype).eps)
    return max(20 * eps, 1e-10) * (1 + jnp.abs(value))


def _without_overflow(integrand, values, distance, num_nodes):
    """Values, with those that overflow far out set to zero mass.

    :raises ModelError: if there is mass next to such a node, or it is not far out.
    """
    is_bad = jnp.isnan(values) | (values == jnp.inf)
    cleaned = jnp.where(is_bad, -jnp.inf, values)
    if not not_jax_tracer(values):
        return cleaned
    is_bad, mass = np.asarray(is_bad), np.asarray(jax.nn.softmax(cleaned, 0))
    if not np.any(is_bad):
        return cleaned
    size = integrand.num_real
    on_grid = is_bad.reshape((num_nodes,) * size + (-1,))
    beside = on_grid.copy()
    for axis in range(size):
        for shift in (-1, 1):
            beside |= np.roll(on_grid, shift, axis)
    share = np.where(beside.reshape(is_bad.shape), mass, 0.0).sum(0)
    if np.any(share > 1e-6) or np.any(is_bad[distance < 10.0]):
        raise divergence_error(
            integrand.real, "it has mass up to where the energy is no finite number"
        )
    return cleaned
