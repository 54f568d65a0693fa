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
import pytest
from jax.nn import softmax
from jax.scipy.special import logsumexp
from neighbour_cases import BITS, FORMULAS, KEY, RNG, assert_close
from oracles import jit
from registry.objectives import formulas

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.objectives import PseudoLikelihood
from numpyro_ebm.objectives.energy_discrepancy import EnergyDiscrepancy


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


def arrays(params):
    return {k: jnp.asarray(x) for k, x in params.items()}


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
            ebm.energy("E", -jnp.log(jnp.exp(x @ logits)))  # no form that one gradient would do

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


@pytest.mark.slow
def test_one_value_is_no_choice():
    model, data = one_site(dist.DiscreteUniform(4, 4), np.full(3, 4))
    cases = [(formula.make, formula.expected) for formula in FORMULAS.values()]
    for make, expected in ((EnergyDiscrepancy, lambda *_: np.log1p(1 / 16)), *cases):
        loss = jit(make().loss, static_argnums=(2, 3))(KEY, {"a": 0.1}, model, None, data)
        assert loss == pytest.approx(float(np.mean(expected(jnp.zeros(1), np.zeros((1, 1), int)))))


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
    if isinstance(objective, ebm.DiscreteFisher) and isinstance(fn, dist.Poisson):
        return  # it takes counts
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
