# SPDX-License-Identifier: Apache-2.0
"""The relaxed ELBO on Bernoulli latents."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from guide_cases import GRBM_NAMES, arrays, loss_of, minimise, split
from jax.nn import sigmoid, softplus
from oracles import assert_unbiased, draws

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_relaxed_elbo_has_no_gradient_at_the_posterior_whatever_the_draw(temperature):
    system = oracles.with_learned_guide(oracles.grbm_system())
    loss = loss_of(ebm.RelaxedELBO(temperature), system, GRBM_NAMES)
    _, exact = split(system, GRBM_NAMES)
    gradients = draws(lambda key: jax.grad(lambda p: loss(key, p))(exact), jax.random.key(0), 50)
    np.testing.assert_allclose(gradients, 0.0, atol=1e-10)
    away = {**exact, "d": exact["d"] + 0.1}
    moved = draws(lambda key: jax.grad(lambda p: loss(key, p))(away), jax.random.key(0), 50)
    assert np.max(np.abs(moved)) > 1e-3


def test_relaxed_elbo_drives_a_guide_to_the_posterior():
    system = oracles.with_learned_guide(oracles.grbm_system(num_rows=100, seed=1))
    loss = loss_of(ebm.RelaxedELBO(0.5), system, GRBM_NAMES)
    found = minimise(loss, {"A": jnp.zeros((2, 3)), "d": jnp.zeros(3)}, 2_000, 0.05)
    np.testing.assert_allclose(found["A"], system.params["W"], atol=0.02)
    np.testing.assert_allclose(found["d"], system.params["c"], atol=0.02)


def test_relaxed_elbo_sums_over_hidden_plates_and_weighs_rows():
    """Its value, at weights of the rows, is that of the formula at the same logistic noise."""
    system = oracles.grbm_system(num_rows=3)

    def guide(data, *, num_hidden=3):
        A = numpyro.param("A", jnp.zeros((2, 3)))
        with numpyro.plate("data", len(data), dim=-1):
            v = ebm.visible("v", data)
            with numpyro.plate("hidden", 3, dim=-2):
                numpyro.sample("h", dist.Bernoulli(logits=(v @ A).T))

    A = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3)))
    weights = jnp.array([0.5, 2.0, 3.0])
    plated = system._replace(model=oracles.grbm_plated, guide=guide)
    joined = system._replace(guide=oracles.learned_grbm_guide)
    values = []
    for case, extra in ((plated, {}), (joined, {"d": jnp.zeros(3)})):
        loss = loss_of(ebm.RelaxedELBO(0.7), case, GRBM_NAMES)
        samples = draws(
            lambda key, loss=loss, extra=extra: loss(key, {"A": A, **extra}, weights),
            jax.random.key(3),
            20_000,
        )
        values.append(samples[:, 0])
    u = jnp.linspace(1e-7, 1 - 1e-7, 200_001)
    logistic = jnp.log(u) - jnp.log1p(-u)
    p = arrays(system.params)

    def row(v):
        logits, field = v @ A, v @ p["W"] + p["c"]
        # Linear in h, unit by unit: its mean is all that matters.
        mean = jax.vmap(lambda x: jnp.mean(sigmoid((x + logistic) / 0.7)))(logits)
        energy = 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2)
        return jnp.sum(mean * (logits - field) - softplus(logits)) + energy

    expected = np.mean(weights * jnp.stack([row(v) for v in jnp.asarray(system.data)]))
    for samples in values:
        assert_unbiased(samples[:, None], np.array([expected]), "relaxed ELBO")


PAIR = {"a": 0.4, "b": -0.8, "u": 2.5}


def pair_model(data):
    """Two coupled binary sites: p(h1, h2 | v) is proportional to exp(a h1 + b h2 + u h1 h2)."""
    numpyro.param("theta", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h1 = numpyro.sample("h1", ebm.Counting())
        h2 = numpyro.sample("h2", ebm.Counting())
        field = PAIR["a"] * h1 + PAIR["b"] * h2 + PAIR["u"] * h1 * h2
        ebm.energy("E", 0.5 * v**2 - field)


def autoregressive_guide(data):
    p, q, r = (numpyro.param(name, 0.0) for name in "pqr")
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        h1 = numpyro.sample("h1", dist.Bernoulli(logits=p + 0.0 * v))
        numpyro.sample("h2", dist.Bernoulli(logits=q + r * h1))


def test_relaxed_elbo_drives_an_autoregressive_guide_to_the_posterior():
    """The gradient also flows from the later sites of the guide back through the earlier draws."""
    system = oracles.System(
        pair_model, autoregressive_guide, {"theta": 1.0}, np.zeros(200), *[None] * 3
    )
    loss = loss_of(ebm.RelaxedELBO(0.1), system, ("theta",))
    found = minimise(loss, dict.fromkeys("pqr", jnp.array(0.0)), 1_500, 0.05)
    a, b, u = PAIR.values()
    exact = {"p": a + softplus(b + u) - softplus(b), "q": b, "r": u}
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, atol=0.1)
