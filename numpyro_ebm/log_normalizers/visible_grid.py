# SPDX-License-Identifier: Apache-2.0
r"""log Z as a differentiable function of the parameters, by a sum over the visible sites.

.. math:: \log Z(θ) = \log \sum_m w_m\, \tilde p(v_m; θ)

over all values of discrete visible coordinates, and over nodes around the data of at most two real
ones; latent sites are integrated out by an exact marginal. The nodes do not depend on θ, so that
the derivatives of the sum are those of log Z but for the error of the quadrature. For maximum
likelihood and for posteriors; at fixed parameters :mod:`numpyro_ebm.log_normalizers.quadrature`
looks for the mass itself.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp

from numpyro_ebm._compat import eval_jaxpr
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.log_normalizers.nodes import (
    NODES_AT_ONCE,
    log_sum_over_rows,
    sinh_nodes,
    weighted_grid,
)
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.finite_supports import support_values
from numpyro_ebm.model.resize import with_rows
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Params

__all__ = [
    "has_real_coordinates",
    "quadrature_of_parameters",
    "sum_over_visible",
    "why_not_visible_grid",
]

MOST_REAL = 2  # real coordinates


def why_not_visible_grid(
    row_model: RowModel, num_nodes: int, max_states: int, who: str
) -> str | None:
    """Why the sum over the visible sites is too much: a sentence, or ``None``.

    :param RowModel row_model: the model.
    :param int num_nodes: nodes for each real coordinate.
    :param int max_states: the most nodes (states times quadrature nodes).
    :param str who: who asks, for errors.
    :raises ModelError: if a site has infinitely many values.
    """
    values = _grid_columns(row_model, who)
    num_real = sum(x is None for x in values)
    sites = sorted(row_model.visible)
    if num_real > MOST_REAL:
        return (
            f"a quadrature is over at most {MOST_REAL} real coordinates of a row, and the visible "
            f"sites {sites} have {num_real}"
        )
    states = np.prod([float(num_nodes if x is None else len(x)) for x in values])
    if states > max_states:
        return (
            f"log Z is a sum over {states:.3g} states of the visible sites {sites}, more than "
            f"max_states={max_states}"
        )
    return None


def quadrature_of_parameters(
    row_model: RowModel, params: Params, num_nodes: int, max_states: int
) -> jax.Array:
    """log Z(θ) of the rows of a model whose latent sites an exact marginal covers.

    :param RowModel row_model: the model, read at the data.
    :param dict params: parameter values by name.
    :param int num_nodes: nodes for each real coordinate.
    :param int max_states: the most nodes.
    :return: of shape (rows,), or a scalar if all rows share it.
    :raises ModelError: if there are too many coordinates or states, or latent sites that no exact
        marginal covers.
    """
    marginal: Any = None
    try:
        marginal = exact_marginal(row_model)
        why_not = why_not_visible_grid(row_model, num_nodes, max_states, "log_normalizer")
    except ModelError as error:
        why_not = str(error)
    if why_not is not None:
        why_not = why_not.removesuffix(".")
        raise ModelError(f"log_normalizer: method='quadrature' does not apply: {why_not}.")
    return sum_over_visible(params, row_model, marginal, num_nodes)


def has_real_coordinates(row_model: RowModel) -> bool:
    """Whether log Z has the error of a quadrature."""
    return not all(site.is_discrete for site in row_model.visible.values())


def sum_over_visible(
    params: Params,
    row_model: RowModel,
    marginal: Marginal,
    num_nodes: int,
    *,
    every: int = 1,
    reach: float = np.inf,
) -> jax.Array:
    """log Z(θ) of the rows of a model.

    :param dict params: parameter values by name.
    :param RowModel row_model: the model, read at the data.
    :param Marginal marginal: how latent sites are integrated out; one with exact values.
    :param int num_nodes: nodes for each real coordinate.
    :param int every: of a real coordinate every ``every``-th node counts.
    :param float reach: how far out nodes count, in standard deviations of the data.
    :return: of shape (rows,), or a scalar if all rows share it.
    """
    nodes, log_weights = _nodes_around_data(row_model, num_nodes, every, reach)
    at_data = stop_gradient(row_model.flatten(row_model.unconstrain_visible()))
    low, high = jnp.min(at_data, 0), jnp.max(at_data, 0)
    if not row_model.covariates:  # a plate of as many rows as there are nodes
        resized = with_rows(row_model, min(len(nodes), NODES_AT_ONCE))
        if resized is not None:
            row_model = resized
            at_data = jnp.broadcast_to(at_data[:1], (row_model.num_rows, at_data.shape[1]))
    rows, unconstrained = row_model.num_rows, row_model.unconstrain_visible()
    estimate = marginal.bind(default_key(), row_model, None, params, unconstrained, order=1)

    def log_density(params, flat):
        return estimate.log_density(params, row_model.unflatten(flat))

    def with_mass(params, flat):
        # Far out an energy may overflow. Such a node counts as zero; among the data NaN is an
        # error of the energy and stays. A weight of zero times an infinite derivative is NaN:
        # nodes without mass are moved to the data first.
        values = log_density(stop_gradient(params), flat)
        among = jnp.all((flat >= low) & (flat <= high), -1)
        massive = (values > -jnp.inf) | (jnp.isnan(values) & among)
        values = log_density(params, jnp.where(massive[:, None], flat, at_data))
        return jnp.where(massive, values, -jnp.inf)

    if row_model.covariates:
        density = with_mass if has_real_coordinates(row_model) else log_density

        def at_node(node):
            return density(params, jnp.broadcast_to(node, (rows, node.size)))

        values = jax.lax.map(jax.checkpoint(at_node), nodes, batch_size=64)
        return logsumexp(values + log_weights[:, None], 0)

    def log_sum(density, params):
        return log_sum_over_rows(partial(density, params), nodes, log_weights, rows)

    if not has_real_coordinates(row_model):
        return log_sum(log_density, params)
    own = {name: params[name] for name in row_model.parameters}
    other = {name: x for name, x in params.items() if name not in own}
    return _guarded(
        lambda own: log_sum(log_density, {**other, **own}),
        lambda own: log_sum(with_mass, {**other, **own}),
    )(own)


def _grid_columns(row_model, who="log_normalizer"):
    """Values of every visible coordinate of a row, ``None`` if it is real, by sorted sites."""
    columns = []
    for name, size in row_model.sizes.items():
        site = row_model.visible[name]
        values = support_values(site, who) if site.is_discrete else None
        columns += [values] * size
    return columns


def _nodes_around_data(row_model, num_nodes, every, reach):
    """Nodes of all visible coordinates of a row, by sorted sites, and log-weights."""
    at, log_weights = sinh_nodes(num_nodes)
    log_weights = np.where(np.abs(at) <= reach, log_weights, -np.inf) + np.log(every)
    values = _grid_columns(row_model)
    is_real = np.array([x is None for x in values])
    # Many nodes: arrays of the program, not constants.
    nodes, log_weights = weighted_grid(
        [jnp.asarray(at[::every] if x is None else x) for x in values],
        [jnp.asarray(log_weights[::every] if x is None else np.zeros(len(x))) for x in values],
        jnp,
    )
    flat = stop_gradient(row_model.flatten(row_model.unconstrain_visible()))
    nodes = jnp.asarray(nodes, flat.dtype)
    log_weights = jnp.asarray(log_weights, jnp.result_type(float))
    if np.any(is_real):
        spread = jnp.std(flat, 0)
        # Of a single row, or equal ones (but for rounding), there is no spread to scale to.
        rounding = 8 * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(flat), 0)
        spread = jnp.where(is_real & (spread > rounding), spread, 1.0)
        nodes = jnp.where(is_real, jnp.mean(flat, 0), 0.0) + spread * nodes
        log_weights = log_weights + jnp.sum(jnp.log(spread))
    return nodes, log_weights


def _guarded(fast, safe):
    """A function of parameters: ``fast``, or ``safe`` where that or its derivative is not finite.

    It has a rule for its derivative, which can be differentiated in turn. The rule may be evaluated
    after a `jit` around the function has ended; so what the functions close over is an argument.
    """

    def guarded(params):
        programs = [jax.make_jaxpr(fn)(params) for fn in (fast, safe)]

        def run(which, consts, params):
            leaves = jax.tree.leaves(params)
            return eval_jaxpr(programs[which].jaxpr, consts[which], *leaves)[0]

        def checked(derive, consts, params):
            found = derive(partial(run, 0, consts))(params)
            is_finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found)]
            again = lambda: derive(partial(run, 1, consts))(params)  # noqa: E731
            return jax.lax.cond(jnp.all(jnp.stack(is_finite)), lambda: found, again)

        @jax.custom_jvp
        def value(consts, params):
            return checked(lambda fn: fn, consts, params)

        @value.defjvp
        def value_and_slope(primals, tangents):
            found, gradient = checked(jax.value_and_grad, *primals)
            along = jax.tree.map(jnp.vdot, gradient, tangents[1])
            return found, sum(jax.tree.leaves(along))

        return value(stop_gradient([program.consts for program in programs]), params)

    return guarded
