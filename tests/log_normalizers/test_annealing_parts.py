# SPDX-License-Identifier: Apache-2.0
"""The parts of annealing, of two problems side by side, against NumPy and SciPy."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import multivariate_normal, multivariate_t

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers import (
    ais,
    annealing,
    exploration,
    mixture,
    quadrature,
    quadrature_nodes,
    smc,
)
from numpyro_ebm.log_normalizers.gaussian import Gaussian
from numpyro_ebm.log_normalizers.integrand import read_integrand
from numpyro_ebm.log_normalizers.particles import resample
from numpyro_ebm.log_normalizers.path import (
    ADAPTATION_RATE,
    TARGET_ACCEPTANCE,
    Path,
    Tuning,
    sweep_particles,
)
from numpyro_ebm.log_normalizers.schedule import AnnealingSchedule, adaptive_schedule
from numpyro_ebm.samplers.gibbs_blocks import Block

KEY = jax.random.key(6)
CENTERS = np.array([[1.0, -2.0, 0.5], [0.0, 4.0, -1.0]])
FACTORS = np.array(
    [
        [[0.5, 0.0, 0.0], [1.0, 2.0, 0.0], [-0.4, 0.3, 0.8]],
        [[3.0, 0.0, 0.0], [0.2, 0.7, 0.0], [0.0, -1.0, 1.5]],
    ]
)


@pytest.mark.parametrize("is_diagonal", [True, False])
def test_a_gaussian_of_every_problem(is_diagonal):
    factors = FACTORS * np.eye(3) if is_diagonal else FACTORS
    given = np.diagonal(factors, axis1=1, axis2=2) if is_diagonal else factors
    found = Gaussian(jnp.asarray(CENTERS), jnp.asarray(given))
    laws = [multivariate_normal(m, f @ f.T) for m, f in zip(CENTERS, factors, strict=True)]
    x = np.random.default_rng(0).normal(size=(6, 3))  # of the problems by turns
    expected = np.array([laws[i % 2].logpdf(x[i]) for i in range(6)])
    np.testing.assert_allclose(found.log_prob(x), expected, rtol=1e-5)
    z = np.stack([np.linalg.solve(factors[i % 2], x[i] - CENTERS[i % 2]) for i in range(6)])
    np.testing.assert_allclose(found.standardize(x), z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.restore(z), x, rtol=1e-4, atol=1e-5)
    noise = jax.random.normal(KEY, (4, 3))
    np.testing.assert_allclose(found.sample(KEY, 4), found.restore(noise), rtol=1e-5)
    part, at = found.subset(np.array([0, 2])), [0, 2]
    for i, law in enumerate(laws):
        own = multivariate_normal(CENTERS[i, at], law.cov[np.ix_(at, at)])
        found_i = part.log_prob(x[:, at])[i::2]
        np.testing.assert_allclose(found_i, own.logpdf(x[i::2][:, at]), rtol=1e-5)


def test_mixtures_of_two_problems_are_those_of_their_components(monkeypatch):
    """Log-densities by SciPy's Student-t; draws have the means of their own problem."""
    rng = np.random.default_rng(1)
    own_weights = np.log([0.3, 0.7])
    own_centers = rng.normal(size=(2, 3))
    factors = np.tril(rng.normal(size=(2, 3, 3))) + 2.0 * np.eye(3)
    points = np.zeros((5, 2, 3))

    def fit(rng_key, z, mask):
        return own_weights, own_centers + 0.0 * jnp.sum(z), jnp.asarray(factors) * mask[0]

    monkeypatch.setattr(mixture, "_fit", fit)
    cloud = Gaussian(jnp.asarray(CENTERS), jnp.asarray(FACTORS))
    x = CENTERS + rng.normal(size=(4, 2, 3))

    @jax.jit
    def run(key):
        found = mixture.fit_mixture(key, cloud, points, jnp.ones((5, 2), bool), 0.2)
        return found.log_prob(jnp.reshape(x, (8, 3))), found.sample(key, 20_000)

    log_prob, draws = run(KEY)
    weights = np.append(0.8 * np.exp(own_weights), 0.2)
    centers, factors = np.append(own_centers, [[0, 0, 0]], 0), np.append(factors, [np.eye(3)], 0)
    for i in range(2):
        means, scales = CENTERS[i] + centers @ FACTORS[i].T, mixture.WIDER * FACTORS[i] @ factors
        terms = [
            np.log(w) + multivariate_t(m, f @ f.T, mixture.DEGREES).logpdf(x[:, i])
            for w, m, f in zip(weights, means, scales, strict=True)
        ]
        np.testing.assert_allclose(log_prob[i::2], np.logaddexp.reduce(terms), rtol=1e-4)
        off = np.asarray(draws[i::2]) - weights @ means
        assert np.all(np.abs(off.mean(0)) < 4.5 * off.std(0) / 100)
        around = means - weights @ means
        second = np.einsum("k,kij,klj->il", weights * 5 / 3, scales, scales)
        second = second + np.einsum("k,ki,kj->ij", weights, around, around)
        np.testing.assert_allclose(np.cov(off.T), second, atol=0.1 * np.diag(second).max())


