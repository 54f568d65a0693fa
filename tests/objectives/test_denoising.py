# SPDX-License-Identifier: Apache-2.0
"""Denoising score matching against quadrature, its control variate, and who sees the noise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from jax.nn import softplus

import numpyro_ebm as ebm
from numpyro_ebm.objectives.directions import draw_like

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)

RNG = np.random.default_rng(1)

PARAMS = {
    "W": RNG.normal(size=(2, 3)),
    "b": np.array([0.3, -0.2]),
    "c": np.array([0.5, -0.4, 0.1]),
    "scale": np.array([0.8, 1.1]),
}

DATA = RNG.normal(size=(6, 2))

STATES = np.array(list(itertools.product([0, 1], repeat=3)), float)


def params64():
    return {k: jnp.asarray(x) for k, x in PARAMS.items()}


def declare():
    W = numpyro.param("W", jnp.zeros((2, 3)))
    b, c = numpyro.param("b", jnp.zeros(2)), numpyro.param("c", jnp.zeros(3))
    return W, b, c, numpyro.param("scale", jnp.ones(2), constraint=dist.constraints.positive)


def event_units(data):
    W, b, c, scale = declare()
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, (3,)))
        ebm.energy("E", 0.5 * jnp.sum(((v - b) / scale) ** 2, -1) - h @ c - jnp.sum(v @ W * h, -1))


def no_latents(data):
    W, b, c, scale = declare()
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        bowl = 0.5 * jnp.sum(((v - b) / scale) ** 2, -1)
        ebm.energy("E", bowl - jnp.sum(softplus(c + v @ W), -1))


def log_marginal(p, v):
    """Brute force: log Σ_h exp(-E(v, h)) for one row v."""
    bowl = 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2)
    return jax.scipy.special.logsumexp(STATES @ p["c"] + STATES @ (v @ p["W"])) - bowl


def score(p, v):
    return jax.vmap(lambda v: jax.grad(log_marginal, 1)(p, v))(v)


def assert_unbiased(samples, expected, limit=4.0):
    """Every component of a tree of draws has the expected mean, within standard errors."""
    for name in expected:
        x = np.asarray(samples[name])
        error = x.std(0, ddof=1) / np.sqrt(len(x)) + 1e-12
        z = np.abs(x.mean(0) - np.asarray(expected[name])) / error
        assert np.all(z < limit), (name, z)


@pytest.mark.parametrize("variance_reduction", [True, False])
def test_denoising_equals_its_formula(variance_reduction):
    """Against E ½‖s(v + σε) + ε/σ‖², its expectation over ε by Gauss-Hermite quadrature."""
    sigma, p, v = 0.3, params64(), jnp.asarray(DATA)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    grid = jnp.asarray(list(itertools.product(nodes, nodes)))
    weights = jnp.asarray(np.outer(weights, weights).ravel() / (2 * np.pi))

    def formula(p):
        noised = lambda e: score(p, v + sigma * e) + e / sigma  # noqa: E731
        rows = jax.vmap(lambda e: 0.5 * jnp.sum(noised(e) ** 2, -1))(grid)
        return jnp.mean(weights @ rows)

    objective = ebm.DenoisingScoreMatching(sigma, variance_reduction=variance_reduction)

    def draw(key):
        loss = lambda p: objective.loss(key, p, no_latents, None, v)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(p)
        return {"value": value, **gradient}

    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(6), 4_000))
    value, gradient = jax.jit(jax.value_and_grad(formula))(p)
    assert_unbiased(samples, {"value": value, **gradient})


def test_the_control_variate_takes_the_noise_off():
    p, v = params64(), jnp.asarray(DATA)
    spread = {}
    for reduce in (True, False):
        objective = ebm.DenoisingScoreMatching(0.01, variance_reduction=reduce)
        draw = lambda k, o=objective: jax.grad(lambda p: o.loss(k, p, no_latents, None, v))(p)  # noqa: E731
        samples = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 500))
        spread[reduce] = float(samples["W"].std(0).max())
    assert spread[True] < 0.05 * spread[False]


def test_gradients_of_guide_and_energy_do_not_leak():
    """dL/dθ does not feel the guide's loss, and dL/dφ does not feel the energy's."""

    def guide(data):
        A, d = numpyro.param("A", jnp.zeros((2, 3))), numpyro.param("d", jnp.zeros(3))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Bernoulli(logits=d + v @ A).to_event(1))

    p, v = params64(), jnp.asarray(DATA)
    phi = {"A": p["W"], "d": p["c"]}
    objective = ebm.DenoisingScoreMatching(0.3, marginal=ebm.VaGES(2))

    def draw(key):
        loss = lambda q: objective.loss(key, q, event_units, guide, v)  # noqa: E731
        exact = lambda q: ebm.DenoisingScoreMatching(0.3).loss(key, q, no_latents, None, v)  # noqa: E731
        gradient = jax.grad(loss)({**p, **phi})
        difference = {k: gradient[k] - g for k, g in jax.grad(exact)(p).items()}
        return difference | {k: gradient[k] for k in phi}

    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(11), 8_000))
    assert_unbiased({k: samples[k] for k in p}, dict.fromkeys(p, 0.0), limit=4.5)
    # At the exact posterior the pathwise gradient of RelaxedELBO vanishes draw by draw.
    for k in phi:
        np.testing.assert_allclose(samples[k], 0.0, atol=1e-12)


@pytest.mark.slow
def test_the_guide_is_fitted_at_the_noised_values():
    """A guide that reports the value it saw: the noised one, the same as the energy's."""
    seen = []

    def guide(data):
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            seen.append(v)
            numpyro.sample("h", dist.Bernoulli(logits=v @ A).to_event(1))

    p, v = params64(), jnp.asarray(DATA)
    objective = ebm.DenoisingScoreMatching(0.5, marginal=ebm.VaGES(2), variance_reduction=False)
    problem = objective.prepare(KEY, {**p, "A": jnp.zeros((2, 3))}, event_units, guide, (v,), {})
    del seen[:]
    from numpyro_ebm.guides.losses import row_guide_loss

    row_guide_loss(ebm.RelaxedELBO(), KEY, p, {"A": jnp.zeros((2, 3))}, problem, guide)
    objective.energy_loss(KEY, {**p, "A": jnp.zeros((2, 3))}, problem)
    noised = problem.unconstrained["v"]
    assert not np.allclose(noised, v, atol=0.05)
    for value in seen:
        np.testing.assert_array_equal(value, noised)


