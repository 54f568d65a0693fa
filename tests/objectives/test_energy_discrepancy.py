# SPDX-License-Identifier: Apache-2.0
"""Energy discrepancy against closed forms and tables of all states, bits and numbers together."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.nn import softmax
from jax.scipy.special import logsumexp
from neighbour_cases import site_kernel
from numpyro.distributions import constraints
from oracles import assert_unbiased, draws, flat, jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.objectives.energy_discrepancy import EnergyDiscrepancy

KEY = jax.random.key(3)
RNG = np.random.default_rng(4)

BITS = np.array(list(itertools.product([0, 1], repeat=3)))
PAIRS = np.array([[0, 1], [0, 2], [1, 2]])
ISING = {"J": np.array([0.7, -0.4, 0.5]), "b": np.array([0.3, -0.6, 0.2])}


def ising(x):
    J, b = numpyro.param("J", jnp.zeros(3)), numpyro.param("b", jnp.zeros(3))
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Counting(event_shape=(3,)), obs=x)
        s = 2.0 * x - 1.0
        ebm.energy("E", -(s[:, PAIRS[:, 0]] * s[:, PAIRS[:, 1]]) @ J - s @ b)


def ising_table(p):
    s = 2.0 * BITS - 1.0
    return (s[:, PAIRS[:, 0]] * s[:, PAIRS[:, 1]]) @ p["J"] + s @ p["b"]


def ising_kernel(probability):
    q = site_kernel("uniform", 2, probability)
    return np.kron(np.kron(q, q), q)


def energy_discrepancy(f, q):
    """ED of every state x, its definition: -f(x) + E_y log Σ_x' q(y | x') exp f(x')."""
    return q @ jnp.log(q @ jnp.exp(f)) - f


def finite(f, q, num_samples, w):
    """The loss with M perturbations of every state, summed over all of them."""
    total = 0.0
    for others in itertools.product(range(len(f)), repeat=num_samples):
        chance = q @ np.prod(q[:, list(others)], axis=1)  # of x^1, …, x^M given x
        ratios = sum(jnp.exp(f[j] - f) for j in others)
        total = total + chance * jnp.log((w + ratios) / num_samples)
    return total


def arrays(params):
    return {k: jnp.asarray(x) for k, x in params.items()}


def value_and_gradient(objective, model, params, *args):
    """``key -> (value, gradient)``, compiled by `draws`."""
    loss = lambda params, key: objective.loss(key, params, model, None, *args)  # noqa: E731
    return lambda key: jax.value_and_grad(loss)(params, key)


# The loss of finite M ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples, w", [(1, 1.0), (2, 1.0), (2, 0.3), (2, 0.0)])
def test_bits_equal_enumeration(x64, num_samples, w):
    params = arrays(ISING)
    data = np.array([0, 0, 3, 5, 7, 6])
    objective = EnergyDiscrepancy(num_samples=num_samples, w=w, flip_probability=0.3)

    def expected(params):
        return jnp.mean(finite(ising_table(params), ising_kernel(0.3), num_samples, w)[data])

    samples = draws(value_and_gradient(objective, ising, params, BITS[data]), KEY, 4_000)
    assert_unbiased(samples, flat(jit(jax.value_and_grad(expected))(params)), f"M = {num_samples}")


@pytest.mark.parametrize("perturbation, low", [("uniform", 2), ("cyclical", 0), ("ordinal", 2)])
def test_values_equal_enumeration(x64, perturbation, low):
    """One coordinate of four values, which need not start at zero."""
    q = site_kernel(perturbation, 4, 0.4)
    params = {"logits": jnp.asarray(RNG.normal(size=4))}
    data = np.array([0, 0, 1, 3])

    def model(x):
        logits = numpyro.param("logits", jnp.zeros(4))
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", dist.DiscreteUniform(low, low + 3), obs=x)
            ebm.energy("E", -logits[x - low])

    objective = EnergyDiscrepancy(num_samples=2, flip_probability=0.4, perturbation=perturbation)
    expected = jit(jax.value_and_grad(lambda p: jnp.mean(finite(p["logits"], q, 2, 1.0)[data])))
    samples = draws(value_and_gradient(objective, model, params, data + low), KEY, 4_000)
    assert_unbiased(samples, flat(expected(params)), perturbation)


@pytest.mark.slow
def test_minimal_at_the_truth(x64):
    """ED in the population; and, at w = 1, its estimate with one or two perturbations as well."""
    params = arrays(ISING)
    p = softmax(ising_table(params))
    q = ising_kernel(0.3)

    def gradient(loss):
        return np.asarray(flat(jit(jax.grad(lambda x: p @ loss(ising_table(x))))(params)))

    np.testing.assert_allclose(gradient(lambda f: energy_discrepancy(f, q)), 0.0, atol=1e-12)
    for num_samples in (1, 2):
        unbiased = gradient(lambda f, m=num_samples: finite(f, q, m, 1.0))
        np.testing.assert_allclose(unbiased, 0.0, atol=1e-12)
        for w in (0.0, 0.3, 3.0):
            biased = gradient(lambda f, m=num_samples, w=w: finite(f, q, m, w))
            assert np.max(np.abs(biased)) > 1e-3

    objective = EnergyDiscrepancy(num_samples=2, flip_probability=0.3)

    def population(params, key):
        def row(key, x):
            return objective.loss(key, params, ising, None, x[None])

        return p @ jax.vmap(row)(jax.random.split(key, 8), BITS)

    samples = draws(lambda key: jax.grad(population)(params, key), KEY, 2_000)
    assert_unbiased(samples, np.zeros(6), "population")


def test_uniform_perturbation_is_maximum_likelihood():
    """At ε = (K - 1)/K the closed form of ED is log Z - f, up to a constant."""
    f = ising_table(ISING)
    ed = energy_discrepancy(f, ising_kernel(0.5))
    np.testing.assert_allclose(ed, logsumexp(f) - f - np.log(8), rtol=1e-5)


# The limit of many samples -----------------------------------------------------------------------


@pytest.mark.slow
def test_bits_tend_to_the_definition(x64):
    params = arrays(ISING)
    data = np.array([0, 0, 3, 5, 7, 6])
    objective = EnergyDiscrepancy(num_samples=2_000, w=0.0, flip_probability=0.2)

    def expected(params):
        return jnp.mean(energy_discrepancy(ising_table(params), ising_kernel(0.2))[data])

    samples = draws(value_and_gradient(objective, ising, params, BITS[data]), KEY, 100)
    assert_unbiased(samples, flat(jit(jax.value_and_grad(expected))(params)))


def gaussian(v):
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        ebm.energy("E", 0.5 * precision * v**2)


def test_gaussian_tends_to_its_closed_form(x64):
    data, t = RNG.normal(size=20), 0.8

    def expected(params):
        precision = params["precision"]
        smoothed = precision / (1.0 + precision * t**2)
        energy_of_y = 0.5 * smoothed * (data**2 + t**2) + 0.5 * jnp.log1p(precision * t**2)
        return jnp.mean(0.5 * precision * data**2 - energy_of_y)

    params = {"precision": jnp.array(1.7)}
    objective = EnergyDiscrepancy(t, num_samples=1_000, w=0.0)
    samples = draws(value_and_gradient(objective, gaussian, params, data), KEY, 60)
    assert_unbiased(samples, flat(jit(jax.value_and_grad(expected))(params)))


@pytest.mark.slow
def test_small_noise_is_score_matching(x64):
    """ED/t² against ½s² + ∂s, on the closed form of the Gaussian and on the library."""
    data, t, params = RNG.normal(size=20), 0.03, {"precision": 1.3}
    objective = EnergyDiscrepancy(t, num_samples=200, w=0.0)
    samples = draws(value_and_gradient(objective, gaussian, params, data), KEY, 400)
    expected = np.array([np.mean(0.5 * 1.3**2 * data**2) - 1.3, np.mean(1.3 * data**2) - 1.0])
    # The bias is of order t² and 1/M.
    error = 4.0 * samples.std(0) / np.sqrt(len(samples)) / t**2 + 0.02
    assert np.all(np.abs(samples.mean(0) / t**2 - expected) < error)


@pytest.mark.slow
def test_bits_and_numbers_together(x64):
    """p(b, v) ∝ exp(a b - ½ (v - m b)²), each site perturbed in its own way."""
    t, flip = 0.7, 0.25
    b, v = np.array([0, 1, 1, 0, 1]), np.array([0.2, 1.5, -0.3, -1.0, 0.9])
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()

    def model(b, v):
        a, m = numpyro.param("a", 0.0), numpyro.param("m", 0.0)
        with numpyro.plate("data", len(b)):
            b = numpyro.sample("b", ebm.Counting(), obs=b)
            v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
            ebm.energy("E", 0.5 * (v - m * b) ** 2 - a * b)

    def expected(p):
        q, total = site_kernel("uniform", 2, flip), 0.0
        y = v[:, None] + t * nodes  # (rows, nodes)
        for bit in (0, 1):
            # log Σ_b' q(bit | b') ∫ q(y | v') p̃(b', v') dv'
            terms = [
                np.log(q[bit, c]) + p["a"] * c - 0.5 * (y - p["m"] * c) ** 2 / (1.0 + t**2)
                for c in (0, 1)
            ]
            inner = logsumexp(jnp.stack(terms), axis=0) - 0.5 * np.log(1.0 + t**2)
            total = total + q[bit][b] * (inner @ weights)
        return jnp.mean(total - p["a"] * b + 0.5 * (v - p["m"] * b) ** 2)

    params = {"a": jnp.array(0.4), "m": jnp.array(1.2)}
    objective = EnergyDiscrepancy(t, num_samples=2_000, w=0.0, flip_probability=flip)
    samples = draws(value_and_gradient(objective, model, params, b, v), KEY, 100)
    assert_unbiased(samples, flat(jit(jax.value_and_grad(expected))(params)))


# Supports, marginals, compilation, errors --------------------------------------------------------


@pytest.mark.slow
def test_positive_sites_are_perturbed_in_their_unconstrained_coordinates(x64):
    def log_normal(v):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(v)):
            v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=v)
            ebm.energy("E", 0.5 * precision * jnp.log(v) ** 2 + jnp.log(v))

    u, params = RNG.normal(size=9), {"precision": 1.4}
    loss = EnergyDiscrepancy(0.5).loss
    compiled = jit(loss, static_argnums=(2, 3))
    on_u = compiled(KEY, params, gaussian, None, u)
    on_v = compiled(KEY, params, log_normal, None, np.exp(u))
    np.testing.assert_allclose(on_v, on_u, rtol=1e-10)
    np.testing.assert_allclose(loss(KEY, params, gaussian, None, u), on_u, rtol=1e-10)  # eager


