# SPDX-License-Identifier: Apache-2.0
"""Annealed Langevin dynamics: noise levels and temperatures."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from conftest import assert_mean, enable_x64
from kernel_cases import MEANS, SPREAD, noised_mixture, run, slow
from numpyro.infer import DiscreteGibbs, Gibbs

import numpyro_ebm as ebm
from numpyro_ebm.samplers import annealed


@pytest.mark.parametrize("precision", ["float32", slow("float64")])
def test_annealing_of_a_mixture_whose_noised_scores_are_known(precision):
    sigma = np.geomspace(4.0, 0.1, 15)
    with enable_x64() if precision == "float64" else jax.default_matmul_precision("highest"):
        kernel = ebm.AnnealedLangevin(
            ebm.fixed(noised_mixture, {}), sigma, noise_argument="sigma", num_steps=60
        )
        _, draws = run(kernel, 2, 0)
        v = draws["v"][0]
        assert v.dtype == precision
        # Every draw is a run of its own: nothing is left of the one before.
        side = v[..., 0] > 0
        assert abs(np.corrcoef(side[0], side[1])[0, 1]) < 0.1
        rows = v.reshape(-1, 2)
        share = (rows[:, 0] > 0).mean()
        assert abs(share - 0.7) < 4.5 * (0.21 / len(rows)) ** 0.5 + 0.02
        near = rows[rows[:, 0] > 0] - MEANS[1]
        assert np.all(np.abs(near.mean(0)) < 0.03)
        # Denoised, the variance is SPREAD⁴ / (SPREAD² + σ²) and not SPREAD² + σ².
        expected = SPREAD**4 / (SPREAD**2 + sigma[-1] ** 2)
        assert np.all(np.abs(near.var(0) / expected - 1) < 0.1)


@pytest.mark.slow
def test_annealing_with_the_convention_of_mdsm():
    """Data at a point: MDSM's minimiser is s(z) = -(z - μ)/σ₀² for every level."""
    sigma_0, centre = 0.1, 2.0

    def learned(num_rows=3_000):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * (v - centre) ** 2 / sigma_0**2)

    # It is the minimiser: the loss there is zero, as noise and score cancel row by row.
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            mean = numpyro.param("mean", centre)
            ebm.energy("E", 0.5 * (v - mean) ** 2 / sigma_0**2)

    objective = ebm.MultiscaleDenoisingScoreMatching(
        sigma_0, min_noise_scale=0.1, max_noise_scale=2.0, variance_reduction=False
    )
    loss = objective.loss(jax.random.key(0), {"mean": centre}, model, None, jnp.full(50, centre))
    assert abs(loss) < 1e-4
    levels = np.geomspace(2.0, 0.5, 5)
    options = {"noise_scale": sigma_0, "num_steps": 40, "step_size": 0.1}
    kernel = ebm.AnnealedLangevin(ebm.fixed(learned, {}), levels, denoise=False, **options)
    v = run(kernel, 1, 0)[1]["v"][0, 0]
    # At the last level the density is N(μ, σ_K²), wider by 1/(1 - r/2).
    assert abs(v.mean() - centre) < 4.5 * 0.5 / 3_000**0.5
    assert abs(v.var() / (0.25 / 0.95) - 1) < 0.12
    last = kernel.init(jax.random.key(0), 0, None, (), {}).adapt_state.step_size
    np.testing.assert_allclose(last, 0.1 * 0.5**2, rtol=1e-5)  # r σ²
    denoised = run(ebm.AnnealedLangevin(ebm.fixed(learned, {}), levels, **options), 1, 0)[1]["v"]
    np.testing.assert_allclose(denoised, centre, atol=1e-4)


@pytest.mark.slow
def test_annealing_by_temperatures_ends_with_the_noise_of_dsm():
    def learned(num_rows=3_000):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * (v - 2.0) ** 2 / 0.1**2)

    options = {"inverse_temperatures": [1e-3, 1e-2, 0.1, 1.0], "num_steps": 40, "init_scale": 3.0}
    kernel = ebm.AnnealedLangevin(ebm.fixed(learned, {}), step_size=1e-3, **options)
    v = run(kernel, 1, 0)[1]["v"][0, 0]
    assert abs(v.mean() - 2) < 0.01
    assert abs(v.var() / (0.01 / 0.95) - 1) < 0.12
    kernel = ebm.AnnealedLangevin(
        ebm.fixed(learned, {}), step_size=1e-3, noise_scale=0.1, **options
    )
    np.testing.assert_allclose(run(kernel, 1, 0)[1]["v"], 2.0, atol=1e-4)


def test_annealed_is_blackjax_shaped():
    assert {"init", "build_kernel", "as_top_level_api"} <= set(dir(annealed))
    beta = jnp.array([0.1, 0.5, 1.0])
    algorithm = annealed.as_top_level_api(
        lambda x, b: -0.5 * b * jnp.sum((x - 1) ** 2), beta, 0.1 / beta, num_steps=50
    )
    state = jax.vmap(algorithm.init)(jnp.zeros((4_000, 1)))
    state, info = jax.vmap(algorithm.step)(jax.random.split(jax.random.key(0), 4_000), state)
    x = np.asarray(state.position[:, 0])
    assert not info.is_divergent.any()
    assert abs(x.mean() - 1) < 4.5 / 4_000**0.5 + 0.01
    assert abs(x.var() * 0.95 - 1) < 0.1
    np.testing.assert_allclose(state.logdensity, -0.5 * (x - 1) ** 2, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_annealing_in_a_block_of_gibbs(grbm):
    model = ebm.fixed(grbm.model, grbm.params)
    block = ebm.AnnealedLangevin(
        model, inverse_temperatures=[0.3, 1.0], num_steps=30, step_size=0.03, init_scale=2.0
    )
    _, draws = run(Gibbs([(block, ["v"]), (DiscreteGibbs(model), ["h"])]), 3_000, 100)
    mean, _, hidden = grbm.oracle.moments()
    assert_mean(draws["v"][:, :, 0], mean, num_errors=6.0)
    assert_mean(draws["h"][:, :, 0], hidden, num_errors=6.0)
