# SPDX-License-Identifier: Apache-2.0
"""Posteriors of parameters with priors: exact where log Z is known, generalised where not."""

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
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from numpyro.infer.util import log_density
from registry.objectives import OBJECTIVES

import numpyro_ebm as ebm
from numpyro_ebm.errors import (
    EmulationWarning,
    ImproperSamplingError,
    ModelError,
    UnhandledEnergyError,
)

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).standard_normal(200)


def precision_model(data, prior=None):
    """Rows N(0, 1/precision) by their energy."""
    prior = dist.Gamma(2.0, 1.0) if prior is None else prior
    precision = numpyro.sample("precision", prior)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def linear_model(data):
    """Two parameters with normal priors, and an energy that is linear in them."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta[1] * v**2 - theta[0] * v)


BONDS = [(i, j) for i in range(4) for j in range(4) if j == i + 1 or (i, j) == (0, 3)]


def ring_model(data):
    """Four spins on a ring, of unknown coupling and field."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0))
    field = numpyro.sample("field", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(4,)), obs=data)
        s = 2.0 * v - 1.0
        ebm.energy("E", -beta * jnp.sum(s * jnp.roll(s, 1, -1), -1) - field * jnp.sum(s, -1))


SPINS = np.random.default_rng(1).integers(0, 2, (30, 4))
STATES = np.array(list(itertools.product([0, 1], repeat=4)))


def ring_log_likelihood(beta, field, data):
    def energy(v):
        s = 2.0 * v - 1.0
        return -beta * np.sum(s * np.roll(s, 1, -1), -1) - field * np.sum(s, -1)

    return -energy(data) - scipy.special.logsumexp(-energy(STATES))


def hidden_model(data):
    """Real rows with two binary hidden units, and priors on the weights."""
    W = numpyro.sample("W", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, event_shape=(2,)))
        ebm.energy("E", 0.5 * v**2 - v * (h @ W) + h[..., 0] * h[..., 1])


def hidden_log_likelihood(W, data):
    states = np.array(list(itertools.product([0, 1], repeat=2)))
    shift = states @ W
    log_joint = -0.5 * data[:, None] ** 2 + data[:, None] * shift - states.prod(-1)
    # The integral of exp(-v²/2 + v m) is sqrt(2π) exp(m²/2).
    log_z = scipy.special.logsumexp(0.5 * shift**2 - states.prod(-1)) + 0.5 * np.log(2 * np.pi)
    return scipy.special.logsumexp(log_joint, -1) - log_z


def density(model, params, *args, rng_key=KEY):
    """Log joint density of a model at given parameters."""
    return log_density(seed(model, rng_key), args, {}, params)[0]


def rows_of(model, params, *args):
    """Log-likelihoods by site."""
    model_trace = trace(substitute(seed(model, KEY), data=params)).get_trace(*args)
    return {
        name: site["fn"].log_prob(site["value"])
        for name, site in model_trace.items()
        if site["type"] == "sample" and site["is_observed"]
    }


def slope(f, x, step):
    return (f(x + step) - f(x - step)) / (2 * step)


# normalized


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


def test_laplace_sees_the_curvature_of_a_quadrature():
    variances = []
    for method in ("enumerate", "quadrature"):
        model = ebm.normalized(precision_model, method)
        guide = AutoLaplaceApproximation(model)
        svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
        params = svi.run(KEY, 800, ROWS, progress_bar=False).params
        variances.append(float(guide.get_posterior(params).covariance_matrix.squeeze()))
    np.testing.assert_allclose(variances[1], variances[0], rtol=1e-3)


# An emulated log Z


