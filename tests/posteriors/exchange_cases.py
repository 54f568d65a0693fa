# SPDX-License-Identifier: Apache-2.0
"""What the tests of posteriors share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean
from numpyro.infer import MCMC
from scipy import stats
from scipy.special import logsumexp

import numpyro_ebm as ebm

slow = partial(pytest.param, marks=pytest.mark.slow)
MALA = partial(ebm.MALA, step_size=0.8)


def gaussian(data, num_rows=None):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def gaussian_rows(rng_key, params, num_rows=200):
    return {"v": jax.random.normal(rng_key, (num_rows,)) / jnp.sqrt(params["theta"])}


def gaussian_posterior(data):
    return stats.gamma(2 + len(data) / 2, scale=1 / (1 + 0.5 * np.sum(data**2)))


def bonds(s):
    return s * (jnp.roll(s, 1, -1) + jnp.roll(s, 1, -2))


def ising(data):
    beta = numpyro.sample("beta", dist.Uniform(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        s = numpyro.sample("s", ebm.Counting(2, np.shape(data)[1:]), obs=data)
        ebm.energy("E", -beta * jnp.sum(bonds(2.0 * s - 1.0), (-1, -2)))


def lattice_sums(size):
    """Sum of the bonds of every state of a lattice on a torus."""
    states = (np.arange(2 ** (size * size))[:, None] >> np.arange(size * size)) & 1
    s = (2 * states - 1).reshape(-1, size, size)
    return states.reshape(-1, size, size), np.sum(
        s * (np.roll(s, 1, -1) + np.roll(s, 1, -2)), (-1, -2)
    )


def pairs(data):
    """Two visible bits and a hidden one."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(2, (2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, (1,)))
        ebm.energy("E", -(w * jnp.sum(v, -1) - 0.5) * h[..., 0] - 0.3 * v[..., 0])


PAIRS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


def on_grid(log_density, low, high, num=4_000):
    """Mean and sd of a density on the line, by a sum over a fine grid."""
    x = np.linspace(low, high, num)
    weights = log_density(x)
    weights = np.exp(weights - weights.max())
    weights /= weights.sum()
    mean = np.sum(weights * x)
    return mean, np.sqrt(np.sum(weights * (x - mean) ** 2))


def pairs_posterior(data):
    def log_rows(w, v):
        up = w[:, None] * v.sum(-1) - 0.5
        return np.logaddexp(0.0, up) + 0.3 * v[:, 0]

    def log_density(w):
        log_z = logsumexp(log_rows(w, PAIRS), axis=1)
        return -0.5 * w**2 + log_rows(w, data).sum(1) - len(data) * log_z

    return on_grid(log_density, -6, 8)


RNG = np.random.default_rng(0)
GAUSSIAN = RNG.normal(size=200)


def draw_lattices(size, num, beta=0.3):
    states, sums = lattice_sums(size)
    return states[RNG.choice(len(states), size=num, p=np.exp(beta * sums - logsumexp(beta * sums)))]


LATTICES = {3: draw_lattices(3, 3), 4: draw_lattices(4, 1)}
BITS = PAIRS[RNG.choice(4, size=60, p=[0.1, 0.2, 0.3, 0.4])]


def chains(kernel, args, num_steps, num_chains=20, num_warmup=200, seed=0, **init_params):
    """Constrained draws (chains, draws, ...) by name, and the last state."""

    @jax.jit
    def run(keys):
        def one(key):
            state = kernel.init(key, num_warmup, init_params or None, args, {})

            def step(state, _):
                state = kernel.sample(state, args, {})
                return state, (state.z, state.accept_prob)

            return jax.lax.scan(step, state, None, num_warmup + num_steps)

        return jax.vmap(one)(keys)

    state, (z, accept) = run(jax.random.split(jax.random.key(seed), num_chains))
    z = jax.tree.map(lambda x: x[:, num_warmup:], z)
    constrain = kernel.get_constrain_fn(args, {})
    draws = jax.jit(jax.vmap(jax.vmap(constrain)))(z)
    draws = {name: np.asarray(x, float) for name, x in draws.items()}
    return draws, state, np.asarray(accept)[:, num_warmup:]


def assert_posterior(draws, mean, sd):
    assert_mean(draws, mean)
    assert_mean((draws - mean) ** 2, sd**2)


def _moments(data):
    exact = gaussian_posterior(data)
    return exact.mean(), exact.std()


def run(kernel, *args, num_samples=200, num_warmup=100, seed=0, fields=(), **options):
    init_params = options.pop("init_params", None)
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False, **options
    )
    mcmc.run(jax.random.key(seed), *args, extra_fields=fields, init_params=init_params)
    return mcmc


class Ran:
    """What is asked of NumPyro's MCMC after a run: fields and unconstrained draws by chain."""

    def __init__(self, kernel: Any, args: Any, trace: Any, z: Any):
        self.sampler, self._args, self._kwargs = kernel, args, {}
        self.trace, self.z, self.last_state = trace, z, ()

    def get_extra_fields(self, group_by_chain):
        return {"auxiliary": self.trace}

    def get_samples(self):
        constrain = jax.vmap(self.sampler.get_constrain_fn(self._args, {}))
        return constrain({k: jnp.reshape(x, (-1, *x.shape[2:])) for k, x in self.z.items()})


NUM_GROUPS, NUM_UNITS = 6, 30


GROUPS = np.random.default_rng(1).normal(size=(NUM_GROUPS, NUM_UNITS)) * np.exp(
    -0.5 * (0.3 + 0.5 * np.random.default_rng(2).normal(size=(NUM_GROUPS, 1)))
)
