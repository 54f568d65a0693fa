# SPDX-License-Identifier: Apache-2.0
"""Replica exchange over kernels of discrete sites: between modes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.infer import MCMC

import numpyro_ebm as ebm

SIZE, PULL, FIELD = 12, 0.16, 0.06


def two_modes(num_rows=1):
    """A magnet that is up or down, and up more often."""
    with numpyro.plate("data", num_rows):
        s = 2 * numpyro.sample("s", ebm.Counting(2, (SIZE,))) - 1
        total = jnp.sum(s, -1)
        ebm.energy("E", -PULL * total**2 - FIELD * total)


@pytest.mark.slow
def test_replicas_cross_between_modes_that_hold_their_kernel():
    up = np.arange(SIZE + 1)
    total = 2 * up - SIZE
    log_count = np.cumsum(np.log(np.maximum(SIZE - up + 1, 1) / np.maximum(up, 1)))
    weights = np.exp(log_count + PULL * total**2 + FIELD * total)
    expected = weights[total > 0].sum() / weights.sum()
    start = {"s": jnp.zeros((100, SIZE), int)}

    def share(kernel):
        options = {"num_warmup": 20, "num_samples": 60, "progress_bar": False}
        mcmc = MCMC(kernel, **options)
        mcmc.run(jax.random.key(0), num_rows=100, init_params=start)
        is_up = np.mean(np.asarray(mcmc.get_samples()["s"]), -1) > 0.5
        of_rows = is_up.mean(0)
        return of_rows.mean(), of_rows.std() / 10, mcmc.last_state

    model = ebm.fixed(two_modes, {})
    kernel = ebm.ReplicaExchange(
        model, kernel=ebm.BlockGibbs, num_replicas=4, min_inverse_temperature=0.2
    )
    found, error, state = share(kernel)
    assert abs(found - expected) < 4.5 * error < 0.15
    assert state.round_trips.mean() > 5
    alone, *_ = share(ebm.BlockGibbs(model))
    assert alone < expected - 0.3


@pytest.mark.parametrize(
    "kernel",
    [
        ebm.MALA,
        "BlockGibbs",
        lambda model: ebm.DiscreteLangevin(model, step_size=0.5, adjusted=False),
        lambda model: model,
    ],
)
def test_kernels_without_a_law_of_discrete_sites_are_refused(kernel):
    with pytest.raises(ebm.ModelError, match="`kernel` is a function from a model to a kernel"):
        ebm.ReplicaExchange(ebm.fixed(two_modes, {}), kernel=kernel)


def test_what_the_kernel_refuses_is_refused():
    def model(num_rows=1):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            ebm.energy("E", jnp.sum(v**4, -1))

    kernel = ebm.ReplicaExchange(ebm.fixed(model, {}), kernel=ebm.SwendsenWang)
    with pytest.raises(ebm.ModelError, match="moves discrete sites, and ..v.. are continuous"):
        kernel.init(jax.random.key(0), 0, None, (), {})


def test_what_belongs_to_the_steps_is_given_to_the_kernel():
    model = ebm.fixed(lambda: None, {})
    with pytest.raises(ebm.ModelError, match=r"\['step_size'\] belong.*kernel=lambda model"):
        ebm.ReplicaExchange(model, kernel=ebm.BlockGibbs, step_size=0.1)