def test_rows_count_for_the_guide_by_the_inverse_of_their_level():
    objective = ebm.MultiscaleDenoisingScoreMatching(None, min_noise_scale=0.2, max_noise_scale=2.0)
    problem = objective.prepare(KEY, params64(), event_units, None, (jnp.asarray(DATA),), {})
    levels, noise = problem.noise
    np.testing.assert_allclose(problem.row_weights, 1.0 / levels)
    np.testing.assert_allclose(problem.unconstrained["v"], DATA + levels[:, None] * noise["v"])


def test_sites_have_noise_of_their_own():
    noise = draw_like(jax.random.normal, KEY, {"a": jnp.zeros(4_000), "b": jnp.zeros(4_000)})
    assert abs(np.corrcoef(noise["a"], noise["b"])[0, 1]) < 4 / np.sqrt(4_000)


def test_geometric_levels_are_even_in_their_logarithm():
    objective = ebm.MultiscaleDenoisingScoreMatching(
        min_noise_scale=0.1, max_noise_scale=10.0, spacing="geometric"
    )
    place = (np.log10(np.sort(objective.levels(jax.random.key(3), 50))) + 1) / 2 * 50
    np.testing.assert_array_equal(np.floor(place), np.arange(50))


def test_a_weight_that_is_not_given_is_that_of_each_level():
    """At one level for all rows it is the weight of that number."""
    system = oracles.gaussian_system(num_rows=5)
    params = jax.tree.map(jnp.asarray, system.params)
    losses = [
        ebm.MultiscaleDenoisingScoreMatching(weight, min_noise_scale=0.4, max_noise_scale=0.4).loss(
            jax.random.key(5), params, system.model, None, jnp.asarray(system.data)
        )
        for weight in (None, 0.4)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)
