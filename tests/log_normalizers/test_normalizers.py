# SPDX-License-Identifier: Apache-2.0
"""log Z against the truth: closed forms, enumeration and Kaufman's formula, in NumPy."""

import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import GRBMOracle, enable_x64
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers import LogNormalizer
from numpyro_ebm.log_normalizers.comparison import best_of
from numpyro_ebm.log_normalizers.gaussian import Gaussian
from numpyro_ebm.log_normalizers.mixture import fit_mixture
from numpyro_ebm.log_normalizers.particles import log_mean_weight

KEY = jax.random.key(0)
CRITICAL = 0.5 * math.log(1 + math.sqrt(2))


def model_of(energy, base, num_rows=1):
    """A fixed model of one visible site."""

    def model(data=None):
        with numpyro.plate("data", num_rows if data is None else len(data)):
            v = numpyro.sample("v", base, obs=data)
            ebm.energy("E", energy(v))

    return ebm.fixed(model, {})


def ising(data=None, *, size=4):
    beta = numpyro.param("beta", 0.0)
    with numpyro.plate("data", 1 if data is None else len(data)):
        x = numpyro.sample("x", ebm.Counting(2, (size, size)), obs=data)
        s = 2.0 * x - 1
        pairs = s * jnp.roll(s, 1, -1) + s * jnp.roll(s, 1, -2)
        ebm.energy("E", -beta * jnp.sum(pairs, (-1, -2)))


def assert_covers(result, truth, num_errors=3.0):
    z = (np.asarray(result[0]) - truth) / np.asarray(result[1])
    assert np.all(np.abs(z) < num_errors), f"off by {z} standard errors: {result[:2]}, not {truth}"


# Oracles


def enumerated_ising(size, beta):
    states = np.array(list(itertools.product([-1, 1], repeat=size * size)), np.int8)
    s = states.reshape(-1, size, size)
    pairs = (s * np.roll(s, 1, -1) + s * np.roll(s, 1, -2)).sum((-1, -2))
    return np.logaddexp.reduce(beta * pairs)


def kaufman(size, beta):
    """log Z of the Ising model on a square torus (Kaufman 1949)."""
    coth = 1 / np.tanh(2 * beta)
    gamma = np.arccosh(np.cosh(2 * beta) * coth - np.cos(np.pi * np.arange(2 * size) / size))
    gamma[0] = 2 * beta + np.log(np.tanh(beta))
    x = 0.5 * size * gamma
    odd, even = x[1::2], x[0::2]
    # Products of 2 cosh and 2 sinh, as signs and logarithms.
    terms = [
        (1.0, np.sum(np.logaddexp(odd, -odd))),
        (1.0, np.sum(np.log(2 * np.sinh(odd)))),
        (1.0, np.sum(np.logaddexp(even, -even))),
        (np.sign(even[0]), np.sum(np.log(np.abs(2 * np.sinh(even)) + 1e-300))),
    ]
    top = max(log for _, log in terms)
    total = sum(sign * np.exp(log - top) for sign, log in terms)
    return 0.5 * size**2 * np.log(2 * np.sinh(2 * beta)) + top + np.log(0.5 * total)


@pytest.fixture(scope="module")
def grbm16():
    """A GRBM with 8 visible and 16 hidden units, and its log Z by enumeration in NumPy."""
    rng = np.random.default_rng(1)
    params = {
        "W": 0.5 * rng.normal(size=(8, 16)),
        "b": rng.normal(size=8),
        "c": rng.normal(size=16),
        "scale": np.exp(0.2 * rng.normal(size=8)),
    }
    states = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    shift = states @ params["W"].T
    terms = states @ params["c"] + shift @ params["b"]
    terms += 0.5 * np.sum((shift * params["scale"]) ** 2, -1)
    truth = 4 * np.log(2 * np.pi) + np.sum(np.log(params["scale"])) + np.logaddexp.reduce(terms)
    return params, truth


MIXTURE = {
    "centers": 2 * np.random.default_rng(3).normal(size=(4, 10)),
    "log_weights": np.log([0.1, 0.2, 0.3, 0.4]),
    "log_z": 7.0,
}


