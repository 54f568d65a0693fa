# SPDX-License-Identifier: Apache-2.0
"""The exchange kernel under MCMC: chains, precisions, references, gradients."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import enable_x64
from exchange_cases import (
    GAUSSIAN,
    _moments,
    assert_posterior,
    chains,
    gaussian,
    gaussian_rows,
    run,
    slow,
)
from numpyro.infer import init_to_value
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.posteriors.exchange.target import ExchangeTarget


@pytest.mark.parametrize("method", [slow("sequential"), "vectorized", slow("parallel")])
def test_chain_methods(method):
    data = jnp.asarray(GAUSSIAN)
    kernel = ebm.Exchange(gaussian, ebm.BlockGibbs, 1)
    context = warnings.catch_warnings()
    with context:
        if method == "parallel":  # NumPyro tells that there is one device
            warnings.simplefilter("ignore")
        mcmc = run(kernel, data, num_chains=2, chain_method=method, fields=("log_prior", "i"))
    draws = mcmc.get_samples(group_by_chain=True)["theta"]
    assert draws.shape == (2, 200) and bool(jnp.all(draws > 0))
    assert not np.array_equal(draws[0], draws[1])
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert fields["accept_prob"].shape == (2, 200) == fields["log_prior"].shape
    assert fields["auxiliary"].log_ratio.shape == (2, 200, 3)
    state = mcmc.last_state
    assert "acc. prob=0." in kernel.get_diagnostics_str(state)
    mcmc.run(jax.random.key(1), data)  # from the same warm-up anew
    assert mcmc.get_samples()["theta"].shape == (400,)


def test_both_precisions_start_where_they_are_told_and_collect_deterministic_sites():
    def model(data, scale=1.0):
        theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
        numpyro.deterministic("sd", scale / jnp.sqrt(theta))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * theta * v**2)

    with enable_x64():
        kernel = ebm.Exchange(model, gaussian_rows, step_size=0.3)
        start = {"theta": jnp.log(2.0)}
        data = jnp.asarray(GAUSSIAN)
        state = kernel.init(jax.random.key(0), 0, start, (data,), {})
        assert state.z["theta"] == np.log(2.0) and state.log_density.dtype == np.float64
        assert state.log_prior == pytest.approx(stats.gamma(2).logpdf(2.0) + np.log(2.0))
        assert state.log_density == pytest.approx(-np.sum(GAUSSIAN**2))
        mcmc = run(kernel, data, num_warmup=0, num_samples=20, init_params=start)
        draws = mcmc.get_samples()
        assert draws["theta"].dtype == np.float64
        np.testing.assert_allclose(draws["sd"], 1 / np.sqrt(draws["theta"]))
        last = mcmc.last_state.auxiliary  # of a row of the data, at the proposal
        expected = -0.5 * np.exp(last.proposal) * np.mean(GAUSSIAN**2)
        np.testing.assert_allclose(last.log_density[0], expected[0])
    kernel = ebm.Exchange(
        model, gaussian_rows, step_size=0.3, init_strategy=init_to_value(values={"theta": 0.5})
    )
    state = kernel.init(jax.random.key(0), 0, None, (jnp.asarray(GAUSSIAN),), {})
    assert state.z["theta"] == pytest.approx(np.log(0.5))


def test_the_surrogate_has_a_log_z_for_every_row():
    """N times the logarithm of the mean ratio, over the rows of all references."""
    data, center = jnp.asarray(GAUSSIAN), 1.3
    target = ExchangeTarget(gaussian, (data,), {})
    v = np.random.default_rng(3).normal(size=(6, len(GAUSSIAN)))
    theta = np.array([0.5, 2.0])
    found = [
        target.log_posterior({"theta": jnp.log(x)}, {"v": jnp.asarray(v)}, -0.5 * center * v**2)
        for x in theta
    ]
    log_z = [np.logaddexp.reduce(np.ravel(-0.5 * (x - center) * v**2)) for x in theta]
    log_p = stats.gamma(2).logpdf(theta) + np.log(theta) - 0.5 * theta * np.sum(GAUSSIAN**2)
    expected = log_p - len(GAUSSIAN) * np.array(log_z)
    np.testing.assert_allclose(found[1] - found[0], expected[1] - expected[0], rtol=1e-4)


def test_priors_of_rows_have_their_densities_in_unconstrained_coordinates():
    """log p(θ) + log |dθ / dz| of every row, summed over its sites and their elements."""

    def model(data):
        with numpyro.plate("groups", len(data)):
            rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0).expand([2]).to_event(1))
            mean = numpyro.sample("mean", dist.Normal(0.5, 2.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            ebm.energy("E", 0.5 * jnp.sum(rate * (v - mean[:, None]) ** 2, -1))

    rng = np.random.default_rng(3)
    rate, mean = rng.gamma(3.0, size=(4, 2)), rng.normal(size=4)
    target = ExchangeTarget(model, (jnp.zeros((4, 2)),), {}, by_row=True)
    found = target.log_prior({"rate": jnp.log(rate), "mean": jnp.asarray(mean)})
    of_rate = stats.gamma(3.0, scale=0.5).logpdf(rate) + np.log(rate)
    expected = of_rate.sum(-1) + stats.norm(0.5, 2.0).logpdf(mean)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_references_are_draws_at_the_center_and_frozen_after_the_warmup():
    data = jnp.asarray(GAUSSIAN)
    kernel = ebm.Exchange(gaussian, gaussian_rows, proposal="langevin", num_references=5)
    _, state, accept = chains(kernel, (data,), 50, 2, num_warmup=100)
    adapt = state.adapt_state
    assert bool(adapt.has_gradient.all()) and 0.1 < accept.mean() < 0.8
    # References are draws at θ̂, a frozen function: their rows have the density they had then.
    theta = np.exp(np.asarray(adapt.reference, float))[:, 0]  # (chains, 1)
    v = np.asarray(adapt.references["v"], float)
    expected = -0.5 * theta[:, :, None] * v**2
    np.testing.assert_allclose(adapt.baselines, expected, rtol=1e-4)
    assert abs(np.mean(theta[:, :, None] * v**2) - 1) < 4 * np.sqrt(2 / v.size)
    moved = jax.vmap(lambda s: kernel.sample(s, (data,), {}))(state)
    for old, new in zip(jax.tree.leaves(adapt), jax.tree.leaves(moved.adapt_state), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_exact_posterior_near_the_reference():
    """With many references the surrogate of log Z is as good as log Z."""
    data = jnp.asarray(GAUSSIAN)
    kernel = ebm.Exchange(gaussian, gaussian_rows, proposal="langevin", num_references=100)
    _, state, _ = chains(kernel, (data,), 1, 4, num_warmup=500)
    z = np.asarray(state.z["theta"], float)
    theta = np.exp(z)
    exact = (2 + 100) - theta * (1 + 0.5 * np.sum(GAUSSIAN**2))
    np.testing.assert_allclose(np.asarray(state.gradient)[:, 0, 0], exact, atol=3.0)
    assert np.max(abs(exact)) < 40


@pytest.mark.slow
def test_param_sites_are_held_where_they_have_values():
    def model(data):
        scale = numpyro.param("scale", 1.0)
        theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * theta * (v / scale) ** 2)

    held = numpyro.handlers.substitute(model, data={"scale": 2.0})
    kernel = ebm.Exchange(held, ebm.BlockGibbs, 1)
    draws, _, _ = chains(kernel, (jnp.asarray(2 * GAUSSIAN),), 500)
    assert_posterior(draws["theta"], *_moments(GAUSSIAN))
