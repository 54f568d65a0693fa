# SPDX-License-Identifier: Apache-2.0
"""Weights of rows in posteriors and likelihoods: a power of the likelihood, never of the energy.

The oracles: what NumPyro makes of the same handlers around a normalised density, and conjugate
posteriors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.infer import log_likelihood as numpyro_log_likelihood
from numpyro.infer.util import log_density

import numpyro_ebm as ebm
from numpyro_ebm.log_normalizers import LogNormalizer

N = 30
X = 1.5 * np.random.default_rng(0).normal(size=N)
W = np.random.default_rng(1).uniform(0.2, 3.0, N)
MASK = np.arange(N) % 4 != 1


def under(weights, mask):
    return handlers.scale(scale=weights), handlers.mask(mask=mask)


def statement(kind, v, precision):
    """The energies of a row: of an unnormalised density, or none beside a normalised one."""
    if kind == "energy":
        ebm.energy("E", 0.5 * precision * v**2)
    if kind == "zero":
        ebm.energy("E", 0.0 * v)


def gaussian(kind):
    """N(0, 1/θ) as a NumPyro likelihood, the same and an energy of zero, or as an energy."""

    def model(data, weights=1.0, mask=True):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        scaled, masked = under(weights, mask)
        base = ebm.Lebesgue() if kind == "energy" else dist.Normal(0.0, precision**-0.5)
        with numpyro.plate("data", len(data)), scaled, masked:
            v = numpyro.sample("v", base, obs=data)
            statement(kind, v, precision)

    return model


CASES = {
    "one number": (0.25, True),
    "by row": (jnp.asarray(W), True),
    "masked": (1.0, jnp.asarray(MASK)),
    "both": (jnp.asarray(W), jnp.asarray(MASK)),
}


@pytest.fixture(params=CASES)
def case(request):
    weights, mask = CASES[request.param]
    return jnp.where(jnp.asarray(mask), X, jnp.nan), weights, mask


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["zero", "energy"])
def test_normalized_is_the_likelihood_under_the_same_handlers(kind, case):
    data, *handled = case
    method = "quadrature" if kind == "zero" else "enumerate"
    model = ebm.normalized(gaussian(kind), method)
    for precision in (0.6, 1.7):
        values = {"precision": jnp.asarray(precision)}
        expected, _ = log_density(gaussian("none"), (data, *handled), {}, values)
        found, _ = log_density(model, (data, *handled), {}, values)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    draws = {"precision": jnp.array([0.6, 1.7])}
    expected = numpyro_log_likelihood(gaussian("none"), draws, data, *handled)["v"]
    found = numpyro_log_likelihood(model, draws, data, *handled)["v"]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def posterior(weights, mask):
    """Shape and rate of the conjugate Gamma posterior."""
    w = np.broadcast_to(np.where(mask, weights, 0.0), N)
    return 2.0 + 0.5 * w.sum(), 1.0 + 0.5 * np.sum(w * X**2)


def test_generalized_is_a_power_of_the_likelihood(case):
    data, weights, mask = case
    shape, rate = posterior(weights, mask)
    model = ebm.generalized(gaussian("energy"), ebm.MaximumLikelihood())
    log_joint = jax.jit(
        jax.vmap(lambda p: log_density(model, (data, weights, mask), {}, {"precision": p})[0])
    )
    grid = jnp.linspace(0.3, 1.5, 7)
    gap = log_joint(grid) - dist.Gamma(shape, rate).log_prob(grid)
    np.testing.assert_allclose(gap - gap[0], 0.0, atol=2e-3)


def test_the_log_likelihood_of_a_row_is_weighted(case):
    data, weights, mask = case
    model = ebm.fixed(gaussian("energy"), {"precision": 1.7})
    rows = ebm.log_likelihood(jax.random.key(0), model, data, weights, mask)
    w = np.where(mask, weights, 0.0)
    expected = w * dist.Normal(0.0, 1.7**-0.5).log_prob(X)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-6)
    log_z = LogNormalizer(jnp.array(0.5), jnp.array(0.2), 1.0, "given")
    found = ebm.log_likelihood(
        jax.random.key(0), model, data, weights, mask, log_normalizer=log_z, with_error=True
    )
    np.testing.assert_allclose(found.mcse, 0.2 * w, rtol=1e-5)


# Exchange


def exact_rows(num):
    def draw(rng_key, params):
        return {"v": jax.random.normal(rng_key, (num,)) / jnp.sqrt(params["precision"])}

    return draw


def run(kernel, *args, num=3_000):
    mcmc = MCMC(kernel, num_warmup=500, num_samples=num, progress_bar=False)
    mcmc.run(jax.random.key(1), *args)
    return np.asarray(mcmc.get_samples()["precision"])


TIMES = np.arange(N) % 3


@pytest.mark.parametrize(
    "auxiliary, options",
    [
        (exact_rows(TIMES.sum()), {}),
        (exact_rows(TIMES.sum()), {"proposal": "langevin"}),
    ],
    ids=["walk", "langevin"],
)
def test_a_row_of_a_whole_weight_is_so_many_rows(auxiliary, options):
    # NumPyro takes no scale of zero: a row that does not count is masked.
    weights, mask = jnp.asarray(np.maximum(TIMES, 1)), jnp.asarray(TIMES > 0)
    draws = run(ebm.Exchange(gaussian("energy"), auxiliary, **options), X, weights, mask)
    right = dist.Gamma(*posterior(TIMES, True))
    error = draws.std() / np.sqrt(len(draws) / 20)
    assert abs(draws.mean() - right.mean) < 4 * error
    assert abs(draws.std() / right.variance**0.5 - 1) < 0.2


def test_rows_that_are_masked_drop_out_of_both_sides_of_the_ratio():
    kernel = ebm.Exchange(gaussian("energy"), lambda m: ebm.MALA(m, step_size=0.8), 20)
    spoilt = jnp.where(MASK, X, jnp.nan)
    draws = run(kernel, spoilt, 1.0, jnp.asarray(MASK), num=2_000)
    right = dist.Gamma(*posterior(1.0, MASK))
    assert abs(draws.mean() - right.mean) < 4 * draws.std() / np.sqrt(len(draws) / 20)


@pytest.mark.parametrize("weights", [0.25, 1 + 0.5 * (np.arange(N) == 3)], ids=["all", "of a row"])
def test_a_weight_that_is_no_whole_number_is_refused(weights):
    kernel = ebm.Exchange(gaussian("energy"), exact_rows(N))
    with pytest.raises(ebm.ModelError, match="whole numbers"):
        run(kernel, X, jnp.asarray(weights), num=1)


def test_rows_that_are_no_argument_cannot_be_repeated():
    def closed(weights):
        return gaussian("energy")(jnp.asarray(X), weights)

    with pytest.raises(ebm.ModelError, match="not the same"):
        run(ebm.Exchange(closed, exact_rows(N)), jnp.asarray(1 + TIMES), num=1)


def test_a_plate_of_a_fixed_size_cannot_be_repeated():
    def model(data, weights):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", N), handlers.scale(scale=weights):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2)

    with pytest.raises(ebm.ModelError, match=r"plate is not as long as its data, `len\(data\)`"):
        run(ebm.Exchange(model, exact_rows(N)), X, jnp.asarray(1 + TIMES), num=1)


def test_an_argument_as_long_as_the_rows_is_not_repeated_with_them():
    def model(data, weights, loadings):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data)), handlers.scale(scale=weights):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2 * jnp.sum(loadings**2))

    with pytest.raises(ebm.ModelError, match="as long as they are"):
        run(ebm.Exchange(model, exact_rows(N)), X, jnp.asarray(1 + TIMES), jnp.ones(N), num=1)


@pytest.mark.slow
def test_nuts_and_score_matching_with_weights():
    """Score matching is quadratic in θ: its generalised posterior is a Gaussian, cut at zero."""
    model = ebm.generalized(gaussian("energy"), ebm.ScoreMatching())
    draws = run(NUTS(model), X, jnp.asarray(W), num=1_500)
    grid = np.linspace(1e-3, 4, 4_000)
    log_p = dist.Gamma(2.0, 1.0).log_prob(grid) - 0.5 * grid**2 * (W @ X**2) + grid * W.sum()
    p = np.exp(log_p - log_p.max())
    mean = p @ grid / p.sum()
    assert abs(draws.mean() - mean) < 4 * draws.std() / np.sqrt(len(draws) / 4)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["normalized", "exchange"], ids=["normalized", "exchange"])
def test_rows_without_observation_integrate_to_one(route):
    def unobserved(data, mask):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data, obs_mask=mask)
            ebm.energy("E", 0.5 * precision * v**2)

    spoilt, mask = jnp.where(MASK, X, jnp.nan), jnp.asarray(MASK)
    right = dist.Gamma(*posterior(1.0, MASK))
    if route == "normalized":
        model = ebm.normalized(unobserved, "enumerate")
        at = [
            log_density(model, (spoilt, mask), {}, {"precision": jnp.asarray(p)})[0]
            - right.log_prob(p)
            for p in (0.5, 1.5)
        ]
        np.testing.assert_allclose(at[0], at[1], rtol=1e-4)
        return
    kernel = ebm.Exchange(unobserved, lambda m: ebm.MALA(m, step_size=0.8), 20)
    draws = run(kernel, spoilt, mask, num=1_500)
    assert abs(draws.mean() - right.mean) < 4 * draws.std() / np.sqrt(len(draws) / 20)