def mixture_energy(v):
    """Minus the log-density of a normalised mixture of Gaussians, less a constant."""
    centers = jnp.asarray(MIXTURE["centers"], v.dtype)
    square = jnp.sum((v[..., None, :] - centers) ** 2, -1)
    log_weights = jnp.asarray(MIXTURE["log_weights"], v.dtype)
    density = logsumexp(log_weights - 0.5 * square, -1) - 5 * math.log(2 * math.pi)
    return -density - MIXTURE["log_z"]


# Enumeration


@pytest.mark.parametrize(
    "beta, log_z",
    [
        (0.1, 11.252588),
        (0.2, 11.771470),
        (0.25, 12.201271),
        (0.4, 14.561093),
        (0.4406868, 15.521916),
    ],
)
def test_enumeration_gives_the_ising_values_of_the_literature(beta, log_z):
    found = ebm.log_normalizer(KEY, ebm.fixed(ising, {"beta": beta}))
    assert found.method == "enumerate" and found.mcse == 0 and found.bias == "none"
    assert found.ess == math.inf and found.value.shape == ()
    assert found.value == pytest.approx(log_z, abs=1e-5)
    assert enumerated_ising(4, beta) == pytest.approx(log_z, abs=2e-6)
    assert kaufman(4, beta) == pytest.approx(log_z, abs=2e-6)


def test_kaufman_gives_the_values_of_the_literature():
    for beta, log_z in ((0.1, 70.3231), (0.25, 75.9110), (CRITICAL, 93.6103)):
        assert kaufman(10, beta) == pytest.approx(log_z, abs=1e-4)


def test_real_sites_are_integrated_in_closed_form(grbm16):
    params, truth = grbm16
    model = ebm.fixed(ebm.models.grbm, params)
    found = ebm.log_normalizer(KEY, model, num_visible=8, num_hidden=16)
    assert found.method == "enumerate"
    assert found.value == pytest.approx(truth, rel=2e-6)
    with enable_x64():
        found = ebm.log_normalizer(KEY, model, num_visible=8, num_hidden=16)
        assert found.value.dtype == jnp.float64
        assert found.value == pytest.approx(truth, rel=1e-12)


def test_units_that_do_not_interact_are_not_counted(grbm):
    rng = np.random.default_rng(0)
    W, b, c = rng.normal(size=(5, 40)), rng.normal(size=5), rng.normal(size=40)

    def rbm(event):
        with numpyro.plate("data", 3):
            v = numpyro.sample("v", ebm.Counting(2, (5,)))
            h = numpyro.sample("h", ebm.Counting(2, (40,)))
            coupling = jnp.sum((v @ W) * h, -1)
            ebm.energy("E", -coupling - v @ b - h @ c)

    states = np.array(list(itertools.product([0, 1], repeat=5)))
    exact = np.logaddexp.reduce(states @ b + np.logaddexp(0, c + states @ W).sum(-1))
    found = ebm.log_normalizer(KEY, ebm.fixed(rbm, {}), True)
    assert found.diagnostics["num_states"] == 32
    assert found.value == pytest.approx(exact, rel=1e-6)

    def free():
        with numpyro.plate("data", 2):
            h = numpyro.sample("h", ebm.Counting(2, (100,)))
            ebm.energy("E", -jnp.sum(h, -1))

    found = ebm.log_normalizer(KEY, ebm.fixed(free, {}))
    assert found.value == pytest.approx(100 * np.log1p(np.e), rel=1e-6)
    # Hidden units in a plate, beside Gaussian visible ones.
    params = {k: jnp.asarray(x, jnp.float32) for k, x in grbm.params.items()}
    found = [
        ebm.log_normalizer(KEY, ebm.fixed(m, params), grbm.data).value
        for m in (grbm.model, grbm.plate_model)
    ]
    oracle = GRBMOracle(grbm.params)
    shift = oracle.states @ oracle.W.T
    terms = oracle.states @ oracle.c + shift @ oracle.b
    terms = terms + 0.5 * np.sum((shift * oracle.scale) ** 2, -1)
    exact = np.log(2 * np.pi) + np.log(oracle.scale).sum() + np.logaddexp.reduce(terms)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_a_full_covariance_and_a_gaussian_without_discrete_sites():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    precision, linear = root @ root.T + np.eye(6), rng.normal(size=6)

    def energy(v):
        return 0.5 * jnp.sum((v @ jnp.asarray(precision, v.dtype)) * v, -1) - v @ linear

    found = ebm.log_normalizer(KEY, model_of(energy, ebm.Lebesgue((6,))))
    quadratic = 0.5 * linear @ np.linalg.solve(precision, linear)
    exact = 3 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1] + quadratic
    assert found.method == "enumerate"
    assert found.value == pytest.approx(exact, rel=1e-5)


