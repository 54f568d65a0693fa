# SPDX-License-Identifier: Apache-2.0
"""Schedules of kernel steps: runs in a row, each from the state of the one before.

Langevin steps of size ε on N(0, 1/λ) have the variance 1 / (λ (1 - ελ/2)): persistent chains learn
the λ at which it is that of the data, and the last step size decides.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro.distributions import constraints

import numpyro_ebm as ebm


def gaussian(x):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
        ebm.energy("E", 0.5 * precision * x**2)


def learned(variance, step_size):
    """The smaller root of λ (1 - ελ/2) = 1 / variance."""
    return (1 - np.sqrt(1 - 2 * step_size / variance)) / step_size


@pytest.mark.slow
def test_chains_and_parameters_go_on_while_steps_fall():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=200))
    variance, state, rounds = float(jnp.mean(rows**2)), None, 0
    for step_size in (0.3, 0.1, 0.02):
        kernel = partial(ebm.ULA, step_size=step_size)
        objective = ebm.ContrastiveDivergence(kernel, 10, persistent=True, num_chains=1_000)
        svi = ebm.EnergySVI(gaussian, None, optax.adam(0.01), objective)
        before, key = state, jax.random.key(1)
        fit = svi.run(key, 400, rows, init_state=state, ema=0.99, progress_bar=False)
        state, rounds = fit.state, rounds + 400
        assert int(state.objective_state.num_rounds) == rounds
        if before is not None:  # the first round starts where the chains and θ were
            one = svi.run(key, 1, rows, init_state=before, ema=0.99, progress_bar=False)
            moved = one.state.objective_state.position["x"] - before.objective_state.position["x"]
            assert np.std(moved) < 1.5 * np.sqrt(2 * 10 * step_size)
        found = fit.ema_params["precision"]
        np.testing.assert_allclose(found, learned(variance, step_size), rtol=0.05)
