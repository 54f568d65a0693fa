# SPDX-License-Identifier: Apache-2.0
"""Objectives of discrete sites against tables of all states, and an Ising model learned."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.nn import softmax
from jax.scipy.special import logsumexp
from oracles import jit
from registry.objectives import formulas

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.objectives import PseudoLikelihood
from numpyro_ebm.objectives.energy_discrepancy import EnergyDiscrepancy

KEY = jax.random.key(0)
RNG = np.random.default_rng(2)


class System(NamedTuple):
    """A model on a finite space, and all of it written down as a table.

    - **model** - as a user writes it.
    - **params** - numpy parameter values.
    - **table** - params -> log p̃ of every state, one axis for each coordinate.
    - **pack** - indices of the rows into the table, (rows, coordinates), -> the model's arguments.
    """

    model: Callable
    params: dict
    table: Callable
    pack: Callable

    def states(self):
        """All states as indices, (states, coordinates)."""
        shape = self.table(self.params).shape
        return np.indices(shape).reshape(len(shape), -1).T

    def rows(self, num_rows=7):
        return RNG.permutation(self.states())[:num_rows]


BITS = np.array(list(itertools.product([0, 1], repeat=3)), float)
HIDDEN = np.array(list(itertools.product([0, 1], repeat=2)), float)

ISING_PARAMS = {"J": RNG.normal(size=(3,)), "b": RNG.normal(size=(3,))}
RBM_PARAMS = {"W": RNG.normal(size=(3, 2)), "b": RNG.normal(size=3), "c": RNG.normal(size=2)}
MANY_PARAMS = {"xy": RNG.normal(size=(3, 4)), "xx": RNG.normal(size=(3, 3)), "bond": np.array(0.7)}
PAIRS = np.array([[0, 1], [0, 2], [1, 2]])


def declare(params):
    return {k: numpyro.param(k, jnp.zeros_like(x)) for k, x in params.items()}


def ising(x):
    p = declare(ISING_PARAMS)
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Counting(event_shape=(3,)), obs=x)
        s = 2.0 * x - 1.0
        ebm.energy("E", -(s[:, PAIRS[:, 0]] * s[:, PAIRS[:, 1]]) @ p["J"] - s @ p["b"])


def ising_table(p):
    s = 2.0 * BITS - 1.0
    return ((s[:, PAIRS[:, 0]] * s[:, PAIRS[:, 1]]) @ p["J"] + s @ p["b"]).reshape(2, 2, 2)


def rbm(x):
    p = declare(RBM_PARAMS)
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Counting(event_shape=(3,)), obs=x)
        h = numpyro.sample("h", ebm.Counting(event_shape=(2,)))
        ebm.energy("E", -x @ p["b"] - h @ p["c"] - jnp.sum(x @ p["W"] * h, -1))


def plates(x):
    """The same density with pixels and hidden units in plates of their own."""
    p = declare(RBM_PARAMS)
    pixels, units = numpyro.plate("pixels", 3, dim=-2), numpyro.plate("units", 2, dim=-2)
    with numpyro.plate("data", x.shape[-1], dim=-1):
        with pixels:
            x = numpyro.sample("x", dist.Bernoulli(logits=p["b"][:, None]), obs=x)
        with units:
            h = numpyro.sample("h", ebm.Counting())
            ebm.energy("E", -h * (p["c"][:, None] + p["W"].T @ x))


def rbm_table(p):
    row_model = (BITS @ p["b"])[:, None] + HIDDEN @ p["c"] + BITS @ p["W"] @ HIDDEN.T
    return logsumexp(row_model, axis=1).reshape(2, 2, 2)


def plates_table(p):
    return rbm_table(p) - jnp.sum(jnp.logaddexp(0.0, p["b"]))  # Bernoulli is normalised


def many(x, y, z):
    """Three sites: two 3-valued coordinates, one with values 2 to 5, and a bit."""
    p = declare(MANY_PARAMS)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", ebm.Counting(3, (2,)), obs=x)
        y = numpyro.sample("y", dist.DiscreteUniform(2, 5), obs=y)
        z = numpyro.sample("z", dist.Bernoulli(0.3), obs=z)
        pair = p["xy"][x[:, 0], y - 2] + p["xx"][x[:, 0], x[:, 1]]
        ebm.energy("E", -pair - p["bond"] * z * x[:, 1])


def many_table(p):
    x0, x1, y, z = np.indices((3, 3, 4, 2))
    base = np.log(0.25) + np.where(z, np.log(0.3), np.log(0.7))
    return p["xy"][x0, y] + p["xx"][x0, x1] + p["bond"] * z * x1 + base


SYSTEMS = {
    "ising": System(ising, ISING_PARAMS, ising_table, lambda i: (i,)),
    "latents": System(rbm, RBM_PARAMS, rbm_table, lambda i: (i,)),
    "plates": System(plates, RBM_PARAMS, plates_table, lambda i: (i.T,)),
    "many": System(
        many, MANY_PARAMS, many_table, lambda i: (i[:, :2], i[:, 2] + 2, i[:, 3].astype(float))
    ),
}


CASES = [(name, system) for name in formulas("discrete") for system in SYSTEMS]
CASES += [(name, system) for name in formulas("binary") for system in ("ising", "plates")]
FORMULAS = formulas("discrete", "binary")


def arrays(params):
    return {k: jnp.asarray(x) for k, x in params.items()}


def assert_close(a, b, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), a, b)


@pytest.mark.parametrize("name, system", CASES)
def test_equals_enumeration(x64, name, system):
    """Value and gradient, in any order of the rows, compiled or not."""
    eager, system = system == "ising", SYSTEMS[system]  # op by op is slow
    index, params, objective = system.rows(), arrays(system.params), FORMULAS[name].make()

    def loss(params, index):
        return objective.loss(KEY, params, system.model, None, *system.pack(index))

    def expected(params):
        return jnp.mean(FORMULAS[name].expected(system.table(params), index))

    compiled = jit(jax.value_and_grad(loss))
    found = compiled(params, index)
    assert_close(found, jax.value_and_grad(expected)(params))
    assert_close(compiled(params, index[::-1]), found)
    if eager:
        assert_close(loss(params, index), found[0])


@pytest.mark.parametrize("name, system", CASES)
def test_minimal_at_the_truth(x64, name, system):
    """Under the model's own law the gradient is zero at its parameters, and only there."""
    system, objective = SYSTEMS[system], FORMULAS[name].make()
    params, states = arrays(system.params), system.states()
    weights = softmax(system.table(params).reshape(-1))

    @jit
    @jax.grad
    def gradient(params):
        def row(index):
            args = system.pack(index[None])
            return objective.loss(KEY, params, system.model, None, *args)

        return weights @ jax.vmap(row)(states)

    assert_close(gradient(params), jax.tree.map(jnp.zeros_like, params))
    elsewhere = gradient(jax.tree.map(lambda x: x + 0.3 * x**2, params))
    assert max(jnp.max(jnp.abs(g)) for g in elsewhere.values()) > 1e-3


