# SPDX-License-Identifier: Apache-2.0
"""Supports with gaps, such as spins of -1 and 1: what counts is `enumerate_support`, everywhere.

The oracle is the table of all states.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from oracles.values import Values
from registry.objectives import minimum_probability_flow, pseudo_likelihood, ratio_matching
from scipy.special import logsumexp

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
SUPPORTS = [(-1, 1), (1, -1), (0, 2, 5), (-2, 0, 1, 4), (3, 4)]


def log_density(a, b, bend=0.0):
    return 0.3 * a * b + 0.2 * a - 0.1 * b**2 + bend * jnp.abs(a - b)


def model_of(values, bend):
    def model(data=None, num_rows=1):
        with numpyro.plate("data", num_rows if data is None else len(data)):
            s = numpyro.sample("s", Values(*values).expand([2]).to_event(1), obs=data)
            ebm.energy("E", -log_density(s[:, 0], s[:, 1], bend))

    return model


def table_of(values, bend):
    """log p̃ without the constant base measure, of all states."""
    x = jnp.array(sorted(values))
    return log_density(x[:, None], x, bend)


def rows_of(values):
    index = np.random.default_rng(0).integers(0, len(values), (7, 2))
    return index, jnp.asarray(np.sort(values)[index])


@pytest.mark.parametrize("bend", [0.0, 0.3], ids=["quadratic", "not quadratic"])
@pytest.mark.parametrize("values", SUPPORTS)
def test_neighbours_are_the_values_of_the_support(values, bend):
    table, (index, data) = table_of(values, bend), rows_of(values)
    cases = {
        ebm.PseudoLikelihood: pseudo_likelihood,
        ebm.MinimumProbabilityFlow: minimum_probability_flow,
    }
    if len(values) == 2:
        cases[ebm.RatioMatching] = ratio_matching
    for objective, expected in cases.items():
        loss = objective().loss(KEY, {}, model_of(values, bend), None, data)
        np.testing.assert_allclose(loss, jnp.mean(expected(table, index)), rtol=1e-10)


@pytest.mark.parametrize("values", SUPPORTS)
def test_log_normalizers_sum_over_the_support(values):
    table, (index, data) = table_of(values, 0.3), rows_of(values)
    base = -2 * np.log(len(values))
    model = model_of(values, 0.3)
    log_z = ebm.log_normalizer(KEY, ebm.fixed(model, {}), num_rows=3).value
    np.testing.assert_allclose(log_z, logsumexp(table) + base, rtol=1e-10)
    loss = ebm.MaximumLikelihood().loss(KEY, {}, model, None, data)
    expected = logsumexp(table) - np.mean(np.asarray(table)[tuple(index.T)])
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


@pytest.mark.parametrize("values", SUPPORTS)
def test_energy_discrepancy_at_uniform_noise_is_the_likelihood(values):
    """Perturbed uniformly, every perturbed row is a draw of the uniform law of all states."""
    table, (index, data) = table_of(values, 0.0), rows_of(values)
    share = (len(values) - 1) / len(values)
    objective = ebm.EnergyDiscrepancy(num_samples=20_000, flip_probability=share)
    loss = objective.loss(KEY, {}, model_of(values, 0.0), None, data)
    at_rows = np.asarray(table)[tuple(index.T)]
    mean = np.exp(logsumexp(table)) / table.size
    expected = np.log(mean) - np.mean(at_rows)
    error = np.std(np.exp(table)) / mean / np.sqrt(20_000)  # of the log of a mean
    assert abs(loss - expected) < 5 * error + 1e-3


@pytest.mark.parametrize("perturbation", ["cyclical", "ordinal"])
def test_perturbations_stay_on_the_support(perturbation):
    values = (0, 2, 5)
    _, data = rows_of(values)
    objective = ebm.EnergyDiscrepancy(
        num_samples=50, flip_probability=0.9, perturbation=perturbation
    )
    # Off its support the base measure is zero, and the ratio of such a state would be lost.
    flat = model_of(values, 0.0)

    def zero(data):
        with numpyro.plate("data", len(data)):
            s = numpyro.sample("s", Values(*values).expand([2]).to_event(1), obs=data)
            ebm.energy("E", 0.0 * s[:, 0])

    losses = jax.jit(lambda: [objective.loss(KEY, {}, model, None, data) for model in (zero, flat)])
    loss, other = losses()
    np.testing.assert_allclose(loss, np.log((1 + 50) / 50), rtol=1e-10)
    assert np.isfinite(other)


@pytest.mark.parametrize("objective", [ebm.PseudoLikelihood(), ebm.EnergyDiscrepancy()])
def test_data_in_the_gaps_are_refused(objective):
    with pytest.raises(ebm.ModelError, match=r"'s' are not among its values, \[-1, 1\], in 1 of 4"):
        data = jnp.array([[1, -1], [0, 1]])
        objective.loss(KEY, {}, model_of((-1, 1), 0.0), None, data)


@pytest.mark.parametrize("values", [(-1, 1), (0, 2, 5)])
def test_latent_sites_with_gaps_are_summed_over_their_values(values):
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            s = numpyro.sample("s", Values(*values).expand([2]).to_event(1))
            t = numpyro.sample("t", Values(*values))
            coupled = log_density(s[:, 0], s[:, 1]) + 0.1 * t * v + 0.2 * t * s[:, 0]
            ebm.energy("E", 0.5 * v**2 - coupled)

    data = jnp.array([0.3, -1.0])
    log_p = ebm.log_likelihood(KEY, ebm.fixed(model, {}), data, log_normalizer=0.0)
    a, b, t = np.meshgrid(values, values, values, indexing="ij")
    for v, found in zip(np.asarray(data), log_p, strict=True):
        terms = log_density(a, b) + 0.1 * t * v + 0.2 * t * a - 3 * np.log(len(values))
        np.testing.assert_allclose(found, logsumexp(terms) - 0.5 * v**2, rtol=1e-10)


@pytest.mark.slow
def test_draws_are_values_of_the_support():
    values = (-1, 1)
    draws = ebm.sample(KEY, ebm.fixed(model_of(values, 0.3), {}), 2_000, num_rows=4)["s"]
    assert set(np.unique(draws)) == set(values)
    table = np.asarray(table_of(values, 0.3))
    expected = np.exp(table - logsumexp(table)) @ np.ones(2) @ np.array(sorted(values))
    mean = np.mean(draws[..., 0], 0)  # of every row
    assert abs(np.mean(mean) - expected) < 4 * np.std(mean) / np.sqrt(3) + 0.02
