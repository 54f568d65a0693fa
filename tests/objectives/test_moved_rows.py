# SPDX-License-Identifier: Apache-2.0
"""Rows against copies moved by a kernel on discrete sites, against tables of all states."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.nn import softplus
from neighbour_cases import BITS, KEY, RNG, site_kernel
from oracles import assert_unbiased, draws, flat, jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.objectives import ConditionalNCE, KernelRatioMatching

PAIRS = np.array([[0, 1], [0, 2], [1, 2]])
ISING = {"J": jnp.array([0.7, -0.4, 0.5]), "b": jnp.array([0.3, -0.6, 0.2])}
LOSSES = {
    ConditionalNCE: softplus,
    KernelRatioMatching: lambda x: 4.0 / (1.0 + jnp.exp(-x)) ** 2,
}


def ising(x):
    J, b = numpyro.param("J", jnp.zeros(3)), numpyro.param("b", jnp.zeros(3))
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Counting(event_shape=(3,)), obs=x)
        s = 2.0 * x - 1.0
        ebm.energy("E", -(s[:, PAIRS[:, 0]] * s[:, PAIRS[:, 1]]) @ J - s @ b)


def ising_table(p):
    s = 2.0 * BITS - 1.0
    return (s[:, PAIRS[:, 0]] * s[:, PAIRS[:, 1]]) @ p["J"] + s @ p["b"]


def bits_kernel(probability):
    """q(y | x) of three bits: each flips with a probability, or exactly one does."""
    flips = np.sum(BITS[:, None] != BITS, -1)
    if probability is None:
        return np.where(flips == 1, 1.0 / 3.0, 0.0)
    return probability**flips * (1.0 - probability) ** (3 - flips)


def of_states(table, q, pair_loss):
    """The loss of every state, by the sum over all that it may be moved to."""
    return jnp.sum(q * pair_loss(table - table[:, None]), -1)


def gradients(objective, model, params, *args):
    loss = lambda p, key: objective.loss(key, p, model, None, *args)  # noqa: E731
    return lambda key: jax.value_and_grad(loss)(params, key)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "make, probability",
    [
        (ConditionalNCE, None),
        slow(ConditionalNCE, 0.3),
        slow(KernelRatioMatching, None),
        (KernelRatioMatching, 0.3),
    ],
)
def test_bits_equal_the_sum_over_all_states(x64, make, probability):
    data = np.array([0, 0, 3, 5, 7, 6])
    q = bits_kernel(probability)

    def expected(p):
        return jnp.mean(of_states(ising_table(p), q, LOSSES[make])[data])

    one = gradients(make(noise_ratio=2, flip_probability=probability), ising, ISING, BITS[data])
    found = draws(one, KEY, 4_000)
    assert_unbiased(found, flat(jit(jax.value_and_grad(expected))(ISING)), f"{probability}")


@pytest.mark.parametrize(
    "perturbation, base",
    [
        ("ordinal", ebm.Counting(math.inf)),
        slow("uniform", dist.DiscreteUniform(2, 5)),
        slow("cyclical", ebm.Counting(4)),
        slow("ordinal", dist.DiscreteUniform(2, 5)),
    ],
)
def test_values_and_counts_equal_the_sum_over_where_they_go(x64, perturbation, base):
    """Counts stay at their lowest value where they would fall below, as others at their ends."""
    low, number = (2, 4) if isinstance(base, dist.DiscreteUniform) else (0, 4)
    states = 9 if base.support.is_discrete and not hasattr(base.support, "upper_bound") else number
    data, params = np.array([0, 0, 1, 3]), {"a": jnp.asarray(RNG.normal(size=2))}
    q = site_kernel(perturbation, states, 0.4)

    def table(p, x):
        return p["a"][0] * x - p["a"][1] * jnp.sqrt(x + 1.0)

    def model(x):
        a = numpyro.param("a", jnp.zeros(2))
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", base, obs=x)
            ebm.energy("E", -table({"a": a}, x - low))

    def expected(p):
        return jnp.mean(of_states(table(p, jnp.arange(states)), q, softplus)[data])

    objective = ConditionalNCE(flip_probability=0.4, perturbation=perturbation)
    one = gradients(objective, model, params, data.astype(np.uint8) + np.uint8(low))
    found = draws(one, KEY, 4_000)
    assert_unbiased(found, flat(jit(jax.value_and_grad(expected))(params)), perturbation)


def test_one_coordinate_of_all_sites_moves():
    """Each of the coordinates of a row as often as the others, and no other site with it."""

    def model(a, b, v):
        with numpyro.plate("data", len(b)):
            a = numpyro.sample("a", ebm.Counting(3, (2,)), obs=a)
            b = numpyro.sample("b", ebm.Counting(2), obs=b)
            v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
            ebm.energy("E", numpyro.param("t", 1.0) * v**2 + jnp.sum(a, -1) * b)

    rows = 30_000
    a, b, v = RNG.integers(0, 3, (rows, 2)), RNG.integers(0, 2, rows), RNG.normal(size=rows)
    objective = ConditionalNCE(0.5)
    problem = objective.prepare(KEY, {"t": 1.0}, model, None, (a, b, v), {})
    draw = jit(lambda point: objective._kernel.draw(KEY, problem.row_model, point))
    moved = draw(problem.unconstrained)
    changed = np.c_[moved["a"] != a, (moved["b"] != b)[:, None]]
    assert np.all(changed.sum(1) == 1)
    np.testing.assert_allclose(changed.mean(0), 1 / 3, atol=4 * np.sqrt(2 / 9 / rows))
    up = (moved["a"] - a)[changed[:, :2]] % 3 == 1
    np.testing.assert_allclose(up.mean(), 0.5, atol=4 * 0.5 / np.sqrt(up.size))
    np.testing.assert_allclose(np.std(moved["v"] - v), 0.5, rtol=0.03)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("probability", [None, 0.3])
def test_minimal_at_the_truth_for_any_kernel(x64, make, probability):
    """The loss in closed form, which the objective was held to: zero gradient, and only there."""
    q, p0 = bits_kernel(probability), jax.nn.softmax(ising_table(ISING))
    gradient = jit(jax.grad(lambda p: p0 @ of_states(ising_table(p), q, LOSSES[make])))
    for x in jax.tree.leaves(gradient(ISING)):
        np.testing.assert_allclose(x, 0.0, atol=1e-12)
    elsewhere = gradient(jax.tree.map(lambda x: x + 0.3, ISING))
    assert max(jnp.max(jnp.abs(x)) for x in elsewhere.values()) > 1e-2


@pytest.mark.parametrize("probability", [None, 0.3])
def test_kernel_ratio_matching_is_a_distance_of_ratios(x64, probability):
    """Twice the weighted squared distance of p(x) / (p(x) + p(y)), up to a constant."""
    q, p0 = bits_kernel(probability), np.asarray(jax.nn.softmax(ising_table(ISING)))

    def shares(f):
        return 1.0 / (1.0 + np.exp(f - f[:, None]))

    def difference(f):
        distance = np.sum(q * (p0[:, None] + p0) * (shares(f) - shares(np.log(p0))) ** 2)
        return p0 @ of_states(f, q, LOSSES[KernelRatioMatching]) - 2.0 * distance

    found = [difference(RNG.normal(size=8)) for _ in range(3)]
    np.testing.assert_allclose(found, found[0], rtol=1e-12)


@pytest.mark.slow
def test_one_bit_is_pseudo_likelihood_and_ratio_matching():
    """In the mean over the bit: the sums over all bits, by their number."""
    q, table = bits_kernel(None), ising_table(ISING)
    for make, other, times in (
        (ConditionalNCE, ebm.PseudoLikelihood, 3.0),
        (KernelRatioMatching, ebm.RatioMatching, 0.75),
    ):
        rows = of_states(table, q, LOSSES[make])
        exact = jit(lambda p, other=other: other().loss(KEY, p, ising, None, BITS))(ISING)
        np.testing.assert_allclose(times * jnp.mean(rows), exact, rtol=1e-5)


def test_what_is_not_moved_is_refused():
    def mixed(x, v, n):
        with numpyro.plate("data", 2):
            x = numpyro.sample("x", ebm.Counting(), obs=x)
            v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
            n = numpyro.sample("n", dist.Poisson(1.0), obs=n)
            ebm.energy("E", numpyro.param("a", 1.0) * (x + v**2 + n))

    args = np.array([0, 1]), np.array([0.3, 0.1]), np.array([4, 0])
    for make in LOSSES:
        for options, message in (
            ({}, "'v' is continuous.*`noise_scale`"),
            ({"noise_scale": 0.5}, "'n' has infinitely many values.*'ordinal'"),
        ):
            with pytest.raises(ModelError, match=f"{make.__name__}: the .*{message}"):
                make(**options).loss(KEY, {"a": 1.0}, mixed, None, *args)
        loss = make(0.5, perturbation="ordinal").loss(KEY, {"a": 1.0}, mixed, None, *args)
        assert np.isfinite(loss)


@pytest.mark.parametrize(
    "options",
    [
        {"noise_scale": 0.0},
        {"noise_scale": math.nan},
        {"noise_ratio": 0},
        {"flip_probability": 0.0},
        {"flip_probability": 1.0},
        {"perturbation": "random"},
        {"perturbation": None},
    ],
)
def test_bad_options_are_named(options):
    (name,) = options
    for make in LOSSES:
        with pytest.raises(ModelError, match=f"{make.__name__}: `{name}` must"):
            make(**options)