def test_many_coordinates_are_mapped_in_pieces(x64):
    """More neighbours than are evaluated at once, with a remainder."""
    data = RNG.integers(0, 2, size=(3, 150))

    def independent(x):
        logits = numpyro.param("logits", jnp.zeros(150))
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", ebm.Counting(event_shape=(150,)), obs=x)
            ebm.energy("E", -x @ logits)

    def loss(logits):
        return PseudoLikelihood().loss(KEY, {"logits": logits}, independent, None, data)

    logits = jnp.asarray(RNG.normal(size=150))
    value, gradient = jit(jax.value_and_grad(loss))(logits)
    p = 1.0 / (1.0 + np.exp(-logits))
    expected = -np.mean(np.sum(np.where(data == 1, np.log(p), np.log1p(-p)), -1))
    assert_close(value, expected)
    assert_close(gradient, p - data.mean(0))


@pytest.mark.parametrize("data", [np.array([True, False, True]), np.array([1, 0, 1], np.uint8)])
def test_bits_of_any_dtype(data):
    def bit(x):
        logit = numpyro.param("logit", 0.0)
        with numpyro.plate("data", 3):
            x = numpyro.sample("x", ebm.Counting(), obs=x)
            ebm.energy("E", -logit * x)

    for formula in FORMULAS.values():
        loss = jit(formula.make().loss, static_argnums=(2, 3))(KEY, {"logit": 0.0}, bit, None, data)
        expected = formula.expected(jnp.zeros(2), data.astype(int)[:, None])
        assert loss == pytest.approx(jnp.mean(expected))


def test_one_value_is_no_choice():
    model, data = one_site(dist.DiscreteUniform(4, 4), np.full(3, 4))
    for make in (EnergyDiscrepancy, *(formula.make for formula in FORMULAS.values())):
        loss = jit(make().loss, static_argnums=(2, 3))(KEY, {"a": 0.1}, model, None, data)
        expected = np.log1p(1 / 16) if make is EnergyDiscrepancy else 0.0
        assert loss == pytest.approx(expected)


