# SPDX-License-Identifier: Apache-2.0
"""Variational posteriors of parameters, alone and beside a guide for latents."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.handlers import block, seed, trace
from numpyro.infer import Predictive, TraceGraph_ELBO
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from prior_cases import (
    BEST,
    DATA,
    KEY,
    M1,
    M2,
    PRIOR,
    ROWS,
    N,
    adam,
    by_hand,
    dsm_vages,
    gaussian,
    grbm,
    line,
    train,
)
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.svi.global_guide import GlobalGuide
from numpyro_ebm.svi.round import THETA_STREAM


def conjugate():
    """The generalised posterior of `line` under score matching: mean and covariance."""
    curvature = np.array([[M2, -M1], [-M1, 1.0]])
    precision = np.eye(2) / 0.7**2 + N * curvature
    right = np.array([1.0, -1.0]) / 0.7**2 + N * np.array([1.0, 0.0])
    return np.linalg.solve(precision, right), np.linalg.inv(precision)


@pytest.mark.slow
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


GUIDES = {
    "by hand": lambda model: by_hand,
    "AutoNormal": lambda model: AutoNormal(ebm.prior(model)),
    "NumPyro's idiom": lambda model: AutoNormal(block(seed(model, 0), expose=["theta"])),
    "a site of all together": lambda model: AutoMultivariateNormal(ebm.prior(model)),
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_guide_for_latents_sees_what_a_draw_was_made_of():
    """Auxiliary draws of q(θ) are those of the round, where q(h | v) reads them."""

    def model(data):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", 0.5 * (v - h) ** 2 + 0.5 * (h - theta) ** 2)

    def guide(data):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        numpyro.sample("theta", dist.Delta(2.0 * z + numpyro.param("loc", 0.0)))
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.Normal(z * ebm.visible("v", data), 1.0))

    data, params = jnp.arange(1.0, 4.0), {"loc": jnp.array(0.5)}
    posterior = GlobalGuide.find(guide, read_model(model, (data,)), {})
    draw = posterior.draw(KEY, params, (data,), {})
    local = trace(seed(posterior.given(draw, params), jax.random.key(3))).get_trace(data)
    z = 0.5 * (draw.params["theta"] - 0.5)
    np.testing.assert_allclose(local["h"]["fn"].loc, z * data, rtol=1e-5)


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


@pytest.mark.slow
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
