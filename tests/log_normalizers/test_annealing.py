# SPDX-License-Identifier: Apache-2.0
"""log Z by annealing, with error bars that cover."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp
from normalizer_cases import CRITICAL, KEY, assert_covers, ising, kaufman, model_of
from numpyro.distributions import constraints
from oracles import jit
from scipy.stats import kstest

import numpyro_ebm as ebm
from numpyro_ebm.log_normalizers import annealing
from numpyro_ebm.log_normalizers.ais import annealed_importance_sampling
from numpyro_ebm.log_normalizers.base_measure import reference
from numpyro_ebm.log_normalizers.gaussian import Gaussian
from numpyro_ebm.log_normalizers.integrand import read_integrand
from numpyro_ebm.log_normalizers.mixture import DEGREES, Mixture, fit_mixture
from numpyro_ebm.log_normalizers.particles import log_mean_weight, student_factor
from numpyro_ebm.log_normalizers.path import Path
from numpyro_ebm.log_normalizers.schedule import AnnealingSchedule


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


@pytest.mark.slow
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


def test_annealing_starts_at_a_law_and_at_its_draws():
    """The density of the first particles, Jacobian and all, is normalised and theirs."""

    def model():
        with numpyro.plate("data", 1):
            r = numpyro.sample("r", dist.Exponential(1.5))
            h = numpyro.sample("h", ebm.Counting(3, (2,)))
            ebm.energy("E", r * h[:, 0] * h[:, 1])

    integrand = read_integrand(KEY, ebm.fixed(model, {}), (), {})
    log_densities, draw = reference(integrand, None)
    u = np.repeat(np.linspace(-12.0, 4.0, 401), 9)
    states = np.tile(np.indices((3, 3)).reshape(2, 9).T, (401, 1))
    base, _ = jit(log_densities)({"r": jnp.asarray(u, jnp.float32), "h": jnp.asarray(states)})
    assert np.sum(np.exp(base)) * 16 / 400 == pytest.approx(1.0, abs=1e-3)
    found = draw(KEY, 9_000)
    counts = np.bincount(np.asarray(found["h"]) @ [3, 1], minlength=9)
    assert np.sum((counts - 1_000) ** 2 / 1_000) < 8 + 4 * 16**0.5
    assert np.mean(np.exp(found["r"])) == pytest.approx(1 / 1.5, abs=4 / 1.5 / 9_000**0.5)


def mixed(data=None, *, num_rows=1):
    """Real sites that are not Gaussian, beside discrete ones that interact."""
    with numpyro.plate("data", num_rows if data is None else len(data)):
        h = numpyro.sample("h", dist.Bernoulli(0.3).expand([2]).to_event(1))
        v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
        shift = jnp.sum(h * jnp.array([2.0, -4.0]), -1, keepdims=True)
        ebm.energy("E", jnp.sum(jnp.abs(v - shift), -1) - h[:, 0] * h[:, 1])


def test_flat_sites_begin_beside_the_base_measure():
    """The density of the first particles is that of the proper sites times the fitted one."""
    integrand = read_integrand(KEY, ebm.fixed(mixed, {}), (), {})
    fitted = Gaussian(jnp.array([[1.0, -2.0, 0.5]]), 2.0 * jnp.eye(3)[None])
    log_densities, draw = reference(integrand, fitted)
    drawn = jit(lambda key: draw(key, 4_000))(KEY)
    away = np.asarray(drawn["v"] - fitted.center) / 2.0
    assert np.all(abs(away.mean(0)) < 4.5 / 4_000**0.5)
    assert np.all(abs((away**2).mean(0) - 1) < 4.5 * (2 / 4_000) ** 0.5)
    assert np.all(abs(drawn["h"].mean(0) - 0.3) < 4.5 * (0.21 / 4_000) ** 0.5)
    h, v = jnp.array([[0, 0], [0, 1], [1, 1]]), jnp.arange(9.0).reshape(3, 3) / 3 - 1
    base, _ = jit(log_densities)({"h": h, "v": v})
    by_hand = dist.Bernoulli(0.3).log_prob(h).sum(-1)
    by_hand += dist.Normal(fitted.center, 2.0).log_prob(v).sum(-1)
    np.testing.assert_allclose(base, by_hand, rtol=1e-5)


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


def test_coordinates_of_a_draw_share_their_scale():
    """|x|² / D of a multivariate t with ν degrees of freedom follows F(D, ν)."""
    eye = jnp.eye(5)
    one = Mixture(jnp.zeros((1, 1)), jnp.zeros((1, 1, 5)), eye[None, None], eye[None], jnp.zeros(5))
    draws = np.asarray(one.sample(KEY, 20_000))
    assert kstest(np.mean(draws**2, -1), "f", args=(5, DEGREES)).pvalue > 1e-3


@pytest.mark.parametrize("num", [2, 4, 8, 16])
def test_intervals_of_few_replicates_cover(num):
    """Log-normal estimates of spread s have the mean exp(s²/2); 1.96 errors are 95 %."""
    spread, repeats = 0.05, 40_000
    draws = spread * np.random.default_rng(num).normal(size=(num, repeats))
    value, mcse, _ = (np.asarray(x) for x in log_mean_weight(jnp.asarray(draws)))
    off = abs(value - spread**2 / 2)
    covered = (off < 1.96 * student_factor(num) * mcse).mean()
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / repeats) + 0.002
    assert (off < 1.96 * mcse).mean() < 0.94  # as it was


def test_weights_of_particles_that_stay_are_the_ratio_of_the_ends():
    """Whatever the temperatures: the powers of p̃ / q on the way add to the first one."""
    path = Path(
        lambda position: (-position["x"], 2.0 * position["x"]),
        lambda rng_key, num: {"x": jnp.arange(float(num))},
        real=(),
        blocks=(),
        precondition=None,
    )
    schedule = AnnealingSchedule(jnp.array([[0.0], [0.1], [0.6], [1.0]]), None, jnp.array(3))
    for num_temperatures in (3, 7):
        weights, *_ = annealed_importance_sampling(KEY, path, schedule, 5, num_temperatures, 2)
        np.testing.assert_allclose(weights[:, 0], 3.0 * np.arange(5), rtol=1e-6)


def sequences(fields):
    """Four units of three values, all in pairs, with fields of every row."""
    pairs = jnp.asarray(np.random.default_rng(5).normal(size=(12, 12)) * 0.4)
    with numpyro.plate("data", len(fields)):
        o = jax.nn.one_hot(numpyro.sample("x", ebm.Counting(3, (4,))), 3)
        flat = o.reshape(*o.shape[:-2], -1)
        ebm.energy("E", jnp.sum((flat @ pairs) * flat, -1) - jnp.sum(fields * flat, -1))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ais", "smc"])
def test_annealed_sequences_in_one_hot_codes(method):
    fields = jnp.asarray(np.random.default_rng(6).normal(size=(3, 12)))
    model = ebm.fixed(sequences, {})
    truth = ebm.log_normalizer(KEY, model, fields, method="enumerate").value
    found = ebm.log_normalizer(KEY, model, fields, method=method, num_particles=256)
    assert_covers(found, truth, 4.0)
    assert np.all(found.mcse < 0.1) and np.ptp(truth) > 0.5


@pytest.mark.slow
def test_annealed_ising_of_a_thousand_spins():
    """Kaufman's lattice at its critical point, where correlations reach across all of it."""
    run = ising_run("ais", 32, num_particles=192, num_temperatures=1_500)
    found = run(KEY, CRITICAL)
    assert_covers(found, kaufman(32, CRITICAL))
    assert found[1] < 0.3


def test_the_derivative_of_log_z_weighs_the_draws():
    """E ∂ log p̃ of draws with 0.2 and 0.8: 0.2 times 3 and 0.8 times 5."""

    def value(a):
        density = SimpleNamespace(log_density=lambda position: a * position["x"])
        log_weights = jnp.log(jnp.array([[0.2], [0.8]]))
        position = {"x": jnp.array([3.0, 5.0])}
        return jnp.sum(annealing._differentiable_at(density, position, log_weights, jnp.ones(1)))

    np.testing.assert_allclose(jax.value_and_grad(value)(2.0), (1.0, 4.6), rtol=1e-6)
