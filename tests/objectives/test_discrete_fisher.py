# SPDX-License-Identifier: Apache-2.0
"""Discrete Fisher divergence of counts, which have no last value, against its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.special
from jax.scipy.special import gammaln
from numpyro import handlers
from numpyro.distributions import constraints
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import ImproperSamplingError, ModelError

KEY = jax.random.key(0)
RNG = np.random.default_rng(5)
COUNTS = ebm.Counting(math.inf)
DFD = ebm.DiscreteFisher()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


class FromOneOn(dist.Poisson):
    """A base measure on 1, 2, 3, …"""

    support = constraints.positive_integer


def tilted(base):
    """Poisson(rate), tilted from Poisson(1) or from the counting measure."""

    def model(data):
        rate = numpyro.param("rate", 1.0)
        with numpyro.plate("data", len(data)):
            x = numpyro.sample("x", base, obs=data)
            flat = isinstance(base, ebm.Counting)
            ebm.energy("E", (gammaln(x + 1.0) if flat else 0.0) - jnp.log(rate) * x)

    return model


@pytest.mark.parametrize(
    "base, dtype",
    [(COUNTS, np.int8), slow(COUNTS, np.uint8), slow(dist.Poisson(1.0), float)],
)
def test_a_poisson_has_a_closed_form(x64, base, dtype):
    """x²/θ² - 2 (x + 1)/θ, up to the last value that the type of the data holds."""
    data, rate = np.array([0, 3, 1, 0, 2, 127]).astype(dtype), 1.7
    loss = DFD.loss(KEY, {"rate": rate}, tilted(base), None, data)
    x = data.astype(float)
    np.testing.assert_allclose(loss, np.mean(x**2 / rate**2 - 2 * (x + 1) / rate), rtol=1e-10)


def test_the_lowest_value_has_nothing_below(x64):
    x, rate = np.array([1, 1, 4, 2]), 1.7
    of = lambda r: DFD.loss(KEY, {"rate": r}, tilted(FromOneOn(1.0)), None, x)  # noqa: E731
    square = np.where(x > 1, x**2, 0)
    expected = square / rate**2 - 2 * (x + 1) / rate, 2 * (x + 1) / rate**2 - 2 * square / rate**3
    np.testing.assert_allclose(
        jit(jax.value_and_grad(of))(rate), [np.mean(y) for y in expected], rtol=1e-10
    )


PARAMS = {"J": RNG.normal(size=(3, 3)), "slope": np.array([0.4, -0.3, 0.2]), "bit": np.array(0.6)}
COVARIATE = RNG.normal(size=8)


def network(counts, bit, weights=None):
    """Three counts that inhibit each other and a bit, with a covariate in a closure."""
    J, slope, tilt = (numpyro.param(k, jnp.zeros_like(x)) for k, x in PARAMS.items())
    weigh = handlers.scale(scale=jnp.ones(8) if weights is None else weights)
    with numpyro.plate("data", len(bit)), weigh:
        x = numpyro.sample("x", ebm.Counting(math.inf, (3,)), obs=counts)
        b = numpyro.sample("b", ebm.Counting(), obs=bit)
        ebm.energy("E", -network_density({"J": J, "slope": slope, "bit": tilt}, x, b))


def network_density(p, x, b):
    pairs = jnp.sum((jnp.sqrt(x) @ p["J"]) * jnp.sqrt(x), -1)
    field = jnp.asarray(COVARIATE) * (x @ p["slope"]) + p["bit"] * b * x[:, 0]
    return field - 0.1 * pairs - jnp.sum(gammaln(x + 1.0), -1)


@pytest.mark.parametrize(
    "weights", [slow(None), np.array([0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 0.2])]
)
def test_counts_and_bits_with_covariates_are_the_definition(x64, weights):
    """Every neighbour by itself; the objective evaluates log p̃ nowhere else."""
    x, b = RNG.integers(0, 4, (8, 3)), RNG.integers(0, 2, 8)
    x[3] = 0

    def definition(p):
        here, total = network_density(p, x, b), 0.0
        for d in range(3):
            up, down = x + np.eye(3, dtype=int)[d], np.maximum(x - np.eye(3, dtype=int)[d], 0)
            before = jnp.where(x[:, d] > 0, jnp.exp(network_density(p, down, b) - here), 0.0)
            total += before**2 - 2.0 * jnp.exp(here - network_density(p, up, b))
        flip = network_density(p, x, 1 - b) - here
        total += jnp.exp(2.0 * flip) - 2.0 * jnp.exp(-flip)
        return jnp.mean(total * (1.0 if weights is None else weights))

    params = {k: jnp.asarray(x) for k, x in PARAMS.items()}
    loss = jit(jax.value_and_grad(lambda p: DFD.loss(KEY, p, network, None, x, b, weights)))
    expected = jax.value_and_grad(definition)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), loss(params), expected)


def cmp(data, weights=None):
    """Conway–Maxwell–Poisson counts: p(x) ∝ λ^x / (x!)^ν."""
    log_rate, nu = numpyro.param("log_rate", 0.0), numpyro.param("nu", 1.0)
    weigh = handlers.scale(scale=1.0 if weights is None else weights)
    with numpyro.plate("data", len(data)), weigh:
        x = numpyro.sample("x", COUNTS, obs=data)
        ebm.energy("E", nu * gammaln(x + 1.0) - log_rate * x)


@pytest.mark.parametrize("nu", [0.6, slow(1.4)])
def test_minimal_at_the_truth_of_counts(x64, nu):
    """Rows are all counts, with their probabilities: the grid's own end is out of reach."""
    x, truth = np.arange(120), jnp.array([0.9, nu])
    log_p = 0.9 * x - nu * scipy.special.gammaln(x + 1)
    p = np.exp(log_p - scipy.special.logsumexp(log_p))

    def loss(theta):
        params = {"log_rate": theta[0], "nu": theta[1]}
        return DFD.loss(KEY, params, cmp, None, x, len(x) * p)

    np.testing.assert_allclose(jit(jax.grad(loss))(truth), 0.0, atol=1e-9)
    assert np.all(np.linalg.eigvalsh(jit(jax.hessian(loss))(truth)) > 1e-3)


