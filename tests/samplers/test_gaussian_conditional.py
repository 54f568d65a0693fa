# SPDX-License-Identifier: Apache-2.0
"""Integrals of quadratic log-densities: those that diverge are not finite, the others are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm.samplers.gaussian_conditional import expand_quadratic


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
