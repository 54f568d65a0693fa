# SPDX-License-Identifier: Apache-2.0
"""Few rows: the covariance of the scores from draws of the model at its estimate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from posterior_cases import lattice_model

import numpyro_ebm as ebm

LATTICE = np.array([[[1, 1, 0], [0, 1, 1], [0, 0, 1]], [[0, 0, 1], [1, 0, 0], [1, 1, 1]]])


@pytest.mark.slow
def test_few_lattices_are_calibrated_by_simulation(x64):
    """J against the sum over all 512 states, of gradients that JAX takes one by one."""
    model = ebm.generalized(lattice_model, ebm.PseudoLikelihood(), "calibrate")
    found = model.calibrate(LATTICE, num_resamples=2_000)
    assert found.method == "simulation"
    states = np.array(list(itertools.product([-1.0, 1.0], repeat=9))).reshape(-1, 3, 3)

    def statistics(s):
        return jnp.stack([jnp.sum(s[1:] * s[:-1]) + jnp.sum(s[:, 1:] * s[:, :-1]), jnp.sum(s)])

    def loss(theta, s):
        padded = jnp.pad(s, 1)
        near = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
        return jnp.sum(jax.nn.softplus(-2 * s * (theta[0] * near + theta[1])))

    theta = jnp.array([found.minimizer["beta"], found.minimizer["field"]])

    def of_data(theta):
        return jnp.mean(jnp.stack([loss(theta, 2.0 * s - 1) for s in LATTICE]))

    np.testing.assert_allclose(jax.grad(of_data)(theta), 0.0, atol=1e-5)
    log_p = np.asarray(jax.vmap(statistics)(states) @ theta)
    p = np.exp(log_p - scipy.special.logsumexp(log_p))
    scores = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(theta, states))
    np.testing.assert_allclose(p @ scores, 0.0, atol=1e-9)  # pseudo-likelihood is unbiased
    J = (scores * p[:, None]).T @ scores
    error = np.sqrt(np.diag(J)) / np.sqrt(2_000)
    np.testing.assert_allclose(
        np.sqrt(np.diag(found.score_covariance)), np.sqrt(np.diag(J)), atol=4 * error.max()
    )
    H = jax.hessian(of_data)(theta)
    np.testing.assert_allclose(found.hessian, H, rtol=1e-5, atol=1e-6)
    again = model.calibrate(LATTICE, method="simulation", num_resamples=2_000)
    assert again.learning_rate == found.learning_rate  # one key, one result