@pytest.mark.slow
def test_a_calibrated_posterior_of_counts(x64):
    """Of Poisson counts: the minimum is θ = Σx²/Σ(x + 1), and its error that of the sandwich."""
    data = np.random.default_rng(6).poisson(3.0, size=400)

    def model(data):
        rate = numpyro.sample("rate", dist.Gamma(1.0, 0.1))
        with numpyro.plate("data", len(data)):
            x = numpyro.sample("x", COUNTS, obs=data)
            ebm.energy("E", gammaln(x + 1.0) - jnp.log(rate) * x)

    found = ebm.generalized(model, DFD).calibrate(data)
    rate = np.sum(data**2) / np.sum(data + 1)
    np.testing.assert_allclose(found.minimizer["rate"], rate, rtol=1e-5)
    slopes = 2 * (data + 1) / rate - 2 * data**2 / rate**2  # in log θ
    error = np.std(slopes) / np.mean(2 * data**2 / rate**2) / np.sqrt(len(data))
    np.testing.assert_allclose(found.standard_error, error, rtol=0.2)  # of groups of rows


def test_what_counts_without_an_end_are_not_for():
    data = np.array([0, 3, 1])
    with pytest.raises(ModelError, match="'x'.*infinitely many.*DiscreteFisher"):
        ebm.PseudoLikelihood().loss(KEY, {"rate": 1.0}, tilted(COUNTS), None, data)
    with pytest.raises(ModelError, match="'x'.*infinitely many"):
        ebm.log_normalizer(KEY, ebm.fixed(tilted(COUNTS), {"rate": 1.0}), data)
    with pytest.raises(ImproperSamplingError, match="no draws.*num_values"):
        COUNTS.sample(KEY)
    for bad in (0, 1, 2.5, -math.inf, math.nan):
        with pytest.raises(ModelError, match="`num_values` must be an integer of at least 2"):
            ebm.Counting(bad)
    with pytest.raises(ModelError, match="leave its support"):
        DFD.loss(KEY, {"rate": 1.0}, tilted(COUNTS), None, np.array([0, -1]))
