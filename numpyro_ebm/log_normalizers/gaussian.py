# SPDX-License-Identifier: Apache-2.0
"""Gaussian distributions, one for each problem."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.log_normalizers.particles import by_problem

__all__ = ["Gaussian"]


class Gaussian(NamedTuple):
    """A Gaussian of every problem.

    - **center** - of shape (problems, D).
    - **factor** - Cholesky factor of its covariance, of shape (problems, D, D); of shape
      (problems, D) where that is diagonal.
    """

    center: jax.Array
    factor: jax.Array

    @property
    def is_diagonal(self) -> bool:
        return jnp.ndim(self.factor) == 2

    @property
    def log_det(self) -> jax.Array:
        """log det of the factor, of shape (problems,)."""
        diagonal = self.factor
        if not self.is_diagonal:
            diagonal = jnp.diagonal(self.factor, axis1=-2, axis2=-1)
        return jnp.sum(jnp.log(diagonal), -1)

    def standardize(self, x: jax.Array) -> jax.Array:
        """Coordinates in which it is standard, of points (n, D)."""
        gap = by_problem(x, self.center) - self.center
        if self.is_diagonal:
            return jnp.reshape(gap / self.factor, x.shape)
        columns = jnp.moveaxis(gap, 0, -1)
        z = lax.linalg.triangular_solve(self.factor, columns, left_side=True, lower=True)
        return jnp.reshape(jnp.moveaxis(z, -1, 0), x.shape)

    def restore(self, z: jax.Array) -> jax.Array:
        """Undo :meth:`standardize`."""
        z_rows = by_problem(z, self.center)
        if self.is_diagonal:
            return jnp.reshape(self.center + self.factor * z_rows, z.shape)
        return jnp.reshape(self.center + jnp.einsum("kij,pkj->pki", self.factor, z_rows), z.shape)

    def log_prob(self, x: jax.Array) -> jax.Array:
        """Normalised log-density of points (n, D), of shape (n,)."""
        constant = 0.5 * x.shape[-1] * math.log(2 * math.pi)
        shape = -0.5 * jnp.sum(self.standardize(x) ** 2, -1) - constant
        return jnp.reshape(by_problem(shape, self.center) - self.log_det, len(x))

    def sample(self, rng_key: jax.Array, num: int) -> jax.Array:
        """Draw ``num`` points, (num, D)."""
        shape = (num, self.center.shape[-1])
        return self.restore(jax.random.normal(rng_key, shape, self.center.dtype))

    def subset(self, index: Any) -> "Gaussian":
        """The marginal of some coordinates."""
        if self.is_diagonal:
            return self._replace(center=self.center[:, index], factor=self.factor[:, index])
        covariance = self.factor @ jnp.swapaxes(self.factor, -1, -2)
        factor = jnp.linalg.cholesky(covariance[:, index][:, :, index])
        return self._replace(center=self.center[:, index], factor=factor)
