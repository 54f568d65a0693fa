# SPDX-License-Identifier: Apache-2.0
"""Sums over latents with supports and event dimensions of every kind, against loops in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp

import numpyro_ebm as ebm
from numpyro_ebm.marginals.langevin_refinement import LangevinRefinement
from numpyro_ebm.model.reading import read_model

DATA = np.array([0.4, 1.7, 3.0])


def model_of(latent, positive):
    """Visible values that are real or positive, two latent units in one event dimension."""

    def model(data=None):
        with numpyro.plate("data", 1 if data is None else len(data)):
            support = dist.constraints.positive if positive else dist.constraints.real
            v = numpyro.sample("v", ebm.Lebesgue(support=support), obs=data)
            h = numpyro.sample("h", latent)
            ebm.energy("E", energy(v, h[:, 0], h[:, 1]))

    return model


def energy(v, a, b):
    return 0.5 * (v - 0.3 * a) ** 2 + 0.2 * a * b * v - 0.1 * b + 0.4 * v


LATENTS = {
    "from 0": (ebm.Counting(3, (2,)), range(3), 0.0),
    "bits": (ebm.Counting(2, (2,)), range(2), 0.0),
    "from 3": (dist.DiscreteUniform(3, 5).expand([2]).to_event(1), range(3, 6), np.log(3.0)),
    "3 and 4": (dist.DiscreteUniform(3, 4).expand([2]).to_event(1), range(3, 5), np.log(2.0)),
    "from -2": (dist.DiscreteUniform(-2, 0).expand([2]).to_event(1), range(-2, 1), np.log(3.0)),
}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", LATENTS)
def test_units_are_summed_over_their_values_and_jacobians_are_kept(x64, name, positive):
    latent, values, log_base = LATENTS[name]
    row_model = read_model(model_of(latent, positive), (DATA,), {})
    states = np.array(list(itertools.product(values, values)))
    terms = -energy(DATA, states[:, :1], states[:, 1:]) - 2 * log_base
    expected = logsumexp(terms, 0)
    marginal = ebm.Enumerated()
    marginal.check(row_model, None, 1)
    found = jax.jit(lambda: marginal.log_density(row_model, {}, {"v": jnp.asarray(DATA)}))()
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    u = jnp.log(DATA) if positive else jnp.asarray(DATA)
    free = jax.jit(lambda u: marginal.unconstrained_log_density(row_model, {}, {"v": u}))(u)
    np.testing.assert_allclose(free - found, np.log(DATA) if positive else 0.0, atol=1e-9)
    draws = marginal.draw(jax.random.key(3), row_model, {}, {"v": jnp.tile(DATA, (50, 1))}, 50)
    assert set(np.unique(draws["h"])) <= set(values)


def test_kernels_move_on_the_marginal_in_unconstrained_coordinates():
    latent, values, log_base = LATENTS["from 3"]
    model = ebm.fixed(model_of(latent, True), {})
    _, log_density = ebm.MALA(model, step_size=0.1)._read(model, (), {})
    states = np.array(list(itertools.product(values, values)))
    expected = logsumexp(-energy(1.7, states[:, 0], states[:, 1])) - 2 * log_base + np.log(1.7)
    np.testing.assert_allclose(log_density({"v": jnp.log(jnp.array([1.7]))}), expected, rtol=1e-5)


def separable(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, (2, 1)))[..., 0]
        ebm.energy("E", 0.5 * v**2 - h[:, 0] * (v - 1.0) + 2.0 * h[:, 1])


def mixture(data):
    """One of two values, and a normal number around it; the second is wider."""
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, (1,)))[:, 0]
        z = numpyro.sample("z", ebm.Lebesgue())
        ebm.energy("E", 0.5 * (z - 2.0 * h) ** 2 / (1.0 + 3.0 * h) + 0.5 * (v - z) ** 2)


@pytest.mark.parametrize("model", [separable, mixture])
def test_units_are_drawn_with_their_probabilities(model):
    num = 4_000
    row_model = read_model(model, (DATA,), {})
    marginal = ebm.Enumerated() if model is separable else ebm.GaussianLatents()
    marginal.check(row_model, None, 1)
    values = {"v": jnp.tile(jnp.asarray(DATA, jnp.float32), (num, 1))}
    draws = jax.jit(lambda key: marginal.draw(key, row_model, {}, values, num))(jax.random.key(3))
    if model is separable:
        logits = np.stack([DATA - 1.0, -2.0 + 0 * DATA], -1)[..., None]
        p = 1 / (1 + np.exp(-logits))
        found = marginal.log_density(row_model, {}, {"v": jnp.asarray(DATA)})
        log_sum = np.sum(np.logaddexp(0.0, logits), (1, 2)) - 0.5 * DATA**2
        np.testing.assert_allclose(found, log_sum, rtol=1e-5)
    else:  # ∫ dz: v is normal around 0 with variance 2, or around 2 with variance 5
        logits = 0.5 * np.log(4 / 5 * 2) - (DATA - 2) ** 2 / 10 + DATA**2 / 4
        p = 1 / (1 + np.exp(-logits[:, None]))
        # Given the state, z is normal around what prior and v agree on.
        state, precision = draws["h"][..., 0], 1.0 / (1.0 + 3.0 * draws["h"][..., 0]) + 1.0
        center = (2.0 * state / (1.0 + 3.0 * state) + DATA) / precision
        noise = np.asarray((draws["z"] - center) * np.sqrt(precision))
        for one in (state == 0, state == 1):
            x = noise[one]
            assert abs(x.mean()) < 4 / len(x) ** 0.5 and abs(x.var() - 1) < 4 * (2 / len(x)) ** 0.5
    z = (np.mean(draws["h"], 0) - p) / np.sqrt(p * (1 - p) / num)
    assert np.abs(z).max() < 4


def test_refinement_starts_at_the_particles_on_every_support():
    """A step of no size goes nowhere, of positive latents as well."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue(support=dist.constraints.positive))
            ebm.energy("E", 0.5 * (v - h) ** 2 + h)

    row_model = read_model(model, (DATA,), {})
    latent = {"h": jnp.array([[0.2, 3.0, 1.0], [5.0, 0.1, 2.0]])}
    refine = LangevinRefinement(1, 1e-12)
    found = refine(jax.random.key(3), row_model, {}, {"v": jnp.asarray(DATA)}, latent)
    np.testing.assert_allclose(found["h"], latent["h"], rtol=1e-4)


