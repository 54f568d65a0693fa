# SPDX-License-Identifier: Apache-2.0
"""EnergySVI on parameters with priors: penalised estimates and variational posteriors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.handlers import block, seed, trace
from numpyro.infer import SVI, Predictive, TraceGraph_ELBO
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)
from scipy import stats
from scipy.optimize import minimize_scalar

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.svi.minibatch import Minibatches
from numpyro_ebm.svi.round import THETA_STREAM

DATA = 0.5 * jax.random.normal(jax.random.key(0), (40,))
N, M1, M2 = 40, float(jnp.mean(DATA)), float(jnp.mean(DATA**2))
KEY = jax.random.key(1)


PRIOR = dist.LogNormal(0.5, 0.4)


def gaussian(data, prior=PRIOR):
    precision = numpyro.sample("precision", prior)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def line(data):
    """The score θ₂ − θ₁ v is linear in θ, and so score matching is quadratic in it."""
    theta = numpyro.sample("theta", dist.Normal(jnp.array([1.0, -1.0]), 0.7).to_event(1))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta[0] * v**2 - theta[1] * v)


def penalised_score_matching(precision, m2=M2):
    prior = stats.lognorm.logpdf(precision, 0.4, scale=np.exp(0.5))
    return 0.5 * precision**2 * m2 - precision - prior / N


BEST = minimize_scalar(penalised_score_matching, bounds=(0.1, 20.0), method="bounded").x


def adam(rate=0.05, steps=300, factor=0.1):
    return optax.adam(optax.exponential_decay(rate, steps, factor))


def train(model, guide=None, loss=None, num_steps=800, optim=None, data=DATA, **options):
    optim = adam() if optim is None else optim
    svi = ebm.EnergySVI(model, guide, optim, ebm.ScoreMatching() if loss is None else loss)
    return svi, svi.run(KEY, num_steps, data, progress_bar=False, **options)


# Penalised estimates


def test_the_mode_of_the_generalised_posterior():
    assert abs(BEST - 1 / M2) > 0.02  # what it would be without a prior
    svi, fit = train(gaussian)
    np.testing.assert_allclose(fit.params["precision"], BEST, rtol=1e-4)
    np.testing.assert_allclose(fit.losses[-1], penalised_score_matching(BEST), rtol=1e-5)
    fixed = trace(ebm.fixed(gaussian, fit.params)).get_trace(DATA)
    assert "precision" not in fixed and fixed["E"]["fn"].log_prob(jnp.zeros(())).shape == (N,)


def test_the_mode_of_the_posterior_itself():
    """Maximum likelihood and a Gamma prior on a precision: a Gamma posterior, in closed form."""
    model = partial(gaussian, prior=dist.Gamma(3.0, 2.0))
    mode = (N / 2 + 3.0 - 1.0) / (N * M2 / 2 + 2.0)
    svi = ebm.EnergySVI(model, None, optax.sgd(1.0), ebm.MaximumLikelihood())
    update = jax.jit(svi.update)

    def moved(start):
        state, _ = update(svi.init(KEY, DATA, init_params={"precision": start}), DATA)
        return svi.get_params(state)["precision"] / start - 1.0

    assert abs(moved(mode)) < 1e-4 and moved(0.5 * mode) > 0.05 and moved(2 * mode) < -0.05


def test_priors_of_priors_factors_and_plates_count():
    """All log-densities outside the data plate, a quadratic form of (mu, beta, free)."""

    def hierarchical(data):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("features", 3):
            beta = numpyro.sample("beta", dist.Normal(mu, 0.2))
        free = numpyro.param("free", 0.0)
        numpyro.factor("ridge", -0.5 * (free - 1.0) ** 2)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
            ebm.energy("E", 0.5 * jnp.sum((v - beta - free) ** 2, -1))

    data = jnp.array([1.0, 2.0, 4.0]) + jax.random.normal(jax.random.key(3), (10, 3))
    mean = np.mean(data, 0)
    # Ten times the loss, and each prior: squares of combinations of (mu, beta, free).
    one = np.eye(5)
    squares = [(10, one[1 + i] + one[4], mean[i]) for i in range(3)]
    squares += [(1 / 0.2**2, one[1 + i] - one[0], 0.0) for i in range(3)]
    squares += [(1, one[0], 0.0), (1, one[4], 1.0)]
    at = np.array([0.3, 1.0, -2.0, 0.5, 0.7])
    gradient = sum(weight * (a @ at - b) * a for weight, a, b in squares) / 10
    start = {"mu": at[0], "beta": jnp.array(at[1:4]), "free": at[4]}
    _, fit = train(hierarchical, num_steps=1, optim=optax.sgd(1.0), data=data, init_params=start)
    found = np.concatenate([np.ravel(fit.params[name]) for name in ("mu", "beta", "free")])
    np.testing.assert_allclose(at - found, gradient, rtol=1e-4, atol=1e-5)


def test_a_prior_is_weighed_once_against_all_rows_whatever_the_batch():
    init = {"precision": jnp.array(3.0)}
    whole = penalised_score_matching(3.0)
    still = dict(init_params=init, num_steps=12, optim=optax.sgd(0.0))
    svi, fit = train(gaussian, batch_size=10, **still)
    np.testing.assert_allclose(fit.losses.reshape(3, 4).mean(1), whole, rtol=1e-5)
    row_model = read_model(gaussian, (DATA,), {}, init)
    minibatches = Minibatches.of(row_model, (DATA,), {}, 10)
    rows = jax.jit(lambda key: minibatches.indices(key, 0, 12))(fit.state.rng_key)
    expected = penalised_score_matching(3.0, np.mean(DATA[rows] ** 2, 1))
    np.testing.assert_allclose(fit.losses, expected, rtol=1e-5)

    def subsampled(data):
        precision = numpyro.sample("precision", PRIOR)
        with numpyro.plate("data", N, subsample_size=10):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=numpyro.subsample(data, event_dim=0))
            ebm.energy("E", 0.5 * precision * v**2)

    same = jnp.full(N, 0.5)  # every batch of it is alike
    svi = ebm.EnergySVI(subsampled, None, optax.sgd(0.0), ebm.ScoreMatching())
    _, loss = jax.jit(svi.update)(svi.init(KEY, same, init_params=init), same)
    np.testing.assert_allclose(loss, penalised_score_matching(3.0, 0.25), rtol=1e-5)


@pytest.mark.slow
def test_minibatches_lead_to_the_same_mode():
    _, fit = train(gaussian, batch_size=10, num_steps=2_000, optim=adam(0.05, 500))
    np.testing.assert_allclose(fit.params["precision"], BEST, rtol=5e-3)


def test_batches_cut_by_hand_need_the_number_of_rows():
    init = {"precision": jnp.array(3.0)}
    svi = ebm.EnergySVI(gaussian, None, optax.sgd(0.0), ebm.ScoreMatching())
    state = svi.init(KEY, DATA, init_params=init)
    for method in (svi.update, svi.evaluate):
        with pytest.raises(ebm.ModelError, match="40 rows and has 10 now.*num_rows=N"):
            jax.eval_shape(method, state, DATA[:10])
    svi = ebm.EnergySVI(gaussian, None, optax.sgd(0.0), ebm.ScoreMatching(), num_rows=N)
    state = svi.init(KEY, DATA[:10], init_params=init)
    expected = penalised_score_matching(3.0, float(jnp.mean(DATA[:10] ** 2)))
    np.testing.assert_allclose(jax.jit(svi.update)(state, DATA[:10])[1], expected, rtol=1e-5)
    # What the user says goes before what a run sees: a stream of data.
    fit = svi.run(KEY, 1, DATA[:10], init_params=init, progress_bar=False)
    np.testing.assert_allclose(fit.losses, expected, rtol=1e-5)


def test_estimates_start_at_the_median_of_the_prior():
    def at_start(model, **options):
        svi = ebm.EnergySVI(model, None, optax.sgd(0.0), ebm.ScoreMatching())
        return svi.get_params(svi.init(KEY, DATA, **options))

    start = at_start(partial(gaussian, prior=dist.LogNormal(5.0, 0.01)))
    np.testing.assert_allclose(start["precision"], np.exp(5.0), rtol=0.02)
    start = at_start(gaussian, init_params={"precision": 7.0})
    np.testing.assert_allclose(start["precision"], 7.0, rtol=1e-6)

    def chain(data):
        mu = numpyro.sample("mu", dist.Normal(50.0, 0.1))
        beta = numpyro.sample("beta", dist.Normal(mu, 0.1))
        gaussian(data, prior=dist.LogNormal(0.001 * beta, 0.01))

    start = at_start(chain, init_params={"mu": -50.0})
    np.testing.assert_allclose([start["mu"], start["beta"]], -50.0, atol=0.5)


def test_supports_may_be_computed_and_are_kept():
    upper = 2.0 + jnp.max(DATA)

    def bounded(data):
        prior = dist.Uniform(0.5, 2.0 + jnp.max(data))
        precision = numpyro.sample("precision", prior)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2)

    svi, fit = train(bounded, num_steps=500, optim=optax.adam(0.3))
    assert upper < 1 / M2  # the mode is at the edge
    np.testing.assert_allclose(svi.get_params(fit.state)["precision"], upper, rtol=1e-2)
    assert fit.params["precision"] <= upper
    # Of other data they are others, although nothing else has changed.
    fit = svi.run(KEY, 500, DATA + 0.1, progress_bar=False)
    edge, second = upper + 0.1, np.mean((DATA + 0.1) ** 2)
    assert edge < 1 / second
    loss = 0.5 * edge**2 * second - edge + np.log(edge - 0.5) / N
    np.testing.assert_allclose(fit.losses[-1], loss, rtol=1e-3)


# Variational posteriors


def conjugate():
    """The generalised posterior of `line` under score matching: mean and covariance."""
    curvature = np.array([[M2, -M1], [-M1, 1.0]])
    precision = np.eye(2) / 0.7**2 + N * curvature
    right = np.array([1.0, -1.0]) / 0.7**2 + N * np.array([1.0, 0.0])
    return np.linalg.solve(precision, right), np.linalg.inv(precision)


def test_the_generalised_posterior_in_closed_form():
    mean, covariance = conjugate()
    guide = AutoMultivariateNormal(ebm.prior(line))
    _, fit = train(line, guide, num_steps=10_000, optim=adam(0.05, 2_000))
    assert set(fit.params) == {"auto_loc", "auto_scale_tril"}
    posterior = guide.get_posterior(fit.params)
    scale = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((posterior.loc - mean) / scale, 0.0, atol=0.05)
    found = posterior.covariance_matrix / np.outer(scale, scale)
    np.testing.assert_allclose(found, covariance / np.outer(scale, scale), atol=0.06)
    # Draws, as a NumPyro user takes them.
    draws = Predictive(guide, params=fit.params, num_samples=4_000)(KEY, DATA)["theta"]
    np.testing.assert_allclose(np.mean(draws, 0), posterior.loc, atol=0.05)
    assert guide.sample_posterior(KEY, fit.params)["theta"].shape == (2,)
    assert "E" in trace(ebm.fixed(line, {"theta": draws[0]})).get_trace(DATA)


def by_hand(data):
    loc = numpyro.param("loc", jnp.zeros(2))
    scale = numpyro.param("scale", jnp.ones(2), constraint=dist.constraints.positive)
    numpyro.sample("theta", dist.Normal(loc, scale).to_event(1))


GUIDES = {
    "by hand": lambda model: by_hand,
    "AutoNormal": lambda model: AutoNormal(ebm.prior(model)),
    "NumPyro's idiom": lambda model: AutoNormal(block(seed(model, 0), expose=["theta"])),
    "a flow that is not inverted": lambda model: AutoIAFNormal(ebm.prior(model), num_flows=1),
}
SLOW = pytest.param("a flow that is not inverted", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*list(GUIDES)[:-1], SLOW])
def test_the_loss_at_a_draw(name):
    """L(θ) + (log q(θ) − log π(θ))/N by hand, at the draw that the round makes."""
    guide = GUIDES[name](line)
    svi = ebm.EnergySVI(line, guide, optax.sgd(0.1), ebm.ScoreMatching())
    state = svi.init(KEY, DATA)
    step_key = jax.random.fold_in(state.rng_key, 0)
    key = jax.random.fold_in(step_key, THETA_STREAM)
    drawn = numpyro.handlers.substitute(seed(guide, key), svi.get_params(state))
    sites = trace(drawn).get_trace(DATA)
    theta = np.asarray(sites["theta"]["value"])
    log_q = sum(
        np.sum(site["fn"].log_prob(site["value"], *([x] if (x := site["intermediates"]) else [])))
        for site in sites.values()
        if site["type"] == "sample"
    )
    loss = np.mean(0.5 * (theta[1] - theta[0] * np.asarray(DATA)) ** 2) - theta[0]
    log_prior = stats.norm.logpdf(theta, [1.0, -1.0], 0.7).sum()
    expected = loss + (log_q - log_prior) / N
    evaluated, updated = jax.jit(lambda s: (svi.evaluate(s, DATA), svi.update(s, DATA)[1]))(state)
    np.testing.assert_allclose([evaluated, updated], expected, rtol=1e-5)


def test_a_point_mass_is_the_penalised_estimate():
    _, fit = train(gaussian, AutoDelta(ebm.prior(gaussian)))
    np.testing.assert_allclose(fit.params["precision_auto_loc"], BEST, rtol=1e-4)


def test_a_posterior_is_resumed_bit_for_bit():
    """By a new object, whose AutoGuide has started elsewhere."""

    def make(rate=0.05):
        guide = AutoNormal(ebm.prior(gaussian))
        return ebm.EnergySVI(gaussian, guide, optax.adam(rate), ebm.ScoreMatching())

    options = {"batch_size": 10, "stable_update": True, "progress_bar": False}
    svi = make()
    start = svi.init(KEY, DATA)
    again = svi.init(jax.random.key(5), DATA)  # an AutoGuide starts where it did first
    np.testing.assert_array_equal(*map(jax.tree.leaves, map(svi.get_params, (start, again))))
    whole = svi.run(KEY, 20, DATA, init_state=start, **options)
    first = svi.run(KEY, 9, DATA, init_state=start, **options)
    second = make().run(jax.random.key(9), 11, DATA, init_state=first.state, **options)
    np.testing.assert_array_equal(whole.losses, jnp.concatenate([first.losses, second.losses]))
    for name in whole.params:
        np.testing.assert_array_equal(whole.params[name], second.params[name])


def test_guides_in_a_list():
    def model(data):
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        precision = numpyro.sample("precision", PRIOR)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * (v - shift) ** 2)

    prior = seed(ebm.prior(model), 0)
    guide = AutoGuideList(ebm.prior(model))
    guide.append(AutoNormal(block(prior, expose=["shift"])))
    guide.append(AutoDelta(block(prior, expose=["precision"])))
    _, fit = train(model, guide, num_steps=10)
    assert set(fit.params) == {"shift_auto_loc", "shift_auto_scale", "precision_auto_loc"}


# Beside a guide for latents


def grbm(data):
    W = numpyro.sample("W", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    c = numpyro.sample("c", dist.Normal(0.0, 0.5).expand([3]).to_event(1))
    b = numpyro.param("b", jnp.zeros(2))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(event_shape=(3,)))
        bowl = 0.5 * jnp.sum((v - b) ** 2, -1)
        ebm.energy("E", bowl - h @ c - jnp.sum((v @ W) * h, -1))


class OfBoth:
    """q(W, c), and q(h | v) which looks at the draw of c."""

    def __init__(self):
        self.auto = AutoNormal(ebm.prior(grbm))

    def __call__(self, data):
        theta = self.auto(data)
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Bernoulli(logits=v @ A + theta["c"]).to_event(1))


ROWS = ebm.datasets.checkerboard(jax.random.key(7), 200)


def dsm_vages():
    return ebm.DenoisingScoreMatching(0.3, marginal=ebm.VaGES())


def test_a_round_with_latents():
    """Score matching of the exact marginal, its score and divergence written out, at a draw."""

    def guide(data):
        W = numpyro.sample(
            "W", dist.Normal(numpyro.param("loc", jnp.ones((2, 3))), 0.3).to_event(2)
        )
        width = numpyro.param("width", jnp.ones(3), constraint=dist.constraints.positive)
        c = numpyro.sample("c", dist.Normal(0.1, width).to_event(1))
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Bernoulli(logits=v @ (A + W) + c).to_event(1))

    loss = ebm.ScoreMatching(marginal=ebm.Enumerated())
    svi = ebm.EnergySVI(grbm, guide, optax.adam(0.01), loss, num_guide_steps=2)
    state = svi.init(KEY, ROWS)
    new, value = jax.jit(svi.update)(state, ROWS)
    key = jax.random.fold_in(jax.random.fold_in(state.rng_key, 0), THETA_STREAM)
    params = svi.get_params(state)
    draw = trace(numpyro.handlers.substitute(seed(guide, key), params)).get_trace(ROWS[:1])
    W, c = (np.asarray(draw[k]["value"], float) for k in ("W", "c"))
    log_q = stats.norm.logpdf(W, 1.0, 0.3).sum() + stats.norm.logpdf(c, 0.1, 1.0).sum()
    log_prior = stats.norm.logpdf(W).sum() + stats.norm.logpdf(c, scale=0.5).sum()
    v = np.asarray(ROWS, float)
    p = 1 / (1 + np.exp(-(c + v @ W)))
    score = p @ W.T - v
    divergence = np.sum((p * (1 - p)) @ (W**2).T, -1) - 2
    expected = np.mean(0.5 * np.sum(score**2, -1) + divergence) + (log_q - log_prior) / 200
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Every parameter is trained, by its own optimiser.
    after = svi.get_params(new)
    assert set(after) == {"A", "b", "loc", "width"}
    assert all(np.all(params[name] != after[name]) for name in after)
    assert int(new.guide_optim_state[0]) == 2 and int(new.optim_state[0]) == 1
    assert set(svi.guide_optim.get_params(new.guide_optim_state)) == {"A"}


@pytest.mark.slow
def test_a_guide_beside_a_posterior_finds_the_posterior_of_h():
    """With q(W, c) narrow and held, A comes to W: the guide for h sees the draws."""

    def guide(data):
        W = numpyro.sample("W", dist.Normal(truth, 0.01).to_event(2))
        c = numpyro.sample("c", dist.Normal(jnp.zeros(3), 0.01).to_event(1))
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Bernoulli(logits=v @ (A + 0 * W) + c).to_event(1))

    truth = jnp.array([[1.0, -2.0, 0.5], [0.5, 1.0, -1.0]])
    svi = ebm.EnergySVI(
        grbm, guide, optax.sgd(0.0), dsm_vages(), guide_optim=adam(0.05, 500), num_guide_steps=2
    )
    fit = svi.run(KEY, 1_500, ROWS, progress_bar=False)
    np.testing.assert_allclose(fit.params["A"], truth, atol=0.1)


def grbm_guide(data):
    A = numpyro.param("A", jnp.zeros((2, 3)))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v @ A).to_event(1))


@pytest.mark.parametrize("guide_loss", [None, TraceGraph_ELBO()])
@pytest.mark.parametrize("guide", [grbm_guide, OfBoth()])
def test_priors_are_no_part_of_the_loss_of_a_guide_for_latents(guide, guide_loss):
    """NumPyro would warn, while tracing, of sites that the guide does not draw."""
    svi = ebm.EnergySVI(grbm, guide, optax.adam(0.01), dsm_vages(), guide_loss)
    state = svi.init(KEY, ROWS)
    assert ("W" in svi.get_params(state)) == (guide is grbm_guide)
    jax.eval_shape(svi.update, state, ROWS)


@pytest.mark.slow
def test_a_penalised_estimate_beside_a_guide_for_latents():
    """Latents that change nothing: the estimate is that of the Gaussian without them."""

    def model(data):
        precision = numpyro.sample("precision", PRIOR)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", dist.Normal(0.0, 1.0))
            ebm.energy("E", 0.5 * precision * v**2 + 0.5 * (h - v) ** 2 - 0.25 * v**2)

    def guide(data):
        slope = numpyro.param("slope", 0.1)
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Normal(slope * v, 0.5**0.5))

    # The latent is N(v/2, 1/2) and, integrated out, exp(-v²/4 + v²/4) is left.
    loss = ebm.ScoreMatching(marginal=ebm.VaGES(8))
    _, fit = train(model, guide, loss, num_steps=3_000, optim=adam(0.05, 600))
    np.testing.assert_allclose(fit.params["slope"], 0.5, atol=0.02)
    np.testing.assert_allclose(fit.params["precision"], BEST, rtol=0.03)


# Objectives with parameters, states and players of their own


def test_noise_contrast_keeps_its_log_normalizer():
    """Half of a round's loss is the prior's, with N = 40; c is trained beside θ."""
    init = {"precision": 3.0, "log_normalizer": 0.5}
    objective = ebm.NCE(dist.Normal(0.0, 1.0), 200)
    svi = ebm.EnergySVI(gaussian, None, optax.sgd(0.1), objective)
    state, loss = jax.jit(svi.update)(svi.init(KEY, DATA, init_params=init), DATA)
    params = svi.get_params(state)
    assert set(params) == set(init)
    assert np.all([abs(params[name] - init[name]) > 1e-4 for name in init])
    # The logistic loss, its expectation over the noise by quadrature.
    ratio = lambda v: -1.5 * v**2 - 0.5 - stats.norm.logpdf(v) - np.log(200)  # noqa: E731
    nodes = np.linspace(-9, 9, 4_001)
    of_noise = np.sum(stats.norm.pdf(nodes) * np.logaddexp(0, ratio(nodes))) * (nodes[1] - nodes[0])
    expected = np.mean(np.logaddexp(0, -ratio(np.asarray(DATA)))) + 200 * of_noise
    expected -= stats.lognorm.logpdf(3.0, 0.4, scale=np.exp(0.5)) / N
    np.testing.assert_allclose(loss, expected, rtol=0.02)


@pytest.mark.parametrize(
    "objective",
    [
        ebm.DenoisingScoreMatching(0.3),
        ebm.KernelSteinDiscrepancy(),
        ebm.ConditionalNCE(0.3),
        ebm.EnergyDiscrepancy(1.0),
        ebm.FisherDivergence(),
    ],
)
def test_objectives_see_a_draw_where_they_see_parameters(objective):
    svi = ebm.EnergySVI(line, by_hand, optax.adam(0.05), objective)
    state = svi.init(KEY, DATA)
    jax.eval_shape(svi.update, state, DATA)
    jax.eval_shape(svi.evaluate, state, DATA)


def location(data):
    theta = numpyro.sample("theta", dist.Normal(-0.5, 0.2))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - theta) ** 2)


def test_objectives_do_not_see_what_a_draw_was_made_of():
    """Maximum likelihood closes over what is no parameter of the model."""
    train(location, AutoNormal(ebm.prior(location)), ebm.MaximumLikelihood(), num_steps=1)


@pytest.mark.slow
def test_the_posterior_of_bayes_rule():
    """Maximum likelihood, and the mean of a Gaussian: normal prior, normal posterior."""

    loss, guide = ebm.MaximumLikelihood(), AutoNormal(ebm.prior(location))
    _, fit = train(location, guide, loss, num_steps=4_000, optim=adam(0.05, 1_000), batch_size=10)
    precision = 1 / 0.2**2 + N
    mean = (-0.5 / 0.2**2 + N * M1) / precision
    np.testing.assert_allclose(fit.params["theta_auto_loc"], mean, atol=0.1 * precision**-0.5)
    np.testing.assert_allclose(fit.params["theta_auto_scale"], precision**-0.5, rtol=0.1)


@pytest.mark.parametrize(
    "guide", [pytest.param(None, marks=pytest.mark.slow), AutoNormal(ebm.prior(gaussian))]
)
def test_persistent_chains_go_on(guide):
    objective = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=0.2), persistent=True)
    svi = ebm.EnergySVI(gaussian, guide, optax.adam(0.05), objective)
    update, states = jax.jit(svi.update), [svi.init(KEY, DATA)]
    for _ in range(2):
        states.append(update(states[-1], DATA)[0])
    chains = [jax.tree.leaves(state.objective_state)[0] for state in states]
    assert np.mean(chains[0] != chains[1]) > 0.5 and np.mean(chains[1] != chains[2]) > 0.5


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.warns(ebm.NonFiniteLossWarning, match="step 1 of 3"):
        train(gaussian, num_steps=3, init_params={"precision": -1.0})


# What is refused


def priors(**sites):
    def model(data):
        theta = sum(jnp.sum(numpyro.sample(name, fn)) for name, fn in sites.items())
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * theta * v**2)

    return model


def masked(data):
    with numpyro.handlers.mask(mask=False):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def moving(data):
    upper = numpyro.sample("upper", dist.LogNormal(0.0, 1.0))
    theta = numpyro.sample("theta", dist.Uniform(0.0, upper))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def subsampled_parameters(data):
    with numpyro.plate("units", 4, subsample_size=2):
        theta = numpyro.sample("theta", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * jnp.sum(theta) * v**2)


REAL = dist.constraints.real


@pytest.mark.parametrize(
    "model, message",
    [
        (priors(theta=dist.ImproperUniform(REAL, (), ())), "prior of 'theta' is improper"),
        (priors(theta=ebm.Lebesgue()), "prior of 'theta' is improper"),
        (masked, "prior of 'theta' is improper"),
        (priors(theta=dist.Poisson(3.0)), "'theta' is discrete"),
        (priors(theta=dist.Delta(3.0)), "'theta' is a point mass.*deterministic"),
        (moving, r"support of 'theta' depends on \['upper'\]"),
        (subsampled_parameters, "'theta' is in the subsampled plate 'units'"),
    ],
)
def test_priors_that_do_not_serve(model, message):
    with pytest.raises(ebm.ModelError, match=message):
        train(model, num_steps=1)


def draws_of(**sites):
    def guide(data):
        for name, fn in sites.items():
            numpyro.sample(name, fn)

    return guide


def inside(data):
    with numpyro.plate("data", len(data)):
        numpyro.sample("a", dist.Normal(0.0, 1.0))


def shared(data):
    loc = numpyro.param("loc", 0.0)
    numpyro.sample("W", dist.Normal(loc, jnp.ones((2, 3))).to_event(2))
    numpyro.sample("c", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v[:, :1] * loc * jnp.ones(3)).to_event(1))


def backwards(data):
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        h = numpyro.sample("h", dist.Bernoulli(logits=v[:, :1] * jnp.ones(3)).to_event(1))
    numpyro.sample("W", dist.Normal(jnp.mean(h), jnp.ones((2, 3))).to_event(2))
    numpyro.sample("c", dist.Normal(jnp.zeros(3), 1.0).to_event(1))


TWO = priors(a=dist.LogNormal(0.0, 1.0), b=dist.LogNormal(0.0, 1.0))
NORMAL = dist.Normal(0.0, 1.0)


@pytest.mark.parametrize(
    "model, guide, message",
    [
        (TWO, draws_of(a=NORMAL), r"draws \['a'\] and not \['b'\]"),
        (TWO, draws_of(a=NORMAL, b=NORMAL, z=NORMAL), r"draws \['z'\] outside"),
        (TWO, draws_of(A=NORMAL), r"draws \['A'\] outside"),
        (TWO, inside, r"\['a'\] inside the data plate"),
        (TWO, draws_of(a=NORMAL, b=dist.Poisson(3.0)), "draws of 'b' are not differentiable"),
        (gaussian, AutoNormal(gaussian), r"AutoNormal\(numpyro_ebm.prior\(model\)\)"),
        (gaussian, AutoLaplaceApproximation(ebm.prior(gaussian)), "curvature of the prior"),
        (grbm, shared, r"depend on the `param` site\(s\) \['loc'\]"),
        (grbm, backwards, r"depends on its draw of \['h'\]"),
    ],
)
def test_guides_that_do_not_serve(model, guide, message):
    data, loss = (ROWS, dsm_vages()) if model is grbm else (DATA, None)
    with pytest.raises(ebm.ModelError, match=message):
        train(model, guide, loss, num_steps=1, data=data)


def test_numpyros_own_svi_points_here():
    svi = SVI(gaussian, lambda data: None, optax.sgd(0.1), ebm.ScoreMatching())
    with pytest.raises(ebm.ModelError, match="'precision' have a prior and no value.*EnergySVI"):
        svi.run(KEY, 1, DATA, progress_bar=False)


def test_num_rows_is_a_number_of_rows():
    for wrong in (0, 1.5):
        with pytest.raises(ebm.ModelError, match="num_rows"):
            ebm.EnergySVI(gaussian, None, optax.sgd(0.1), ebm.ScoreMatching(), num_rows=wrong)


def test_the_prior_is_a_model():
    """Its draws, and its density without a normalizer."""
    draws = Predictive(ebm.prior(gaussian), num_samples=4_000)(KEY, DATA)
    assert set(draws) == {"precision"}
    assert stats.kstest(np.log(draws["precision"]), stats.norm(0.5, 0.4).cdf).pvalue > 1e-3
    density, _ = numpyro.infer.util.log_density(
        ebm.prior(gaussian), (DATA,), {}, {"precision": 1.5}
    )
    expected = stats.lognorm.logpdf(1.5, 0.4, scale=np.exp(0.5))
    np.testing.assert_allclose(density, expected, rtol=1e-5)
