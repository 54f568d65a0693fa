# SPDX-License-Identifier: Apache-2.0
"""Fits in processes and calls in threads, as far as they are promised."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest

import numpyro_ebm as ebm

DATA = np.random.default_rng(4).normal(1.0, 2.0, 60).astype(np.float32)


def model(data):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - mean) ** 2)


def new():
    return ebm.EnergySVI(model, None, optax.adam(0.1), ebm.DenoisingScoreMatching(0.3))


def fit(seed):
    run = new().run(jax.random.key(seed), 20, DATA, progress_bar=False)
    return float(run.params["mean"])


@pytest.mark.slow
def test_processes_that_are_spawned_fit_as_this_one_does():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(fit, [1, 2])) == [fit(1), fit(2)]


def test_threads_may_call_what_is_compiled():
    svi = new()
    update = jax.jit(svi.update)
    states = [svi.init(jax.random.key(seed), DATA) for seed in range(4)]
    expected = [update(state, DATA) for state in states]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda state: update(state, DATA), 8 * states))
    for (state, loss), (same, again) in zip(found, 8 * expected, strict=True):
        assert loss == again
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True)
        assert all(jnp.array_equal(x, y) for x, y in pairs)
