# SPDX-License-Identifier: Apache-2.0
"""Penalties of gradients, and the divergence of the chains with their entropy by neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from divergence_cases import BITS, KEY, RBM, Stay, rbm
from numpyro.distributions import constraints
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.objectives.chain_penalties import chain_divergence
from numpyro_ebm.objectives.nearest_neighbours import neighbour_entropy


def two_coordinates(data):
    a, b = numpyro.param("a", 0.0), numpyro.param("b", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=data)
        ebm.energy("E", a * v[:, 0] * v[:, 1] + 0.5 * b * v[:, 1] ** 2)


def rates(data):
    a = numpyro.param("a", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=data)
        ebm.energy("E", a * v)


def of_two(p, v):
    return (p["a"] * v[:, 1]) ** 2 + (p["a"] * v[:, 0] + p["b"] * v[:, 1]) ** 2


@pytest.mark.parametrize(
    "model, params, data, squares",
    [
        (
            *(two_coordinates, {"a": 0.7, "b": -0.4}),
            *(jnp.array([[1.0, 2.0], [-0.5, 3.0], [0.2, -1.0]]), of_two),
        ),
        # In the coordinate log v, where dE/du = a v.
        (rates, {"a": 0.7}, jnp.array([0.5, 2.0, 3.0]), lambda p, v: (p["a"] * v) ** 2),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_a_penalty_of_gradients(model, params, data, squares, temperature):
    """β times the mean squared gradients of the energy at rows and chains, here at the rows too.

    Neither the base measure nor the Jacobian is in it; rows count by their weights.
    """
    weights = jnp.array([1.0, 0.5, 2.0])

    def weighted(data):
        with numpyro.handlers.scale(scale=weights):
            model(data)

    objective = ebm.ContrastiveDivergence(
        Stay, gradient_penalty=0.3, energy_penalty=0.0, temperature=temperature
    )
    found = jit(jax.value_and_grad(lambda p: objective.loss(KEY, p, weighted, None, data)))(params)

    def closed(p):
        rows = squares(p, data)
        return 0.3 * (jnp.mean(weights * rows) + jnp.mean(rows))

    expected = jax.value_and_grad(closed)(params)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    for name, x in expected[1].items():
        np.testing.assert_allclose(found[1][name], x, rtol=1e-4)


@pytest.mark.parametrize("dimension", [1, 3])
def test_the_entropy_is_that_of_a_gaussian(dimension):
    num, scale = 1_000, 2.5
    draws = 7.0 + jax.random.normal(KEY, (num, dimension))  # far from the origin
    found, slope = jit(jax.value_and_grad(lambda s: neighbour_entropy(s * draws)))(scale)
    expected = dimension * (0.5 * np.log(2 * np.pi * np.e) + np.log(scale))
    error = np.sqrt((dimension / 2 + np.pi**2 / 6) / num)
    assert abs(found - expected) < 4.5 * error
    assert slope == pytest.approx(dimension / scale, rel=1e-3)  # as that of log s^d


def test_the_entropy_of_few_draws():
    """d/N Σ log ρ + log V_d + log(N - 1) + γ, by hand."""
    found = neighbour_entropy(jnp.array([[0.0], [3.0], [4.0]]))
    expected = (np.log(3) + 2 * np.log(1)) / 3 + np.log(2) + np.log(2) + np.euler_gamma
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weight", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_the_divergence_of_chains_has_the_gradient_of_closed_form(weight):
    """Chains from N(0, s²) I a step on, of a Gaussian model of precision λ.

    v' = (1 - ελ) v + √(2ε) ξ has the variance V, and the KL in the laws of v' alone has the
    derivative ε (1 - ελ) s² (1/V - λ) a coordinate.
    """
    dimension, sd, step, precision, num = 3, 2.0, 0.2, 1.5, 400

    def model(data):
        lam = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((dimension,)), obs=data)
            ebm.energy("E", 0.5 * lam * jnp.sum(v**2, -1))

    objective = ebm.ContrastiveDivergence(Stay, kl_weight=weight, kl_step_size=step)

    def one(key):
        key_data, key_loss = jax.random.split(key)
        data = sd * jax.random.normal(key_data, (num, dimension))

        def loss(lam):  # the chains are at the data: nothing else is in it
            return objective.loss(key_loss, {"precision": lam}, model, None, data)

        return jax.value_and_grad(loss)(precision)

    value, slope = jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(KEY, 50))
    variance = (1 - step * precision) ** 2 * sd**2 + 2 * step
    expected = step * (1 - step * precision) * sd**2 * (1 / variance - precision)
    expected *= weight * dimension
    error = np.std(slope) / np.sqrt(len(slope))
    assert abs(np.mean(slope) - expected) < 4.5 * error < 0.4 * abs(expected)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)


def test_a_step_of_the_chains_has_the_noise_of_langevin_dynamics():
    """KL(N(0, V) ‖ p) + log Z of chains at the origin, whose step is noise of the variance 2ε.

    There are two sites, with noise of their own each.
    """
    num, step, precision = 1_000, 0.3, 0.5

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            w = numpyro.sample("w", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * (v**2 + w**2))

    objective, data = ebm.ContrastiveDivergence(Stay), jnp.zeros(num)
    problem = objective.prepare(KEY, {}, model, None, (data,), {})
    log_p = lambda p, x: -0.5 * precision * (x["v"] ** 2 + x["w"] ** 2)  # noqa: E731
    chains = {"v": data, "w": data}
    found = jit(lambda x: chain_divergence(KEY, log_p, {}, problem, x, step))(chains)
    expected = precision * 2 * step - np.log(2 * np.pi * np.e * 2 * step)
    assert abs(found - expected) < 4.5 * np.sqrt((1 + np.pi**2 / 6) / num)


def still(data, shift=0.0):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - shift) ** 2)


THREE = jnp.arange(3.0)
KL = {"kl_weight": 1.0, "kl_step_size": 0.1}


@pytest.mark.parametrize(
    "model, args, options, message",
    [
        (still, (THREE,), {"gradient_penalty": -1.0}, "`gradient_penalty` must be positive"),
        (still, (THREE,), {"kl_weight": -1.0, "kl_step_size": 0.1}, "`kl_weight` must be positive"),
        (still, (THREE,), {"kl_weight": 1.0}, "go together"),
        (still, (THREE,), {"kl_step_size": 1.0}, "go together"),
        (still, (THREE,), {"kl_weight": 1.0, "kl_step_size": 0.0}, "`kl_step_size` must be pos"),
        (still, (THREE,), {**KL, "persistent": True, "num_chains": 1}, "and there is one"),
        (still, (THREE, THREE), KL, "entropy of chains of one law"),
        (rbm, (BITS,), {"gradient_penalty": 1.0}, r"latent site\(s\) \['h'\]"),
        (rbm, (BITS,), KL, r"derivatives in the visible values, and \['v'\] are discrete"),
        (
            *(still, (THREE,)),
            *({**KL, "persistent": True, "weighted": True, "initial": "gaussian"}, "drop `kl_w"),
        ),
    ],
)
def test_what_they_do_not_go_with(model, args, options, message):
    with pytest.raises(ebm.ModelError, match=message):
        objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, **options)
        objective.prepare(KEY, RBM if model is rbm else {}, model, None, args, {})


def test_the_divergence_wants_an_exact_marginal():
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", 0.5 * v**2 + 0.5 * h**4 - v * h)

    def guide(data):
        v = ebm.visible("v", data)
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.Normal(v, 1.0))

    objective = ebm.ContrastiveDivergence(Stay, 1, ebm.VaGES(), **KL)
    with pytest.raises(ebm.ModelError, match="wants log p̃"):
        objective.prepare(KEY, {}, model, guide, (THREE,), {})