def test_units_are_drawn_beside_what_they_share():
    """Two units, 3 or 4, that read two sites of their row: P(h₁ = h₂) = σ(6)² + σ(-6)²."""

    def model(data):
        with numpyro.plate("data", 1, dim=-1):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            z = numpyro.sample("z", ebm.Counting())
            g = numpyro.sample("g", ebm.Counting(2, (1,)))[:, 0]
            ebm.energy("E0", 0.5 * v**2)
            with numpyro.plate("units", 2, dim=-2):
                h = numpyro.sample("h", dist.DiscreteUniform(3, 4))
                ebm.energy("E", -3.0 * (2.0 * h - 7) * (2.0 * z - 1) * (2.0 * g - 1))

    row_model = read_model(model, (jnp.zeros(1),))
    values = {"v": jnp.zeros((2_000, 1))}
    draws = ebm.Enumerated().draw(jax.random.key(4), row_model, {}, values, 2_000)
    h = np.asarray(draws["h"])[:, :, 0]
    on = jax.nn.sigmoid(6.0)
    assert set(np.unique(h)) == {3, 4}
    assert abs(np.mean(h[:, 0] == h[:, 1]) - (on**2 + (1 - on) ** 2)) < 0.02
    signs = (2.0 * h[:, 0] - 7) * (2.0 * draws["z"][:, 0] - 1) * (2.0 * draws["g"][:, 0, 0] - 1)
    assert abs(signs.mean() - np.tanh(3.0)) < 0.02


def test_states_and_gaussian_values_are_drawn_apart():
    def model(data):
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            k = numpyro.sample("k", ebm.Counting())
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", 0.5 * v**2 + 0.5 * h**2 + 0.0 * k)

    row_model = read_model(model, (jnp.zeros(1),))
    values = {"v": jnp.zeros((4_000, 1))}
    draws = ebm.GaussianLatents().draw(jax.random.key(4), row_model, {}, values, 4_000)
    k, h = (np.asarray(draws[x])[:, 0] for x in "kh")
    assert abs(np.corrcoef(k, h)[0, 1]) < 5 / 4_000**0.5
