# SPDX-License-Identifier: Apache-2.0
"""How often a chain traces the user's model, and that what it keeps of it is never outdated."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.infer import MCMC

import numpyro_ebm as ebm


def counted(fn):
    def model(*args, **kwargs):
        model.count += 1
        return fn(*args, **kwargs)

    model.count = 0
    return model


def gaussian(num_rows=3, scale=1.0):
    with numpyro.plate("rows", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        ebm.energy("E", 0.5 * jnp.sum((v / scale) ** 2, -1))


def spins(num_rows=3):
    with numpyro.plate("rows", num_rows):
        v = numpyro.sample("v", ebm.Counting(2, (4,)))
        ebm.energy("E", 0.5 * jnp.sum(v, -1) ** 2)


def both(num_rows=3):
    with numpyro.plate("rows", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        h = numpyro.sample("h", ebm.Counting(2, (4,)))
        numpyro.deterministic("sum", jnp.sum(v, -1))
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - jnp.sum(v, -1) * jnp.sum(h, -1))


CHAINS = {
    "MALA": (ebm.MALA, gaussian),
    "MALA with sums": (ebm.MALA, both),
    "MCLMC": (ebm.MCLMC, gaussian),
    "ReplicaExchange": (ebm.ReplicaExchange, gaussian),
    "DiscreteLangevin": (ebm.DiscreteLangevin, spins),
    "BlockGibbs": (ebm.BlockGibbs, both),
}


def run(kernel, *args, num_samples=10, **options):
    mcmc = MCMC(kernel, num_warmup=10, num_samples=num_samples, progress_bar=False, **options)
    mcmc.run(jax.random.key(0), *args)
    return mcmc


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_traces_its_model_four_times_at_most(name):
    make, fn = CHAINS[name]
    model = counted(fn)
    run(make(ebm.fixed(model, {})))
    assert 0 < model.count <= 4


@pytest.mark.slow
def test_a_kernel_reads_its_model_again_at_other_arguments():
    """A kernel that ran at one scale draws at the scale that it is given next."""
    kernel = ebm.MALA(ebm.fixed(gaussian, {}), 0.5, adapt_step_size=False)
    for num_rows, scale in ((500, 1.0), (400, 1.0), (400, 0.5)):
        mcmc = run(kernel, num_rows, scale, num_samples=30)
        draws = np.asarray(mcmc.get_samples()["v"])
        assert draws.shape == (30, num_rows, 2)
        assert abs(draws.std() / scale - 1) < 0.1


@pytest.mark.slow
def test_a_kernel_started_under_jit_steps_outside_of_it():
    kernel = ebm.MALA(ebm.fixed(gaussian, {}), 0.5)
    state = jax.jit(lambda key: kernel.init(key, 0, None, (), {}))(jax.random.key(0))
    moved = kernel.sample(state, (), {})
    again = jax.jit(lambda state: kernel.sample(state, (), {}))(state)
    np.testing.assert_allclose(moved.z["v"], again.z["v"], rtol=1e-6)


@pytest.mark.slow
def test_traced_arguments_are_read_where_they_are_traced():
    def steps(scale):
        kernel = ebm.MALA(ebm.fixed(gaussian, {}), 0.5)
        state = kernel.init(jax.random.key(0), 0, None, (3, scale), {})
        return kernel.sample(state, (3, scale), {}).potential_energy

    both_scales = jax.vmap(steps)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(both_scales[0], steps(1.0), rtol=1e-5)
    np.testing.assert_allclose(both_scales[1], steps(2.0), rtol=1e-5)
