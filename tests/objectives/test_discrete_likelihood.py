# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood of discrete and mixed sites, by enumeration."""

import itertools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.nn import softplus
from jax.scipy.special import logsumexp
from likelihood_cases import EDGES, KEY, assert_likelihood, ising, ising_log_density
from oracles import binary_states, jit

import numpyro_ebm as ebm

ISING = {"J": np.linspace(-0.6, 0.8, len(EDGES)), "field": np.linspace(-0.5, 0.4, 9)}


def ising_plated(data):
    """The same with its units in a plate, row axis last."""
    p = {
        "J": numpyro.param("J", jnp.zeros(len(EDGES))),
        "field": numpyro.param("field", jnp.zeros(9)),
    }
    with numpyro.plate("data", len(data), dim=-1):
        with numpyro.plate("units", 9, dim=-2):
            v = numpyro.sample("v", ebm.Counting(), obs=data.T)
        ebm.energy("E", -ising_log_density(p, v.T))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("model", [ising, pytest.param(ising_plated, marks=pytest.mark.slow)])
def test_ising_by_enumeration(model):
    data = np.random.default_rng(0).integers(0, 2, size=(5, 9))
    states = np.array(list(itertools.product([0, 1], repeat=9)))

    def expected(p):
        return logsumexp(ising_log_density(p, states)) - jnp.mean(ising_log_density(p, data))

    assert_likelihood(model, ISING, data, expected, rtol=1e-10)


def potts_log_density(p, x):
    """Three units of three values, in a matrix (2 x 2) less one: fields and equal pairs."""
    pairs = [(0, 1), (1, 2), (0, 2)]
    equal = sum(p["J"][k] * (x[..., i] == x[..., j]) for k, (i, j) in enumerate(pairs))
    return equal + jnp.sum(p["field"][jnp.arange(3), x], -1)


def potts(data):
    p = {"J": numpyro.param("J", jnp.zeros(3)), "field": numpyro.param("field", jnp.zeros((3, 3)))}
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(3, (3,)), obs=data)
        ebm.energy("E", -potts_log_density(p, v))


@pytest.mark.usefixtures("x64")
def test_potts_of_three_values():
    rng = np.random.default_rng(1)
    params = {"J": np.array([0.7, -0.4, 0.2]), "field": rng.normal(size=(3, 3))}
    data = rng.integers(0, 3, size=(6, 3))
    states = np.array(list(itertools.product(range(3), repeat=3)))

    def expected(p):
        return logsumexp(potts_log_density(p, states)) - jnp.mean(potts_log_density(p, data))

    assert_likelihood(potts, params, data, expected, rtol=1e-10)


def shifted_count(data):
    """A proper base measure whose lowest value is 2."""
    rate = numpyro.param("rate", jnp.array(0.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", dist.DiscreteUniform(2, 5), obs=data)
        ebm.energy("E", -rate * v)


@pytest.mark.usefixtures("x64")
def test_a_base_measure_of_its_own_counts():
    data, values = np.array([2, 5, 3]), np.arange(2, 6)

    def expected(p):
        return logsumexp(p["rate"] * values) - p["rate"] * np.mean(data)

    assert_likelihood(shifted_count, {"rate": 0.3}, data, expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_binary_rbm_sums_its_latents_out():
    def rbm(data):
        W = numpyro.param("W", jnp.zeros((3, 2)))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
            h = numpyro.sample("h", ebm.Counting(event_shape=(2,)))
            ebm.energy("E", -jnp.sum((v @ W) * h, -1))

    data = np.array([[0, 1, 1], [1, 1, 0]])

    def free(p, v):
        return jnp.sum(softplus(v @ p["W"]), -1)

    def expected(p):
        return logsumexp(free(p, binary_states(3))) - jnp.mean(free(p, data))

    W = np.random.default_rng(0).normal(size=(3, 2))
    assert_likelihood(rbm, {"W": W}, data, expected, ebm.MaximumLikelihood(ebm.Enumerated()))


def mixed(real, bits, order=("s", "v")):
    """A real site and a binary one, coupled, in either order."""
    mean, tilt = numpyro.param("mean", jnp.array(0.0)), numpyro.param("tilt", jnp.array(0.0))
    precision = numpyro.param("precision", jnp.array(1.0))
    with numpyro.plate("data", len(real)):
        x = {}
        for name in order:
            fn, obs = {"v": (ebm.Lebesgue(), real), "s": (ebm.Counting(), bits)}[name]
            x[name] = numpyro.sample(name, fn, obs=obs)
        square = (x["v"] - mean * x["s"]) ** 2
        ebm.energy("E", 0.5 * precision * square - tilt * x["s"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", [("s", "v"), ("v", "s")])
def test_one_real_and_one_binary_site(order):
    rng = np.random.default_rng(0)
    real, bits = rng.normal(size=6), rng.integers(0, 2, size=6)
    params = {"mean": 1.4, "tilt": -0.6, "precision": 2.0}

    def expected(p):
        log_z = softplus(p["tilt"]) + 0.5 * jnp.log(2 * jnp.pi / p["precision"])
        square = (real - p["mean"] * bits) ** 2
        return log_z + jnp.mean(0.5 * p["precision"] * square - p["tilt"] * bits)

    def model(real, bits):
        return mixed(real, bits, order)

    assert_likelihood(model, params, (real, bits), expected)


@pytest.mark.usefixtures("x64")
def test_covariates_give_every_row_a_normalizer_of_its_own():
    def regression(x, data):
        w = numpyro.param("w", jnp.array(0.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * jnp.exp(w * x) * (v - w * x) ** 2)

    x, data = np.random.default_rng(0).normal(size=(2, 7))

    def expected(p):
        return -jnp.mean(dist.Normal(p["w"] * x, jnp.exp(-0.5 * p["w"] * x)).log_prob(data))

    assert_likelihood(regression, {"w": 0.7}, (x, data), expected)
    svi = ebm.EnergySVI(regression, None, numpyro.optim.SGD(0.1), ebm.MaximumLikelihood())
    state = svi.init(KEY, x, data, init_params={"w": 0.7})  # and in every round of a fit
    np.testing.assert_allclose(jit(svi.update)(state, x, data)[1], expected({"w": 0.7}), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_subsampled_plate_counts_its_own_rows():
    whole = np.random.default_rng(0).normal(size=20)

    def model(data):
        precision = numpyro.param("precision", jnp.array(1.0))
        with numpyro.plate("data", 20, subsample_size=5):
            batch = numpyro.subsample(data, event_dim=0)
            v = numpyro.sample("v", ebm.Lebesgue(), obs=batch)
            ebm.energy("E", 0.5 * precision * v**2)

    objective, params = ebm.MaximumLikelihood(), {"precision": jnp.array(2.5)}
    problem = objective.prepare(KEY, params, model, None, (jnp.asarray(whole),), {})
    rows = np.asarray(problem.row_model.visible_values["v"])
    assert rows.shape == (5,) and np.isin(rows, whole).all()
    expected = -np.mean(dist.Normal(0, 2.5**-0.5).log_prob(rows))
    loss = jit(lambda p: objective.energy_loss(KEY, p, problem))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-8)
