# SPDX-License-Identifier: Apache-2.0
"""Posteriors where log Z is known: they are exact."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.distributions import constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from posterior_cases import (
    KEY,
    ROWS,
    SPINS,
    density,
    hidden_model,
    precision_model,
    ring_log_likelihood,
    ring_model,
    rows_of,
)

import numpyro_ebm as ebm
from numpyro_ebm.errors import (
    ImproperSamplingError,
    ModelError,
    UnhandledEnergyError,
)


def hidden_log_likelihood(W, data):
    states = np.array(list(itertools.product([0, 1], repeat=2)))
    shift = states @ W
    log_joint = -0.5 * data[:, None] ** 2 + data[:, None] * shift - states.prod(-1)
    # The integral of exp(-v²/2 + v m) is sqrt(2π) exp(m²/2).
    log_z = scipy.special.logsumexp(0.5 * shift**2 - states.prod(-1)) + 0.5 * np.log(2 * np.pi)
    return scipy.special.logsumexp(log_joint, -1) - log_z


@pytest.mark.parametrize(
    "log_normalizer",
    ["enumerate", "quadrature", lambda params: 0.5 * jnp.log(2 * jnp.pi / params["precision"])],
)
def test_normalized_rows_have_their_likelihood(x64, log_normalizer):
    model = ebm.normalized(precision_model, log_normalizer)
    for precision in (0.4, 2.0):
        rows = rows_of(model, {"precision": precision}, ROWS)
        exact = scipy.stats.norm.logpdf(ROWS, scale=precision**-0.5)
        np.testing.assert_allclose(rows["v"], exact, rtol=1e-8)
        total = exact.sum() + scipy.stats.gamma.logpdf(precision, 2.0)
        np.testing.assert_allclose(density(model, {"precision": precision}, ROWS), total, rtol=1e-9)
    gradient = jax.grad(lambda t: density(model, {"precision": t}, ROWS))(2.0)
    exact = 100 / 2.0 - np.sum(ROWS**2) / 2 + 1 / 2.0 - 1.0
    np.testing.assert_allclose(gradient, exact, rtol=1e-6)


def test_normalized_lattice_is_enumerated(x64):
    model = ebm.normalized(ring_model)
    params = {"beta": 0.3, "field": -0.2}
    rows = rows_of(model, params, SPINS)["v"]
    np.testing.assert_allclose(rows, ring_log_likelihood(0.3, -0.2, SPINS), rtol=1e-10)


def test_normalized_sums_hidden_units_out(x64):
    model = ebm.normalized(hidden_model)
    W = np.array([0.7, -1.1])
    rows = rows_of(model, {"W": W}, ROWS[:20])
    assert set(rows) == {"v"}
    np.testing.assert_allclose(rows["v"], hidden_log_likelihood(W, ROWS[:20]), rtol=1e-8)
    assert set(trace(seed(model, KEY)).get_trace(ROWS[:20])) == {"W", "data", "v"}


def test_continuous_latents_stay(x64):
    def model(data):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("data", len(data)):
            h = numpyro.sample("h", dist.Normal(0.0, scale))
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - h) ** 2)

    known = ebm.normalized(model, lambda params: 0.5 * jnp.log(2 * jnp.pi))
    params = {"scale": 0.5, "h": jnp.linspace(-1.0, 1.0, 5)}
    exact = (
        scipy.stats.halfnorm.logpdf(0.5)
        + scipy.stats.norm.logpdf(params["h"], scale=0.5).sum()
        + scipy.stats.norm.logpdf(ROWS[:5] - params["h"]).sum()
    )
    np.testing.assert_allclose(density(known, params, ROWS[:5]), exact, rtol=1e-10)


def test_subsampled_rows_are_scaled_up(x64):
    def model(data):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data), subsample_size=50) as index:
            v = numpyro.sample("v", ebm.Lebesgue(), obs=jnp.asarray(data)[index])
            ebm.energy("E", 0.5 * precision * v**2)

    for made in (
        ebm.normalized(model),
        ebm.generalized(model, ebm.ScoreMatching(), 0.7),
    ):
        model_trace = trace(substitute(seed(made, KEY), data={"precision": 2.0})).get_trace(ROWS)
        index = model_trace["data"]["value"]
        assert index.shape == (50,)
        square = np.mean(ROWS[index] ** 2)
        if isinstance(made, ebm.normalized):
            exact = 200 * (0.5 * np.log(2.0 / (2 * np.pi)) - square)
        else:
            exact = -0.7 * 200 * (0.5 * 2.0**2 * square - 2.0)
        exact += scipy.stats.gamma.logpdf(2.0, 2.0)
        np.testing.assert_allclose(density(made, {"precision": 2.0}, ROWS), exact, rtol=1e-8)

    class Known:
        """A normalizer with an error, which is that of all rows at once."""

        def __call__(self, params):
            return 0.5 * jnp.log(2 * jnp.pi / params["precision"])

        def mcse(self, params):
            return 0.01 * params["precision"]

    made = seed(ebm.normalized(model, Known()), KEY)
    sites = trace(substitute(made, data={"precision": 2.0})).get_trace(ROWS)
    np.testing.assert_allclose(sites["log_normalizer_error"]["value"], 200 * 0.02)


def test_rows_with_a_normalizer_of_their_own(x64):
    def model(x, data):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * jnp.exp(slope * x) * v**2)

    x = np.linspace(-1.0, 1.0, 20)
    exact = scipy.stats.norm.logpdf(ROWS[:20], scale=np.exp(-0.5 * 0.8 * x))
    for method in (
        "enumerate",
        "quadrature",
        lambda p: 0.5 * (jnp.log(2 * jnp.pi) - p["slope"] * x),
    ):
        rows = rows_of(ebm.normalized(model, method), {"slope": 0.8}, x, ROWS[:20])
        np.testing.assert_allclose(rows["v"], exact, rtol=1e-7)
    with pytest.raises(ModelError, match="a log Z of its own"):
        density(ebm.normalized(model, lambda p: 1.0), {"slope": 0.8}, x, ROWS[:20])


def test_rows_with_parameters_of_their_own(x64):
    """Found as covariates are, traced or not; an axis of the plate's length alone is none."""

    def model(data, *, mixed=False):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([4]).to_event(1))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (jnp.sum(scale) if mixed else scale) * v**2)

    scale, data = np.array([0.5, 1.0, 2.0, 4.0]), ROWS[:4]
    exact = scipy.stats.norm.logpdf(data, scale=scale**-0.5)
    for method in ("enumerate", "quadrature"):
        rows = jax.jit(
            lambda scale, m=method: rows_of(ebm.normalized(model, m), {"scale": scale}, data)["v"]
        )(scale)
        np.testing.assert_allclose(rows, exact, rtol=1e-6)
    loss = jax.jit(
        lambda scale, data: ebm.MaximumLikelihood().loss(KEY, {"scale": scale}, model, None, data)
    )(scale, data)
    np.testing.assert_allclose(loss, -exact.mean(), rtol=1e-6)
    with pytest.raises(ModelError, match="a log Z of its own"):
        density(ebm.normalized(model, lambda p: 1.0), {"scale": scale}, data)
    with pytest.raises(ModelError, match="differs from row to row"):
        ebm.KernelSteinDiscrepancy().loss(KEY, {"scale": scale}, model, None, data)
    mixed = lambda data: model(data, mixed=True)  # noqa: E731
    ebm.KernelSteinDiscrepancy().loss(KEY, {"scale": scale}, mixed, None, data)


