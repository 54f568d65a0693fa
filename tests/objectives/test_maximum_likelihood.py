# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood: log Z by enumeration and quadrature, against normalised densities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from jax.scipy.special import logsumexp
from likelihood_cases import KEY, assert_likelihood
from oracles import binary_states, jit

import numpyro_ebm as ebm


def gaussian_nll(data):
    def nll(p):
        precision = 0.5 * (p["precision"] + p["precision"].T)
        x = jnp.asarray(data) - p["mean"]
        log_det = jnp.linalg.slogdet(precision)[1]
        square = jnp.mean(jnp.sum((x @ precision) * x, -1))
        return 0.5 * (square - log_det) + math.log(2 * math.pi)

    return nll


def grbm_log_z(p):
    """A mixture of 2^H Gaussians: log Z by enumeration of h."""
    h = binary_states(len(p["c"]))
    shift = h @ p["W"].T
    terms = h @ p["c"] + shift @ p["b"] + 0.5 * jnp.sum((shift * p["scale"]) ** 2, -1)
    return logsumexp(terms) + jnp.sum(jnp.log(p["scale"])) + math.log(2 * math.pi)


def grbm_nll(data):
    def nll(p):
        rows = jax.vmap(lambda v: oracles.grbm_log_density(p, v))(jnp.asarray(data))
        return grbm_log_z(p) - jnp.mean(rows)

    return nll


@pytest.mark.usefixtures("x64")
def test_gaussian_with_full_precision():
    system = oracles.gaussian_system()
    expected = gaussian_nll(system.data)
    objective = ebm.MaximumLikelihood(num_nodes=96)
    assert_likelihood(system.model, system.params, system.data, expected, objective)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "model", [oracles.grbm, pytest.param(oracles.grbm_plated, marks=pytest.mark.slow)]
)
def test_grbm(model):
    system = oracles.grbm_system()
    expected = grbm_nll(system.data)
    objective = ebm.MaximumLikelihood(num_nodes=96)
    assert_likelihood(model, system.params, system.data, expected, objective)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "make, density",
    [
        (oracles.gamma_system, lambda p: dist.Gamma(p["a"], p["rate"])),
        (oracles.log_normal_system, lambda p: dist.LogNormal(p["mean"], p["scale"])),
        (oracles.beta_system, lambda p: dist.Beta(p["a"], p["b"]).to_event(1)),
    ],
)
def test_other_supports_are_integrated_in_their_own_measure(make, density):
    """The density is one of v, not of its unconstrained coordinates."""
    system = make()
    data = jnp.asarray(system.data)
    assert_likelihood(
        system.model,
        system.params,
        data,
        lambda p: -jnp.mean(density(p).log_prob(data)),
        ebm.MaximumLikelihood(num_nodes=256),
        rtol=1e-6,
    )


@pytest.mark.usefixtures("x64")
def test_a_single_row_and_equal_rows_have_no_spread_to_scale_to():
    system = oracles.log_normal_system()
    for data in (np.array([1.7]), np.array([0.4, 0.4])):
        assert_likelihood(
            system.model,
            system.params,
            data,
            lambda p, v=data: -jnp.mean(dist.LogNormal(p["mean"], p["scale"]).log_prob(v)),
        )


def gumbel(data):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", v - loc + jnp.exp(loc - v))


def test_an_energy_that_overflows_far_out_has_a_finite_gradient():
    """At a hundred standard deviations exp(-v) is no float32; its weight is zero, not NaN."""
    data = np.asarray(np.random.default_rng(0).gumbel(size=20), np.float32)
    assert data.std() * 100 > 89

    def expected(p):
        return -jnp.mean(dist.Gumbel(p["loc"], 1.0).log_prob(data))

    assert_likelihood(gumbel, {"loc": 0.3}, data, expected, rtol=2e-4)


def test_positive_data_of_wide_spread_have_a_finite_gradient():
    data = np.asarray(np.random.default_rng(0).gamma(0.5, size=50), np.float32)
    params = {"a": np.float32(0.6), "rate": np.float32(1.3)}

    def expected(p):
        return -jnp.mean(dist.Gamma(p["a"], p["rate"]).log_prob(data))

    assert_likelihood(oracles.gamma, params, data, expected, rtol=2e-4)


def test_an_energy_without_an_integral_is_not_finite():
    """Nodes that are left out have no mass; infinite mass is not hidden."""

    def upside_down(data):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", -jnp.exp((v - loc) ** 2))

    objective, data = ebm.MaximumLikelihood(), jnp.arange(3.0)
    loss = jit(lambda p: objective.loss(KEY, p, upside_down, None, data))({"loc": 0.0})
    assert not np.isfinite(loss)
