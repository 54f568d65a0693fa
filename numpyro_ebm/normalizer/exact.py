# SPDX-License-Identifier: Apache-2.0
r"""Exact log Z: a sum over all states, or a quadrature over the line or the plane.

.. math:: \log Z = \log \sum_m w_m\, \tilde p(x_m)

over nodes x_m with weights w_m. Discrete coordinates take all their values, with weight one. A
real coordinate runs over :math:`x = m + s \sinh t` for equidistant t: dense around the data, and
out to a hundred of their standard deviations, with errors that vanish exponentially in the number
of nodes for smooth energies (the trapezoidal rule after a change of variable).

Reference: Takahasi, Mori, *Double exponential formulas for numerical integration*, 1974; Trefethen,
Weideman, *The exponentially convergent trapezoidal rule*, SIAM Review 2014.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp

__all__ = ["REACH", "grid_nodes", "log_sum_over_rows", "quadrature_nodes"]

REACH = 100.0
"""How far the nodes of a quadrature go, in units of its scale."""

AT_ONCE = 65_536
"""Nodes that are evaluated at the same time."""


def quadrature_nodes(center, scale, num_nodes):
    """Nodes and log-weights of a quadrature over the real line.

    :param center: where the nodes are densest.
    :param scale: their width there.
    :param int num_nodes: their number.
    :return: nodes and log-weights, of shape (num_nodes,) each.

    **Example**

    >>> import jax.numpy as jnp
    >>> from jax.scipy.special import logsumexp
    >>> from numpyro_ebm.normalizer import quadrature_nodes
    >>> x, log_weights = quadrature_nodes(0.0, 1.0, 64)
    >>> float(logsumexp(log_weights - 0.5 * x**2))  # ½ log 2π
    0.918938...
    """
    limit = math.asinh(REACH)
    t = jnp.linspace(-limit, limit, num_nodes)
    step = 2 * limit / (num_nodes - 1)
    return center + scale * jnp.sinh(t), jnp.log(scale * step) + jnp.log(jnp.cosh(t))


def grid_nodes(columns, log_weights):
    """All combinations of the nodes of several coordinates.

    :param list columns: nodes of each coordinate.
    :param list log_weights: their log-weights.
    :return: nodes, of shape (nodes, coordinates), and log-weights, of shape (nodes,).
    """
    shape = [len(x) for x in columns]

    def spread(i, x):  # by broadcasting, which costs nothing where looking up indices does
        x = jnp.asarray(x).reshape([-1 if i == j else 1 for j in range(len(shape))])
        return jnp.broadcast_to(x, shape).reshape(-1)

    nodes = jnp.stack([spread(i, x) for i, x in enumerate(columns)], -1)
    weights = [spread(i, w) for i, w in enumerate(log_weights)]
    return nodes, sum(weights)


def log_sum_over_rows(log_density, nodes, log_weights, num_rows):
    """log Σ_m w_m p̃(x_m), with the nodes spread over the rows of a plate.

    :param log_density: maps (rows, coordinates) to (rows,), row by row.
    :param nodes: of shape (nodes, coordinates).
    :param log_weights: of shape (nodes,).
    :param int num_rows: rows of the plate.
    :return: scalar.
    """
    num_nodes, coordinates = nodes.shape
    groups = -(-num_nodes // num_rows)
    missing = groups * num_rows - num_nodes
    nodes = jnp.concatenate([nodes, jnp.broadcast_to(nodes[:1], (missing, coordinates))])
    log_weights = jnp.pad(log_weights, (0, missing), constant_values=-jnp.inf)
    nodes = nodes.reshape(groups, num_rows, coordinates)
    if groups * num_rows <= AT_ONCE:
        values = jax.vmap(log_density)(nodes)
    else:  # too many to be kept for the backward pass, which evaluates them again
        batch_size = max(1, AT_ONCE // num_rows)
        values = lax.map(jax.checkpoint(log_density), nodes, batch_size=batch_size)
    return logsumexp(values.reshape(-1) + log_weights)
