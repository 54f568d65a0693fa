# SPDX-License-Identifier: Apache-2.0
"""Sliced and multiscale score matching by hand, in one dimension."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

import numpyro_ebm as ebm


@pytest.mark.parametrize("variance_reduction", [True, False])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_in_one_dimension_it_is_score_matching(x64, num_slices, variance_reduction):
    """The mean of p² v² / 2 - p, whatever the signs, and its derivative in p."""
    v, p = np.array([0.3, -1.2, 2.0]), 1.4

    def gaussian(data):
        precision = numpyro.param("p", 1.0)
        with numpyro.plate("data", len(data)):
            x = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * x**2)

    objective = ebm.SlicedScoreMatching(num_slices, variance_reduction=variance_reduction)

    @jax.jit
    @jax.value_and_grad
    def loss(p):
        return objective.loss(jax.random.key(3), {"p": p}, gaussian, None, jnp.asarray(v))

    second = np.mean(v**2)
    np.testing.assert_allclose(loss(p), (0.5 * p**2 * second - p, p * second - 1), rtol=1e-9)


def test_levels_weigh_the_score_and_the_noise(x64):
    """Of many levels: the mean of ½ (s / σ + e / σ₀²)² at the noised values, by hand."""

    def gaussian(data):
        with numpyro.plate("data", len(data)):
            x = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.7 * x**2)

    objective = ebm.MultiscaleDenoisingScoreMatching(
        0.6, min_noise_scale=0.3, max_noise_scale=2.0, variance_reduction=False
    )
    data, key = jnp.array([0.3, -1.2, 2.0]), jax.random.key(3)
    problem = objective.prepare(key, {}, gaussian, None, (data,), {})
    levels, noise = problem.noise
    found = objective.energy_loss(key, {}, problem)
    score = -1.4 * (data + levels * noise["v"])
    expected = np.mean(0.5 * (score / levels + noise["v"] / 0.6**2) ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_coordinates_in_blocks_give_the_trace(monkeypatch):
    """Σ over seven coordinates, two at a time: ½‖Pv‖² - tr P for a Gaussian of precision P."""
    rows = np.random.default_rng(3).normal(size=(5, 7)).astype(np.float32)

    def gaussian(data):
        precision = numpyro.param("precision", jnp.ones(7))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(7,)), obs=data)
            ebm.energy("E", 0.5 * jnp.sum(precision * v**2, -1))

    def loss(precision):
        params = {"precision": precision}
        return ebm.ScoreMatching().loss(jax.random.key(1), params, gaussian, None, rows)

    monkeypatch.setattr("numpyro_ebm.objectives.score_matching.MOST_VALUES", 2 * rows.size)
    precision = jnp.linspace(0.5, 2.0, 7)
    value, gradient = jax.value_and_grad(loss)(precision)
    second = np.mean(rows**2, 0)
    np.testing.assert_allclose(value, np.sum(0.5 * precision**2 * second - precision), rtol=1e-5)
    np.testing.assert_allclose(gradient, precision * second - 1.0, rtol=1e-5, atol=1e-6)
