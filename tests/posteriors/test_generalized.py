# SPDX-License-Identifier: Apache-2.0
"""Generalised posteriors, and the learning rates that calibrate them."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density
from posterior_cases import (
    KEY,
    ROWS,
    SPINS,
    density,
    hidden_model,
    precision_model,
    ring_model,
    slope,
)
from registry.objectives import OBJECTIVES

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.posteriors import simulated_rows
from numpyro_ebm.posteriors.calibrated import _at_same_data
from numpyro_ebm.posteriors.calibration import _over_data_sets
from numpyro_ebm.posteriors.minimum import polish


def linear_model(data):
    """Two parameters with normal priors, and an energy that is linear in them."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta[1] * v**2 - theta[0] * v)


LOSSES = {
    **{
        name: (objective.make(), linear_model if objective.sites == "real" else ring_model)
        for name, objective in OBJECTIVES.items()
        if objective.make().is_loss and not objective.make().networks
    },
    "KSD, square": (ebm.KernelSteinDiscrepancy(kernel="imq", pairs="square"), linear_model),
    "KSD, weighted": (
        ebm.KernelSteinDiscrepancy(pairs="square", weight=lambda v: (1 + v[:, 0] ** 2) ** -0.5),
        linear_model,
    ),
    "ConditionalNCE of bits": (ebm.ConditionalNCE(noise_ratio=2), ring_model),
    "EnergyDiscrepancy of bits": (ebm.EnergyDiscrepancy(flip_probability=0.2), ring_model),
    "ScoreMatching, hidden units": (ebm.ScoreMatching(), hidden_model),
    "VaGES": (
        ebm.DenoisingScoreMatching(0.3, marginal=ebm.VaGES(4, importance_weighted=True)),
        hidden_model,
    ),
}


POINTS = {
    linear_model: {"theta": jnp.array([0.3, 1.2])},
    ring_model: {"beta": jnp.array(0.3), "field": jnp.array(-0.2)},
    hidden_model: {"W": jnp.array([0.7, -1.1])},
}


def test_a_learned_log_z_has_a_prior_about_its_start():
    """Normal, of width 10."""
    objective = ebm.NCE(dist.Normal(), init_log_normalizer=1.5)
    prior = ebm.generalized(linear_model, objective)._potential((ROWS[:12],), {})
    there = prior.start.at[0].add(3.0)
    assert prior.start[0] == 1.5 and prior.shapes["log_normalizer"] == ()
    change = jnp.diff(jax.vmap(prior.log_prior)(jnp.stack([prior.start, there])))
    np.testing.assert_allclose(change, -0.5 * 0.3**2, rtol=1e-4)


def coin(data):
    with numpyro.plate("data", len(data)):
        numpyro.sample("h", dist.Bernoulli(0.5).expand([2]).to_event(1))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_loss_is_that_of_its_value(x64, name):
    """What Hamiltonian Monte Carlo needs, and the densities are those of π(θ) exp(-β N L)."""
    objective, base = LOSSES[name]
    data = SPINS if base is ring_model else ROWS[:12]
    guide = coin if name == "VaGES" else None
    model = ebm.generalized(base, objective, 0.4, guide=guide)
    params = {k: jnp.asarray(x, float) for k, x in POINTS[base].items()}
    if name in ("NCE", "SelfNormalized"):
        params["log_normalizer"] = jnp.array(0.8)
    potential = jax.jit(lambda params: density(model, params, data))
    gradient = jax.grad(potential)(params)
    for site, x in params.items():
        for i in np.ndindex(np.shape(x)):
            at = lambda t: potential({**params, site: x.at[i].set(t)})  # noqa: B023, E731
            np.testing.assert_allclose(
                gradient[site][i], slope(at, x[i], 1e-5), rtol=1e-5, atol=1e-6
            )
    model_trace = trace(substitute(seed(model, KEY), data=params)).get_trace(data)
    prior = sum(
        float(jnp.sum(site["fn"].log_prob(site["value"])))
        for k, site in model_trace.items()
        if k in params
    )
    site = model_trace["generalized_loss"]
    term = jnp.sum(site["fn"].log_prob(site["value"]))
    np.testing.assert_allclose(potential(params), prior + term, rtol=1e-9)
    if guide is None and not model.is_random(data):
        loss = objective.loss(KEY, params, base, None, data)
        np.testing.assert_allclose(term, -0.4 * len(data) * loss, rtol=1e-9)
    elif name != "SlicedScoreMatching":  # every slice of one coordinate is ±1
        assert density(model, params, data, rng_key=jax.random.key(5)) != potential(params)


