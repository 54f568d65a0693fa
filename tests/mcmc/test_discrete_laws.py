# SPDX-License-Identifier: Apache-2.0
"""Stationary laws of discrete kernels by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from conftest import enable_x64
from discrete_cases import KERNELS, LAWS, last

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.block_gibbs import BlockGibbsState

CASES = [(name, law) for name, kernel in KERNELS.items() for law in kernel.laws]


MOST_CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if case[1] == "dense" else []) for case in CASES
]


@pytest.mark.parametrize("kernel, law", MOST_CASES)
def test_stationary_law_is_that_of_enumeration(kernel, law):
    kernel, law = KERNELS[kernel], LAWS[law]
    state = last(kernel.make(law.model), 10_000, kernel.num_steps // 3, kernel.num_steps)
    assert abs(law.z_score(state.z["s"])) < 4.5
    assert np.all(np.abs(law.moment_z_scores(state.z["s"])) < 4.5)
    energy = np.asarray(law.energy(np.asarray(state.z["s"])))
    np.testing.assert_allclose(state.potential_energy, energy, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kernel, law", CASES)
def test_stationary_law_in_double_precision(kernel, law):
    kernel, model = KERNELS[kernel], LAWS[law].model
    with enable_x64():
        state = last(kernel.make(model), 20_000, kernel.num_steps // 3, kernel.num_steps)
        assert state.potential_energy.dtype == "float64" and state.z["s"].dtype == "int64"
        assert abs(LAWS[law].z_score(state.z["s"])) < 4.5


@pytest.mark.parametrize("law", LAWS)
def test_how_blocks_are_drawn(law):
    [block] = ebm.BlockGibbs(LAWS[law].model).plan(num_rows=3)
    assert block.kind == LAWS[law].kind
    if block.kind == "coloured":
        assert block.colors.max() == 1


@pytest.mark.slow
def test_a_sweep_of_a_lattice_is_two_gradients():
    """Whatever its size: no loop over units is left in the compiled sweep."""
    calls = []

    def model(side):
        calls.append(1)
        with numpyro.plate("data", 2):
            s = 2 * numpyro.sample("s", ebm.Counting(2, (side, side))) - 1
            bonds = s * jnp.roll(s, 1, 1) + s * jnp.roll(s, 1, 2)
            ebm.energy("E", -0.4 * jnp.sum(bonds, (1, 2)))

    kernel = ebm.BlockGibbs(ebm.fixed(model, {}))
    for side in (4, 20):
        z = {"s": jnp.zeros((2, side, side), int)}
        state = BlockGibbsState(jnp.array(0), z, jnp.zeros(2), jax.random.key(0))
        [block] = kernel.plan(side)
        checkerboard = np.indices((side, side)).sum(0) % 2
        assert set(block.colors[checkerboard.ravel() == 0]) != set(
            block.colors[checkerboard.ravel() == 1]
        )
        jaxpr = jax.make_jaxpr(lambda s, side=side: kernel.sample(s, (side,), {}))(state)
        scans = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
        assert [e.params["length"] for e in scans] == [2]


@pytest.mark.slow
def test_the_unadjusted_proposals_are_biased_as_known():
    g, step_size = np.array([1.5, -0.7, 0.2]), 0.8

    def model(num_rows):
        with numpyro.plate("data", num_rows):
            s = numpyro.sample("s", ebm.Counting(2, (3,)))
            ebm.energy("E", -s @ g)

    def odds(adjusted):
        kernel = ebm.DiscreteLangevin(ebm.fixed(model, {}), step_size, adjusted=adjusted)
        p = np.mean(last(kernel, 100_000, 0, 25).z["s"], 0)
        return np.log(p / (1 - p)), 1 / np.sqrt(p * (1 - p) * 100_000)

    a = 1 / (2 * step_size)
    biased = g + np.log1p(np.exp(-g / 2 - a)) - np.log1p(np.exp(g / 2 - a))
    for adjusted, expected in ((True, g), (False, biased)):
        found, error = odds(adjusted)
        assert np.all(np.abs(found - expected) < 4.5 * error)
    assert np.max(np.abs(biased - g)) > 20 * error.max()


@pytest.mark.slow
def test_the_unadjusted_proposals_miss_a_coupled_law():
    law = LAWS["dense"]
    kernel = ebm.DiscreteLangevin(law.model, 1.0, adjusted=False)
    assert law.z_score(last(kernel, 20_000, 0, 60).z["s"]) > 50


@pytest.mark.parametrize("differences, longest", [("gradient", 4.0), ("exact", 1.0)])
def test_steps_grow_no_longer_than_their_support(differences, longest):
    """Where nearly every proposal is taken: to the square of its width, or to one."""

    def model(num_rows):
        with numpyro.plate("data", num_rows):
            s = numpyro.sample("s", ebm.Counting(3, (2,)))
            ebm.energy("E", 1e-3 * jnp.sum(s, -1))

    kernel = ebm.DiscreteLangevin(ebm.fixed(model, {}), 0.5, differences=differences)
    np.testing.assert_allclose(last(kernel, 2, 30, 0).adapt_state.step_size, longest)


@pytest.mark.slow
def test_step_size_is_adapted_to_the_acceptance():
    kernel = ebm.DiscreteLangevin(LAWS["ordinal"].model, target_accept_prob=0.8)
    state = last(kernel, 500, 300, 300)
    assert abs(state.mean_accept_prob - 0.8) < 0.05
    assert np.all(state.adapt_state.step_size != 0.2)
