# SPDX-License-Identifier: Apache-2.0
"""Every part once, on one small model whose answers are known: what other versions are tried on.

The model is a Gaussian-Bernoulli RBM with two visible and two hidden units; its density, log Z and
the law of its units are sums over four states.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.slow,
]  # every part has laws of its own in the default run

TRUTH = {
    "W": np.array([[1.0, -0.5], [0.3, 0.8]]),
    "b": np.array([0.2, -0.1]),
    "c": np.array([-0.4, 0.1]),
    "scale": np.array([1.0, 0.7]),
}
STATES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
MEANS = TRUTH["b"] + TRUTH["scale"] ** 2 * (STATES @ TRUTH["W"].T)
LOG_MASS = STATES @ TRUTH["c"] + 0.5 * np.sum(
    (MEANS / TRUTH["scale"]) ** 2 - (TRUTH["b"] / TRUTH["scale"]) ** 2, -1
)
LOG_Z = np.log(np.sum(np.exp(LOG_MASS))) + np.log(2 * np.pi) + np.sum(np.log(TRUTH["scale"]))
WEIGHTS = np.exp(LOG_MASS) / np.sum(np.exp(LOG_MASS))
grbm = partial(ebm.models.grbm, num_hidden=2)
MODEL = ebm.fixed(grbm, {k: jnp.asarray(x, jnp.float32) for k, x in TRUTH.items()})


def log_density(v):
    logits = -0.5 * np.sum(((v[:, None] - MEANS) / TRUTH["scale"]) ** 2, -1) + np.log(WEIGHTS)
    log_normal = np.log(2 * np.pi) + np.sum(np.log(TRUTH["scale"]))
    return np.log(np.sum(np.exp(logits), -1)) - log_normal


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    state = rng.choice(4, size=2_000, p=WEIGHTS)
    return MEANS[state] + TRUTH["scale"] * rng.normal(size=(2_000, 2))


def test_log_normalizer_and_log_likelihood(data):
    log_z = ebm.log_normalizer(jax.random.key(0), MODEL)
    assert float(log_z.value) == pytest.approx(LOG_Z, abs=1e-4)
    annealed = ebm.log_normalizer(jax.random.key(1), MODEL, method="ais", num_particles=200)
    assert abs(float(annealed.value) - LOG_Z) < 5 * float(annealed.mcse) + 0.01
    rows = ebm.log_likelihood(jax.random.key(2), MODEL, data[:20], log_normalizer=log_z)
    np.testing.assert_allclose(rows, log_density(data[:20]), rtol=1e-4)


@pytest.mark.parametrize("marginal", [ebm.Enumerated(), ebm.VaGES(num_particles=2)])
def test_learning_comes_near_the_truth(data, marginal):
    guide, of_guide = None, {}
    if marginal.needs_guide:
        guide, of_guide = partial(ebm.models.grbm_guide, num_hidden=2), {"num_guide_steps": 2}
    objective = ebm.DenoisingScoreMatching(0.1, marginal=marginal)
    svi = ebm.EnergySVI(grbm, guide, optax.adam(0.02), objective, **of_guide)
    fit = svi.run(jax.random.key(0), 1_500, jnp.asarray(data), batch_size=200, progress_bar=False)
    learned = np.mean(ebm.models.grbm_log_likelihood(fit.params, jnp.asarray(data)))
    assert np.mean(log_density(data)) - learned < 0.05
    tree = ebm.to_arviz(fit)
    assert tree["posterior"]["W"].shape == (1, 1, 2, 2)


@pytest.mark.parametrize("kernel", [ebm.MALA, ebm.BlockGibbs])
def test_chains_have_the_moments_of_the_model(kernel):
    mcmc = MCMC(kernel(MODEL), num_warmup=300, num_samples=500, progress_bar=False)
    mcmc.run(jax.random.key(0), num_rows=40)
    v = np.asarray(mcmc.get_samples()["v"])
    error = np.std(v.mean(0), axis=0) / np.sqrt(v.shape[1])
    assert np.all(np.abs(v.mean((0, 1)) - WEIGHTS @ MEANS) < 5 * error + 0.02)
    tree = ebm.to_arviz(mcmc)
    assert "energy" in tree["sample_stats"] and "log_likelihood" not in tree


def test_sample_draws_both_kinds_of_sites():
    draws = ebm.sample(jax.random.key(0), MODEL, 400)
    assert draws["v"].shape == (400, 1, 2) and set(np.unique(draws["h"])) <= {0, 1}


def precision_model(x):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(x)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=x)
        ebm.energy("E", 0.5 * theta * v**2)


@pytest.mark.parametrize("route", ["normalized", "exchange"])
def test_posteriors_are_conjugate(route):
    x = np.random.default_rng(1).normal(size=100)

    def simulate(rng_key, params):
        return {"v": jax.random.normal(rng_key, x.shape) / params["theta"] ** 0.5}

    if route == "normalized":
        kernel = NUTS(ebm.normalized(precision_model, "enumerate"))
    else:
        kernel = ebm.Exchange(precision_model, simulate)
    mcmc = MCMC(kernel, num_warmup=300, num_samples=2_000, progress_bar=False)
    mcmc.run(jax.random.key(0), jnp.asarray(x))
    right = dist.Gamma(2.0 + len(x) / 2, 1.0 + np.sum(x**2) / 2)
    theta = np.asarray(mcmc.get_samples()["theta"])
    assert abs(theta.mean() - right.mean) < 0.2 * right.variance**0.5
    assert 0.8 < theta.std() / right.variance**0.5 < 1.2


def test_the_stein_test_accepts_its_model(data):
    model = ebm.fixed(precision_model, {"theta": 1.0})
    rows = jax.random.normal(jax.random.key(0), (300,))
    assert ebm.stein_test(jax.random.key(1), model, rows).p_value > 0.01
    assert ebm.stein_test(jax.random.key(1), model, 1.5 * rows).p_value < 0.01