def test_an_emulated_normalizer_knows_its_error(x64):
    emulated = ebm.emulate_log_normalizer(KEY, ring_model, SPINS[:1], design=60)
    for beta, field in ((0.3, -0.2), (-0.5, 0.6), (0.9, 0.1)):
        s = -np.ones(4)
        log_z = beta * np.sum(s * np.roll(s, 1)) + field * s.sum()
        log_z = log_z - ring_log_likelihood(beta, field, np.zeros((1, 4)))[0]
        params = {"beta": beta, "field": field}
        gap = float(emulated(params)) - log_z
        assert abs(gap) < 5 * float(emulated.mcse(params)) < 0.1
    far = {"beta": 6.0, "field": 0.0}
    assert emulated.mcse(far) > 10 * emulated.mcse(params)
    model = ebm.normalized(ring_model, emulated)
    model_trace = trace(substitute(seed(model, KEY), data=params)).get_trace(SPINS)
    error = model_trace["log_normalizer_error"]["value"]
    np.testing.assert_allclose(error, 30 * emulated.mcse(params), rtol=1e-6)
    doubt = model_trace["log_normalizer_doubt"]["fn"].log_prob(jnp.zeros(0))
    np.testing.assert_allclose(doubt, -0.5 * error**2)
    rows = rows_of(model, params, SPINS)["v"]
    np.testing.assert_allclose(
        rows.sum(), ring_log_likelihood(0.9, 0.1, SPINS).sum(), atol=5 * float(error)
    )


@pytest.mark.parametrize("center", [0.3, -3.0])
def test_a_posterior_outside_of_the_design_is_found_out(center):
    near = center + 0.3 * jax.random.normal(jax.random.key(3), (30,))
    design = {"beta": near, "field": 0.3 * jax.random.normal(jax.random.key(4), (30,))}
    emulated = ebm.emulate_log_normalizer(KEY, ring_model, SPINS[:1], design=design)
    kernel = NUTS(ebm.normalized(ring_model, emulated))
    mcmc = MCMC(kernel, num_warmup=50, num_samples=50, progress_bar=False)
    mcmc.run(jax.random.key(5), SPINS)
    if center == 0.3:
        idata = ebm.to_arviz(mcmc)
        assert idata.posterior["log_normalizer_error"].median() < 0.5
        assert list(idata.log_likelihood.data_vars) == ["v"]
    else:
        with pytest.warns(EmulationWarning, match="a larger `design`, one around the posterior"):
            ebm.to_arviz(mcmc)


def test_an_emulated_normalizer_weighs_noise_and_refuses():
    from numpyro_ebm.posteriors.emulator import fit_emulator

    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (80, 1))
    errors, at, scores = np.full(80, 0.1), np.linspace(-1.8, 1.8, 7)[:, None], []
    for _ in range(8):
        y = np.sin(2 * x[:, 0]) + errors * rng.standard_normal(80)
        found, error = jax.vmap(fit_emulator(x, y, errors).predict)(at)
        scores.append((found - np.sin(2 * at[:, 0])) / error)
        assert np.all(error < 0.1)  # neighbours help
    assert 0.7 < np.std(scores) < 1.4
    with pytest.raises(ModelError, match="coefficients"):
        ebm.emulate_log_normalizer(KEY, ring_model, SPINS[:1], design=6)
    with pytest.raises(ModelError, match="no values for \\['field'\\]"):
        ebm.emulate_log_normalizer(KEY, ring_model, SPINS[:1], design={"beta": jnp.ones(20)})


# generalized

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
    "EnergyDiscrepancy of bits": (ebm.EnergyDiscrepancy(0.2), ring_model),
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
    if name == "NCE":
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
    term = model_trace["generalized_loss"]["fn"].log_prob(model_trace["generalized_loss"]["value"])
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


# Learning rates


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
        ({"method": "cross-validation"}, "'sandwich' or 'bootstrap'"),
        ({"num_resamples": 1}, "num_resamples"),
    ):
        with pytest.raises(ModelError, match=message):
            model.calibrate(ROWS, **options)
    with pytest.raises(ModelError, match="spread over rows"):
        model.calibrate(ROWS[:3])


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