def test_resampling_of_runs_of_their_own():
    """Systematic: each particle as often as its share says, up to one; runs apart, and at rest."""
    rng = np.random.default_rng(2)
    log_ratio, delta = rng.normal(size=(8, 3)), np.array([0.7, 0.0, 2.0])
    log_ratio[:, 1] = [np.inf, -np.inf, *np.zeros(6)]  # of a run that has arrived
    label = np.arange(24)
    position = {"x": jnp.asarray(label), "y": jnp.asarray(label[:, None] * [1.0, 10.0])}
    found, increment = jax.jit(resample)(KEY, position, log_ratio, delta)
    weights = np.exp(np.where(delta > 0, delta * np.where(delta > 0, log_ratio, 0.0), 0.0))
    np.testing.assert_allclose(increment, np.log(weights.mean(0)), rtol=1e-4, atol=1e-6)
    chosen = np.asarray(found["x"]).reshape(8, 3)
    np.testing.assert_array_equal(chosen % 3, np.tile(np.arange(3), (8, 1)))
    np.testing.assert_array_equal(found["y"], np.asarray(found["x"])[:, None] * [1.0, 10.0])
    for run in range(3):
        counts = np.bincount(chosen[:, run] // 3, minlength=8)
        assert np.all(np.abs(counts - 8 * weights[:, run] / weights[:, run].sum()) < 1 + 1e-5)


def still_path(rates, draws):
    """Nothing moves; log p̃ - log q is a rate of the problem times x."""
    rates = jnp.asarray(rates)

    def log_densities(position):
        x = position["x"]
        ratio = jnp.reshape(jnp.reshape(x, (-1, len(rates))) * rates, -1)
        return -0.3 * x, ratio - 0.3 * x

    return Path(log_densities, lambda key, num: {"x": draws(key, num)}, (), (), None, len(rates))


BETAS = jnp.array([[0.0, 0.0], [0.2, 0.5], [0.6, 1.0], [1.0, 1.0], [1.0, 1.0]])


def test_sequential_monte_carlo_is_unbiased_for_every_problem():
    """Of three values of x the mean of exp(rate x), however few the particles are."""
    rates, values = np.array([1.0, -0.7]), np.array([-1.0, 0.5, 2.0])
    path = still_path(rates, lambda key, num: jax.random.choice(key, jnp.asarray(values), (num,)))
    schedule = AnnealingSchedule(BETAS, None, jnp.array(3))
    run = jax.jit(lambda key: smc.sequential_monte_carlo(key, path, schedule, 3, 1, 4_000))
    total, position, log_weights = run(KEY)
    assert total.shape == (4_000, 2) and log_weights.shape == (12_000, 2)
    estimates, exact = np.exp(total), np.exp(rates * values[:, None]).mean(0)
    assert np.all(np.abs(estimates.mean(0) - exact) < 4.5 * estimates.std(0) / 4_000**0.5)
    # Draws at the end, by their weights, have the law of p̃.
    weights = np.exp(log_weights)
    x = np.asarray(position["x"]).reshape(12_000, 2)
    tilted = np.exp(rates * values[:, None])
    mean = (values[:, None] * tilted).sum(0) / tilted.sum(0)
    found = (weights * x).sum(0) / weights.sum(0)
    assert np.all(np.abs(found - mean) < 0.1)


def test_annealed_weights_of_problems_that_arrive_in_turn(monkeypatch):
    """The powers add to one for each; infinite ratios do not count once a problem is there."""

    def sweep(rng_key, path, position, beta, *_):
        return {"x": jnp.where(beta == 1, jnp.inf, position["x"])}, None

    monkeypatch.setattr(ais, "sweep_particles", sweep)
    path = still_path([2.0, -1.0], lambda key, num: jnp.arange(float(num)))
    schedule = AnnealingSchedule(BETAS, None, jnp.array(3))
    weights, *_ = ais.annealed_importance_sampling(KEY, path, schedule, 3, 7, 1)
    np.testing.assert_allclose(weights, np.arange(6.0).reshape(3, 2) * [2.0, -1.0], rtol=1e-5)


@pytest.mark.parametrize("method", [ais, smc])
def test_particles_move_with_the_tuning_of_their_temperature(method, monkeypatch):
    """AIS has that in between, and that of the first temperature before; the reference has none."""
    seen = jnp.array([[jnp.nan, jnp.nan], [1.0, 10.0], [3.0, 30.0], [7.0, 70.0], [9.0, 90.0]])

    def sweep(rng_key, path, position, beta, tuning, num_sweeps):
        per_particle = jnp.tile(tuning.log_step + 100 * tuning.scale[:, 0], len(beta) // 2)
        return {"x": position["x"] + per_particle * 1e-3, "beta": beta}, tuning

    monkeypatch.setattr(method, "sweep_particles", sweep)
    path = still_path([0.0, 0.0], lambda key, num: jnp.zeros(num))
    path = path._replace(draw=lambda key, num: {"x": jnp.zeros(num), "beta": jnp.zeros(num)})
    schedule = AnnealingSchedule(BETAS, Tuning(seen, seen[..., None]), jnp.array(3))
    if method is ais:
        _, position, _ = ais.annealed_importance_sampling(KEY, path, schedule, 2, 6, 1)
        total = np.array([1.0, 1.0, 2.0, 3.0, 5.0, 7.0]).sum()
    else:
        _, position, _ = smc.sequential_monte_carlo(KEY, path, schedule, 2, 1, 1)
        total = 1.0 + 3.0 + 7.0
    np.testing.assert_allclose(position["x"], total * 0.101 * np.tile([1, 10], 2), rtol=1e-5)
    np.testing.assert_array_equal(position["beta"], 1.0)


def test_the_first_temperature_leaves_the_share_of_particles_that_is_asked_for():
    rates, num = np.array([4.0, -9.0]), 200
    x = np.linspace(0.0, 1.2, 2 * num) ** 3  # not symmetric
    path = still_path(rates, lambda key, n: jnp.asarray(x))
    run = jax.jit(lambda key: adaptive_schedule(key, path, num, 1, 0.9))
    schedule, _ = run(KEY)
    beta, count = np.asarray(schedule.beta), int(schedule.num_temperatures)
    for i, rate in enumerate(rates):
        weights = np.exp(beta[1, i] * rate * x.reshape(num, 2)[:, i])
        share = weights.sum() ** 2 / np.sum(weights**2) / num
        assert share == pytest.approx(0.9, abs=0.01) and 0 < beta[1, i] < 0.3
    assert np.all(beta[0] == 0) and np.all(beta[count:] == 1) and beta[count - 1].min() < 1
    assert np.all(np.diff(beta, axis=0) >= 0)


def test_moves_of_particles_leave_the_law_of_their_temperature_as_it_is():
    """Between N(0, 1) and N(3, 1/4) of each problem's scale, at a temperature of each particle."""
    scales, num = jnp.array([1.0, 10.0]), 20_000
    beta = np.tile([0.1, 0.1, 0.8, 0.8], num // 4)

    def log_densities(position):
        x = jnp.sum(jnp.reshape(position["x"], (-1, 2, 2)), -1) / scales[:, None].T
        apart = jnp.reshape(position["x"][:, 0] - position["x"][:, 1], (-1, 2)) / scales
        hot, cold = -0.5 * (x**2 + apart**2), -2.0 * (x - 3.0) ** 2 - 0.5 * apart**2
        return jnp.reshape(hot, -1), jnp.reshape(cold, -1)

    factor = jnp.array([[1.0, 0.0], [-0.5, 0.6]]) * scales[:, None, None]
    cloud = Gaussian(jnp.ones((2, 2)), factor)
    path = Path(log_densities, lambda key, n: {}, ("x",), (), cloud, 2)
    precision = 1 - beta + 4 * beta
    mean = 12 * beta / precision
    rng = np.random.default_rng(3)
    total = mean + rng.normal(size=num) / np.sqrt(precision)
    apart = rng.normal(size=num)
    scale = np.tile(scales, num // 2)
    x = np.stack([total + apart, total - apart], 1) / 2 * scale[:, None]
    tuning = Tuning(jnp.log(jnp.array([0.4, 0.2])), jnp.array([[1.0, 0.5], [0.7, 1.2]]))

    @jax.jit
    def moved(key):
        start = {"x": jnp.asarray(x, jnp.float32)}
        return sweep_particles(key, path, start, jnp.asarray(beta), tuning, 5)

    position, same = moved(KEY)
    y = np.asarray(position["x"]) / scale[:, None]
    assert np.mean(np.all(y == (x / scale[:, None]).astype("float32"), 1)) < 0.2
    away = (y.sum(1) - mean) * np.sqrt(precision), y[:, 0] - y[:, 1]
    for group in range(4):
        for z in (away[0][group::4], away[1][group::4]):
            assert abs(z.mean()) < 4.5 / (num / 4) ** 0.5
            assert abs(np.mean(z**2) - 1) < 4.5 * (2 / (num / 4)) ** 0.5
    np.testing.assert_array_equal(same.log_step, tuning.log_step)


def test_the_steps_of_a_problem_follow_its_own_acceptance():
    """Steps of no size are all taken, and steps out of all proportion are not."""
    path = Path(
        lambda position: (jnp.zeros(8), -0.5 * jnp.sum(position["x"] ** 2, -1)),
        lambda key, num: {},
        *(("x",), (), Gaussian(jnp.zeros((2, 2)), jnp.ones((2, 2))), 2),
    )
    tuning = Tuning(jnp.log(jnp.array([1e-8, 1e8])), jnp.ones((2, 2)))
    start = {"x": jnp.ones((8, 2))}
    move = jax.jit(
        lambda key: sweep_particles(key, path, start, jnp.ones(8), tuning, 3, adapt=True)
    )
    found = np.asarray(move(KEY)[1].log_step - tuning.log_step) / (3 * ADAPTATION_RATE)
    np.testing.assert_allclose(found, [1 - TARGET_ACCEPTANCE, -TARGET_ACCEPTANCE], rtol=1e-2)


def test_moves_and_draws_of_blocks_leave_a_joint_law_as_it_is():
    """A real coordinate around one of two centres, and the bit that says which."""
    num, beta = 20_000, 0.5

    def log_densities(position):
        x, h = position["x"][:, 0], position["h"]
        return -0.5 * x**2, -1.5 * x**2 + 9.0 * x * h - 12.0 * h

    block = Block(("h",), "bernoulli", {"h": np.array([0, 1])})
    cloud = Gaussian(jnp.ones((1, 1)), jnp.ones((1, 1)))
    path = Path(log_densities, lambda key, n: {}, ("x",), (block,), cloud)
    h = np.arange(2)  # of precision ½ + 3/2, around 2.25 h
    p = np.exp(-12.0 * beta * h + 0.5 * 2.0 * (2.25 * h) ** 2)
    p, rng = p[1] / p.sum(), np.random.default_rng(5)
    start = (rng.uniform(size=num) < p).astype(int)
    x = 2.25 * start + rng.normal(size=num) / 2**0.5
    tuning = Tuning(jnp.log(jnp.array([0.4])), jnp.ones((1, 1)))

    @jax.jit
    def moved(key):
        position = {"x": jnp.asarray(x, jnp.float32)[:, None], "h": jnp.asarray(start)}
        return sweep_particles(key, path, position, jnp.full(num, beta), tuning, 3)[0]

    found = moved(KEY)
    y, h = np.asarray(found["x"])[:, 0], np.asarray(found["h"])
    assert np.mean(h != start) > 0.01 and np.mean(y == x.astype("float32")) < 0.2
    assert abs(h.mean() - p) < 4.5 * (p * (1 - p) / num) ** 0.5
    z = (y - 2.25 * h) * 2**0.5
    assert abs(z.mean()) < 4.5 / num**0.5 and abs(np.mean(z**2) - 1) < 4.5 * (2 / num) ** 0.5
    assert abs(np.mean(z * (h - p))) < 4.5 * (p * (1 - p) / num) ** 0.5


@pytest.mark.parametrize("is_diagonal", [True, False])
def test_a_cloud_of_chains_has_their_mean_and_covariance(is_diagonal):
    """Those with a finite density alone; how far they reach is the width and the middle."""
    rng = np.random.default_rng(4)
    x = rng.uniform(0.0, 1.0, (500, 2, 2)) ** 3 @ np.array([[2.0, 1.0], [0.0, 0.5]]) + [9.0, -0.5]
    there = rng.uniform(size=(500, 2)) < 0.8
    x[~there] = 1e9
    run = jax.jit(exploration._robust_gaussian, static_argnums=2)
    cloud, extent = run(x, there, is_diagonal)
    for i in range(2):
        own = x[there[:, i], i]
        np.testing.assert_allclose(cloud.center[i], own.mean(0), rtol=1e-3, atol=1e-3)
        covariance = np.cov(own.T, ddof=0)
        if is_diagonal:
            np.testing.assert_allclose(cloud.factor[i] ** 2, np.diag(covariance), rtol=1e-2)
        else:
            found = cloud.factor[i] @ cloud.factor[i].T
            np.testing.assert_allclose(found, covariance, rtol=1e-2, atol=1e-3)
        low, middle, high = np.quantile(own, [0.16, 0.5, 0.84], axis=0)
        np.testing.assert_allclose(extent[i], (high - low) / 2 + abs(middle), rtol=1e-3)


def on_a_line(log_density):
    """A density of one real coordinate, of two problems."""
    return SimpleNamespace(
        num_problems=2,
        num_real=1,
        real=("v",),
        placeholder=lambda num: {"v": jnp.zeros((num,))},
        log_density=log_density,
    )


def test_derivatives_of_a_quadrature_where_far_nodes_overflow():
    """∫ exp(-a cosh v) dv is 2 K₀(a), of slope -2 K₁(a) in a, for every problem."""
    cloud = Gaussian(jnp.zeros((2, 1)), jnp.ones((2, 1, 1)))

    def log_z(a):
        line = on_a_line(lambda position: -a * jnp.cosh(position["v"]))
        return quadrature._differentiable(line, cloud, 129, 100.0)

    a = jnp.array([1.0, 2.0])
    found, slope = jax.jit(lambda a: (log_z(a), jax.grad(lambda a: jnp.sum(log_z(a)))(a)))(a)
    np.testing.assert_allclose(found, np.log([2 * 0.42102444, 2 * 0.11389387]), rtol=1e-5)
    ratios = [0.60190723 / 0.42102444, 0.13986588 / 0.11389387]
    np.testing.assert_allclose(slope, np.negative(ratios), rtol=1e-4)
    assert math.isfinite(float(slope.sum()))


def test_far_nodes_that_overflow_are_no_mass_and_near_ones_are_an_error():
    """Nodes without a number: far out and beside nothing; beside the mass; in the middle."""
    distance = np.abs(np.linspace(-40.0, 40.0, 9))
    values = np.tile(-(distance[:, None] ** 2) * 0.1, (1, 2))
    line = on_a_line(None)

    def cleaned(at, value, values=values):
        bad = values.copy()
        bad[at, 1] = value
        return np.asarray(quadrature._without_overflow(line, jnp.asarray(bad), distance, 9))

    for value in (np.nan, np.inf):
        found = cleaned(8, value)
        assert found[8, 1] == -np.inf
        np.testing.assert_allclose(np.delete(found, 8, 0), np.delete(values, 8, 0), rtol=1e-6)
        for at in (4, 5, 3):  # of no distance, and beside the node that holds all mass
            with pytest.raises(ModelError, match="mass up to where the energy is no finite"):
                cleaned(at, value)
    np.testing.assert_array_equal(cleaned(8, -np.inf)[8], [values[8, 0], -np.inf])
    with pytest.raises(ModelError, match="mass up to where"):  # the middle, and all mass is far
        cleaned(4, np.nan, np.where(distance[:, None] > 35, values, -500.0))


def rows_of_data(x, data):
    with numpyro.plate("data", len(x)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(3))
        ebm.energy("E", jnp.sum(v**4, -1) + x * v[:, 0] * h)


DATA = np.arange(6.0).reshape(3, 2)


def test_chains_of_a_row_start_at_its_data():
    """Where rows have a log Z each, chain after chain; else at any of them."""
    for x, spread in ((np.array([0.5, 1.0, 2.0]), False), (np.zeros(3), True)):
        model = ebm.fixed(rows_of_data, {})
        integrand = read_integrand(KEY, model, (x, DATA), {}, is_shared=spread)
        run = jax.jit(lambda key: exploration._starting_points(key, integrand, 60)["v"])  # noqa: B023
        found = np.asarray(run(KEY))
        first = found[:, 0].astype(int) // 2
        np.testing.assert_array_equal(found, DATA[first])
        if spread:
            assert np.all(np.bincount(first) > 8) and np.any(first != np.arange(60) % 3)
        else:
            np.testing.assert_array_equal(first, np.arange(60) % 3)


def test_a_density_whose_discrete_sites_are_summed_out():
    x = np.array([0.5, 1.0, 2.0])
    integrand = read_integrand(KEY, ebm.fixed(rows_of_data, {}), (x, DATA), {}, is_shared=False)
    rest = integrand.sum_out()
    assert rest.real == ("v",) and rest.discrete == () and rest.num_problems == 3
    v = np.random.default_rng(7).normal(size=(3, 2))
    base, found = rest.log_densities({"v": jnp.asarray(v)})
    terms = -(v**4).sum(1)[:, None] - x[:, None] * v[:, :1] * np.arange(3)
    np.testing.assert_allclose(found, np.logaddexp.reduce(terms, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(base, 0.0)


def test_a_reference_is_fitted_to_chains_and_again_to_particles(monkeypatch):
    """The second is fitted to where the first one's particles end; proper sites are in neither."""

    def model():
        with numpyro.plate("data", 1):
            p = numpyro.sample("p", dist.Normal(0.0, 2.0))
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            ebm.energy("E", jnp.sum(v**4, -1) + p**2 * v[:, 0] ** 2)

    integrand = read_integrand(KEY, ebm.fixed(model, {}), (), {})
    cloud = Gaussian(jnp.array([[9.0, 1.0, -1.0]]), jnp.diag(jnp.array([7.0, 2.0, 3.0]))[None])
    points = jnp.arange(12.0).reshape(4, 1, 3)
    monkeypatch.setattr(
        annealing,
        "explore",
        lambda *a, **k: SimpleNamespace(cloud=cloud, points=points, is_there=1),
    )
    fits = []

    def fit(rng_key, cloud, points, is_there, wide_weight):
        fits.append((cloud, points.shape[-1], wide_weight))
        return Gaussian(cloud.center + wide_weight, cloud.factor * (1 + jnp.max(points)))

    monkeypatch.setattr(annealing, "fit_mixture", fit)
    end = {"v": jnp.full((6, 2), 5.0), "p": jnp.zeros(6)}

    def scout(rng_key, path, num, num_sweeps, target_ess):
        assert num_sweeps == 5 and path.real == ("p", "v") and path.precondition is cloud
        there = {k: x * jnp.max(jnp.abs(path.log_densities(end)[0])) for k, x in end.items()}
        return AnnealingSchedule(jnp.ones((2, 1)), None, jnp.array(1)), there

    monkeypatch.setattr(annealing, "adaptive_schedule", scout)

    def weigh(rng_key, path, schedule):
        log_q, log_p = path.log_densities(end)
        return jnp.stack([log_q[:1], log_p[:1]]), end, jnp.zeros((6, 1))

    _, (value, *_) = annealing.anneal(KEY, integrand, weigh, 1)
    prior = multivariate_normal(0.0, 4.0).logpdf(0.0)
    own = Gaussian(cloud.center[:, 1:], cloud.factor[:, 1:, 1:])

    def log_q(weight, largest):
        reference = Gaussian(own.center + weight, own.factor * (1 + largest))
        return float(reference.log_prob(end["v"])[0]) + prior

    first, second = annealing.WIDE_WEIGHTS
    started = log_q(first, 11.0)  # of the points of the chains
    expected = log_q(second, 5.0 * abs(started))
    log_p = prior - 2 * 5.0**4
    np.testing.assert_allclose(value, np.logaddexp(expected, log_p) - np.log(2), rtol=1e-4)
    assert [(n, w) for _, n, w in fits] == [(2, first), (2, second)]


def test_a_reference_of_a_quadratic_energy_is_its_cloud_made_wider(monkeypatch):
    def model():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            h = numpyro.sample("h", ebm.Counting(2))
            ebm.energy("E", jnp.sum(v**2, -1) - v[:, 0] * h)

    cloud = Gaussian(jnp.zeros((1, 2)), jnp.array([[2.0, 3.0]]))
    made = SimpleNamespace(cloud=cloud, points=None, is_there=None)
    monkeypatch.setattr(annealing, "explore", lambda *a, **k: made)
    plan = annealing._plan(KEY, read_integrand(KEY, ebm.fixed(model, {}), (), {}))
    assert plan.moved == () and plan.groups == (("v",), ("h",)) and plan.refit is None
    np.testing.assert_allclose(plan.fitted.factor, annealing.WIDER * cloud.factor)
    assert [block.kind for block in plan.path(plan.fitted).blocks] == ["gaussian", "bernoulli"]


def test_units_whose_sum_factorises_are_not_counted():
    couplings = np.random.default_rng(8).normal(size=(2, 3))

    def model():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Counting(2, (2,)))
            h = numpyro.sample("h", ebm.Counting(2, (3,)))
            ebm.energy("E", -jnp.sum((v @ couplings) * h, -1) - 0.5 * v[:, 0] * v[:, 1])

    found = ebm.log_normalizer(KEY, ebm.fixed(model, {}), method="enumerate")
    v = np.indices((2, 2)).reshape(2, -1).T
    terms = np.logaddexp(0, v @ couplings).sum(1) + 0.5 * v.prod(1)
    np.testing.assert_allclose(found.value, np.logaddexp.reduce(terms), rtol=1e-6)
    assert found.diagnostics["num_states"] == 4
    x, log_weights = quadrature_nodes(3.0, 0.2, 128)
    total = np.logaddexp.reduce(np.asarray(log_weights - 0.5 * (x - 3.1) ** 2 / 0.09))
    assert total == pytest.approx(0.5 * np.log(2 * np.pi * 0.09), abs=1e-4)
