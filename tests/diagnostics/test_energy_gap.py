# SPDX-License-Identifier: Apache-2.0
"""Energies of data and samples."""

import jax.numpy as jnp
import numpy as np
import numpyro
import oracles
import pytest
from diagnostic_cases import KEY, conditional, own_grbm
from oracles import LINEAR

import numpyro_ebm as ebm

GRBM, GRBM_FIXED, FIT = own_grbm()


def test_energies_of_data_and_samples():
    rng = np.random.default_rng(0)
    data, draws = (oracles.grbm_draws(GRBM, n, rng) for n in (40, 130))
    energy = lambda x: -np.array([oracles.grbm_log_density(GRBM, v) for v in x])  # noqa: E731
    gap = ebm.energy_gap(KEY, GRBM_FIXED, jnp.asarray(data), jnp.asarray(draws))
    np.testing.assert_allclose(gap.data, energy(data), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gap.samples, energy(draws), rtol=1e-4, atol=1e-5)
    assert gap.difference == pytest.approx(gap.data.mean() - gap.samples.mean(), abs=1e-5)
    error = np.sqrt(np.var(gap.data, ddof=1) / 40 + np.var(gap.samples, ddof=1) / 130)
    assert gap.standard_error == pytest.approx(error, rel=1e-5)
    both = np.sort(np.concatenate([gap.data, gap.samples]))
    cdf = lambda x: np.searchsorted(np.sort(x), both, side="right") / len(x)  # noqa: E731
    assert gap.statistic == pytest.approx(np.abs(cdf(gap.data) - cdf(gap.samples)).max())
    # What `sample` returns: draws of a plate, other sites aside.
    by_rows = {"v": draws.reshape(65, 2, 2), "h": jnp.zeros((65, 2, 3))}
    again = ebm.energy_gap(KEY, GRBM_FIXED, jnp.asarray(data), by_rows)
    np.testing.assert_allclose(again.samples, gap.samples, rtol=1e-5)
    far = ebm.energy_gap(KEY, GRBM_FIXED, jnp.asarray(data) + 2, draws)
    assert far.difference > 5 * far.standard_error and far.p_value < 1e-3 < gap.p_value


def test_energies_on_bounded_supports_are_those_of_the_site():
    params = {"a": np.array(2.5), "rate": np.array(1.3)}
    data = np.random.default_rng(0).gamma(2.0, size=4)
    gap = ebm.energy_gap(KEY, ebm.fixed(oracles.gamma, params), jnp.asarray(data), data)
    np.testing.assert_allclose(gap.data, 1.3 * data - 1.5 * np.log(data), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gap.samples, gap.data, rtol=1e-5)
    assert gap.statistic == 0 and gap.p_value == 1


@pytest.mark.slow
def test_energies_under_a_bound():
    system = oracles.linear_system(num_rows=5)
    model, data = ebm.fixed(oracles.linear_gaussian, LINEAR), jnp.asarray(system.data)
    gap = ebm.energy_gap(
        KEY, model, data, data, marginal=ebm.ImportanceBound(3), guide=system.guide
    )  # the exact posterior: no gap in the bound
    energy = -np.array([oracles.linear_log_density(LINEAR, v) for v in system.data])
    np.testing.assert_allclose(np.diff(gap.data), np.diff(energy), atol=1e-3)
    np.testing.assert_allclose(gap.samples, gap.data, atol=1e-3)


def test_energies_of_draws_are_at_the_covariates_of_their_rows():
    regression, x = ebm.fixed(conditional, {}), jnp.arange(3.0)
    gap = ebm.energy_gap(KEY, regression, x, {"v": jnp.tile(x + 1, (4, 1))}, x)
    np.testing.assert_allclose(gap.samples, 0.5)
    with pytest.raises(ebm.ModelError, match="for the 3 rows"):
        ebm.energy_gap(KEY, regression, x, {"v": jnp.ones((4, 2))}, x)


def test_energy_gap_refuses_what_it_cannot_do():
    data = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    guide = oracles.learned_grbm_guide
    cases = [
        ("free parameter", (oracles.grbm, data, data), {}),
        ("lack the visible site 'v'", (GRBM_FIXED, data, {"h": data}), {}),
        (
            r"shape \(4, 2, 3\); it should be \(draws, 3, 2\)",
            (GRBM_FIXED, data, jnp.ones((4, 2, 3))),
            {},
        ),
        (
            "derivatives only",
            (GRBM_FIXED, data, data),
            {"marginal": ebm.VaGES(), "guide": guide, "guide_params": FIT},
        ),
        ("ImportanceBound", (GRBM_FIXED, data, data), {"guide": guide}),
        ("NaN or infinite", (GRBM_FIXED, data, jnp.full((4, 2), jnp.inf)), {}),
        (
            "`samples` as a dict",
            (ebm.fixed(two_sites, {}), {"a": data[:, 0], "b": data[:, 1]}, data),
            {},
        ),
    ]
    for message, args, options in cases:
        with pytest.raises(ebm.ModelError, match=message):
            ebm.energy_gap(KEY, *args, **options)


def two_sites(data=None):
    with numpyro.plate("data", 1 if data is None else len(data["a"])):
        a = numpyro.sample("a", ebm.Lebesgue(), obs=None if data is None else data["a"])
        b = numpyro.sample("b", ebm.Lebesgue(), obs=None if data is None else data["b"])
        ebm.energy("E", 0.5 * a**2 + 0.5 * (b - a) ** 2)
