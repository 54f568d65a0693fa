# SPDX-License-Identifier: Apache-2.0
"""Persistent chains that carry their work: log Z against closed forms, through training."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from divergence_cases import (
    BITS,
    ISING,
    KEY,
    RBM,
    arrays,
    ising,
    ising_log_density,
    rbm,
    regression,
)
from jax.nn import softplus
from jax.scipy.special import logsumexp
from oracles import assert_unbiased, binary_states, jit
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.objectives.chain_starts import draw_latent
from numpyro_ebm.objectives.chain_weights import gradient_weights, read_log_normalizer, resampled
from numpyro_ebm.objectives.persistent_chains import Chains


def weighted(kernel, num_steps=1, **options):
    options = {"num_chains": 1_024, "initial": "gaussian", **options}
    return ebm.ContrastiveDivergence(kernel, num_steps, persistent=True, weighted=True, **options)


def quadratic(data):
    p = numpyro.param("precision", 2.0 * jnp.eye(2)), numpyro.param("mean", jnp.ones(2))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        x = v - p[1]
        ebm.energy("E", 0.5 * jnp.sum((x @ p[0].T) ** 2, -1) + jnp.sum(p[1]))


def gaussian_log_z(p):
    return np.log(2 * np.pi) - np.linalg.slogdet(p["precision"])[1] - np.sum(p["mean"])


def ising_log_z(p):
    return logsumexp(ising_log_density(p, binary_states(4)))


def rbm_log_z(p):
    v = binary_states(4)
    return logsumexp(v @ p["b"] + jnp.sum(softplus(v @ p["W"] + p["c"]), -1))


CORRELATED = np.random.default_rng(0).normal(size=(200, 2)) @ np.array([[0.6, 0.5], [0.0, 0.4]])

CASES = {
    "Gaussian, MALA": (
        quadratic,
        CORRELATED + 1.0,
        weighted(partial(ebm.MALA, step_size=0.1)),
        gaussian_log_z,
        np.log(np.pi / 2) - 2,
    ),
    "Ising, Gibbs": (
        ising,
        BITS,
        weighted(ebm.BlockGibbs, initial="uniform"),
        ising_log_z,
        4 * np.log(2),
    ),
    "RBM, Gibbs": (
        rbm,
        BITS,
        weighted(ebm.BlockGibbs, initial=dist.Bernoulli(0.5).expand([4]).to_event(1)),
        rbm_log_z,
        7 * np.log(2),
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(k, marks=[pytest.mark.slow] * (k != "Ising, Gibbs")) for k in CASES],
)
def test_log_z_is_known_at_the_end_of_training(name):
    """Within its own error, which is small, of the parameters that the fit returns."""
    model, data, objective, log_z, start = CASES[name]
    data = jnp.asarray(data, jnp.float32 if data.dtype == float else None)
    svi = ebm.EnergySVI(model, None, optax.adam(0.02), objective)
    fit = svi.run(KEY, 60, data, progress_bar=False)
    found, exact = objective.log_normalizer(fit.state), float(log_z(arrays(fit.params)))
    print(name, found.value, exact, found.mcse, found.ess, found.diagnostics["gradient_ess"])
    assert abs(found.value - exact) < 4.5 * found.mcse and 0 < found.mcse < 0.1
    assert abs(exact - start) > 5 * found.mcse  # it has moved
    assert 256 <= found.ess <= 512 and found.bias == "below"


@pytest.mark.slow
def test_weights_find_the_shares_of_modes_that_chains_do_not_leave():
    """One parameter, the log odds of two far modes: 80 to 20 in the data, chains 50 to 50."""

    def modes(data):
        odds = numpyro.param("odds", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            share = jax.nn.log_sigmoid(odds) - 2 * (v + 4) ** 2
            other = jax.nn.log_sigmoid(-odds) - 2 * (v - 4) ** 2
            ebm.energy("E", -jnp.logaddexp(share, other))

    rng = np.random.default_rng(0)
    data = np.where(np.arange(1_000) < 800, -4.0, 4.0) + 0.5 * rng.normal(size=1_000)
    start = dist.MixtureSameFamily(
        dist.Categorical(probs=jnp.array([0.5, 0.5])), dist.Normal(jnp.array([-4.0, 4.0]), 0.5)
    )
    shares = {}
    for is_weighted in (True, False):
        objective = ebm.ContrastiveDivergence(
            partial(ebm.MALA, step_size=0.1),
            persistent=True,
            num_chains=2_000,
            initial=start,
            weighted=is_weighted,
        )
        svi = ebm.EnergySVI(modes, None, optax.sgd(0.05), objective)
        with nullcontext() if is_weighted else pytest.warns(ebm.ConvergenceWarning, match="R-hat"):
            fit = svi.run(KEY, 2_000, jnp.asarray(data, jnp.float32), progress_bar=False)
        shares[is_weighted] = float(jax.nn.sigmoid(fit.params["odds"]))
    assert abs(shares[True] - 0.8) < 0.05 < 0.1 < abs(shares[False] - 0.8)


def test_weights_are_those_of_the_density_over_where_the_chains_began():
    """Before the parameters move and after, of chains that stay where they are.

    The first half is then compared with the data, by its weights.
    """
    model, data = CASES["Gaussian, MALA"][:2]
    objective, data = weighted(partial(ebm.MALA, step_size=1e-12)), jnp.asarray(data, jnp.float32)
    start = arrays({"precision": 2.0 * np.eye(2), "mean": np.ones(2)})
    after = arrays({"precision": np.array([[1.5, 0.3], [0.0, 2.0]]), "mean": np.array([0.2, 0.9])})

    @jit
    def both(data):
        problem = objective.prepare(KEY, start, model, None, (data,), {})
        state = objective.init_state(KEY, start, problem)
        moved = objective.settle(KEY, start, after, problem, state)
        problem, last = objective.advance(KEY, after, problem, moved)
        loss = objective.energy_loss(KEY, after, problem)
        return state, moved, last, problem.noise, loss

    state, moved, last, noise, loss = both(data)
    v = np.asarray(state.position["v"])
    log_q = stats.norm.logpdf(v, data.mean(0), data.std(0)).sum(-1)
    for params, found in ((start, state), (after, moved)):
        x = (v - params["mean"]) @ params["precision"].T
        log_p = -0.5 * np.sum(x**2, -1) - np.sum(params["mean"])
        np.testing.assert_allclose(found.log_weights, log_p - log_q, rtol=1e-3, atol=1e-3)
    half = len(v) // 2
    first, log_weights = np.asarray(last.position["v"])[:half], np.asarray(last.log_weights)
    np.testing.assert_array_equal(noise.position["v"], first)
    weights = np.exp(log_weights[:half] - log_weights[:half].max())
    squares = [np.sum(((x - after["mean"]) @ after["precision"].T) ** 2, -1) for x in (first, data)]
    expected = 0.5 * (np.mean(squares[1]) - np.average(squares[0], weights=weights))
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_chains_are_resampled_among_those_of_their_population():
    """Sixty-four that give the gradient, and sixteen islands of four that measure."""
    origin = jnp.concatenate([jnp.zeros(64, int), 1 + jnp.arange(64) // 4])
    log_weights = jnp.where(jnp.arange(128) % 4 == 1, 0.0, -5.0) + jnp.arange(128) / 100
    found, weights = jit(resampled)(KEY, {"origin": origin, "i": jnp.arange(128)}, log_weights)
    np.testing.assert_array_equal(found["origin"], origin)
    assert np.mean(found["i"] % 4 == 1) > 0.9  # the heavy ones
    means = np.exp(log_weights).reshape(-1, 4)[16:].mean(1)
    np.testing.assert_allclose(weights[64:], np.repeat(np.log(means), 4), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient_weights(log_weights), jax.nn.softmax(log_weights[:64]))
    total = np.exp(log_weights[:64]).mean()
    np.testing.assert_allclose(weights[:64], np.log(total), rtol=1e-4, atol=1e-5)
    even = log_weights / 50  # left alone
    found, weights = jit(resampled)(KEY, {"origin": origin, "i": jnp.arange(128)}, even)
    np.testing.assert_array_equal(found["i"], jnp.arange(128))
    np.testing.assert_array_equal(weights, even)


@pytest.mark.usefixtures("x64")
def test_resampling_keeps_every_expectation_and_every_population_to_itself():
    """Of the gradient's half and of each island; weights that are nearly even are left alone."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=128))
    log_weights = jnp.asarray(2.0 * rng.normal(size=128))
    origin = jnp.concatenate([jnp.zeros(64, int), 1 + jnp.arange(64) // 4])

    def moments(position, log_weights):
        w = jnp.exp(log_weights)
        return jnp.stack([jnp.bincount(origin, w * f, length=17) for f in (1.0, position["x"])])

    def one(key):
        position, w = resampled(key, {"x": x, "origin": origin}, log_weights)
        return moments(position, w).ravel(), position["origin"], w

    found, origins, weights = jit(jax.vmap(one))(jax.random.split(KEY, 1_000))
    assert np.all(np.asarray(origins) == np.asarray(origin))
    ess = read_log_normalizer(weights[0]).ess
    assert ess > read_log_normalizer(log_weights).ess
    expected = np.asarray(moments({"x": x}, log_weights)).ravel()
    np.testing.assert_allclose(found[:, :17], expected[:17] * np.ones((1_000, 1)), rtol=1e-9)
    varies = np.std(found, 0) > 1e-9
    assert varies.sum() > 8
    assert_unbiased(np.asarray(found)[:, varies], expected[varies], "resampling")
    even = 3.0 + 0.1 * log_weights
    same, w = resampled(KEY, {"x": x}, even)
    np.testing.assert_array_equal(same["x"], x)
    np.testing.assert_array_equal(w, even)
    np.testing.assert_allclose(jnp.sum(gradient_weights(log_weights)), 1.0)


@pytest.mark.parametrize(
    "model, args, objective, message",
    [
        (ising, (BITS,), weighted(ebm.BlockGibbs, initial="uniform", num_chains=32), "64 at the"),
        (
            quadratic,
            (CORRELATED,),
            weighted(partial(ebm.ULA, step_size=0.1)),
            "ULA does not leave it invariant",
        ),
        (
            quadratic,
            (CORRELATED,),
            weighted(partial(numpyro.infer.HMC, step_size=0.1)),
            "HMC accepts all rows together",
        ),
        (
            regression,
            (np.arange(3.0), np.ones(3)),
            weighted(ebm.BlockGibbs),
            "differs from row to row.*drop `num_chains`, `weighted`",
        ),
    ],
)
def test_what_cannot_be_weighted(model, args, objective, message):
    svi = ebm.EnergySVI(model, None, optax.sgd(0.1), objective)
    with pytest.raises(ebm.ModelError, match=message):
        svi.run(KEY, 1, *map(jnp.asarray, args), progress_bar=False)


@pytest.mark.slow
def test_chains_without_weights_know_no_log_z():
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True)
    svi = ebm.EnergySVI(ising, None, optax.sgd(0.1), objective)
    fit = svi.run(KEY, 1, jnp.asarray(BITS), progress_bar=False)
    with pytest.raises(ebm.ModelError, match=r"have no weights.*weighted=True.*afterwards"):
        objective.log_normalizer(fit.state)
    assert ISING and RBM


def test_the_end_of_a_run_says_that_log_z_is_not_known():
    objective, log_weights = weighted(ebm.BlockGibbs), 5.0 * jax.random.normal(KEY, (128,))
    with pytest.warns(ebm.ConvergenceWarning, match="known to no better than 0.[5-9].* nats"):
        objective.review_state(Chains({}, jnp.array(0), log_weights=log_weights))
    objective.review_state(Chains({}, jnp.array(0), log_weights=0.1 * log_weights))


def test_units_that_are_drawn_at_random_have_the_density_of_a_row():
    """One over the number of their states, however many rows there are; each site by itself."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Counting(3, (2,)))
            k = numpyro.sample("k", dist.DiscreteUniform(2, 4).expand([2]).to_event(1))
            ebm.energy("E", 0.5 * v**2 + 0.1 * jnp.sum(h + k, -1))

    row_model = read_model(model, (jnp.arange(50.0),))
    problem = SimpleNamespace(row_model=row_model, guide=None)
    drawn, density = draw_latent(KEY, {}, problem, row_model.to_rows(row_model.visible_values))
    h, k = np.asarray(drawn["h"]), np.asarray(drawn["k"])
    assert h.shape == k.shape == (50, 2) and np.any(h + 2 != k)
    assert set(h.flat) == {0, 1, 2} and set(k.flat) == {2, 3, 4}
    np.testing.assert_allclose(density, np.full(50, -4 * np.log(3)), rtol=1e-6)


def test_effective_numbers_are_of_the_chains_they_are_said_of():
    """Those that measure are the last half: one of them has all the weight, and no other half."""
    log_weights = jnp.zeros(128).at[127].set(50.0)
    found = read_log_normalizer(log_weights)
    np.testing.assert_allclose(found.ess, 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.diagnostics["gradient_ess"], 64.0, rtol=1e-5)
