# SPDX-License-Identifier: Apache-2.0
r"""Coordinates in which a log-density is quadratic: their Gaussian conditional and their integral.

.. math:: \log π(x) = \log π(m) + g^\top (x - m) - \tfrac12 (x - m)^\top P (x - m)

is a Gaussian of precision P and mean :math:`m + P^{-1} g`, and

.. math:: \log\int π(x)\, dx = \log π(m) + \tfrac12 g^\top P^{-1} g + \tfrac{D}{2} \log 2π
    - \tfrac12 \log\det P

whatever the point m is. That a log-density is quadratic is read off its operations, by
:func:`~numpyro_ebm.program.polynomial.structure`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from numpyro_ebm.program.polynomial import Structure
from numpyro_ebm.types import LogDensity

__all__ = ["Quadratic", "expand_quadratic", "why_not_gaussian"]


SINGULAR = 0.25
"""tr S⁻¹ in units of 1/ε from which on a precision counts as singular; see :class:`Quadratic`."""


class Quadratic(NamedTuple):
    """A log-density of every row that is quadratic in its D coordinates, but for log π(m).

    - **point** - m, of shape (rows, D).
    - **gradient** - g, the gradient at m, of shape (rows, D).
    - **factor** - the Cholesky factor of the precision P, of shape (rows, D, D); where P is
      diagonal, P itself, of shape (rows, D).
    """

    point: jax.Array
    gradient: jax.Array
    factor: jax.Array

    @property
    def is_diagonal(self) -> bool:
        return jnp.ndim(self.factor) == jnp.ndim(self.point)

    @property
    def mean(self) -> jax.Array:
        """The mean of the Gaussian of every row, of shape (rows, D)."""
        return self._mean_and(0.0)

    def draw(self, rng_key: jax.Array) -> jax.Array:
        """One draw of the Gaussian of every row, of shape (rows, D)."""
        return self._mean_and(jax.random.normal(rng_key, self.point.shape, self.point.dtype))

    def log_integral(self, value: jax.Array) -> jax.Array:
        """log of the integral of π over all coordinates, of shape (rows,); NaN where it diverges.

        :param value: log π(m), of shape (rows,).
        """
        if self.is_diagonal:
            precision = jnp.where(self.factor > 0, self.factor, jnp.nan)
            square = jnp.sum(self.gradient**2 / precision, -1)
            log_det = jnp.sum(jnp.log(precision), -1)
        else:
            whitened = solve_triangular(self.factor, self.gradient[..., None], lower=True)
            square = jnp.sum(whitened**2, (-1, -2))
            log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(self.factor, axis1=-2, axis2=-1)), -1)
            log_det = jnp.where(self._is_proper(), log_det, jnp.nan)
        size = self.point.shape[-1]
        return value + 0.5 * square + 0.5 * size * math.log(2 * math.pi) - 0.5 * log_det

    def _is_proper(self):
        """Whether P is positive definite beyond rounding, of shape (rows,).

        The factor is exact for a P that is off by rounding, which moves eigenvalues by as much: if
        P is singular, tr S⁻¹ comes out at about 1/ε or above, with S = P scaled to a unit diagonal.
        """
        scale = jnp.sqrt(jnp.sum(self.factor**2, -1))
        inverse = solve_triangular(
            self.factor, scale[..., None] * jnp.eye(scale.shape[-1]), lower=True
        )
        return jnp.sum(inverse**2, (-1, -2)) * jnp.finfo(self.factor.dtype).eps < SINGULAR

    def _mean_and(self, noise):
        """The mean, and standard noise as it is under the Gaussian."""
        g, factor = self.gradient, self.factor
        if self.is_diagonal:
            return self.point + (g / factor + noise / jnp.sqrt(factor))
        # P = L Lᵀ: x = L⁻ᵀ (L⁻¹ g + ξ) has mean P⁻¹ g and covariance P⁻¹.
        whitened = solve_triangular(factor, g[..., None], lower=True)[..., 0] + noise
        return (
            self.point + solve_triangular(factor, whitened[..., None], lower=True, trans=1)[..., 0]
        )


def expand_quadratic(log_density: LogDensity, point: jax.Array, is_diagonal: bool) -> Quadratic:
    """The quadratic form of a log-density, from a gradient and its Jacobian at a point.

    :param log_density: maps points (rows, D) to (rows,), row by row; quadratic in each row.
    :param point: m, of shape (rows, D).
    :param bool is_diagonal: whether P is diagonal.
    :return: a :class:`Quadratic`.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.samplers.gaussian_conditional import expand_quadratic
    >>> form = expand_quadratic(lambda x: -0.5 * x[:, 0] ** 2, jnp.zeros((1, 1)), True)
    >>> form.log_integral(jnp.zeros(1))  # ½ log 2π
    Array([0.9189385], dtype=float32)
    """
    # Rows are independent: the gradient of their sum has the gradient of every row.
    gradient = jax.grad(lambda x: jnp.sum(log_density(x)))
    g, times_hessian = jax.linearize(gradient, point)
    if is_diagonal:
        return Quadratic(point, g, -times_hessian(jnp.ones_like(point)))
    size = point.shape[1]
    axes = jnp.broadcast_to(jnp.eye(size, dtype=point.dtype)[:, None], (size, *point.shape))
    precision = -jnp.moveaxis(jax.vmap(times_hessian)(axes), 0, -1)
    return Quadratic(point, g, jnp.linalg.cholesky(precision))


def why_not_gaussian(found: Structure) -> str | None:
    """What a log-density does in coordinates that are no Gaussian, or ``None``.

    :param found: its :class:`~numpyro_ebm.program.polynomial.Structure` in them.
    """
    if found.degree == 2 and found.true_gradient:
        return None
    if found.degree < 2:
        return "does not bend in them, so that nothing holds them"
    if found.degree == 2:
        return "has derivatives of its own (`jax.custom_jvp` or `jax.custom_vjp`)"
    bound = "no polynomial" if found.degree == math.inf else f"of degree {found.degree}"
    return f"is {bound} in them, as far as can be told"
