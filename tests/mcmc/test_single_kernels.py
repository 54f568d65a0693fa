# SPDX-License-Identifier: Apache-2.0
"""What single kernels on continuous sites promise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from conftest import assert_mean
from kernel_cases import make, run, skewed, slow
from numpyro.diagnostics import effective_sample_size
from scipy import stats

import numpyro_ebm as ebm


def scales(num_rows=10, dimension=12):
    sd = jnp.exp(jnp.linspace(-2.0, 2.0, dimension))
    with numpyro.plate("data", num_rows):
        shift = 5.0 * jnp.arange(num_rows)[:, None]  # rows with different laws
        v = numpyro.sample("v", ebm.Lebesgue((dimension,)))
        ebm.energy("E", 0.5 * jnp.sum(((v - shift) / sd) ** 2, -1))


@pytest.mark.parametrize(
    "name", ["UnderdampedLangevin", slow("MALA-mass"), slow("MCLMC"), slow("MCLMC-unadjusted")]
)
def test_the_preconditioner_learns_the_scales(name):
    init = {"v": 5.0 * jnp.arange(10.0)[:, None] + jnp.zeros((10, 12))}
    mcmc, draws = run(
        make(name, ebm.fixed(scales, {})), 300, 500, init_params=init, extra_fields=("num_steps",)
    )
    found = np.asarray(mcmc.last_state.adapt_state.inverse_mass_matrix)
    expected = np.exp(np.linspace(-4.0, 4.0, 12))
    assert np.all(np.abs(np.log(found / expected)) < np.log(1.5))
    v = draws["v"][0].swapaxes(0, 1) - np.asarray(init["v"])[:, None]
    assert effective_sample_size(v).min() > 150
    if "MCLMC" in name:
        length = mcmc.last_state.adapt_state.trajectory_length
        assert abs(length / 12**0.5 - (1.5 if name == "MCLMC" else 1.0)) < 0.1


def test_a_divergence_does_not_stop_a_row_for_good():
    """The slice of a rejected row is multiplied by 0·exp(ΔH), and must not turn NaN."""

    def model(num_rows=200):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", jnp.where(v < 1.5, 0.5 * v**2, jnp.inf))

    kernel = ebm.UnderdampedLangevin(ebm.fixed(model, {}), step_size=0.8)
    mcmc, draws = run(kernel, 400, 0, init_params={"v": jnp.zeros(200)})
    v = draws["v"][0]
    assert mcmc.get_extra_fields()["diverging"].sum() > 1_000
    assert np.all(np.isfinite(mcmc.last_state.memory[1]))
    assert np.all(np.any(v[-50:] != v[-1], 0))
    # N(0, 1) below 1.5: the mean is -φ(1.5) / Φ(1.5).
    assert_mean(v[50:].T, -stats.norm.pdf(1.5) / stats.norm.cdf(1.5))


def test_hamiltonian_and_potential_energy():
    _, state, later = _two_states(ebm.UnderdampedLangevin(ebm.fixed(skewed, {}), step_size=0.3))
    kinetic = np.asarray(later.energy - later.potential_energy)
    expected = sum(0.5 * np.sum(np.square(m).reshape(20, -1), -1) for m in later.memory[0].values())
    np.testing.assert_allclose(kinetic, expected, rtol=1e-3, atol=1e-4)
    assert np.all(state.energy > state.potential_energy)


def _two_states(kernel):
    state = kernel.init(jax.random.key(0), 0, None, (), {})
    return kernel, state, jax.jit(lambda s: kernel.sample(s, (), {}))(state)


@pytest.mark.slow
def test_the_law_of_chains_with_a_bounded_drift():
    """That of the chain's own transition matrix on a grid, of a quartic that ULA runs away from."""
    step, bound = 0.1, 0.2

    def quartic(num_rows=4_000):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 5.0 * v**4)

    kernel = ebm.ULA(ebm.fixed(quartic, {}), step_size=step, max_drift=bound)
    _, draws = run(kernel, 50, 200, init_params={"v": jnp.linspace(-10.0, 10.0, 4_000)})
    grid = np.linspace(-4.0, 4.0, 801)
    mean = grid - np.clip(step * 20.0 * grid**3, -bound, bound)
    moves = np.exp(-((grid - mean[:, None]) ** 2) / (4 * step))
    moves /= moves.sum(1, keepdims=True)
    law = np.linalg.matrix_power(moves, 512)[0]
    v = draws["v"][0]
    assert_mean((v**2).T, law @ grid**2)
    assert abs(law @ grid**2 / 0.1512 - 1) > 0.5  # that of the model: it is another law


@pytest.mark.slow
def test_unadjusted_mclmc_meets_its_target_and_has_the_bias_it_says():
    def gaussian(num_rows=50):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue((30,)))
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1))

    variances = []
    for target in (5e-4, 5e-6):
        kernel = ebm.MCLMC(ebm.fixed(gaussian, {}), adjusted=False, target_energy_variance=target)
        _, draws = run(kernel, 800, 400)
        variances.append(float(np.var(draws["v"])))
    assert 0.01 < 1 - variances[0] < 0.035
    assert abs(1 - variances[1]) < 0.008


def test_mclmc_trajectories():
    """Their numbers of steps run evenly from 1 to 19, mean L/ε, up to the bound."""
    kernel = ebm.MCLMC(
        ebm.fixed(skewed, {}), step_size=0.1, trajectory_length=1.0, max_num_steps=15
    )
    mcmc, _ = run(kernel, 190, 0, extra_fields=("num_steps",))
    steps = np.asarray(mcmc.get_extra_fields()["num_steps"])
    assert steps.min() == 1 and steps.max() == 15
    expected = np.minimum(np.arange(1, 20), 15).mean()
    assert abs(steps.mean() - expected) < 0.5