def one_site(fn, data):
    def model(x):
        a = numpyro.param("a", 0.1)
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", fn, obs=x)
            ebm.energy("E", a * jnp.reshape(x, (len(x), -1)).sum(-1))

    return model, data


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    "fn, data, message",
    [
        (ebm.Lebesgue(), np.ones(3), "'x'.*ScoreMatching.*Denoising.*NCE"),
        (dist.Normal(0, 1), np.ones(3), "'x'.*ScoreMatching.*Denoising.*NCE"),
        (dist.Poisson(2.0), np.ones(3, int), "'x'.*infinitely many"),
        (dist.DiscreteUniform(np.array([0, 1, 2]), 4), np.full(3, 3), "'x'.*must be the same"),
    ],
)
def test_sites_it_is_not_for(name, fn, data, message):
    model, data = one_site(fn, data)
    objective = FORMULAS[name].make()
    with pytest.raises(ModelError, match=type(objective).__name__ + ".*" + message):
        objective.loss(KEY, {"a": 0.1}, model, None, data)


@pytest.mark.parametrize("name", formulas("binary"))
def test_more_values_than_two(name):
    model, data = one_site(ebm.Counting(3), np.ones(3, int))
    with pytest.raises(ModelError, match="'x' has 3 values.*PseudoLikelihood"):
        FORMULAS[name].make().loss(KEY, {"a": 0.1}, model, None, data)


def test_needs_data_and_exact_values():
    with pytest.raises(ModelError, match="needs values|compares values"):
        PseudoLikelihood(ebm.VaGES()).loss(KEY, RBM_PARAMS, rbm, None, np.ones((3, 3), int))

    def nothing_observed(x):
        with numpyro.plate("data", 3):
            ebm.energy("E", numpyro.param("a", 0.1) * numpyro.sample("x", ebm.Counting()))

    with pytest.raises(ModelError, match="no observed site|does not"):
        PseudoLikelihood().loss(KEY, {"a": 0.1}, nothing_observed, None, None)


# A 4 × 4 Ising model on the torus, one coupling an edge -------------------------------------------

LATTICE = np.arange(16).reshape(4, 4)
NEIGHBOURS = [np.roll(LATTICE, -1, axis) for axis in (0, 1)]
EDGES = np.concatenate([np.stack([LATTICE, x], -1).reshape(-1, 2) for x in NEIGHBOURS])


def lattice(x):
    J = numpyro.param("J", jnp.zeros(len(EDGES)))
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Counting(event_shape=(16,)), obs=x)
        s = 2.0 * x - 1.0
        ebm.energy("E", -(s[:, EDGES[:, 0]] * s[:, EDGES[:, 1]]) @ J)


def moments(couplings, bonds):
    """E[bonds] and their covariance, by enumeration of the 2^16 states."""
    log_weights = bonds @ couplings
    p = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    mean = p @ bonds
    # No BLAS: its threads get in each other's way on a busy machine.
    return p, mean, np.einsum("si,sj->ij", bonds * p[:, None], bonds) - np.outer(mean, mean)


def maximum_likelihood(target, bonds):
    """Newton's method on the exact likelihood."""
    couplings = np.zeros(len(target))
    for _ in range(100):
        _, mean, covariance = moments(couplings, bonds)
        step = np.linalg.solve(covariance, target - mean)
        couplings = couplings + step * min(1.0, 0.5 / np.abs(step).max())
        if np.abs(step).max() < 1e-9:
            return couplings
    raise AssertionError("Newton's method has not converged")


def test_learns_an_ising_model():
    """Root mean square errors of the couplings, beside those of exact maximum likelihood."""
    rng = np.random.default_rng(0)
    spins = 2.0 * ((np.arange(2**16)[:, None] >> np.arange(16)) & 1) - 1.0
    bonds = spins[:, EDGES[:, 0]] * spins[:, EDGES[:, 1]]
    truth = rng.normal(0.2, 0.2, len(EDGES))
    states = rng.choice(2**16, 2_000, p=moments(truth, bonds)[0])
    data = (spins[states] > 0).astype(int)

    def error(couplings):
        return np.sqrt(np.mean((np.asarray(couplings) - truth) ** 2))

    least = error(maximum_likelihood(bonds[states].mean(0), bonds))
    print(f"exact maximum likelihood: {least:.4f}")
    # Over eight data sets: at most 1.12, 1.15 and 1.10 times the error of maximum likelihood.
    for make in (EnergyDiscrepancy, *(formula.make for formula in FORMULAS.values())):
        optim = optax.adam(optax.cosine_decay_schedule(0.05, 300))
        svi = ebm.EnergySVI(lattice, None, optim, make())
        found = error(svi.run(KEY, 300, data, progress_bar=False).params["J"])
        print(f"{make.__name__}: {found:.4f}")
        assert found < 1.3 * least


