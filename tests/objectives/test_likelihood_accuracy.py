# SPDX-License-Identifier: Apache-2.0
"""Accuracy of maximum likelihood by quadrature, what is said of it, and learning."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from likelihood_cases import KEY, arrays, ising
from numpyro.distributions import constraints
from numpyro.infer import SVI
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import QuadratureWarning


def precision_model(data):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


@pytest.mark.usefixtures("x64")
def test_the_error_falls_exponentially_in_the_number_of_nodes():
    """Twice the nodes, more than one and a half times the digits; at 128 nothing is left."""
    data = jnp.array([-1.0, 1.0])
    exact = 0.5 * math.log(2 * math.pi) + 0.5

    def error(num_nodes):
        objective = ebm.MaximumLikelihood(num_nodes=num_nodes)
        loss = jit(lambda p: objective.loss(KEY, p, precision_model, None, data))
        return abs(float(loss({"precision": 1.0})) - exact)

    errors = np.array([error(num) for num in (8, 16, 32, 64, 128)])
    print(errors)
    assert errors[0] > 1e-2 and errors[-1] < 1e-13
    assert np.all(errors[1:4] < errors[:3] ** 1.5)


def reviewed(model, data, **params):
    """What is said at the end of a run with this result."""
    objective = ebm.MaximumLikelihood()

    @jit
    def statistics(params):
        problem = objective.prepare(KEY, params, model, None, (jnp.asarray(data),), {})
        return objective.statistics(KEY, params, problem)

    objective.review(statistics(params))


DATA = np.random.default_rng(0).normal(size=200)


@pytest.mark.parametrize(
    "precision, which", [(1e6, "half of them"), (1e-6, "inner half of their reach")]
)
def test_an_energy_of_another_width_than_the_data_warns(precision, which):
    """Too narrow for the spacing of the nodes, or mass beyond their reach."""
    with pytest.warns(QuadratureWarning, match=rf"log Z is .* {which}. Raise `num_nodes`"):
        reviewed(precision_model, DATA, precision=precision)


@pytest.mark.slow
def test_a_run_ends_with_the_warning():
    svi = ebm.EnergySVI(precision_model, None, optax.sgd(0.0), ebm.MaximumLikelihood(num_nodes=16))
    with pytest.warns(QuadratureWarning, match="`num_nodes` \\(now 16\\)"):
        svi.run(KEY, 1, DATA, init_params={"precision": jnp.array(1e3)}, progress_bar=False)


@pytest.mark.parametrize("precision", [0.01, 1.0, 25.0])
def test_no_warning_where_the_nodes_suffice(precision):
    reviewed(precision_model, DATA, precision=precision)


def test_no_warning_for_sums_over_states():
    data = np.random.default_rng(0).integers(0, 2, size=(4, 9))
    reviewed(ising, data)


def test_more_than_two_real_coordinates_are_told_where_to_go():
    system = oracles.linear_system()
    message = "at most 2 real coordinates.*'v'.*have 3.*ContrastiveDivergence, NCE or a score"

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
            ebm.energy("E", jnp.sum(v**2, -1))

    with pytest.raises(ebm.ModelError, match=message):
        ebm.MaximumLikelihood().loss(KEY, {}, model, None, jnp.asarray(system.data))


@pytest.mark.parametrize(
    "num_units, max_states, ok", [(21, 1_048_576, False), (9, 511, False), (9, 512, True)]
)
def test_too_many_states_are_told_where_to_go(num_units, max_states, ok):
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(event_shape=(num_units,)), obs=data)
            ebm.energy("E", jnp.sum(v, -1))

    data = jnp.zeros((2, num_units), int)
    objective = ebm.MaximumLikelihood(max_states=max_states)
    if ok:
        assert np.isfinite(objective.loss(KEY, {}, model, None, data))
        return
    message = f"more than max_states={max_states}. Use PseudoLikelihood, RatioMatching, NCE"
    with pytest.raises(ebm.ModelError, match=message):
        objective.loss(KEY, {}, model, None, data)


def test_infinitely_many_values_raise():
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", dist.Poisson(2.0), obs=data)
            ebm.energy("E", 0.1 * v)

    with pytest.raises(ebm.ModelError, match="MaximumLikelihood: .*'v'.* has infinitely many"):
        ebm.MaximumLikelihood().loss(KEY, {}, model, None, jnp.array([1, 2]))


@pytest.mark.parametrize("marginal", [ebm.VaGES(), ebm.ImportanceBound()])
def test_marginals_without_exact_values_are_told_where_to_go(marginal):
    system = oracles.grbm_system()
    message = rf"{type(marginal).__name__} has none that are exact.*Enumerated\(\).*NCE"
    with pytest.raises(ebm.ModelError, match=message):
        ebm.MaximumLikelihood(marginal).loss(
            KEY, arrays(system.params), system.model, system.guide, jnp.asarray(system.data)
        )


def test_without_data_there_is_nothing_to_learn():
    with pytest.raises(ebm.ModelError, match="MaximumLikelihood: .*no observed site"):
        ebm.MaximumLikelihood().loss(KEY, {}, oracles.gaussian, None)


@pytest.mark.parametrize("num_nodes", [3, 10.0, "many"])
def test_the_number_of_nodes_is_checked(num_nodes):
    with pytest.raises(ebm.ModelError, match="integer of at least 4"):
        ebm.MaximumLikelihood(num_nodes=num_nodes)


@pytest.mark.parametrize("ours", [True, False])
def test_recovers_a_gaussian(ours):
    """The maximum is the sample mean and covariance."""
    truth = np.linalg.inv(oracles.GAUSSIAN["precision"])
    data = np.random.default_rng(0).multivariate_normal(oracles.GAUSSIAN["mean"], truth, 300)
    data = jnp.asarray(data, jnp.float32)
    objective = ebm.MaximumLikelihood(num_nodes=32)
    optim = optax.adam(optax.exponential_decay(0.1, 50, 0.3))
    if ours:
        svi = ebm.EnergySVI(oracles.gaussian, None, optim, objective)
    else:
        svi = SVI(oracles.gaussian, lambda data: None, optim, objective)
    fit = svi.run(KEY, 200, data, progress_bar=False)
    precision = 0.5 * (fit.params["precision"] + fit.params["precision"].T)
    np.testing.assert_allclose(fit.params["mean"], data.mean(0), atol=2e-3)
    np.testing.assert_allclose(jnp.linalg.inv(precision), jnp.cov(data.T, ddof=0), atol=5e-3)
    assert fit.losses[-1] < fit.losses[0]


@pytest.mark.slow
def test_an_energy_that_is_no_number_among_the_data_is_not_hidden():
    def broken(data):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", a * v**2 + jnp.where(jnp.abs(v) < 0.1, jnp.nan, 0.0))

    loss = ebm.MaximumLikelihood().loss(
        jax.random.key(0), {"a": 1.0}, broken, None, jnp.array([-1.0, 1.0])
    )
    assert np.isnan(loss)


def test_energy_svi_learns_a_discrete_model():
    """A pair of spins: E[s₀ s₁] = tanh J; 200 rows in a plate that the four states do not fill."""

    def pair(data):
        coupling = numpyro.param("J", 0.0)
        with numpyro.plate("data", len(data)):
            x = numpyro.sample("x", ebm.Counting(event_shape=(2,)), obs=data)
            s = 2 * x - 1
            ebm.energy("E", -coupling * s[:, 0] * s[:, 1])

    data = jnp.array([[0, 0], [1, 1], [1, 1], [0, 1]] * 50)
    svi = ebm.EnergySVI(pair, None, numpyro.optim.Adam(0.05), ebm.MaximumLikelihood())
    fit = svi.run(jax.random.key(0), 300, data, progress_bar=False)
    assert abs(fit.params["J"] - np.arctanh(0.5)) < 1e-3


@pytest.mark.slow
def test_derivatives_of_every_order(x64):
    """log Z of the Gaussian is -½ log p and a constant: 1/(2p²), and -1/p³, by quadrature."""

    def gaussian(data):
        p = numpyro.param("p", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * p * v**2)

    data = jnp.array([-1.0, 3.0])

    def loss(p, data=data):
        return ebm.MaximumLikelihood().loss(jax.random.key(0), {"p": p}, gaussian, None, data)

    third = lambda slope: jax.jacfwd(jax.grad(slope))  # noqa: E731
    for wrap in (lambda f: f, jax.jit):  # compiled as a whole, or a part of what is
        slope = jax.grad(wrap(loss))
        derivatives = jax.jit(lambda p: (slope(p), jax.grad(slope)(p), third(slope)(p)))  # noqa: B023
        np.testing.assert_allclose(derivatives(2.0), (2.5 - 0.25, 0.125, -0.125), rtol=1e-6)
    many = jax.vmap(jax.grad(loss))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(many, [2.0, 2.25], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss, 1)(2.0, data), data, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e5])
def test_equal_rows_have_no_spread_but_for_rounding(value):
    def gaussian(data):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - loc) ** 2)

    data = jnp.full(3, value)
    loss = ebm.MaximumLikelihood().loss(KEY, {"loc": value}, gaussian, None, data)
    np.testing.assert_allclose(loss, 0.5 * np.log(2 * np.pi), atol=1e-3)


@pytest.mark.slow
def test_the_error_at_large_energies_is_that_of_the_energies(x64):
    """No sum over states does better: exact weights of the rounded energies have the same error."""
    v = np.array(np.meshgrid(*[[0.0, 1.0]] * 6)).reshape(6, -1).T
    field = np.linspace(-0.8, 0.9, 6)

    def at_level(level):
        def bits(data):
            theta = numpyro.param("theta", jnp.asarray(field, jnp.float32))
            with numpyro.plate("data", len(data)):
                x = numpyro.sample("v", ebm.Counting(2, event_shape=(6,)), obs=data)
                ebm.energy("E", jnp.float32(level) - x.astype(jnp.float32) @ theta)

        loss = partial(ebm.MaximumLikelihood().loss, KEY)
        rows = jnp.zeros((3, 6), int)
        found = jax.grad(lambda p: loss(p, bits, None, rows))({"theta": jnp.float32(field)})
        energy = np.float32(level) - np.asarray(v, np.float32) @ field.astype(np.float32)
        assert energy.dtype == np.float32
        weight = np.exp(-(energy - energy.min()).astype(np.float64))
        return np.asarray(found["theta"]), weight @ v / weight.sum()

    exact = 1 / (1 + np.exp(-field.astype(np.float32).astype(np.float64)))
    found, of_rounded = at_level(1e5)
    assert np.abs(found - of_rounded).max() < 1e-6
    assert 1e-4 < np.abs(of_rounded - exact).max() < 1e-2
    found, _ = at_level(0.0)
    assert np.abs(found - exact).max() < 1e-6
