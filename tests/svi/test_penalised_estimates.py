# SPDX-License-Identifier: Apache-2.0
"""Penalised estimates: modes, weights of the prior, supports."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.handlers import trace
from prior_cases import (
    BEST,
    DATA,
    KEY,
    M2,
    PRIOR,
    N,
    adam,
    gaussian,
    penalised_score_matching,
    train,
)

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.svi.minibatch import Batches


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
    rows = Batches(row_model, (DATA,), {}, 10, fit.state.rng_key).indices(0, 12)
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