ROW_FIELDS = np.linspace(-1.0, 1.0, 12)
WAYS = {  # how the energy is written, the rows, and what that lets the objective do
    "a matrix": ("matrix", 12, ["_by_products"]),
    "a matrix, few rows": ("matrix", 3, ["_by_products"]),
    "pairs": ("pairs", 12, ["_by_products", "_by_gradient"]),
    "pairs, few rows": ("pairs", 3, ["_by_products"]),
    "rows that differ by a constant": ("closed over", 12, []),
    "rows that differ by their number": ("counted", 12, []),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMULAS)
def test_quadratic_energies_take_less_than_all_neighbours(x64, monkeypatch, name, way):
    """Against the table of each row, curvature of single coordinates included."""
    form, num_rows, expected_ways = WAYS[way]
    num_values = 2 if name in formulas("binary") else 3
    objective = FORMULAS[name].make()
    rng = np.random.default_rng(0)
    data = rng.integers(0, num_values, (num_rows, 4))
    params = {"J": rng.normal(size=(4, 4)), "field": rng.normal(size=4)}  # J has a diagonal

    def log_density(J, field, v, scale):
        if form == "pairs":
            pairs = jnp.sum(J * v[:, :, None] * v[:, None, :], (1, 2))
        else:
            pairs = jnp.sum((v @ J) * v, -1)
        return scale * pairs + v @ field

    def model(data):
        J, field = (numpyro.param(k, jnp.zeros_like(params[k])) for k in ("J", "field"))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(num_values, event_shape=(4,)), obs=data)
            scale = {"closed over": jnp.asarray(ROW_FIELDS), "counted": jnp.arange(len(data)) / 5}
            ebm.energy("E", -log_density(J, field, v, scale.get(form, 1.0)))

    scales = {"closed over": ROW_FIELDS, "counted": np.arange(num_rows) / 5}
    states = np.indices((num_values,) * 4).reshape(4, -1).T
    losses = []
    for row, scale in zip(data, scales.get(form, np.ones(num_rows)), strict=True):
        table = log_density(params["J"], params["field"], states, scale).reshape((num_values,) * 4)
        losses.append(FORMULAS[name].expected(jnp.asarray(table), row[None]))
    expected = np.mean(losses)
    tried = []
    for name in ("_by_products", "_by_gradient"):
        method = getattr(type(objective), name)

        def spy(*args, name=name, method=method):
            tried.append(name)
            return method(*args)

        monkeypatch.setattr(type(objective), name, spy)
    loss = jax.jit(lambda p: objective.loss(jax.random.key(0), p, model, None, data))
    np.testing.assert_allclose(loss(params), expected, rtol=1e-9)
    assert tried == expected_ways


SCALE = np.array([1.0, 2.0, 3.0])
SPINS = {
    "scaled": lambda x: (2.0 * x - 1.0) * SCALE,
    "biased": lambda x: 2.0 * x - 1.0 + 0.5,
    "biased each": lambda x: 2.0 * x - 1.0 + SCALE,
}


@pytest.mark.parametrize("name", SPINS)
@pytest.mark.parametrize("hidden", [False, True])
def test_spins_of_any_scale_and_bias(x64, name, hidden):
    """Visible, or hidden beside them: zeros and diagonal matrices meet rows and numbers."""
    spins, W = SPINS[name], RNG.normal(size=(3, 3))
    data = RNG.integers(0, 2, (5, 3))

    def model(data):
        coupling = numpyro.param("W", jnp.zeros((3, 3)))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
            h = numpyro.sample("h", ebm.Counting(event_shape=(3,))) if hidden else v
            ebm.energy("E", -jnp.sum((spins(v) @ coupling) * spins(h), -1))

    pairs = spins(BITS) @ W @ spins(BITS).T
    table = (np.logaddexp.reduce(pairs, -1) if hidden else np.diag(pairs)).reshape(2, 2, 2)
    for formula in FORMULAS.values():
        loss = jit(lambda W, make=formula.make: make().loss(KEY, {"W": W}, model, None, data))
        assert_close(loss(W), jnp.mean(formula.expected(jnp.asarray(table), data)))
    loss = ebm.MaximumLikelihood().loss(KEY, {"W": W}, model, None, data)
    assert_close(loss, np.mean(np.logaddexp.reduce(table, None) - table[tuple(data.T)]))
