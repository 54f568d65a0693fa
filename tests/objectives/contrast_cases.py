# SPDX-License-Identifier: Apache-2.0
"""What the tests of objectives share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from jax.nn import softplus
from numpyro.distributions import constraints
from oracles import flat

import numpyro_ebm as ebm

KEY = jax.random.key(3)
RNG = np.random.default_rng(4)
LOC, SCALE = np.array([0.2, -0.1, 0.3]), np.array([1.3, 1.1, 1.2])
STEP = 0.7  # of ConditionalNCE


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


def normal_grid(dim, degree):
    """Nodes (n, dim) and weights (n,) of the standard Normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(nodes, repeat=dim)))
    return grid, np.prod(list(itertools.product(weights, repeat=dim)), axis=1)


def log_normal(v, loc, scale):
    return jnp.sum(-0.5 * ((v - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * np.log(2 * np.pi), -1)


def noise_of(dim):
    return dist.Normal(LOC[:dim], SCALE[:dim]).to_event(1)


def value_and_gradient(fn):
    return lambda params: flat(jax.value_and_grad(fn)(params))


def log_ratio(system, p, v):
    """log p̃ - log q of one row."""
    dim = system.data.shape[1]
    return system.log_density(p, v) - log_normal(v, LOC[:dim], SCALE[:dim])


def ranking(system, degree):
    """The row against one draw of the noise."""
    dim = system.data.shape[1]
    grid, weights = normal_grid(dim, degree)
    at = LOC[:dim] + SCALE[:dim] * grid

    def loss(p):
        here = jax.vmap(lambda v: log_ratio(system, p, v))(jnp.asarray(system.data))
        there = jax.vmap(lambda v: log_ratio(system, p, v))(jnp.asarray(at))
        return jnp.mean(softplus(there - here[:, None]) @ weights)

    return loss


def conditional(system, degree, pair_loss=softplus):
    grid, weights = normal_grid(system.data.shape[1], degree)

    def loss(p):
        row = jax.vmap(lambda v: system.log_density(p, v))

        def one(v):
            return weights @ pair_loss(row(v + STEP * grid) - system.log_density(p, v))

        return jnp.mean(jax.vmap(one)(jnp.asarray(system.data)))

    return loss


def ratios(system, degree):
    """Four times the squared probability that a row's copy is taken for the row."""
    return conditional(system, degree, lambda x: 4.0 / (1.0 + jnp.exp(-x)) ** 2)


def make(name, marginal, dim):
    noise = noise_of(dim)
    if name.startswith("NCE"):
        return ebm.NCE(noise, int(name[-1]), marginal)
    if name.startswith("SNL"):
        return ebm.SelfNormalized(noise, int(name[-1]), marginal)
    if name.startswith("ranking"):
        return ebm.RankingNCE(noise, 1, marginal)
    if name == "ratios":
        return ebm.KernelRatioMatching(STEP, 2, marginal)
    return ebm.ConditionalNCE(STEP, 2, marginal)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def gaussian_log_z(params):
    return np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(np.asarray(params["precision"]))[1]


def grbm_log_z(params):
    W, b, c, scale = (np.asarray(params[k], float) for k in ("W", "b", "c", "scale"))
    states = np.array(list(itertools.product([0, 1], repeat=W.shape[1])))
    log_weight = states @ c + states @ W.T @ b + 0.5 * np.sum((states @ W.T * scale) ** 2, -1)
    return np.log(2 * np.pi) + np.sum(np.log(scale)) + np.logaddexp.reduce(log_weight)


def gaussian_draws(num_rows):
    mean, precision = oracles.GAUSSIAN["mean"], oracles.GAUSSIAN["precision"]
    return RNG.multivariate_normal(mean, np.linalg.inv(precision), size=num_rows)


def train(model, objective, data, num_steps, *, lr=0.03, seed=1, guide=None, **options):
    optim = optax.adam(optax.cosine_decay_schedule(lr, num_steps))
    svi = ebm.EnergySVI(model, guide, optim, objective)
    return svi.run(jax.random.key(seed), num_steps, data, progress_bar=False, **options)


def one_dimensional(data):
    m = numpyro.param("m", 0.0)
    t = numpyro.param("t", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * t * v**2 - m * v)


def two_sites(x, y, shift=0.0):
    w = numpyro.param("w", jnp.array(0.7))
    b = numpyro.param("b", jnp.array([0.3, -0.4]))
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
        y = numpyro.sample("y", ebm.Counting(event_shape=(2,)), obs=y)
        ebm.energy("E", 0.5 * w * (x - jnp.sum(y, -1)) ** 2 - y @ b)


X, Y = RNG.normal(size=5) + 1.0, RNG.integers(0, 2, size=(5, 2))


def bits(data):
    b = numpyro.param("b", jnp.zeros(3))
    J = numpyro.param("J", jnp.array(0.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
        ebm.energy("E", -v @ b - J * v[:, 0] * v[:, 1])


def fitted_noise():
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("noise_scale", 2.0, constraint=constraints.positive)
    return dist.Normal(loc, scale)