# Quadrature


LINE = [
    # energy, base measure, log Z
    (
        lambda v: 0.5 * ((v - 57) / 0.01) ** 2,
        ebm.Lebesgue(),
        math.log(0.01 * math.sqrt(2 * math.pi)),
    ),
    (lambda v: 2 * v, ebm.Lebesgue(support=constraints.positive), -math.log(2)),
    (lambda v: jnp.log1p(v**2), ebm.Lebesgue(), math.log(math.pi)),
    (lambda v: jnp.abs(v) ** 0.5, ebm.Lebesgue(), math.log(4)),
    (lambda v: 0.0 * v, ebm.Lebesgue(support=constraints.unit_interval), 0.0),
    (lambda v: 0.5 * v**2, dist.Normal(0.0, 1.0), -0.5 * math.log(2)),
    (
        lambda v: jnp.sum(v**4, -1) + 0.5 * (v[..., 0] - v[..., 1]) ** 2 * 0,
        ebm.Lebesgue((2,)),
        2 * math.log(2 * math.gamma(1.25)),
    ),
]


@pytest.mark.parametrize("energy, base, log_z", LINE[:3])
def test_quadrature_finds_the_mass_itself(energy, base, log_z):
    found = ebm.log_normalizer(KEY, model_of(energy, base))
    assert found.method == "quadrature" and found.bias == "none"
    assert_covers(found, log_z)
    assert 0 < found.mcse < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("energy, base, log_z", LINE[3:])
def test_quadrature_on_other_supports_and_in_the_plane(energy, base, log_z):
    found = ebm.log_normalizer(KEY, model_of(energy, base))
    assert found.method == "quadrature"
    assert_covers(found, log_z)
    assert found.mcse < 1e-4


@pytest.mark.slow
def test_quadrature_in_double_precision_and_under_jit(x64):
    found = ebm.log_normalizer(KEY, model_of(*LINE[0][:2]))
    assert found.value.dtype == jnp.float64 and found.mcse < 1e-8
    assert found.value == pytest.approx(LINE[0][2], abs=1e-9)
    under = jax.jit(lambda key: ebm.log_normalizer(key, model_of(*LINE[1][:2]))[:2])(KEY)
    assert_covers(under, LINE[1][2])


# Annealing


@pytest.mark.parametrize("method", ["ais", pytest.param("smc", marks=pytest.mark.slow)])
def test_annealed_gaussian_blocks(grbm16, method):
    params, truth = grbm16
    model = ebm.fixed(ebm.models.grbm, params)
    kwargs = {"num_visible": 8, "num_hidden": 16}
    run = jit(lambda key: ebm.log_normalizer(key, model, method=method, **kwargs)[:3])
    found = run(KEY)
    assert_covers(found, truth)
    assert found[1] < 0.03 and found[2] > 500


def ising_run(method, size, **options):
    @jax.jit
    def run(key, beta):
        model = ebm.fixed(ising, {"beta": beta})
        return ebm.log_normalizer(key, model, method=method, size=size, **options)[:3]

    return run


@pytest.mark.parametrize(
    "method, options", [("ais", {"num_particles": 512}), ("smc", {"num_particles": 256})]
)
def test_annealed_ising_at_the_critical_point(method, options):
    found = ising_run(method, 10, **options)(KEY, CRITICAL)
    assert_covers(found, kaufman(10, CRITICAL))
    assert found[1] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, options", [("ais", {"num_temperatures": 1000}), ("smc", {"num_particles": 1024})]
)
def test_annealed_ising(method, options):
    run = ising_run(method, 10, **options)
    for beta in (0.1, 0.25, CRITICAL):
        found = run(KEY, beta)
        assert_covers(found, kaufman(10, beta))
        assert found[1] < 0.03
    run = ising_run(method, 4)
    for beta in (0.1, 0.2, 0.25, 0.4, CRITICAL):
        found = run(jax.random.key(1), beta)
        assert_covers(found, kaufman(4, beta))
        assert found[1] < 0.02


