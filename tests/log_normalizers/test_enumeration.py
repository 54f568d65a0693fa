# SPDX-License-Identifier: Apache-2.0
"""log Z by enumeration against formulas and the literature, in NumPy."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from conftest import GRBMOracle, enable_x64
from normalizer_cases import CRITICAL, KEY, ising, kaufman, model_of

import numpyro_ebm as ebm
from numpyro_ebm.log_normalizers import nodes
from numpyro_ebm.log_normalizers.nodes import log_sum_in_chunks, log_sum_over_rows


def enumerated_ising(size, beta):
    states = np.array(list(itertools.product([-1, 1], repeat=size * size)), np.int8)
    s = states.reshape(-1, size, size)
    pairs = (s * np.roll(s, 1, -1) + s * np.roll(s, 1, -2)).sum((-1, -2))
    return np.logaddexp.reduce(beta * pairs)


@pytest.fixture(scope="module")
def grbm16():
    """A GRBM with 8 visible and 16 hidden units, and its log Z by enumeration in NumPy."""
    rng = np.random.default_rng(1)
    params = {
        "W": 0.5 * rng.normal(size=(8, 16)),
        "b": rng.normal(size=8),
        "c": rng.normal(size=16),
        "scale": np.exp(0.2 * rng.normal(size=8)),
    }
    states = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    shift = states @ params["W"].T
    terms = states @ params["c"] + shift @ params["b"]
    terms += 0.5 * np.sum((shift * params["scale"]) ** 2, -1)
    truth = 4 * np.log(2 * np.pi) + np.sum(np.log(params["scale"])) + np.logaddexp.reduce(terms)
    return params, truth


@pytest.mark.parametrize(
    "beta, log_z",
    [
        (0.1, 11.252588),
        (0.2, 11.771470),
        (0.25, 12.201271),
        (0.4, 14.561093),
        (0.4406868, 15.521916),
    ],
)
def test_enumeration_gives_the_ising_values_of_the_literature(beta, log_z):
    found = ebm.log_normalizer(KEY, ebm.fixed(ising, {"beta": beta}))
    assert found.method == "enumerate" and found.mcse == 0 and found.bias == "none"
    assert found.ess == math.inf and found.value.shape == ()
    assert found.value == pytest.approx(log_z, abs=1e-5)
    assert enumerated_ising(4, beta) == pytest.approx(log_z, abs=2e-6)
    assert kaufman(4, beta) == pytest.approx(log_z, abs=2e-6)


def test_kaufman_gives_the_values_of_the_literature():
    for beta, log_z in ((0.1, 70.3231), (0.25, 75.9110), (CRITICAL, 93.6103)):
        assert kaufman(10, beta) == pytest.approx(log_z, abs=1e-4)


@pytest.mark.slow
def test_real_sites_are_integrated_in_closed_form(grbm16):
    params, truth = grbm16
    model = ebm.fixed(ebm.models.grbm, params)
    found = ebm.log_normalizer(KEY, model, num_visible=8, num_hidden=16)
    assert found.method == "enumerate"
    assert found.value == pytest.approx(truth, rel=2e-6)
    with enable_x64():
        found = ebm.log_normalizer(KEY, model, num_visible=8, num_hidden=16)
        assert found.value.dtype == jnp.float64
        assert found.value == pytest.approx(truth, rel=1e-12)


@pytest.mark.slow
def test_units_that_do_not_interact_are_not_counted(grbm):
    rng = np.random.default_rng(0)
    W, b, c = rng.normal(size=(5, 40)), rng.normal(size=5), rng.normal(size=40)

    def rbm(event):
        with numpyro.plate("data", 3):
            v = numpyro.sample("v", ebm.Counting(2, (5,)))
            h = numpyro.sample("h", ebm.Counting(2, (40,)))
            coupling = jnp.sum((v @ W) * h, -1)
            ebm.energy("E", -coupling - v @ b - h @ c)

    states = np.array(list(itertools.product([0, 1], repeat=5)))
    exact = np.logaddexp.reduce(states @ b + np.logaddexp(0, c + states @ W).sum(-1))
    found = ebm.log_normalizer(KEY, ebm.fixed(rbm, {}), True)
    assert found.diagnostics["num_states"] == 32
    assert found.value == pytest.approx(exact, rel=1e-6)

    def free():
        with numpyro.plate("data", 2):
            h = numpyro.sample("h", ebm.Counting(2, (100,)))
            ebm.energy("E", -jnp.sum(h, -1))

    found = ebm.log_normalizer(KEY, ebm.fixed(free, {}))
    assert found.value == pytest.approx(100 * np.log1p(np.e), rel=1e-6)
    # Hidden units in a plate, beside Gaussian visible ones.
    params = {k: jnp.asarray(x, jnp.float32) for k, x in grbm.params.items()}
    found = [
        ebm.log_normalizer(KEY, ebm.fixed(m, params), grbm.data).value
        for m in (grbm.model, grbm.plate_model)
    ]
    oracle = GRBMOracle(grbm.params)
    shift = oracle.states @ oracle.W.T
    terms = oracle.states @ oracle.c + shift @ oracle.b
    terms = terms + 0.5 * np.sum((shift * oracle.scale) ** 2, -1)
    exact = np.log(2 * np.pi) + np.log(oracle.scale).sum() + np.logaddexp.reduce(terms)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_a_full_covariance_and_a_gaussian_without_discrete_sites():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    precision, linear = root @ root.T + np.eye(6), rng.normal(size=6)

    def energy(v):
        return 0.5 * jnp.sum((v @ jnp.asarray(precision, v.dtype)) * v, -1) - v @ linear

    found = ebm.log_normalizer(KEY, model_of(energy, ebm.Lebesgue((6,))))
    quadratic = 0.5 * linear @ np.linalg.solve(precision, linear)
    exact = 3 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1] + quadratic
    assert found.method == "enumerate"
    assert found.value == pytest.approx(exact, rel=1e-5)


def test_chunks_that_do_not_fill_up():
    found = log_sum_in_chunks(lambda x: 0.0 * x[:, None], jnp.arange(5.0), 2)
    np.testing.assert_allclose(found[0], np.log(5), rtol=1e-6)


@pytest.mark.parametrize("at_once", [4, 65_536])
def test_nodes_that_do_not_fill_the_rows(at_once, monkeypatch):
    """Σ w f over seven nodes, three rows at a time."""
    monkeypatch.setattr(nodes, "NODES_AT_ONCE", at_once)
    x, weights = np.linspace(-1.0, 2.0, 7), np.arange(1.0, 8.0)
    found = log_sum_over_rows(lambda v: -v[:, 0], jnp.asarray(x[:, None]), jnp.log(weights), 3)
    np.testing.assert_allclose(found, np.log(weights @ np.exp(-x)), rtol=1e-5)
