# SPDX-License-Identifier: Apache-2.0
r"""A function interpolated from noisy values at scattered points, with its error.

.. math:: f(x) = b(x)^\top c + g(x), \qquad g \sim GP\big(0, a^2 e^{-\frac12 \|(x - x')/ℓ\|^2}\big)

with b all monomials to the fourth degree, and amplitude a and length-scales ℓ of maximal marginal
likelihood. The prior of c is flat to the second degree; those of x^α beyond have the variances of
a smooth function with the spread s of the values,

.. math:: \mathrm{var}\, c_α = s^2 / (λ^{2 |α|} α!), \qquad λ^2 = 2.25\, D

Noisy values in the middle cannot tell such terms from none, and from them comes the error beyond
the design. The fit is made once, in double precision on the host; predictions are JAX.

Reference: Rasmussen, Williams, *Gaussian processes for machine learning*, 2006, sections 2.7, 5.4.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["Emulator", "fit_emulator"]

FLOOR = 1e-3
"""Least standard deviation of the noise, in units of the residual spread of the quadratic fit, at
which interpolation is accurate in single precision."""


DEGREE = 4
SQUARED_LENGTH = 2.25
"""λ² a coordinate, in units of the variance of the design. With half as much the errors of
tests/posteriors/test_emulated.py stay as they are."""


class Emulator(NamedTuple):
    """A fitted interpolation; a pytree of arrays.

    - **center, scale** - of the points, (D,) each.
    - **points** - the design, standardised, (K, D).
    - **length_scales, amplitude** - of the kernel.
    - **coefficients, weights** - of the basis, and of the kernel at the design.
    - **half_inverse, basis_half_inverse, basis_map** - what the variance needs.
    - **left_out** - residuals of every value, predicted from all others, in its standard errors.
    """

    center: jax.Array
    scale: jax.Array
    points: jax.Array
    length_scales: jax.Array
    amplitude: jax.Array
    coefficients: jax.Array
    weights: jax.Array
    half_inverse: jax.Array
    basis_half_inverse: jax.Array
    basis_map: jax.Array
    left_out: jax.Array

    def predict(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Value and standard error at a point.

        :param x: point, (D,).
        :return: two scalars.
        """
        x = (x - self.center) / self.scale
        square = jnp.sum(((x - self.points) / self.length_scales) ** 2, -1)
        k = self.amplitude**2 * jnp.exp(-0.5 * square)
        basis = _monomials(x[None], jnp)[0]
        value = basis @ self.coefficients + k @ self.weights
        explained = jnp.sum((self.half_inverse @ k) ** 2)
        rest = self.basis_half_inverse @ (basis - self.basis_map @ k)
        variance = self.amplitude**2 - explained + jnp.sum(rest**2)
        # The rounding error of a difference of nearly equal numbers.
        floor = float(jnp.finfo(variance.dtype).eps) * self.amplitude**2
        return value, jnp.sqrt(jnp.maximum(variance, floor))


