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
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp

__all__ = [
    "REACH",
    "grid_nodes",
    "log_gaussian_integral",
    "log_sum_in_chunks",
    "log_sum_over_rows",
    "quadrature_nodes",
    "standard_nodes",
]

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
    >>> from numpyro_ebm.log_normalizers import quadrature_nodes
    >>> x, log_weights = quadrature_nodes(0.0, 1.0, 64)
    >>> float(logsumexp(log_weights - 0.5 * x**2))  # ½ log 2π
    0.918938...
    """
    nodes, log_weights = standard_nodes(num_nodes)
    return center + scale * nodes, jnp.log(scale) + log_weights


def standard_nodes(num_nodes):
    """The same for center 0 and scale 1, as NumPy arrays."""
    limit = math.asinh(REACH)
    t = np.linspace(-limit, limit, num_nodes)
    step = 2 * limit / (num_nodes - 1)
    return np.sinh(t), np.log(step * np.cosh(t))


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
        values = log_density(nodes[0]) if groups == 1 else jax.vmap(log_density)(nodes)
    else:  # too many to be kept for the backward pass, which evaluates them again
        batch_size = max(1, AT_ONCE // num_rows)
        values = lax.map(jax.checkpoint(log_density), nodes, batch_size=batch_size)
    return logsumexp(values.reshape(-1) + log_weights)


def log_sum_in_chunks(log_terms, nodes, chunk):
    """log Σ_m exp(log_terms(x_m)) over very many nodes, a chunk of them at a time.

    The sum of a chunk is rounded before it joins the others, so that in single precision a million
    terms lose no more than a thousand.

    :param log_terms: maps nodes (M, ...) to log-terms (M, K).
    :param nodes: pytree of arrays, nodes leading.
    :param int chunk: nodes at a time.
    :return: of shape (K,).

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.log_normalizers.exact import log_sum_in_chunks
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


def log_gaussian_integral(log_density, like, is_diagonal):
    r"""log of the integral of exp of a quadratic function, of many of them at once.

    .. math:: \log\int e^{c + g^\top x - \frac12 x^\top P x} dx
        = c + \tfrac12 g^\top P^{-1} g + \tfrac{D}{2} \log 2π - \tfrac12 \log\det P

    :param log_density: maps points (n, D) to (n,), row by row; quadratic in each row.
    :param like: any array of shape (n, D).
    :param bool is_diagonal: whether P is diagonal.
    :return: of shape (n,); NaN or infinite where the integral diverges.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.log_normalizers.exact import log_gaussian_integral
    >>> log_gaussian_integral(lambda x: -0.5 * x[:, 0] ** 2, jnp.zeros((1, 1)), True)
    Array([0.9189385], dtype=float32)
    """
    zero = jnp.zeros_like(like)
    size = like.shape[1]
    constant = log_density(zero)
    gradient = jax.grad(lambda x: jnp.sum(log_density(x)))
    g, times_hessian = jax.linearize(gradient, zero)
    if is_diagonal:
        precision = -times_hessian(jnp.ones_like(zero))
        precision = jnp.where(precision > 0, precision, jnp.nan)
        square = jnp.sum(g**2 / precision, -1)
        log_det = jnp.sum(jnp.log(precision), -1)
    else:
        axes = jnp.broadcast_to(jnp.eye(size, dtype=like.dtype)[:, None], (size, *like.shape))
        lower = jnp.linalg.cholesky(-jnp.moveaxis(jax.vmap(times_hessian)(axes), 0, -1))
        square = jnp.sum(solve_triangular(lower, g[..., None], lower=True) ** 2, (-1, -2))
        log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(lower, axis1=-2, axis2=-1)), -1)
    return constant + 0.5 * square + 0.5 * size * math.log(2 * math.pi) - 0.5 * log_det