def test_score_matching_in_closed_form(x64):
    """L = ½ θ² m2 - θ for the precision of centred rows, and a normal prior."""
    model = ebm.generalized(
        lambda data: precision_model(data, dist.Normal(1.0, 0.5)), ebm.ScoreMatching(), 0.6
    )
    found = model.closed_form(ROWS)
    precision = 0.6 * 200 * np.mean(ROWS**2) + 4.0
    np.testing.assert_allclose(found.mean["precision"], (0.6 * 200 + 4.0) / precision, rtol=1e-6)
    np.testing.assert_allclose(found.standard_deviation["precision"], precision**-0.5, rtol=1e-6)
    np.testing.assert_allclose(found.covariance, [[1 / precision]], rtol=1e-6)
    with pytest.raises(ModelError, match="not Gaussian"):
        ebm.generalized(precision_model, ebm.ScoreMatching()).closed_form(ROWS)
    with pytest.raises(ModelError, match="not Gaussian"):
        ebm.generalized(ring_model, ebm.PseudoLikelihood()).closed_form(SPINS)


def location_model(data):
    """The Gaussian location of the KSD-Bayes paper, with a N(0, 1) prior."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - theta) ** 2)


def ksd_of_a_location(data, theta, scale, weight):
    """The V-statistic, term by term: an oracle in NumPy."""
    x, y = data[:, None], data[None]
    gap = (x - y) / scale
    k = (1 + gap**2) ** -0.5
    first = -gap / scale * (1 + gap**2) ** -1.5  # derivative in x
    both = (1 + gap**2) ** -1.5 / scale**2 - 3 * gap**2 / scale**2 * (1 + gap**2) ** -2.5
    w, v = weight(x), weight(y)
    step = 1e-5
    log_slope = lambda z: (np.log(weight(z + step)) - np.log(weight(z - step))) / (2 * step)  # noqa: E731
    s, r = theta - x + log_slope(x), theta - y + log_slope(y)
    return np.mean(w * v * (s * r * k + s * -first + r * first + both))


@pytest.mark.parametrize("weight", [None, lambda x: (1 + x**2) ** -0.5])
def test_ksd_bayes_of_a_location(x64, weight):
    data = np.concatenate([ROWS[:36] + 1.0, np.full(4, 10.0)])
    of_rows = None if weight is None else (lambda x: weight(x[:, 0]))
    objective = ebm.KernelSteinDiscrepancy(
        kernel="imq", bandwidth=1.3, pairs="square", weight=of_rows
    )
    found = ebm.generalized(location_model, objective, 0.8).closed_form(data)
    plain = (lambda x: np.ones_like(x)) if weight is None else weight
    f = lambda t: 0.8 * 40 * ksd_of_a_location(data, t, 1.3, plain) + 0.5 * t**2  # noqa: E731
    curvature = f(1.0) - 2 * f(0.0) + f(-1.0)
    np.testing.assert_allclose(found.covariance, [[1 / curvature]], rtol=1e-6)
    np.testing.assert_allclose(found.mean["theta"], -(f(1.0) - f(-1.0)) / 2 / curvature, rtol=1e-5)


def test_ksd_bayes_stays_near_the_truth_under_contamination(x64):
    """LITERATURE 3.5: 100 rows of N(1, 1), 10% and 20% of them moved to N(10, 1)."""
    robust = ebm.KernelSteinDiscrepancy(
        kernel="imq", bandwidth=1.0, pairs="square", weight=lambda x: (1 + x[:, 0] ** 2) ** -0.5
    )
    clean = 1.0 + ROWS[:100]
    for share in (0.0, 0.1, 0.2):
        moved = np.arange(100) < 100 * share
        data = np.where(moved, clean + 9.0, clean)
        found = ebm.generalized(location_model, robust).closed_form(data).mean["theta"]
        standard = np.sum(data) / (1 + len(data))  # the conjugate posterior of N(theta, 1)
        assert abs(found - 1.0) < 0.35
        assert abs(standard - 1.0) < 0.25 or share > 0
        if share:
            assert standard - 1.0 > 8 * share


@pytest.mark.slow
def test_svi_and_nuts_find_the_closed_form():
    data = jnp.asarray(ROWS, float)
    model = ebm.generalized(linear_model, ebm.ScoreMatching(), 0.5)
    exact = model.closed_form(data)
    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=1_500, progress_bar=False)
    mcmc.run(KEY, data)
    draws = np.asarray(mcmc.get_samples()["theta"])
    deviation = np.asarray(exact.standard_deviation["theta"])
    assert np.all(np.abs(draws.mean(0) - exact.mean["theta"]) < 0.15 * deviation)
    assert np.all(np.abs(draws.std(0) / deviation - 1) < 0.12)
    guide = AutoNormal(model)
    fit = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO(8)).run(
        KEY, 2_000, data, progress_bar=False
    )
    found = Predictive(guide, params=fit.params, num_samples=4_000)(KEY)["theta"]
    assert np.all(np.abs(found.mean(0) - exact.mean["theta"]) < 0.2 * deviation)


@pytest.mark.slow
def test_common_particles_are_consistent(x64):
    """VaGES with importance weights against the sum over the hidden units, at one set of draws."""
    params = {"W": jnp.array([0.7, -1.1])}
    exact = ebm.generalized(hidden_model, ebm.ScoreMatching())
    loss = exact.loss(KEY, params, ROWS[:30])
    slopes = jax.grad(lambda p: exact.loss(KEY, p, ROWS[:30]))(params)["W"]
    gaps = []
    for num in (30, 1_500):
        objective = ebm.ScoreMatching(marginal=ebm.VaGES(num, importance_weighted=True))
        model = ebm.generalized(hidden_model, objective, guide=coin)
        both = jax.jit(jax.value_and_grad(lambda p: model.loss(KEY, p, ROWS[:30])))  # noqa: B023
        value, gradient = both(params)
        gaps.append(np.abs(np.append(gradient["W"] - slopes, value - loss)).max())
    assert gaps[1] < 0.02 and gaps[1] < 0.4 * gaps[0]


def test_generalized_refuses():
    for rate in (0.0, -1.0, np.inf, "auto"):
        with pytest.raises(ModelError, match="`learning_rate` must be a positive number"):
            ebm.generalized(linear_model, ebm.ScoreMatching(), rate)
    with pytest.raises(ModelError, match="must be an objective"):
        ebm.generalized(linear_model, Trace_ELBO())
    with pytest.raises(ModelError, match="no function of the parameters"):
        ebm.generalized(linear_model, ebm.ContrastiveDivergence(ebm.MALA))
    with pytest.raises(ModelError, match="is discrete. Use PseudoLikelihood"):
        density(ebm.generalized(ring_model, ebm.ScoreMatching()), POINTS[ring_model], SPINS)
    objective = ebm.DenoisingScoreMatching(0.3, marginal=ebm.VaGES(4))
    with pytest.raises(ModelError, match="importance_weighted=True"):
        density(
            ebm.generalized(hidden_model, objective, guide=coin), POINTS[hidden_model], ROWS[:9]
        )
    random = ebm.generalized(linear_model, ebm.DenoisingScoreMatching(0.3))
    with pytest.raises(ModelError, match="no random key"):
        log_density(random, (ROWS,), {}, POINTS[linear_model])


@pytest.mark.slow
def test_calibration_of_a_single_parameter(x64):
    """Score matching of a precision: H = m2 and J = var(θ x²) at θ = 1 / m2, so β = H / J."""
    model = ebm.generalized(precision_model, ebm.ScoreMatching(), "calibrate")
    assert model.learning_rate is None
    found = model.calibrate(ROWS)
    square = np.mean(ROWS**2)
    covariance = np.var(ROWS**2, ddof=1) / square**2
    # In the unconstrained coordinate log θ both are multiplied by θ².
    np.testing.assert_allclose(found.learning_rate, square / covariance, rtol=0.01)
    np.testing.assert_allclose(found.minimizer["precision"], 1 / square, rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, (covariance / 200) ** 0.5, rtol=0.01)
    assert model.learning_rate == found.learning_rate
    other = model.calibrate(ROWS, method="bootstrap", num_resamples=100)
    assert abs(np.log(other.learning_rate / found.learning_rate)) < 0.4
    fresh = ebm.generalized(precision_model, ebm.ScoreMatching(), "calibrate")
    with pytest.raises(ModelError, match="calibrate\\(data\\)"):
        jax.jit(lambda data: density(fresh, {"precision": 1.0}, data))(ROWS)
    density(fresh, {"precision": 1.0}, ROWS)  # the first data calibrate
    np.testing.assert_allclose(fresh.learning_rate, found.learning_rate, rtol=1e-6)
    for options, message in (
        ({"method": "cross-validation"}, "'bootstrap' or 'simulation'"),
        ({"num_resamples": 1}, "num_resamples"),
    ):
        with pytest.raises(ModelError, match=message):
            model.calibrate(ROWS, **options)
    with pytest.raises(ModelError, match="at least 4 for 1 parameters, and there are 3"):
        model.calibrate(ROWS[:3], method="sandwich")


@pytest.mark.slow
def test_calibrated_intervals_cover_at_their_nominal_rate(x64):
    """KSD-Bayes of a location, 200 data sets: 90% intervals within five points."""
    objective = ebm.KernelSteinDiscrepancy(kernel="imq", bandwidth=1.0, pairs="square")
    inside = []
    for i in range(200):
        data = 0.3 + np.random.default_rng(i).standard_normal(60)
        model = ebm.generalized(location_model, objective, "calibrate")
        model.calibrate(data)
        found = model.closed_form(data)
        z = (0.3 - float(found.mean["theta"])) / float(found.standard_deviation["theta"])
        inside.append(abs(z) < scipy.stats.norm.ppf(0.95))
    assert 0.85 <= np.mean(inside) <= 0.95


def test_simulated_data_sets_have_the_covariance_of_a_row():
    """Of N(θ, 1): the gradient over all 25 rows varies by 1/25, that of one row by 1."""
    values = 0.3 + jax.random.normal(KEY, (2_000, 25))
    potential: Any = SimpleNamespace(
        num_rows=25, loss_at=lambda x, key, values: 0.5 * jnp.mean((x[0] - values) ** 2)
    )
    found = _over_data_sets(potential, np.array([0.3]), KEY, values)
    np.testing.assert_allclose(found, [[1.0]], rtol=4 * np.sqrt(2 / 2_000))


def test_data_with_elements_missing_are_those_of_the_calibration():
    data = np.array([1.0, np.nan, 3.0])
    here, there = Arguments((data,), {}), Arguments((data.copy(),), {})
    assert _at_same_data(here, there) and not _at_same_data(here, Arguments((2 * data,), {}))


def test_data_sets_of_a_model_have_its_rows_and_types(monkeypatch):
    """Of its visible sites, which are free to be drawn, at the parameters that are given."""

    def model(data, scale):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(data)):
            s = numpyro.sample("s", ebm.Counting(2, (2,)), obs=data)
            h = numpyro.sample("h", ebm.Counting(2))
            ebm.energy("E", -w * scale * s[:, 0] * h)

    def sample(rng_key, free, num, *args, **kwargs):
        row_model = read_fixed_model(free, args, kwargs)
        assert sorted(row_model.sites) == ["h", "s"] and not row_model.observed
        values = {"s": jnp.ones((3, 2), int), "h": jnp.ones(3, int)}
        told = row_model.log_density({}, values)
        return {"s": jnp.tile(told[:, None], (num, 1, 2)), "h": jnp.zeros((num, 3))}

    monkeypatch.setattr(simulated_rows, "sample", sample)
    data = jnp.array([[0, 1], [1, 1], [0, 0]])
    found = simulated_rows.simulate_rows(KEY, model, {"w": 3.0}, 4, (data,), {"scale": 2.0})
    assert found.keys() == {"s"} and found["s"].dtype == data.dtype
    np.testing.assert_array_equal(found["s"], np.full((4, 3, 2), 6))


def test_a_minimum_is_polished_by_newtons_method():
    """From beside it; a coordinate that the loss does not read stays, and one that falls raises."""
    curvature = np.array([[2.0, 0.5], [0.5, 1.0]])

    def at(x):
        gap = np.asarray(x)[:2] - np.array([1.0, -2.0])
        return 0.5 * gap @ curvature @ gap, np.append(curvature @ gap, 0.0)

    x, hessian, informed = polish(at, np.array([3.0, 0.5, 7.0], np.float32))
    np.testing.assert_allclose(x, [1.0, -2.0, 7.0], atol=1e-3)
    np.testing.assert_allclose(hessian[:2, :2], curvature, rtol=1e-2)
    assert informed.tolist() == [True, True, False]
    with pytest.raises(ModelError, match="falls further and further"):
        polish(lambda x: (np.exp(-x[0]), -np.exp(-np.asarray(x))), np.array([3.0], np.float32))