def fit_emulator(points: ArrayLike, values: ArrayLike, errors: ArrayLike) -> Emulator:
    """Interpolate values at scattered points.

    :param points: (K, D), with K larger than the (D + 1)(D + 2)/2 monomials.
    :param values: (K,).
    :param errors: their standard errors, (K,).
    :return: :class:`Emulator`.

    **Example**

    >>> import numpy as np
    >>> from numpyro_ebm.posteriors.emulator import fit_emulator
    >>> x = np.linspace(0.0, 3.0, 15)
    >>> emulator = fit_emulator(x[:, None], np.sin(x), np.full(15, 1e-4))
    >>> value, error = emulator.predict(np.array([1.1]))
    >>> bool(abs(value - np.sin(1.1)) < 4 * error < 0.05)
    True
    """
    import scipy.linalg
    from scipy.optimize import minimize  # a quarter of a second to import

    points, values = np.asarray(points, float), np.asarray(values, float)
    num, size = points.shape
    center, scale = points.mean(0), points.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    x = (points - center) / scale
    basis, precisions = _monomials(x, np), _precisions(size, max(values.std(), 1e-9))
    flat = basis[:, precisions == 0]
    left_over = values - flat @ np.linalg.lstsq(flat, values, rcond=None)[0]
    spread = max(left_over.std(), 1e-9 * (1 + np.abs(values).max()))
    noise = np.maximum(np.asarray(errors, float), FLOOR * spread) ** 2
    gaps = x[:, None] - x

    def kernel(parameters):
        amplitude, length_scales = np.exp(parameters[0]), np.exp(parameters[1:])
        return amplitude**2 * np.exp(-0.5 * np.sum((gaps / length_scales) ** 2, -1))

    def solved(parameters):
        lower = np.linalg.cholesky(kernel(parameters) + np.diag(noise))
        white_basis, white_values = (
            scipy.linalg.solve_triangular(lower, y, lower=True) for y in (basis, values)
        )
        gram = np.linalg.cholesky(white_basis.T @ white_basis + np.diag(precisions))
        coefficients = scipy.linalg.cho_solve((gram, True), white_basis.T @ white_values)
        rest = white_values - white_basis @ coefficients
        return lower, white_basis, gram, coefficients, rest

    def negative_evidence(parameters):
        # A weak prior bounds flat directions: amplitude near the residual spread, lengths near
        # the extent of the design.
        penalty = np.sum(((parameters - start) / 2.0) ** 2) / 2
        try:
            lower, _, gram, coefficients, rest = solved(parameters)
        except np.linalg.LinAlgError:
            return np.inf
        determinants = np.sum(np.log(np.diag(lower))) + np.sum(np.log(np.diag(gram)))
        return 0.5 * (rest @ rest + precisions @ coefficients**2) + determinants + penalty

    start = np.log(np.array([spread, *np.ones(size)]))
    found = minimize(negative_evidence, start, method="Nelder-Mead")
    lower, white_basis, gram, coefficients, rest = solved(found.x)
    half_inverse = scipy.linalg.solve_triangular(lower, np.eye(num), lower=True)
    weights = half_inverse.T @ rest
    basis_half_inverse = scipy.linalg.solve_triangular(gram, np.eye(gram.shape[0]), lower=True)
    # Leave-one-out residuals (Rasmussen and Williams, 5.12), the basis refitted each time.
    projected = basis_half_inverse @ white_basis.T @ half_inverse
    precision = np.sum(half_inverse**2, 0) - np.sum(projected**2, 0)
    left_out = weights / np.sqrt(precision)
    arrays = (
        *(center, scale, x, np.exp(found.x[1:]), np.exp(found.x[0]), coefficients, weights),
        *(half_inverse, basis_half_inverse, white_basis.T @ half_inverse, left_out),
    )
    return Emulator(*(jnp.asarray(a, jnp.result_type(float)) for a in arrays))


def _powers(size):
    """Which coordinates are multiplied in each monomial, with repetition, by degree."""
    return [
        np.array(list(itertools.combinations_with_replacement(range(size), degree)), int)
        for degree in range(DEGREE + 1)
    ]


def _monomials(x, xp):
    """All monomials of points, (K, monomials)."""
    return xp.concatenate([xp.prod(x[:, powers], -1) for powers in _powers(x.shape[1])], 1)


def _precisions(size, spread):
    """Of the priors of the coefficients: 0 to the second degree."""
    found = []
    for degree, all_powers in enumerate(_powers(size)):
        for powers in all_powers:
            orders = np.unique(powers, return_counts=True)[1]
            factorials = math.prod(math.factorial(n) for n in orders)
            scale = (SQUARED_LENGTH * size) ** degree * factorials
            found.append(scale / spread**2 if degree > 2 else 0.0)
    return np.array(found)
