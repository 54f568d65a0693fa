# SPDX-License-Identifier: Apache-2.0
"""Integrals of quadratic log-densities: those that diverge are not finite, the others are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm.samplers.gaussian_conditional import Quadratic, expand_quadratic


def log_integral(matrix, shift=0.0):
    def log_density(x):
        return -0.5 * jnp.sum(((x - shift) @ matrix.T) ** 2, -1)

    point = jnp.zeros((1, matrix.shape[1]), jnp.float32)
    form = expand_quadratic(log_density, point, False)
    return float(form.log_integral(log_density(point))[0])


@pytest.mark.parametrize("seed", range(12))
def test_a_singular_precision_has_no_integral(seed):
    """Four coordinates, three directions: rounding leaves a pivot that is about zero."""
    matrix = jax.random.normal(jax.random.key(seed), (3, 4))
    assert np.isnan(log_integral(matrix))


def test_correlated_coordinates_are_told_by_their_own_scales():
    matrix = jnp.array([[1.0, 100.0], [0.0, 1.0]])
    assert log_integral(matrix) == pytest.approx(np.log(2 * np.pi), abs=2e-3)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_precision_of_full_rank_has_its_integral(scale):
    matrix = np.array([[1.0, 0.3, 0.0], [0.0, scale, -0.2], [0.1, 0.0, 1 / scale]], np.float32)
    right = 1.5 * np.log(2 * np.pi) - np.log(abs(np.linalg.det(matrix.astype(float))))
    assert log_integral(jnp.asarray(matrix), 0.7) == pytest.approx(right, abs=2e-4)


def test_draws_are_standard_normal_in_units_of_the_precision():
    """A diagonal one and a full one, from the same normal numbers."""
    point, gradient = jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 3.0]])
    noise = jax.random.normal(jax.random.key(2), (1, 2))
    precision = np.array([4.0, 0.25])
    mean = point + gradient / precision
    diagonal = Quadratic(point, gradient, jnp.asarray(precision)[None])
    full = Quadratic(point, gradient, jnp.diag(jnp.sqrt(jnp.asarray(precision)))[None])
    for quadratic in (diagonal, full):
        drawn = quadratic.draw(jax.random.key(2))
        np.testing.assert_allclose((drawn - mean) * np.sqrt(precision), noise, rtol=1e-4)
