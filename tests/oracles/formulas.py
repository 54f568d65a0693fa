# SPDX-License-Identifier: Apache-2.0
"""Objectives from their formulas."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def score_matching(system):
    """½‖s‖² + tr ∇s, a mean over rows, as a function of the parameters."""

    def row(p, u):
        return 0.5 * jnp.sum(system.score(p, u) ** 2) + system.trace(p, u)

    points = jnp.asarray(system.unconstrain(system.data))
    return lambda p: jnp.mean(jax.vmap(lambda u: row(p, u))(points))


def denoising(system, levels, noise, noise_scale=None, variance_reduction=False):
    """½‖s(u + σε)/c + ε/d‖² at given noise: c = 1, d = σ, or for many levels c = σ, d = σ₀².

    A ``noise_scale`` of "level" is σ₀ = σ. With variance reduction what is of first order in the
    noise is taken off, which has mean zero: (ε/σ)·s(u) + (‖ε‖² - D)/(2σ²).
    """
    points = jnp.asarray(system.unconstrain(system.data))

    def row(p, u, level, e):
        score = system.score(p, u + level * e)
        one_level = noise_scale is None
        divisor = level if one_level else (level if noise_scale == "level" else noise_scale) ** 2
        scale, offset = 1.0 if one_level else 1 / level, e / divisor
        loss = 0.5 * jnp.sum((scale * score + offset) ** 2)
        if variance_reduction:
            control = scale * jnp.sum(offset * system.score(p, u))
            loss = loss - control - 0.5 * (jnp.sum(offset**2) - jnp.size(e) / divisor**2)
        return loss

    return lambda p: jnp.mean(jax.vmap(partial(row, p))(points, levels, noise))


def expected_denoising(system, levels, weights, noise_scale=None, degree=24):
    """The denoising loss with noise and levels integrated out by quadrature."""
    dim = np.size(system.data[0])
    x, w = np.polynomial.hermite_e.hermegauss(degree)
    nodes = np.array(list(itertools.product(x, repeat=dim))).reshape(-1, *system.data[0].shape)
    node_weights = np.prod(np.array(list(itertools.product(w, repeat=dim))), -1)
    node_weights = node_weights / node_weights.sum()
    num_rows = len(system.data)

    def loss(p):
        def at(level, e):
            row = jnp.full(num_rows, level), jnp.broadcast_to(e, (num_rows, *e.shape))
            return denoising(system, *row, noise_scale)(p)

        values = jax.vmap(lambda s: jax.vmap(lambda e: at(s, e))(jnp.asarray(nodes)))(levels)
        return weights @ values @ node_weights

    return loss


def level_quadrature(low, high, spacing, degree=24):
    """Nodes and weights of the uniform law of a level, in σ or in log σ."""
    x, w = np.polynomial.legendre.leggauss(degree)
    fraction, w = 0.5 * (x + 1), 0.5 * w
    levels = (
        low + (high - low) * fraction if spacing == "linear" else low * (high / low) ** fraction
    )
    return jnp.asarray(levels), jnp.asarray(w)


RADIAL = {
    "rbf": lambda x, y, width: jnp.exp(-0.5 * jnp.sum((x - y) ** 2) / width**2),
    "imq": lambda x, y, width: 1 / jnp.sqrt(1 + jnp.sum((x - y) ** 2) / width**2),
}


def stein_kernel(score, kernel, width, weight=lambda x: 1.0):
    """κ(x, y) of one pair from a score function, all derivatives of the kernel by autodiff."""

    def k(x, y):
        return weight(x) * weight(y) * RADIAL[kernel](x, y, width)

    def kappa(x, y):
        in_y = jax.grad(k, 1)
        return (
            k(x, y) * (score(x) @ score(y))
            + score(x) @ in_y(x, y)
            + score(y) @ jax.grad(k)(x, y)
            + jnp.trace(jax.jacfwd(in_y, 0)(x, y))
        )

    return kappa


def median_distance(points, pairs="all"):
    """The median distance of the pairs, in NumPy."""
    half = len(points) // 2
    if pairs == "all":
        index = itertools.combinations(range(len(points)), 2)
    else:
        index = ((i, half + i) for i in range(half))
    return np.median([np.linalg.norm(np.subtract(points[i], points[j])) for i, j in index])


def stein_discrepancy(system, kernel="rbf", bandwidth="median", pairs="all", **weighted):
    """The mean of κ over the pairs of rows, as a function of the parameters.

    Over ``halves`` its gradient is that of the second side alone, twice: the same in the mean over
    rows in any order.
    """
    shape = np.shape(system.data[0])
    points = np.reshape(system.unconstrain(system.data), (len(system.data), -1))
    num, width = len(points), bandwidth
    if bandwidth == "median":
        width = median_distance(points, pairs)
    points = jnp.asarray(points)

    def kappa(p, q):
        """κ with the parameters p on its first side and q on its second."""

        def of(x, y):
            sides = [jnp.ravel(system.score(r, u.reshape(shape))) for r, u in ((p, x), (q, y))]
            two = lambda u: jnp.where(jnp.all(u == x), *sides)  # noqa: E731
            return stein_kernel(two, kernel, width, **weighted)(x, y)

        return of

    def all_pairs(p):
        table = jax.vmap(lambda x: jax.vmap(lambda y: kappa(p, p)(x, y))(points))(points)
        return jnp.sum(table - jnp.diag(jnp.diag(table))) / (num * (num - 1))

    def halves(p):
        left, right = points[: num // 2], points[num // 2 :]
        mean = jnp.mean(jax.vmap(kappa(jax.lax.stop_gradient(p), p))(left, right))
        return 2.0 * mean - jax.lax.stop_gradient(mean)

    return all_pairs if pairs == "all" else halves
