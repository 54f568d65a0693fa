# SPDX-License-Identifier: Apache-2.0
r"""A reference fitted to points: a mixture of multivariate Student-t distributions.

.. math:: q(x) = \sum_k w_k\, t_ν(x;\, m_k,\, s^2 Σ_k)

with locations and covariances by expectation maximisation (of Gaussians) and one wide component
that spans all points. Annealing from it need not carry particles from one mode to the next: a path
from one broad component starves modes that are narrow, since at :math:`0 < β < 1` they weigh less
than at either end.

Reference: McLachlan, Peel, *Finite mixture models*, 2000; seeds: Arthur, Vassilvitskii,
*k-means++*, 2007.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp

from numpyro_ebm.log_normalizers.gaussian import Gaussian
from numpyro_ebm.log_normalizers.particles import by_problem

__all__ = ["Mixture", "fit_mixture"]

DEGREES = 5.0  # of freedom
WIDER = 1.2  # by what factor components are wider than those fitted
COMPONENTS = 8
ITERATIONS = 30
MOST_CORRELATED = 32  # dimensions up to which components have covariances of their own


class Mixture(NamedTuple):
    """A mixture of Student-t distributions of every problem. Made by :func:`fit_mixture`.

    - **log_weights** - of shape (problems, K).
    - **centers** - of shape (problems, K, D).
    - **factors** - Cholesky factors of the scale matrices, of shape (problems, K, D, D).
    - **whiteners** - their inverses, side by side, of shape (problems, D, K D).
    - **offsets** - the whitened centres, of shape (problems, K D).
    """

    log_weights: jax.Array
    centers: jax.Array
    factors: jax.Array
    whiteners: jax.Array
    offsets: jax.Array

    def log_prob(self, x: jax.Array) -> jax.Array:
        """Normalised log-density of points (n, D), of shape (n,)."""
        size = x.shape[-1]
        # One product of matrices for all components.
        z = jnp.einsum("nkd,kde->nke", by_problem(x, self.centers), self.whiteners) - self.offsets
        square = jnp.sum(jnp.reshape(z, (*z.shape[:-1], -1, size)) ** 2, -1)
        half = 0.5 * (DEGREES + size)
        constant = math.lgamma(half) - math.lgamma(0.5 * DEGREES)
        constant = constant - 0.5 * size * math.log(DEGREES * math.pi)
        log_weights = self.log_weights + constant - _log_det(self.factors)
        total = logsumexp(log_weights - half * jnp.log1p(square / DEGREES), -1)
        return jnp.reshape(total, len(x))

    def sample(self, rng_key: jax.Array, num: int) -> jax.Array:
        """Draw ``num`` points, (num, D)."""
        key_which, key_normal, key_scale = jax.random.split(rng_key, 3)
        problems, _, size = self.centers.shape
        each = num // problems
        dtype = self.centers.dtype
        which = jax.random.categorical(key_which, self.log_weights, shape=(each, problems))
        noise = jax.random.normal(key_normal, (each, problems, size), dtype)
        scale = 2 * jax.random.gamma(key_scale, 0.5 * DEGREES, (each, problems, 1), dtype)
        at = jnp.arange(problems)
        z = jnp.einsum("nkij,nkj->nki", self.factors[at, which], noise)
        x = self.centers[at, which] + z * jnp.sqrt(DEGREES / scale)
        return jnp.reshape(x, (each * problems, size))


def fit_mixture(
    rng_key: jax.Array, cloud: Gaussian, points: jax.Array, is_there: jax.Array, wide_weight: float
) -> Mixture:
    """Fit a mixture to points.

    :param rng_key: random key.
    :param Gaussian cloud: of the points.
    :param points: of shape (points, problems, D).
    :param is_there: which of them count, of shape (points, problems).
    :param float wide_weight: weight of the wide component.
    :return: a :class:`Mixture`.
    """
    _, problems, size = points.shape
    z = jnp.reshape(cloud.standardize(jnp.reshape(points, (-1, size))), points.shape)
    # Points far out are drawn in: they are the tails' business.
    z = jnp.clip(jnp.where(is_there[..., None], z, 0.0), -6.0, 6.0)
    keys = jax.random.split(rng_key, problems)
    fit = jax.vmap(_fit, (0, 1, 1))(keys, z, is_there.astype(z.dtype))
    log_weights, centers, factors = fit
    broad = jnp.full((problems, 1), math.log(wide_weight), z.dtype)
    log_weights = jnp.concatenate([log_weights + math.log1p(-wide_weight), broad], 1)
    centers = jnp.concatenate([centers, jnp.zeros((problems, 1, size), z.dtype)], 1)
    eye = jnp.broadcast_to(jnp.eye(size, dtype=z.dtype), (problems, 1, size, size))
    factors = WIDER * jnp.concatenate([factors, eye], 1)
    # Back to the coordinates of the points.
    outer = jax.vmap(jnp.diag)(cloud.factor) if cloud.is_diagonal else cloud.factor
    centers = cloud.center[:, None] + jnp.einsum("pij,pkj->pki", outer, centers)
    factors = outer[:, None] @ factors
    inverses = jnp.linalg.inv(factors)
    offsets = jnp.einsum("pkij,pkj->pki", inverses, centers)
    whiteners = jnp.reshape(jnp.moveaxis(inverses, -1, 1), (problems, size, -1))
    offsets = jnp.reshape(offsets, (problems, -1))
    return Mixture(log_weights, centers, factors, whiteners, offsets)


def _fit(rng_key, z, mask):
    """Expectation maximisation for points (N, D): log-weights, centres and factors."""
    size = z.shape[1]
    eye = jnp.eye(size, dtype=z.dtype)
    prior = 2.0 * (size + 2)  # points that the pooled covariance counts for

    def add_seed(centers, x):
        i, key = x
        gap = jnp.where(
            jnp.arange(COMPONENTS)[:, None] < i,
            jnp.sum((z - centers[:, None]) ** 2, -1),
            jnp.inf,
        )
        far = jnp.where(i > 0, jnp.min(gap, 0), 1.0)
        chosen = jax.random.categorical(key, jnp.log(mask * far + 1e-30))
        return centers.at[i].set(z[chosen]), None

    keys = jax.random.split(rng_key, COMPONENTS)
    seeds = jnp.arange(COMPONENTS), keys
    centers, _ = lax.scan(add_seed, jnp.zeros((COMPONENTS, size), z.dtype), seeds)

    def iterate(_, fit):
        log_joint = fit[0] + _log_components(z, fit[1], fit[2])
        share = mask[:, None] * jax.nn.softmax(log_joint, -1)
        count = jnp.sum(share, 0)
        centers = (share.T @ z + 1e-3 * fit[1]) / (count + 1e-3)[:, None]
        gap = z[:, None] - centers
        scatter = jnp.einsum("nk,nki,nkj->kij", share, gap, gap)
        pooled = jnp.sum(scatter, 0) / (jnp.sum(count) + 1e-3)
        covariance = (scatter + prior * pooled) / (count + prior)[:, None, None] + 1e-4 * eye
        if size > MOST_CORRELATED:
            covariance = covariance * eye
        log_weights = jnp.log((count + 1) / jnp.sum(count + 1))
        return log_weights, centers, jnp.linalg.cholesky(covariance)

    start = (
        jnp.full(COMPONENTS, -math.log(COMPONENTS), z.dtype),
        centers,
        jnp.broadcast_to(0.3 * eye, (COMPONENTS, size, size)),
    )
    return lax.fori_loop(0, ITERATIONS, iterate, start)


def _log_components(z, centers, factors):
    """Log-densities of points (N, D) under Gaussian components (K, D), up to a constant: (N, K)."""
    gap = z[:, None] - centers
    square = jnp.sum(jnp.einsum("kij,nkj->nki", jnp.linalg.inv(factors), gap) ** 2, -1)
    return -0.5 * square - _log_det(factors)


def _log_det(factors):
    return jnp.sum(jnp.log(jnp.diagonal(factors, axis1=-2, axis2=-1)), -1)