def test_several_visible_sites_and_further_plates(x64):
    def two(data):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            w = numpyro.sample("w", ebm.Counting(2), obs=(data > 0).astype(int))
            ebm.energy("E", 0.5 * v**2 - a * v * w)

    exact = -0.5 * ROWS**2 + 0.6 * ROWS * (ROWS > 0)
    exact = exact - np.log(np.sqrt(2 * np.pi) * (1 + np.exp(0.5 * 0.6**2)))
    rows = rows_of(ebm.normalized(two), {"a": 0.6}, ROWS)
    np.testing.assert_allclose(rows["v"] + rows["w"], exact, rtol=1e-8)

    def plates(data):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(data), dim=-2):
            ebm.energy("zero", jnp.zeros((len(data), 1)))
            with numpyro.plate("units", 2, dim=-1):
                v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
                ebm.energy("E", 0.5 * jnp.exp(a) * v**2)

    data = ROWS[:20].reshape(10, 2)
    exact = scipy.stats.norm.logpdf(data, scale=np.exp(-0.3)).sum() + scipy.stats.norm.logpdf(0.6)
    np.testing.assert_allclose(density(ebm.normalized(plates), {"a": 0.6}, data), exact, rtol=1e-8)


@pytest.mark.slow
def test_nuts_svi_and_loo_run_on_a_normalized_model():
    data = jnp.asarray(ROWS, float)
    shape, rate = 2 + len(ROWS) / 2, 1 + np.sum(ROWS**2) / 2
    with pytest.raises(UnhandledEnergyError):
        MCMC(NUTS(precision_model), num_warmup=10, num_samples=10, progress_bar=False).run(
            KEY, data
        )
    model = ebm.normalized(precision_model)
    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=2_000, progress_bar=False)
    mcmc.run(jax.random.key(1), data)
    draws = np.asarray(mcmc.get_samples()["precision"])
    ess = float(numpyro.diagnostics.effective_sample_size(draws[None]))
    deviation = shape**0.5 / rate
    assert ess > 300
    assert abs(draws.mean() - shape / rate) < 3 * deviation / ess**0.5
    assert abs(draws.std() / deviation - 1) < 0.15
    idata = ebm.to_arviz(mcmc)
    assert idata["log_likelihood"]["v"].shape == (1, 2_000, 200)
    guide = AutoNormal(model)
    fit = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO(8)).run(
        KEY, 1_500, data, progress_bar=False
    )
    # The posterior of the logarithm is close to normal.
    found = guide.quantiles(fit.params, [0.5])["precision"][0]
    assert abs(found / (shape / rate) - 1) < 0.03