@pytest.mark.parametrize("method", [pytest.param("ais", marks=pytest.mark.slow), "smc"])
def test_annealed_mixture(method):
    model = model_of(mixture_energy, ebm.Lebesgue((10,)))
    found = jit(lambda key: ebm.log_normalizer(key, model, method=method)[:3])(KEY)
    assert_covers(found, MIXTURE["log_z"])
    assert found[1] < 0.05


def tilted(data=None, *, num_rows=3):
    """Proper sites that depend on each other, real and discrete, tilted by an energy."""
    with numpyro.plate("data", num_rows if data is None else len(data)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        v = numpyro.sample("v", dist.Normal(z, 0.5).to_event(1), obs=data)
        h = numpyro.sample("h", dist.Categorical(probs=jnp.array([0.2, 0.3, 0.5])))
        ebm.energy("E", 0.5 * jnp.sum(z**2, -1) + jnp.sum(jnp.abs(v - v), -1) + jnp.log(2.0) * h)


TILTED = -math.log(2) + math.log(0.2 + 0.3 / 2 + 0.5 / 4)

SUPPORTS = {
    "laplace": (lambda v: jnp.sum(jnp.abs(v), -1), ebm.Lebesgue((3,)), 3 * math.log(2)),
    "gamma": (
        lambda v: jnp.sum(v - 1.5 * jnp.log(v), -1),
        ebm.Lebesgue((3,), constraints.positive),
        3 * math.lgamma(2.5),
    ),
    "beta": (
        lambda v: -jnp.sum(2 * jnp.log(v) + jnp.log1p(-v), -1),
        ebm.Lebesgue((3,), constraints.unit_interval),
        3 * math.log(1 / 12),
    ),
    "cauchy": (lambda v: jnp.sum(jnp.log1p(v**2), -1), ebm.Lebesgue((3,)), 3 * math.log(math.pi)),
    "dirichlet": (
        lambda v: -jnp.sum(jnp.log(v), -1),
        ebm.Lebesgue((4,), constraints.simplex),
        -math.lgamma(8),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ais", "smc"])
@pytest.mark.parametrize("name", SUPPORTS)
def test_annealed_supports(name, method):
    energy, base, log_z = SUPPORTS[name]
    found = ebm.log_normalizer(jax.random.key(1), model_of(energy, base), method=method)
    if name == "dirichlet":  # the flat measure of the simplex in its stick-breaking coordinates
        log_z = 4 * math.lgamma(2.0) - math.lgamma(8.0)
    assert_covers(found, log_z)
    assert found.mcse < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ais", "smc"])
def test_proper_sites_are_the_base_measure(method):
    model = ebm.fixed(tilted, {})
    data = np.zeros((4, 2), np.float32)
    found = jit(lambda key: ebm.log_normalizer(key, model, data, method=method)[:3])(KEY)
    assert_covers(found, TILTED)
    assert found[1] < 0.02


def mixed(data=None, *, num_rows=1):
    """Real sites that are not Gaussian, beside discrete ones that interact."""
    with numpyro.plate("data", num_rows if data is None else len(data)):
        h = numpyro.sample("h", dist.Bernoulli(0.3).expand([2]).to_event(1))
        v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
        shift = jnp.sum(h * jnp.array([2.0, -4.0]), -1, keepdims=True)
        ebm.energy("E", jnp.sum(jnp.abs(v - shift), -1) - h[:, 0] * h[:, 1])


MIXED = 3 * math.log(2) + math.log(0.49 + 0.42 + 0.09 * math.e)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ais", "smc"])
def test_mixed_sites(method):
    for args in ((), (np.zeros((7, 3), np.float32),)):
        found = ebm.log_normalizer(KEY, ebm.fixed(mixed, {}), *args, method=method)
        assert_covers(found, MIXED)


@pytest.mark.slow
def test_annealing_in_double_precision(x64):
    energy, base, log_z = SUPPORTS["laplace"]
    found = ebm.log_normalizer(KEY, model_of(energy, base), method="ais")
    assert found.value.dtype == jnp.float64
    assert_covers(found, log_z)


COVERAGE = {
    "ising": (ebm.fixed(ising, {"beta": CRITICAL}), {}, kaufman(4, CRITICAL)),
    "mixture": (model_of(mixture_energy, ebm.Lebesgue((10,))), {}, MIXTURE["log_z"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERAGE)
@pytest.mark.parametrize(
    "method, options", [("ais", {"num_temperatures": 100}), ("smc", {"num_particles": 256})]
)
def test_error_bars_cover_at_their_nominal_rate(name, method, options):
    model, kwargs, log_z = COVERAGE[name]
    run = jax.jit(
        lambda key: ebm.log_normalizer(key, model, method=method, **options, **kwargs)[:2]
    )
    found = np.array([run(key) for key in jax.random.split(jax.random.key(2), 50)])
    z = (found[:, 0] - log_z) / found[:, 1]
    assert np.mean(np.abs(z) < 1.96) >= 0.86
    assert 0.7 < np.sqrt(np.mean(z**2)) < 1.4
    assert np.mean(found[:, 0]) < log_z + 3 * np.std(found[:, 0]) / math.sqrt(50)


def test_weights_make_an_error_bar():
    rng = np.random.default_rng(0)
    log_weights = rng.normal(size=(200, 4_000)) * 0.5 - 0.125  # mean one
    value, mcse, ess = log_mean_weight(jnp.asarray(log_weights))
    z = np.asarray(value / mcse)
    assert np.sqrt(np.mean(z**2)) == pytest.approx(1.0, abs=0.05)
    assert np.mean(ess) == pytest.approx(200 * np.exp(-0.25), rel=0.03)


def test_a_fitted_mixture_is_normalised():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(-3, 0.3, (300, 2)), rng.normal(2, 1.0, (300, 2))])
    points = jnp.asarray(x[:, None], jnp.float32)
    cloud = Gaussian(jnp.mean(points, 0), 2.5 * jnp.eye(2)[None])
    there = jnp.ones((600, 1), bool)
    found = jit(lambda key: fit_mixture(key, cloud, points, there, 0.15))(KEY)
    t = np.sinh(np.linspace(-8, 8, 301))
    grid = np.stack(np.meshgrid(t, t), -1).reshape(-1, 2)
    weight = np.log(np.cosh(np.linspace(-8, 8, 301)) * 16 / 300)
    log_weights = (weight[:, None] + weight).ravel()
    log_prob = np.asarray(jit(found.log_prob)(jnp.asarray(grid, jnp.float32)))
    assert np.logaddexp.reduce(log_prob + log_weights) == pytest.approx(0.0, abs=2e-3)
    # Draws follow the density: their mean log-density is minus its entropy.
    draws = jit(lambda key: found.log_prob(found.sample(key, 20_000)))(KEY)
    entropy = -np.sum(np.exp(log_prob + log_weights) * log_prob)
    error = float(jnp.std(draws)) / math.sqrt(20_000)
    assert float(jnp.mean(draws)) == pytest.approx(-entropy, abs=4 * error)


# Rows


X = np.array([0.5, -1.0, 2.0, 0.0], np.float32)


def conditional(x, data=None, *, kind="abs"):
    """Covariates give every row a normalizer of its own."""
    with numpyro.plate("data", len(x)):
        v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
        size = jnp.abs(v) if kind == "abs" else 0.5 * v**2
        ebm.energy("E", jnp.exp(x) * jnp.sum(size, -1))


def test_rows_with_covariates_have_a_log_z_each():
    model = ebm.fixed(conditional, {})
    exact = 1.5 * np.log(2 * np.pi) - 1.5 * X
    found = ebm.log_normalizer(KEY, model, X, kind="square", method="enumerate")
    assert found.value.shape == found.mcse.shape == found.ess.shape == (4,)
    np.testing.assert_allclose(found.value, exact, rtol=1e-5)


@pytest.mark.slow
def test_rows_are_annealed_side_by_side():
    model, data = ebm.fixed(conditional, {}), np.ones((4, 3), np.float32)
    found = ebm.log_normalizer(KEY, model, X, data)
    assert found.method == "ais"
    assert found.value.shape == found.mcse.shape == found.ess.shape == (4,)
    assert_covers(found, 3 * np.log(2) - 3 * X)


def test_an_array_the_model_closes_over_makes_rows_differ_too():
    x = jnp.asarray(X)

    def closed(data=None):
        with numpyro.plate("data", 4):
            h = numpyro.sample("h", ebm.Counting(3, (2,)), obs=data)
            ebm.energy("E", -x * jnp.sum(h, -1))

    found = ebm.log_normalizer(KEY, ebm.fixed(closed, {}))
    exact = 2 * np.log(1 + np.exp(X) + np.exp(2 * X))
    np.testing.assert_allclose(found.value, exact, rtol=1e-5)
    found = jax.jit(lambda key: ebm.log_normalizer(key, ebm.fixed(closed, {})).value)(KEY)
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["quadrature", "smc"])
def test_every_method_knows_rows(method):
    def line(x, data=None):
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", jnp.abs(v - x) * jnp.exp(x))

    found = ebm.log_normalizer(KEY, ebm.fixed(line, {}), X, method=method)
    assert found.value.shape == (4,)
    assert_covers(found, np.log(2) - X)


def test_many_rows_of_data_do_not_change_it(grbm):
    params = {k: jnp.asarray(x, jnp.float32) for k, x in grbm.params.items()}
    model = ebm.fixed(grbm.model, params)
    few, many = (ebm.log_normalizer(KEY, model, np.zeros((n, 2))) for n in (1, 1_000))
    assert few.value == many.value and many.value.shape == ()


# Log-likelihood


def test_log_likelihood_of_rows(grbm):
    params = {k: jnp.asarray(x, jnp.float32) for k, x in grbm.params.items()}
    exact = ebm.models.grbm_log_likelihood(params, jnp.asarray(grbm.data, jnp.float32))
    for model in (grbm.model, grbm.plate_model):
        fixed = ebm.fixed(model, params)
        found = ebm.log_likelihood(KEY, fixed, grbm.data)
        assert isinstance(found, jax.Array) and found.shape == (5,)
        np.testing.assert_allclose(found, exact, rtol=1e-5)
    log_z = ebm.log_normalizer(KEY, fixed, grbm.data)
    for given in (log_z, log_z.value, float(log_z.value), np.full(5, log_z.value)):
        found = ebm.log_likelihood(KEY, fixed, grbm.data, log_normalizer=given)
        np.testing.assert_allclose(found, exact, rtol=1e-5)
    found = ebm.log_likelihood(
        KEY, fixed, grbm.data, log_normalizer=log_z._replace(mcse=0.25), with_error=True
    )
    np.testing.assert_allclose(found.mcse, np.full(5, 0.25))
    with pytest.raises(ModelError, match="for each of the 5 rows"):
        ebm.log_likelihood(KEY, fixed, grbm.data, log_normalizer=jnp.zeros(3))


@pytest.mark.slow
def test_log_likelihood_integrates_continuous_latents_by_rows():
    def factor(data):
        with numpyro.plate("data", len(data)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
            ebm.energy("E", 0.5 * jnp.sum((v - z) ** 2, -1) + 0.0 * jnp.sum(z**4, -1))

    data = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    exact = dist.Normal(0, math.sqrt(2)).log_prob(data).sum(-1)
    log_z = 1.5 * math.log(2 * math.pi)
    found = ebm.log_likelihood(
        KEY, ebm.fixed(factor, {}), data, log_normalizer=log_z, with_error=True
    )
    assert np.all(found.mcse > 0)
    assert_covers(found, exact, 4.0)


def test_log_likelihood_of_covariates_wants_a_log_z_for_every_row():
    model = ebm.fixed(conditional, {})
    data = np.ones((4, 3), np.float32)
    with pytest.raises(ModelError, match="one number was given"):
        ebm.log_likelihood(KEY, model, X, data, kind="square", log_normalizer=1.0)
    found = ebm.log_likelihood(KEY, model, X, data, kind="square", method="enumerate")
    exact = dist.Normal(0, np.exp(-X / 2)[:, None]).log_prob(data).sum(-1)
    np.testing.assert_allclose(found, exact, rtol=1e-5)


# What goes wrong


DIVERGENT = {
    "rises": (lambda v: -(v**2), ebm.Lebesgue()),
    "flat in one direction": (lambda v: 0.5 * v[..., 0] ** 2, ebm.Lebesgue((2,))),
    "tails of 1/v": (lambda v: jnp.log1p(jnp.abs(v)), ebm.Lebesgue()),
    "flat in three dimensions": (
        lambda v: 0.5 * v[..., 0] ** 2 + v[..., 2] ** 4,
        ebm.Lebesgue((3,)),
    ),
    "flat on the positive line": (lambda v: 0.0 * v, ebm.Lebesgue(support=constraints.positive)),
    "out of a proper base measure": (
        lambda v: -jnp.sum(v**2 + 0.0 * v**4, -1),
        dist.Normal(0.0, 1.0).expand([3]).to_event(1),
    ),
    "a falling quadratic": (lambda v: -0.5 * jnp.sum(v**2, -1), ebm.Lebesgue((3,))),
}


@pytest.mark.parametrize(
    "name",
    [
        "rises",
        "a falling quadratic",
        *(pytest.param(x, marks=pytest.mark.slow) for x in list(DIVERGENT)[1:-1]),
    ],
)
def test_divergent_integrals_are_found(name):
    with pytest.raises(ModelError, match=r"site\(s\) 'v' diverges.*proper base measure"):
        ebm.log_normalizer(KEY, model_of(*DIVERGENT[name]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ais", "smc"])
def test_annealing_finds_divergence(method):
    for name in ("rises", "flat in one direction"):
        with pytest.raises(ModelError, match=r"site\(s\) 'v' diverges"):
            ebm.log_normalizer(KEY, model_of(*DIVERGENT[name]), method=method)


def test_the_site_that_diverges_is_named():
    def two():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            w = numpyro.sample("w", ebm.Lebesgue())
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + 0.0 * w)

    with pytest.raises(ModelError, match=r"site\(s\) 'w' diverges"):
        ebm.log_normalizer(KEY, ebm.fixed(two, {}), method="smc")


def test_free_parameters_and_bad_options():
    with pytest.raises(ModelError, match="fixed"):
        ebm.log_normalizer(KEY, ising)
    with pytest.raises(ModelError, match="fixed"):
        ebm.log_likelihood(KEY, ising, np.zeros((2, 4, 4), int))
    model = ebm.fixed(ising, {"beta": 0.1})
    for kwargs, message in (
        ({"method": "exact"}, "must be one of"),
        ({"method": ["ais", "exact"]}, "must be one of"),
        ({"method": []}, "empty"),
        ({"num_particles": 1}, "num_particles"),
        ({"num_temperatures": 0}, "num_temperatures"),
        ({"num_replicates": 1.5}, "num_replicates"),
        ({"method": "quadrature"}, "no real coordinates"),
        ({"method": "enumerate", "size": 10}, "states to sum over"),
        ({"method": "enumerate", "max_states": 100}, "max_states=100"),
    ):
        with pytest.raises(ModelError, match=message):
            ebm.log_normalizer(KEY, model, **kwargs)
    with pytest.raises(ModelError, match="no observed site"):
        ebm.log_likelihood(KEY, model)
    cube = model_of(lambda v: jnp.sum(jnp.abs(v), -1), ebm.Lebesgue((3,)))
    for method, message in (("quadrature", "3 coordinates"), ("enumerate", "not jointly Gaussian")):
        with pytest.raises(ModelError, match=message):
            ebm.log_normalizer(KEY, cube, method=method)


def test_disagreement_is_reported():
    def result(value, mcse, method):
        return LogNormalizer(jnp.asarray(value), jnp.asarray(mcse), 100.0, method, "below")

    a, b = result(1.0, 0.1, "ais"), result(1.1, 0.01, "smc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best = best_of([a, b])
    assert best.method == "smc" and best.diagnostics["results"] == {"ais": a, "smc": b}
    with pytest.warns(ebm.NormalizerDisagreementWarning, match="ais gives 1 .* smc gives 2"):
        best_of([a, result(2.0, 0.1, "smc")])


@pytest.mark.slow
def test_several_methods_agree():
    model = ebm.fixed(ising, {"beta": 0.25})
    found = ebm.log_normalizer(KEY, model, method=["enumerate", "ais", "smc"])
    assert found.method == "enumerate" and set(found.diagnostics["results"]) == {
        "enumerate",
        "ais",
        "smc",
    }
