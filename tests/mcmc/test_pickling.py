# SPDX-License-Identifier: Apache-2.0
"""Kernels that are put into a file and taken out again, and runs that go on from there."""

import pickle

import jax
import jax.numpy as jnp
import numpyro
import pytest
from numpyro.infer import MCMC
from registry.kernels import KERNELS

import numpyro_ebm as ebm


def real():
    with numpyro.plate("data", 2):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)))
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + 0.1 * jnp.sum(v**4, -1))


def spins():
    with numpyro.plate("data", 2):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(4,)))
        ebm.energy("E", -0.3 * jnp.sum(v[..., 1:] * v[..., :-1], -1))


def run(mcmc):
    mcmc.run(mcmc.post_warmup_state.rng_key)
    return mcmc.get_samples(group_by_chain=True)


DEFAULT = "MALA", "DiscreteLangevin"


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x not in DEFAULT)) for x in KERNELS]
)
def test_a_run_goes_on_from_a_pickle(name):
    kernel = KERNELS[name].make(ebm.fixed(real, {}))
    kernel = KERNELS[name].make(ebm.fixed(spins, {})) if kernel.moves_discrete else kernel
    mcmc = MCMC(kernel, num_warmup=20, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(3))
    mcmc.post_warmup_state = mcmc.last_state
    again = pickle.loads(pickle.dumps(mcmc))
    expected, found = run(mcmc), run(again)
    assert expected.keys() == found.keys()
    assert all(bool(jnp.array_equal(expected[k], found[k])) for k in expected)
