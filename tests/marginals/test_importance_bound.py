# SPDX-License-Identifier: Apache-2.0
"""The importance-weighted bound is consistent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from jax.nn import log_sigmoid
from marginal_cases import bound, grbm_log_joint
from oracles import assert_unbiased, draws, flat, jit, z_scores

import numpyro_ebm as ebm
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")


def bound_derivatives(marginal, system):
    """Value, both scores, θ-gradient and mixed derivative of a marginal; and what they should be.

    The leaves are lists in this order.
    """
    params = jax.tree.map(jnp.asarray, system.params)

    def of(log_density, u):
        def score(params):
            return jax.grad(lambda u: jnp.sum(log_density(params, u)))(u)

        value = log_density(params, u)
        gradient = jax.jacrev(lambda p: log_density(p, u))(params)
        return [value, score(params), gradient, jax.jacrev(score)(params)]

    def one(rng_key):
        estimate, point = bound(marginal, system, rng_key, params)
        log_density = lambda p, u: estimate.log_density(p, {"v": u})  # noqa: E731
        return [estimate.score(point)["v"], *of(log_density, point["v"])]

    rows = jax.vmap(system.log_density, (None, 0))
    points = jnp.asarray(system.unconstrain(system.data))
    value, score, *rest = jit(lambda: of(rows, points))()
    return one, [np.asarray(flat(x)) for x in (score, value, score, *rest)]


def split_like(samples, parts):
    return np.split(samples, np.cumsum([x.size for x in parts])[:-1], axis=-1)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("make", [oracles.grbm_system, oracles.linear_system])
def test_importance_bound_is_exact_at_the_posterior(make, num_particles):
    """Its value has no variance there; its first derivatives are unbiased, its second are not."""
    one, expected = bound_derivatives(ebm.ImportanceBound(num_particles), make(num_rows=2))
    samples = split_like(draws(one, jax.random.key(0), 6_000), expected)
    np.testing.assert_allclose(samples[1], np.broadcast_to(expected[1], samples[1].shape), 1e-9)
    for what, x, y in zip(["score", "", "score in v", "gradient"], samples, expected, strict=False):
        assert_unbiased(x, y, what)
    # What is missing of the posterior covariance is 1/L of it: why VaGES has its L/(L - 1).
    assert np.max(np.abs(z_scores(samples[-1], expected[-1]))) > 10


def test_value_and_score_have_particles_of_their_own():
    """So that a product of the two is without bias: over draws they do not go together."""
    moved = oracles.with_learned_guide(oracles.grbm_system(num_rows=1))
    params = jax.tree.map(jnp.asarray, {**moved.params, "d": moved.params["d"] + 0.5})

    def one(rng_key):
        estimate, point = bound(ebm.ImportanceBound(2), moved, rng_key, params)
        return estimate.log_density(params, point), estimate.score(point)["v"]

    value, score = map(np.asarray, jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 4_000)))
    assert value.std() > 0.01
    for x in score.reshape(4_000, -1).T:
        assert abs(np.corrcoef(value[:, 0], x)[0, 1]) < 4 / 4_000**0.5


def all_weights(v, shift):
    """log q(h | v) and log p̃(v, h) - log q(h | v) of every state, for one row."""
    states = oracles.binary_states(3)
    logits = v @ oracles.GRBM["W"] + oracles.GRBM["c"] + shift
    log_q = np.sum(np.asarray(log_sigmoid(jnp.asarray(np.where(states, logits, -logits)))), -1)
    log_p = np.array([float(grbm_log_joint(oracles.GRBM, v[None], h)[0]) for h in states])
    return log_q, log_p - log_q


def test_importance_bound_rises_to_the_marginal_from_below():
    """Its expectation, by enumeration of all tuples of particles; the ELBO for one of them."""
    shift = 0.8
    system = oracles.grbm_system(num_rows=2)._replace(guide=oracles.grbm_guide(shift))
    exact = np.array([float(oracles.grbm_log_density(oracles.GRBM, v)) for v in system.data])
    last = np.full(2, -np.inf)
    for particles in (1, 2, 4):
        expected = []
        for v in system.data:
            log_q, log_w = all_weights(v, shift)
            tuples = np.array(list(itertools.product(range(8), repeat=particles)))
            values = np.logaddexp.reduce(log_w[tuples], -1) - np.log(particles)
            expected.append(np.exp(log_q[tuples].sum(-1)) @ values)
        expected = np.array(expected)
        assert np.all(last < expected)
        assert np.all(expected < exact)
        last = expected

        def value(rng_key, particles=particles):
            marginal = ebm.ImportanceBound(particles)
            estimate, point = bound(marginal, system, rng_key, system.params)
            return estimate.log_density(system.params, point)

        samples = draws(value, jax.random.key(1), 20_000)
        assert_unbiased(samples, expected, f"{particles} particles")
        assert np.min(np.abs(z_scores(samples, exact))) > 10


@pytest.mark.slow
def test_importance_bound_is_consistent_with_a_wrong_guide():
    wrong = oracles.grbm_guide(0.8)
    errors = {}
    for particles in (1, 8, 64):
        system = oracles.grbm_system(num_rows=2)._replace(guide=wrong)
        one, expected = bound_derivatives(ebm.ImportanceBound(particles), system)
        samples = split_like(draws(one, jax.random.key(2), 4_000), expected)
        errors[particles] = np.array(
            [np.linalg.norm(x.mean(0) - y) for x, y in zip(samples, expected, strict=True)]
        )
    print(errors)
    assert np.all(errors[8] < 0.35 * errors[1])
    assert np.all(errors[64] < 0.08 * errors[1])


def test_importance_weights_alone_excuse_a_guide_that_ignores_the_visible_sites():
    def coin(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.Bernoulli(0.5 * jnp.ones(3)).to_event(1))

    system = oracles.grbm_system(num_rows=2)
    params, data = jax.tree.map(jnp.asarray, system.params), jnp.asarray(system.data)

    def prepare(marginal):
        objective = ebm.DenoisingScoreMatching(0.3, marginal)
        return objective.prepare(jax.random.key(0), params, system.model, coin, (data,), {})

    for marginal in (ebm.ImportanceBound(4), ebm.VaGES(2, importance_weighted=True)):
        assert prepare(marginal).marginal is marginal
    for marginal in (ebm.VaGES(2), ebm.Unrolled(1)):
        with pytest.raises(ebm.ModelError, match="ignores the visible sites"):
            prepare(marginal)


@pytest.mark.parametrize(
    "marginal", [ebm.ImportanceBound(100), ebm.VaGES(100, importance_weighted=True)], ids=repr
)
def test_a_particle_is_resampled_by_its_weight_under_the_guide(marginal):
    """From a guide that is off by a deviation the draws are of the posterior, of every row."""
    system = oracles.linear_system(num_rows=2)
    data = jnp.asarray(system.data)
    params = jax.tree.map(jnp.asarray, system.params)
    row_model = read_model(system.model, (data,), {}, params)
    guide = Guide(oracles.linear_guide(shift=0.7, noise=1.4), row_model, (data,), {})
    point = row_model.unconstrain_visible()
    draw = lambda key: marginal.draw_latent(key, row_model, guide, params, point)["h"]  # noqa: E731
    h = np.asarray(jit(jax.vmap(draw))(jax.random.split(jax.random.key(5), 800)))
    exact = oracles.exact_linear_guide(system.params)
    gap = h.mean(0) - (system.data @ exact["B"].T + exact["d"])
    assert np.max(np.abs(gap) / exact["std"]) < 4.5 / np.sqrt(800) + 0.05