def test_latents_summed_out(x64):
    """The same density with and without its latent bit: the same loss at the same key."""
    data, params = RNG.normal(size=(6, 2)), {"c": jnp.array([0.7, -0.4])}

    def latent(v):
        c = numpyro.param("c", jnp.zeros(2))
        with numpyro.plate("data", len(v)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=v)
            h = numpyro.sample("h", ebm.Counting())
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - h * (v @ c))

    def summed(v):
        c = numpyro.param("c", jnp.zeros(2))
        with numpyro.plate("data", len(v)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=v)
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - jax.nn.softplus(v @ c))

    loss = jit(EnergyDiscrepancy(0.5).loss, static_argnums=(2, 3))
    expected = loss(KEY, params, summed, None, data)
    np.testing.assert_allclose(loss(KEY, params, latent, None, data), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"noise_scale": 0.0},
        {"noise_scale": -1.0},
        {"noise_scale": float("nan")},
        {"num_samples": 0},
        {"num_samples": 2.0},
        {"num_samples": True},
        {"w": -0.1},
        {"w": float("nan")},
        {"flip_probability": 0.0},
        {"flip_probability": 1.0},
        {"perturbation": "random"},
        {"perturbation": None},
    ],
)
def test_bad_options(options):
    (name,) = options
    with pytest.raises(ModelError, match=f"EnergyDiscrepancy: `{name}` must"):
        EnergyDiscrepancy(**options)


def test_bad_models():
    def counts(x):
        a = numpyro.param("a", 0.1)
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", dist.Poisson(2.0), obs=x)
            ebm.energy("E", a * x)

    with pytest.raises(ModelError, match="'x'.*infinitely many"):
        EnergyDiscrepancy().loss(KEY, {"a": 0.1}, counts, None, np.ones(3, int))

    def nothing_observed(v):
        with numpyro.plate("data", 3):
            ebm.energy("E", numpyro.param("a", 0.1) * numpyro.sample("v", ebm.Lebesgue()) ** 2)

    with pytest.raises(ModelError, match="no observed site"):
        EnergyDiscrepancy().loss(KEY, {"a": 0.1}, nothing_observed, None, None)
