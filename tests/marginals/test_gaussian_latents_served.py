# SPDX-License-Identifier: Apache-2.0
"""What asks for an exact marginal is served by Gaussian latents.

A model with latents is compared with the same model without them, its energy being minus the
logarithm of the integral: whatever the library says of the one it has to say of the other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from conftest import assert_mean
from numpyro.infer import MCMC
from numpyro.infer.util import log_density
from oracles import jit
from registry.objectives import OBJECTIVES

import numpyro_ebm as ebm
from numpyro_ebm.marginals import integrable
from numpyro_ebm.mcmc import choose_kernel
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
ROWS = np.random.default_rng(2).normal(size=12)


NOISE = 0.6


def with_latent(data):
    w = numpyro.param("precision", 0.9)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0))
        ebm.energy("E", 0.5 * ((v - w * h) / NOISE) ** 2)


def without_latent(data):
    w = numpyro.param("precision", 0.9)
    variance = w**2 + NOISE**2
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * v**2 / variance + 0.5 * jnp.log(variance / NOISE**2))


PAIR = {"precision": 0.9}


FAST = ("ScoreMatching", "NCE", "MaximumLikelihood")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name, member in OBJECTIVES.items()
        if member.sites == "real" and name != "ContrastiveDivergence"  # whose chains move h as well
    ],
)
def test_every_objective_has_the_loss_of_the_model_without_latents(name):
    objective = OBJECTIVES[name].make()

    def all_params(model):
        problem = objective.prepare(KEY, PAIR, model, None, (ROWS,), {})
        own = dict(objective.own_parameters(KEY, PAIR, problem))
        for network in objective.networks:
            own |= network.parameters(KEY, problem)
        return {**PAIR, **{k: v[0] for k, v in own.items()}}

    params = all_params(without_latent)

    def of(model):
        loss = lambda p: objective.loss(KEY, p, model, None, ROWS)  # noqa: E731
        return jit(jax.value_and_grad(loss))(params)

    found, exact = of(with_latent), of(without_latent)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-9)


def test_stein_test_and_adequacy_are_those_of_the_model_without_latents():
    found, exact = (
        ebm.stein_test(KEY, ebm.fixed(model, PAIR), ROWS, num_bootstrap=200)
        for model in (with_latent, without_latent)
    )
    np.testing.assert_allclose(found.statistic, exact.statistic, rtol=1e-10)
    np.testing.assert_allclose(found.null, exact.null, rtol=1e-9)
    assert found.p_value == exact.p_value


@pytest.mark.slow
def test_energy_svi_learns_without_a_guide():
    import optax

    data = 1.5 * jax.random.normal(KEY, (500,))
    svi = ebm.EnergySVI(with_latent, None, optax.adam(0.02), ebm.ScoreMatching())
    fit = svi.run(KEY, 600, data, progress_bar=False)
    exact = np.sqrt(np.mean(data**2) - NOISE**2)  # score matching of a Gaussian is its likelihood
    np.testing.assert_allclose(np.abs(fit.params["precision"]), exact, rtol=1e-4)


# Chains and log Z: a double well with Gaussian latents, some given the discrete ones


def well(num_rows=1, observed=None):
    """v moves between two wells; h is Gaussian given v, and bends with it."""
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=observed)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        k = numpyro.sample("k", ebm.Counting(2, (1,)))[:, 0]
        ebm.energy("E", (v**2 - 1) ** 2 + 0.5 * jnp.sum((h - v[:, None]) ** 2, -1) * v**2 - k * v)


def well_log_density(v):
    """log ∫ dh Σ_k, up to nothing."""
    integral = -0.5 * v**4 / (1 + v**2) - 0.5 * np.log1p(v**2)
    return -((v**2 - 1) ** 2) + 3 * integral + np.logaddexp(0.0, v)


WELL = np.linspace(-6.0, 6.0, 4_001)
WELL_WEIGHTS = np.exp(well_log_density(WELL)) * (WELL[1] - WELL[0])


@pytest.mark.slow
def test_log_z_integrates_gaussian_sites_before_the_quadrature():
    model = ebm.fixed(well, {})
    found = ebm.log_normalizer(KEY, model)
    assert found.method == "quadrature"
    np.testing.assert_allclose(found.value, np.log(WELL_WEIGHTS.sum()), rtol=1e-8)
    v = jnp.linspace(-2.0, 2.0, 5)
    found = ebm.log_likelihood(KEY, model, 5, v, log_normalizer=0.0)
    np.testing.assert_allclose(found, well_log_density(v), rtol=1e-9)


@pytest.mark.slow
def test_chains_move_on_the_marginal_and_the_latents_are_drawn_exactly():
    model = ebm.fixed(well, {})
    kernel = choose_kernel(model, 2)
    assert isinstance(kernel, ebm.MALA)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=5, progress_bar=False)
    mcmc.run(KEY, 2)
    assert set(mcmc.get_samples()) == {"v"}
    rows = np.asarray(ebm.to_arviz(mcmc)["sample_stats"]["row_energy"])[0]
    np.testing.assert_allclose(rows, -well_log_density(mcmc.get_samples()["v"]), rtol=1e-8)
    draws = ebm.sample(jax.random.key(1), model, 4_000, num_chains=100)
    assert draws["h"].shape == (4_000, 1, 3) and draws["k"].shape == (4_000, 1, 1)
    v, h = (np.asarray(draws[name])[:, 0].reshape(100, 40, -1) for name in "vh")
    weights = WELL_WEIGHTS / WELL_WEIGHTS.sum()
    assert_mean(v[..., 0], weights @ WELL)
    assert_mean(v[..., 0] ** 2, weights @ WELL**2)
    mean = v**3 / (1 + v**2)
    assert_mean(h - mean, 0.0)
    assert_mean((h - mean) ** 2 * (1 + v**2), 1.0)
    assert_mean((h - mean)[..., 0] * (h - mean)[..., 1], 0.0)


@pytest.mark.slow
def test_draws_given_the_visible_values():
    v = jnp.array([-1.5, 0.5])
    draws = ebm.sample(KEY, ebm.fixed(well, {}), 2_000, 2, v, num_warmup=5, thinning=1)
    mean = np.asarray(v) ** 3 / (1 + np.asarray(v) ** 2)
    h = np.asarray(draws["h"]).reshape(100, 20, 2, 3)
    assert_mean(h - mean[:, None], 0.0)
    on = 1 / (1 + np.exp(-np.asarray(v)))
    assert_mean(np.asarray(draws["k"]).reshape(100, 20, 2) - on, 0.0)


@pytest.mark.slow
def test_posterior_gap_has_the_marginal_in_closed_form():
    system = oracles.linear_system(num_rows=5)
    guide = oracles.linear_guide(noise=0.8, shift=0.2)
    std = oracles.exact_linear_guide()["std"]
    kl = np.sum(-np.log(0.8) + 0.5 * (0.8**2 + (0.2 / std) ** 2) - 0.5)
    model = ebm.fixed(oracles.linear_gaussian, system.params)
    gap = ebm.posterior_gap(KEY, model, guide, {}, jnp.asarray(system.data), num_particles=2_000)
    assert gap.method == "marginal"
    exact = [oracles.linear_log_density(system.params, v) for v in system.data]
    np.testing.assert_allclose(gap.log_marginal, exact, rtol=1e-9)
    assert np.all(np.abs(gap.kl - kl) < 4 * gap.kl_error)


# Posteriors of parameters


def bayesian(data):
    """θ is the precision of v given h: a Gamma prior and no closed form."""
    theta = numpyro.sample("theta", dist.Gamma(3.0, 2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0))
        ebm.energy("E", 0.5 * theta * (v - h) ** 2)


def exact_bayesian(theta, data):
    prior = dist.Gamma(3.0, 2.0).log_prob(theta)
    return prior + dist.Normal(0.0, np.sqrt(1 + 1 / theta)).log_prob(data).sum()


@pytest.mark.parametrize("log_z", ["enumerate", "quadrature", "known"])
def test_normalized_integrates_the_latents_out_where_asked(log_z):
    if log_z == "known":
        log_z = lambda p: 0.5 * jnp.log(2 * jnp.pi / p["theta"])  # noqa: E731
    model = ebm.normalized(bayesian, log_z, marginal=ebm.GaussianLatents())
    for theta in (0.5, 2.0):
        found, model_trace = log_density(model, (ROWS,), {}, {"theta": jnp.asarray(theta)})
        assert "h" not in model_trace
        np.testing.assert_allclose(found, exact_bayesian(theta, ROWS), rtol=1e-8)


@pytest.mark.slow
def test_generalized_and_exchange_integrate_the_latents_out():
    from numpyro_ebm.posteriors.exchange.target import ExchangeTarget

    def explicit(data):
        theta = numpyro.sample("theta", dist.Gamma(3.0, 2.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2 / (1 + 1 / theta) + 0.5 * jnp.log(1 + theta))

    theta = {"theta": jnp.asarray(1.3)}
    found, exact = (
        log_density(ebm.generalized(model, ebm.ScoreMatching(), 0.7), (ROWS,), {}, theta)[0]
        for model in (bayesian, explicit)
    )
    np.testing.assert_allclose(found, exact, rtol=1e-9)
    found, exact = (
        ExchangeTarget(model, (ROWS,), {}).log_rows(theta, {"v": ROWS})
        for model in (bayesian, explicit)
    )
    np.testing.assert_allclose(found, exact, rtol=1e-9)


def test_normalized_keeps_the_latents_where_nothing_is_said():
    model = ebm.normalized(bayesian)
    h = 0.3 * ROWS
    exact = dist.Gamma(3.0, 2.0).log_prob(1.5) + dist.Normal(0.0, 1.0).log_prob(h).sum()
    exact += dist.Normal(h, np.sqrt(1 / 1.5)).log_prob(ROWS).sum()
    found, _ = log_density(model, (ROWS,), {}, {"theta": jnp.asarray(1.5), "h": h})
    np.testing.assert_allclose(found, exact, rtol=1e-8)
    with pytest.raises(ebm.ModelError, match="an exact one"):
        ebm.normalized(bayesian, marginal=ebm.VaGES())


@pytest.mark.parametrize(
    "most, beside, expected", [(3, False, ["h", "c", "b"]), (2, True, ["h", "b", "a"])]
)
def test_what_is_integrated_out_beside_the_latents(most, beside, expected):
    """The largest that are Gaussian given the rest come first, and one site remains."""

    def model():
        with numpyro.plate("data", 2):
            a, b, c, h = (
                numpyro.sample(k, ebm.Lebesgue((n,)), obs=None if k == "h" else jnp.ones((2, n)))
                for k, n in (("a", 1), ("b", 2), ("c", 3), ("h", 1))
            )
            d = numpyro.sample("d", ebm.Lebesgue(), obs=jnp.ones(2)) if beside else 0.0
            total = jnp.sum(a, -1) + jnp.sum(b, -1) + jnp.sum(c, -1) + h[:, 0]
            squares = sum(jnp.sum(x**2, -1) for x in (a, b, c, h))
            ebm.energy("E", squares + 0.1 * total**2 + d**4)

    assert integrable(read_model(model), most) == expected
