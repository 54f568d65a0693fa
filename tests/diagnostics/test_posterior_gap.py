# SPDX-License-Identifier: Apache-2.0
"""Posterior gaps, and the bias they bound, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from diagnostic_cases import GAUSSIAN, KEY, all_states, own_grbm
from oracles import LINEAR

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics.gap import posterior

GRBM, GRBM_FIXED, FIT = own_grbm()


def shifted_guide(shift, hidden_plate=False):
    return oracles.grbm_guide(np.asarray(shift), hidden_plate=hidden_plate)


SHIFT = np.array([0.5, -0.3, 0.2])


def enumerated(data, shift):
    """log p̃(v, h) and log q(h | v) at all states, (states, rows), by NumPy."""
    h = all_states()
    field = data @ GRBM["W"] + GRBM["c"]  # rows, hidden
    bowl = 0.5 * np.sum(((data - GRBM["b"]) / GRBM["scale"]) ** 2, -1)
    logits = field + shift
    return h @ field.T - bowl, h @ logits.T - np.logaddexp(0, logits).sum(-1)


@pytest.mark.parametrize("plate", [False, True])
def test_gap_is_exact_where_the_latents_are_enumerated(plate, x64):
    data = np.random.default_rng(0).normal(size=(6, 2))
    model = oracles.grbm_plated if plate else oracles.grbm
    gap = ebm.posterior_gap(KEY, model, shifted_guide(SHIFT, plate), GRBM, jnp.asarray(data))
    log_p, log_q = enumerated(data, SHIFT)
    marginal = np.logaddexp.reduce(log_p)
    p, q = np.exp(log_p - marginal), np.exp(log_q)
    kl = np.sum(q * (log_q - np.log(p)), 0)
    assert gap.method == "enumerate" and gap.fisher is None and gap.pareto_k is None
    np.testing.assert_allclose(gap.kl, kl, rtol=1e-8)
    np.testing.assert_allclose(gap.value, kl.mean(), rtol=1e-8)
    assert float(gap.standard_error) == 0
    np.testing.assert_allclose(gap.log_marginal, marginal, rtol=1e-8)
    np.testing.assert_allclose(gap.elbo, marginal - kl, rtol=1e-8)
    np.testing.assert_allclose(gap.tv, 0.5 * np.abs(p - q).sum(0), rtol=1e-8)
    np.testing.assert_allclose(gap.tv_bound, np.sqrt(kl / 2), rtol=1e-8)
    np.testing.assert_allclose(gap.ess, 1_000 / np.sum(p**2 / q, 0), rtol=1e-8)
    assert np.all(gap.tv <= gap.tv_bound)
    # The score given h, (states, rows, visible): W h and a part without h.
    score = (all_states() @ GRBM["W"].T)[:, None] - (data - GRBM["b"]) / GRBM["scale"] ** 2
    bias = np.linalg.norm(np.einsum("sr,srd->rd", q - p, score), axis=-1)
    width = np.linalg.norm(score.max(0) - score.min(0), axis=-1)
    np.testing.assert_allclose(gap.vaes.bias, bias, rtol=1e-8)
    np.testing.assert_allclose(gap.vaes.range_bound, width * gap.tv, rtol=1e-8)
    largest = np.linalg.norm(score, axis=-1).max(0)
    np.testing.assert_allclose(gap.vaes.norm_bound, 2 * largest * gap.tv, rtol=1e-8)
    assert gap.vages is None


def exact_vages_bias(data, shift):
    """Norm of the bias of VaGES over all parameters, by autodiff of closed forms."""
    h = jnp.asarray(all_states(), float)

    def log_joint(p, v):
        return h @ (p["c"] + v @ p["W"]) - 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2)

    def one(v, log_q):
        q = jnp.exp(log_q)

        def estimate(p, v):  # Σ q and half the variance under q of log p̃
            x = log_joint(p, v) - jax.lax.stop_gradient(log_joint(p, v))
            return q @ x + 0.5 * (q @ x**2 - (q @ x) ** 2)

        exact = lambda p, v: jax.nn.logsumexp(log_joint(p, v))  # noqa: E731
        gradient = jax.jacrev(jax.grad(estimate, 1))(GRBM, v)
        exact = jax.jacrev(jax.grad(exact, 1))(GRBM, v)
        squares = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), gradient, exact)
        return jnp.sqrt(sum(jax.tree.leaves(squares)))

    _, log_q = enumerated(data, shift)
    return np.asarray(oracles.jit(jax.vmap(one))(jnp.asarray(data), jnp.asarray(log_q.T)))


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.02, 0.3])
def test_bias_bounds_bound_the_bias(delta, x64):
    data = 1.5 * np.random.default_rng(1).normal(size=(40, 2))
    shift = delta * np.random.default_rng(2).normal(size=3)
    guide = shifted_guide(shift)
    gap = ebm.posterior_gap(KEY, oracles.grbm, guide, GRBM, jnp.asarray(data), gradient=True)
    np.testing.assert_allclose(gap.vages.bias, exact_vages_bias(data, shift), rtol=1e-6)
    for bound in (gap.vaes, gap.vages):
        assert np.all(bound.bias > 0)
        assert np.all(bound.bias <= bound.range_bound)
        assert np.all(bound.bias <= bound.norm_bound)


def test_bias_goes_like_the_root_of_kl(x64):
    data = jnp.asarray(1.5 * np.random.default_rng(1).normal(size=(40, 2)))
    direction = np.random.default_rng(2).normal(size=3)
    gaps = [
        ebm.posterior_gap(KEY, oracles.grbm, shifted_guide(d * direction), GRBM, data)
        for d in (0.01, 0.1)
    ]
    slope = np.diff([np.log(np.mean(g.vaes.bias)) for g in gaps]) / np.diff(
        [np.log(float(g.value)) for g in gaps]
    )
    assert slope == pytest.approx(0.5, abs=0.03)


def test_the_exact_posterior_has_no_gap(x64, monkeypatch):
    monkeypatch.setattr(posterior, "_pareto_shapes", lambda log_weights: jnp.ptp(log_weights, 0))
    data = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    for options in ({}, {"max_states": 0}):
        gap = ebm.posterior_gap(
            KEY, GRBM_FIXED, oracles.learned_grbm_guide, FIT, data, num_particles=50, **options
        )
        np.testing.assert_allclose(gap.kl, 0, atol=1e-10)
        np.testing.assert_allclose(gap.ess, 50, rtol=1e-8)
        np.testing.assert_allclose(0 if gap.pareto_k is None else gap.pareto_k, 0, atol=1e-10)
        np.testing.assert_allclose(gap.vaes.bias, 0, atol=1e-6 if not options else 0.5)


def gaps(rng_keys, fields, *args, **options):
    """Fields of the gaps at many keys, keys leading."""

    def one(rng_key):
        gap = ebm.posterior_gap(rng_key, *args, **options)
        return tuple(getattr(gap, name) for name in fields)

    return [np.asarray(x) for x in oracles.jit(lambda keys: jax.lax.map(one, keys))(rng_keys)]


def test_gap_from_particles_with_an_exact_marginal():
    data = np.random.default_rng(0).normal(size=(4, 2))
    log_p, log_q = enumerated(data, SHIFT)
    exact = np.sum(np.exp(log_q) * (log_q - log_p), 0) + np.logaddexp.reduce(log_p)
    args = oracles.grbm, shifted_guide(SHIFT), GRBM, jnp.asarray(data)
    options = dict(num_particles=200, max_states=0)
    fields = "kl", "kl_error", "value", "standard_error"
    kl, error, value, standard_error = gaps(jax.random.split(KEY, 200), fields, *args, **options)
    z = (kl - exact) / error
    assert abs(z.mean()) < 4 / np.sqrt(z.size) and 0.85 < z.std() < 1.15
    z = (value - exact.mean()) / standard_error
    assert 0.8 < z.std() < 1.2
    gap = ebm.posterior_gap(KEY, *args, **options)
    assert gap.method == "marginal" and np.shape(gap.pareto_k) == (4,)


def test_gap_of_continuous_latents():
    """Gaussian q against a Gaussian posterior: closed forms for KL and the Fisher gap."""
    system = oracles.linear_system(num_rows=5)
    model, std = ebm.fixed(oracles.linear_opaque, LINEAR), oracles.exact_linear_guide()["std"]
    noise, shift = 0.8, 0.2
    kl = np.sum(-np.log(noise) + 0.5 * (noise**2 + (shift / std) ** 2) - 0.5)
    fisher = 0.5 * np.sum((noise * std) ** 2 * (1 - noise**-2) ** 2 / std**4 + shift**2 / std**4)
    args = model, oracles.linear_guide(noise=noise, shift=shift), {}, jnp.asarray(system.data)
    large = ebm.posterior_gap(jax.random.key(1), *args, num_particles=5_000)
    assert large.method == "importance" and large.vages is None
    assert np.all(np.abs(large.kl - kl) < 4 * large.kl_error + 0.01)
    assert np.all(np.abs(large.fisher - fisher) < 4 * large.fisher_error)
    assert np.all(large.pareto_k < 0.7) and np.all(large.ess > 1_000)
    # A lower bound in the mean, which rises with the particles.
    keys = jax.random.split(KEY, 200)
    few, more = (gaps(keys, ("value",), *args, num_particles=n)[0].mean() for n in (2, 20))
    assert few < more - 0.02 < kl - 0.02
    wide = model, oracles.linear_guide(noise=1.3, shift=0.2), {}, args[-1]
    found, error = gaps(keys, ("kl", "kl_error"), *wide, num_particles=100)
    np.testing.assert_allclose(error.mean(), found.std(0).mean(), rtol=0.1)
    # The score is linear in h: its bias is A times the shift of the mean, whatever the noise.
    bias = np.linalg.norm(LINEAR["A"] @ np.full(2, shift)) / LINEAR["scale"] ** 2
    np.testing.assert_allclose(large.vaes.bias, bias, rtol=0.25)
    assert np.all(large.vaes.bias < large.vaes.range_bound)
    exact = ebm.posterior_gap(KEY, model, system.guide, {}, jnp.asarray(system.data))
    np.testing.assert_allclose(exact.kl, 0, atol=1e-4)
    np.testing.assert_allclose(exact.fisher, 0, atol=1e-6)
    narrow = oracles.linear_guide(noise=0.3)
    narrow = ebm.posterior_gap(KEY, model, narrow, {}, jnp.asarray(system.data))
    assert np.mean(narrow.pareto_k) > 0.7 > np.max(large.pareto_k)


@pytest.mark.slow
def test_tails_of_weights():
    """Weights that are Pareto distributed have the shape 1/α, heavy tails included."""
    from numpyro_ebm.diagnostics.gap.posterior import _pareto_shapes

    rng = np.random.default_rng(0)
    shapes = np.array([0.2, 0.5, 0.9, 2.0])
    log_w = shapes * rng.exponential(size=(20_000, 4))
    np.testing.assert_allclose(_pareto_shapes(jnp.asarray(log_w)), shapes, atol=0.15)
    assert np.all(_pareto_shapes(jnp.zeros((100, 2))) == 0)
    assert np.all(_pareto_shapes(jnp.zeros((20, 2))) == np.inf)


def test_gap_of_discrete_visibles_has_no_scores():
    def model(data=None):
        with numpyro.plate("data", 1 if data is None else len(data)):
            v = numpyro.sample("v", ebm.Counting(2, event_shape=(3,)), obs=data)
            h = numpyro.sample("h", ebm.Counting(3))
            ebm.energy("E", -h * jnp.sum(v, -1))

    def guide(data=None):
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Categorical(logits=jnp.stack([0.0 * v[:, 0]] * 3, -1)))

    data = jnp.array([[0, 0, 0], [1, 1, 0]])
    gap = ebm.posterior_gap(KEY, ebm.fixed(model, {}), guide, {}, data)
    p = np.exp(np.outer(data.sum(-1), np.arange(3)))
    expected = -np.log(3) - np.mean(np.log(p / p.sum(-1, keepdims=True)), -1)
    np.testing.assert_allclose(gap.kl, expected, atol=1e-5)
    assert gap.vaes is None


def test_gap_refuses_what_it_cannot_do():
    data = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))

    def auxiliary(data=None):
        with numpyro.plate("data", len(data)):
            ebm.visible("v", data)
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("h", dist.Bernoulli(logits=x[:, None] * jnp.ones(3)).to_event(1))

    guide = oracles.learned_grbm_guide
    cases = [
        ("'A', 'd'", (GRBM_FIXED, guide, {}, data), {}),
        ("'W', 'b', 'c', 'scale'", (oracles.grbm, guide, FIT, data), {}),
        ("must be a dict", (GRBM_FIXED, guide, data), {}),
        ("`guide` must be", (GRBM_FIXED, None, FIT, data), {}),
        ("observes nothing", (GRBM_FIXED, guide, FIT), {}),
        ("no latent sites", (GAUSSIAN, guide, FIT, jnp.ones(3)), {}),
        ("num_particles", (GRBM_FIXED, guide, FIT, data), {"num_particles": 1}),
        ("gradient=True", (GRBM_FIXED, guide, FIT, data), {"gradient": True}),
        ("draws 'x'", (GRBM_FIXED, auxiliary, FIT, data), {}),
        ("does not draw", (GRBM_FIXED, lambda data=None: None, FIT, data), {}),
    ]
    for message, args, options in cases:
        with pytest.raises(ebm.ModelError, match=message):
            ebm.posterior_gap(KEY, *args, **options)


def test_the_bound_of_a_gradient_is_that_of_its_ranges(x64):
    """Of one bit and one parameter: s = θ h - v, ∂θ log p̃ = h v, and both at once h."""

    def model(data):
        theta = numpyro.param("theta", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Counting(2))
            ebm.energy("E", 0.5 * v**2 - theta * h * v)

    def guide(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.Bernoulli(logits=0.3 + ebm.visible("v", data)))

    v, theta = np.array([0.4, -1.5, 2.0]), 0.7
    gap = ebm.posterior_gap(KEY, model, guide, {"theta": theta}, jnp.asarray(v), gradient=True)
    p, q = (1 / (1 + np.exp(-x)) for x in (theta * v, 0.3 + v))
    np.testing.assert_allclose(gap.tv, np.abs(p - q), rtol=1e-8)
    expected = (1 + 1.5 * np.abs(theta * v)) * gap.tv
    np.testing.assert_allclose(gap.vages.range_bound, expected, rtol=1e-8)
    mean_q, mean_p = (x + theta * v * x * (1 - x) for x in (q, p))  # E h + Cov(θ h - v, h v)
    np.testing.assert_allclose(gap.vages.bias, np.abs(mean_q - mean_p), rtol=1e-8)
