# SPDX-License-Identifier: Apache-2.0
r"""Nodes and weights of sums and quadratures, and log-sums over very many of them.

.. math:: \log Z = \log \sum_m w_m\, \tilde p(x_m)

Discrete coordinates take all their values, with weight one. A real coordinate runs over
:math:`x = m + s \sinh t` for equidistant t: dense around m, and far out in few steps, with errors
that vanish exponentially in the number of nodes for smooth energies (the trapezoidal rule after a
change of variable).

Reference: Takahasi, Mori, *Double exponential formulas for numerical integration*, 1974; Trefethen,
Weideman, *The exponentially convergent trapezoidal rule*, SIAM Review 2014.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from numpyro_ebm.model.finite_supports import grid
from numpyro_ebm.types import LogDensity

__all__ = [
    "NODES_AT_ONCE",
    "REACH",
    "log_sum_in_chunks",
    "log_sum_over_rows",
    "quadrature_nodes",
    "sinh_nodes",
    "weighted_grid",
]

REACH = 100.0
"""How far the nodes of a quadrature go, in units of its scale."""

NODES_AT_ONCE = 65_536
"""Nodes that :func:`log_sum_over_rows` evaluates at the same time."""


def sinh_nodes(num_nodes: int, reach: float = REACH) -> tuple[np.ndarray, np.ndarray]:
    r"""Nodes :math:`\sinh t` of a quadrature over the real line, and their log-weights.

    :param int num_nodes: their number.
    :param float reach: the largest node.
    :return: nodes and log-weights, NumPy arrays of shape (num_nodes,).
    """
    limit = math.asinh(reach)
    t = np.linspace(-limit, limit, num_nodes)
    return np.sinh(t), np.log(2 * limit / (num_nodes - 1) * np.cosh(t))


def quadrature_nodes(
    center: ArrayLike, scale: ArrayLike, num_nodes: int
) -> tuple[np.ndarray | jax.Array, jax.Array]:
    """Nodes and log-weights of a quadrature around a point.

    :param center: where the nodes are densest.
    :param scale: their width there.
    :param int num_nodes: their number.
    :return: nodes and log-weights, of shape (num_nodes,) each.

    **Example**

    >>> import jax.numpy as jnp
    >>> from jax.scipy.special import logsumexp
    >>> from numpyro_ebm.log_normalizers import quadrature_nodes
    >>> x, log_weights = quadrature_nodes(0.0, 1.0, 64)
    >>> float(logsumexp(log_weights - 0.5 * x**2))  # ½ log 2π
    0.918938...
    """
    nodes, log_weights = sinh_nodes(num_nodes)
    return center + scale * nodes, jnp.log(scale) + log_weights


def weighted_grid(
    columns: Sequence[Any], log_weights: Sequence[Any], xp: Any = np
) -> tuple[Any, Any]:
    """All combinations of the nodes of several coordinates, and the sums of their log-weights.

    :param list columns: nodes of each coordinate.
    :param list log_weights: their log-weights.
    :param xp: ``numpy``, or ``jax.numpy`` where they are too many to be constants of a program.
    :return: of shape (nodes, coordinates) and (nodes,).
    """
    totals = sum(x.ravel() for x in xp.meshgrid(*log_weights, indexing="ij"))
    return grid(columns, xp), totals


def log_sum_over_rows(
    log_density: LogDensity, nodes: jax.Array, log_weights: jax.Array, num_rows: int
) -> jax.Array:
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
    if groups * num_rows <= NODES_AT_ONCE:
        values = log_density(nodes[0]) if groups == 1 else jax.vmap(log_density)(nodes)
    else:  # too many to be kept for the backward pass, which evaluates them again
        batch_size = max(1, NODES_AT_ONCE // num_rows)
        values = lax.map(jax.checkpoint(log_density), nodes, batch_size=batch_size)
    return logsumexp(values.reshape(-1) + log_weights)


def log_sum_in_chunks(log_terms: Callable[..., jax.Array], nodes: Any, chunk: int) -> jax.Array:
    """log Σ_m exp(log_terms(x_m)) over very many nodes, a chunk of them at a time.

    The sum of a chunk is rounded before it joins the others, so that in single precision a million
    terms lose no more than a thousand.

    :param log_terms: maps nodes (M, ...) to log-terms (M, K).
    :param nodes: pytree of arrays, nodes leading.
    :param int chunk: nodes at a time.
    :return: of shape (K,).

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.log_normalizers.nodes import log_sum_in_chunks
    >>> log_sum_in_chunks(lambda x: jnp.log(x)[:, None], jnp.arange(1.0, 5.0), 3)
    Array([2.3025851], dtype=float32)
    """
    num = len(jax.tree.leaves(nodes)[0])
    chunk = min(chunk, num)
    missing = -num % chunk

    def split(x):
        padded = jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])
        return jnp.reshape(padded, (len(padded) // chunk, chunk, *x.shape[1:]))

    is_there = jnp.reshape(jnp.arange(num + missing) < num, (-1, chunk, 1))

    def of_chunk(x):
        part, mask = x
        return logsumexp(jnp.where(mask, log_terms(part), -jnp.inf), 0)

    return logsumexp(lax.map(of_chunk, (jax.tree.map(split, nodes), is_there)), 0)