@pytest.mark.slow
def test_normalized_posteriors_are_calibrated():
    """Simulation-based calibration: 400 data sets at once, each a row with a θ of its own."""
    num_sets, size = 400, 5
    rng = np.random.default_rng(3)
    truth = np.exp(0.5 * rng.standard_normal(num_sets))
    data = rng.standard_normal((num_sets, size)) / np.sqrt(truth)[:, None]

    def sets(data):
        with numpyro.plate("sets", num_sets):
            precision = numpyro.sample("precision", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("data", num_sets):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(size,)), obs=data)
            ebm.energy("E", 0.5 * precision * jnp.sum(v**2, -1))

    mcmc = MCMC(NUTS(ebm.normalized(sets)), num_warmup=300, num_samples=1_900, progress_bar=False)
    mcmc.run(KEY, jnp.asarray(data))
    thinned = np.asarray(mcmc.get_samples()["precision"])[::100]  # 19 nearly independent draws
    ranks = np.sum(thinned < truth, 0)
    counts = np.bincount(ranks, minlength=20)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    wrong = np.bincount(np.sum(thinned < 1.3 * truth, 0), minlength=20)
    assert scipy.stats.chisquare(wrong).pvalue < 1e-6  # the test would see a bias of a third


def test_normalized_refuses():
    with pytest.raises(ModelError, match="'enumerate' or 'quadrature', got 'exact'"):
        ebm.normalized(precision_model, "exact")
    model = ebm.normalized(precision_model)
    drawn = trace(substitute(seed(model, KEY), data={"precision": 1.0})).get_trace(ROWS)
    with pytest.raises(ImproperSamplingError, match="sample"):
        drawn["v"]["fn"].sample(KEY)
    with pytest.raises(ModelError, match="shape"):
        density(ebm.normalized(precision_model, lambda p: jnp.ones(3)), {"precision": 1.0}, ROWS)

    def blind():
        numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 2):
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", h**2)

    with pytest.raises(ModelError, match="no observed site"):
        density(ebm.normalized(blind), {"a": 1.0})


def priorless(data):
    theta = numpyro.param("theta", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


@pytest.mark.parametrize(
    "make", [ebm.normalized, lambda model: ebm.generalized(model, ebm.ScoreMatching())]
)
def test_priors_have_to_be_there_and_proper(make):
    with pytest.raises(ModelError, match="'theta'.*`numpyro.param` sites.*no posterior"):
        density(make(priorless), {}, ROWS)
    improper = (
        dist.ImproperUniform(constraints.positive, (), ()),
        ebm.Lebesgue(),
        dist.Normal(0.0, 1.0).mask(False),
    )
    for prior in improper:
        with pytest.raises(ModelError, match="prior of 'precision' is improper"):
            density(make(lambda data, p=prior: precision_model(data, p)), {"precision": 1.0}, ROWS)


@pytest.mark.slow
def test_laplace_sees_the_curvature_of_a_quadrature():
    variances = []
    for method in ("enumerate", "quadrature"):
        model = ebm.normalized(precision_model, method)
        guide = AutoLaplaceApproximation(model)
        svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
        params = svi.run(KEY, 800, ROWS, progress_bar=False).params
        variances.append(float(guide.get_posterior(params).covariance_matrix.squeeze()))
    np.testing.assert_allclose(variances[1], variances[0], rtol=1e-3)
