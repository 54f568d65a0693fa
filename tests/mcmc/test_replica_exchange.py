# SPDX-License-Identifier: Apache-2.0
"""Replica exchange: modes, swaps, the ladder."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean
from jax import lax
from kernel_cases import run
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.adaptation import acceptance_tuner
from numpyro_ebm.mcmc.replica_ladder import LadderAdaptation
from numpyro_ebm.samplers import tempering

CENTRES = 3.0 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], -1)
WEIGHTS = np.array([1.0, 2, 1, 3, 1, 2, 1, 1]) / 12
WIDTH = 0.2  # neighbours are 11.5 widths apart: a barrier of 16 nats


def eight_modes(num_rows=40):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        squares = jnp.sum((v[:, None] - CENTRES) ** 2, -1) / WIDTH**2
        ebm.energy("E", -jax.scipy.special.logsumexp(-squares / 2 + jnp.log(WEIGHTS), axis=-1))


def chi_square(draws, weights):
    """p-value of the counts of modes against the weights, draws thinned to their effective size.

    :param draws: positions of shape (chains, draws, 2).
    """
    mode = np.argmin(np.sum((draws[:, :, None] - CENTRES) ** 2, -1), -1)
    indicators = (mode[..., None] == np.arange(8)).astype(float)
    ess = effective_sample_size(indicators + 1e-9 * np.arange(mode.shape[1])[:, None]).min()
    thin = max(1, int(np.ceil(mode.size / ess)))
    counts = np.bincount(mode[:, ::thin].ravel(), minlength=8)
    return stats.chisquare(counts, counts.sum() * weights).pvalue, counts


@pytest.mark.slow
def test_replica_exchange_finds_the_modes_and_mala_does_not():
    model = ebm.fixed(eight_modes, {})
    start = {"v": jnp.zeros((40, 2)) + jnp.asarray(CENTRES[0])}  # all in one mode
    mcmc, draws = run(
        ebm.ReplicaExchange(model, num_replicas=6, min_inverse_temperature=0.02),
        3_000,
        600,
        init_params=start,
        thinning=3,
    )
    v = draws["v"][0].swapaxes(0, 1)
    pvalue, counts = chi_square(v, WEIGHTS)
    assert counts.sum() > 400 and counts.min() > 10
    assert 0.005 < pvalue
    assert chi_square(v, np.full(8, 1 / 8))[0] < 1e-4  # unequal weights are told apart
    state = mcmc.last_state
    rates = np.asarray(state.mean_swap_prob)
    assert rates.shape == (5,) and rates.min() > 0.2 and np.ptp(rates) < 0.25
    assert np.all(state.round_trips > 20)
    assert state.adapt_state.inverse_temperatures[0] == 1
    np.testing.assert_allclose(state.adapt_state.inverse_temperatures[-1], 0.02, rtol=1e-6)
    assert "swap rates" in mcmc.sampler.get_diagnostics_str(state)

    _, draws = run(ebm.MALA(model), 3_000, 600, init_params=start)
    mode = np.argmin(np.sum((draws["v"][0][:, :, None] - CENTRES) ** 2, -1), -1)
    assert np.mean(mode == 0) > 0.95  # plain MALA stays where it started
    assert (
        stats.chisquare(
            np.bincount(mode[::50].ravel(), minlength=8) + 1e-9, WEIGHTS * mode[::50].size
        )[1]
        < 1e-12
    )


def test_only_energies_are_tempered():
    """N(1, 1) as base and an energy v²/2: at β the density is N(1/(1 + β), 1/(1 + β))."""

    def model(num_rows=30):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", dist.Normal(1.0, 1.0))
            ebm.energy("E", 0.5 * v**2)

    kernel = ebm.ReplicaExchange(ebm.fixed(model, {}), [1.0, 0.5, 0.0], adapt_ladder=False)
    mcmc, draws = run(kernel, 2_000, 300, extra_fields=("memory",))
    replicas = np.asarray(mcmc.get_extra_fields()["memory"][0].position["v"])  # draws, K, rows
    for k, beta in enumerate((1.0, 0.5, 0.0)):
        chains = replicas[:, k].T
        assert_mean(chains, 1 / (1 + beta))
        assert_mean((chains - 1 / (1 + beta)) ** 2, 1 / (1 + beta))
    np.testing.assert_array_equal(replicas[:, 0], draws["v"][0])


def test_tempering_is_blackjax_shaped_and_swaps_by_turns():
    assert {"init", "build_kernel", "as_top_level_api"} <= set(dir(tempering))
    beta = jnp.array([1.0, 0.5, 0.25, 0.1])
    algorithm = tempering.as_top_level_api(
        lambda x: 0.0 * x, lambda x: -0.5 * x**2, beta, 1.0 / beta
    )
    state = algorithm.init(jnp.arange(4.0))
    assert state.replicas.loglikelihood.tolist() == [-0.0, -0.5, -2.0, -4.5]

    def step(state, key):
        state, info = algorithm.step(key, state)
        return state, (state.replicas.position, info.is_swapped, info.swap_probability)

    keys = jax.random.split(jax.random.key(0), 20_000)
    _, (x, swapped, probability) = lax.scan(step, state, keys)
    assert_mean(np.asarray(x)[None] ** 2, 1 / np.asarray(beta))
    assert not swapped[::2, 1].any() and not swapped[1::2, 0].any() and not swapped[1::2, 2].any()
    rates = np.asarray([swapped[::2, 0].mean(), swapped[1::2, 1].mean(), swapped[::2, 2].mean()])
    np.testing.assert_allclose(rates, probability.mean(0), atol=0.02)


def test_swaps_keep_replicas_together():
    replicas = tempering.Replica(
        {"v": jnp.arange(8.0).reshape(4, 2)}, *(jnp.arange(4.0) * s for s in (0.0, 100.0)), 0, 0
    )
    replicas = replicas._replace(logprior_grad=jnp.arange(4.0), loglikelihood_grad=jnp.arange(4.0))
    beta = jnp.array([1.0, 0.5, 0.2, 0.1])
    for parity, order in ((0, [1, 0, 3, 2]), (1, [0, 2, 1, 3])):
        new, label, probability, swapped = tempering.swap(
            jax.random.key(0), replicas, beta, parity, jnp.arange(4)
        )
        assert label.tolist() == order and probability.tolist() == [1.0] * 3
        np.testing.assert_array_equal(new.position["v"], replicas.position["v"][jnp.array(order)])
        assert new.loglikelihood.tolist() == [100.0 * k for k in order]
        assert new.logprior_grad.tolist() == order
        assert swapped.tolist() == [parity == 0, parity == 1, parity == 0]
    worse = replicas._replace(loglikelihood=-replicas.loglikelihood)
    _, label, probability, _ = tempering.swap(jax.random.key(0), worse, beta, 0, jnp.arange(4))
    assert label.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(probability, np.exp(-100 * -np.diff(beta)), rtol=1e-3)


def test_the_ladder_moves_to_equal_rejection():
    beta = jnp.array([1.0, 0.1, 0.05, 0.01])
    new = tempering.equal_rejection_ladder(beta, jnp.array([0.9, 0.1, 0.2]))
    assert np.all(np.diff(new) < 0) and new[0] == 1 and new[-1] == beta[-1]
    assert new[1] > 0.3 and new[2] > 0.1  # most of the way is between the first two
    even = tempering.equal_rejection_ladder(beta, jnp.full(3, 0.4))
    np.testing.assert_allclose(even, beta, rtol=1e-3)
    ended = tempering.equal_rejection_ladder(beta.at[-1].set(0.0), jnp.array([0.9, 0.1, 0.2]))
    assert ended[-1] == 0 and np.all(np.diff(ended) < 0)


def test_step_sizes_move_with_the_ladder():
    """Geometric in between, row by row, where the new temperatures lie among the old ones."""
    old, steps = np.array([1.0, 0.4, 0.1]), np.array([[0.1, 0.3], [0.2, 0.3], [1.0, 2.0]])
    adaptation = LadderAdaptation(100, acceptance_tuner(0.75), True, True)
    state = adaptation.init(old, 0.2, 2)._replace(step_size=jnp.asarray(steps))
    state = state._replace(rejection=jnp.array([0.6, 1.8]), num_steps=jnp.array(3.0))
    found = adaptation._end_window(state)
    ladder = np.asarray(found.inverse_temperatures)
    assert 0.1 < ladder[1] < 0.4
    expected = [np.exp(np.interp(ladder, old[::-1], np.log(x)[::-1])) for x in steps.T]
    np.testing.assert_allclose(found.step_size, np.transpose(expected), rtol=1e-5)


def test_round_trips_are_those_since_the_warmup():
    def model():
        with numpyro.plate("data", 2):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * v**2)

    kernel = ebm.ReplicaExchange(ebm.fixed(model, {}), num_replicas=3)
    mcmc = MCMC(kernel, num_warmup=300, num_samples=4, progress_bar=False)
    mcmc.run(jax.random.key(4))
    assert mcmc.last_state.round_trips.max() <= 1


def test_replicas_start_at_steps_as_wide_as_their_temperatures_allow():
    """ε/β, which a warm-up would make up for; at β = 0 as the replica before it."""
    tuner = acceptance_tuner(0.75)
    found = LadderAdaptation(100, tuner, True, True).init(np.array([1.0, 0.4, 0.1, 0.0]), 0.2, 3)
    expected = np.broadcast_to(np.array([[0.2], [0.5], [2.0], [2.0]]), (4, 3))
    np.testing.assert_allclose(found.step_size, expected, rtol=1e-6)
    steps = jax.vmap(jax.vmap(tuner.current))(found.tuner)
    np.testing.assert_allclose(steps, expected, rtol=1e-5)


def test_a_ladder_down_to_zero_stays_one():
    """Its steps of equal rejection are between the same ends, which it keeps."""
    ladder = jnp.array([1.0, 0.5, 0.1, 0.0])
    found = np.asarray(tempering.equal_rejection_ladder(ladder, jnp.array([0.1, 0.1, 0.6])))
    assert found[0] == 1 and found[-1] == 0 and np.all(np.diff(found) < 0)
    assert found[1] < 0.1  # most of the rejections are between the last two
