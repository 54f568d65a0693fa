# SPDX-License-Identifier: Apache-2.0
"""Chains that hardly move are where they begin, and the loss says where that is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

import numpyro_ebm as ebm

SIGNS = jnp.asarray(np.where(np.random.default_rng(3).random(6_000) < 0.5, 1.0, -1.0))


def quartic(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.1 * v**4)


still = partial(ebm.ULA, step_size=1e-10)
recovery = partial(ebm.RecoveryLikelihood, 0.7, num_steps=2, step_size=1e-10)
contrastive = partial(ebm.ContrastiveDivergence, still, 2)

# The fourth moment there: of the data it is 1, and of s + τ ξ it is 1 + 6 τ² + 3 τ⁴.
BEGINNINGS = {
    "recovery-noised": (recovery(initial="noised"), 1 + 6 * 0.7**2 + 3 * 0.7**4),
    "recovery-default": (recovery(), 1.0),
    "contrastive-default": (contrastive(), 1.0),
    "contrastive-gaussian": (contrastive(initial="gaussian"), 3.0),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_chains_that_hardly_move_are_where_they_begin(name):
    objective, moment = BEGINNINGS[name]
    keys = jax.random.split(jax.random.key(5), 25)
    run = jax.jit(jax.vmap(lambda key: objective.loss(key, {}, quartic, None, SIGNS)))
    losses = np.asarray(run(keys))
    expected = 0.1 * (1.0 - moment)
    error = losses.std(ddof=1) / 5
    assert abs(losses.mean() - expected) < 4.5 * error + 1e-4
    assert error < 0.1 * abs(expected) + 1e-4
