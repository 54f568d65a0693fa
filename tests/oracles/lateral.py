# SPDX-License-Identifier: Apache-2.0
"""Hidden units with lateral couplings: the posterior does not factorise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from oracles.systems import System, count_rows

LATERAL = {
    "W": np.array([[1.0, -0.8, 0.6, 0.4], [-0.5, 0.7, 0.9, -1.1]]),
    "b": np.array([0.1, -0.2]),
    "c": np.array([-0.6, -0.4, -0.5, -0.3]),
    "U": np.array([[0, 1.2, -0.4, 0.5], [0, 0, -0.6, 0.4], [0, 0, 0, 0.7], [0, 0, 0, 0]]),
    "scale": np.array([0.8, 1.1]),
}


def lateral(data=None, *, num_hidden=4):
    W = numpyro.param("W", jnp.zeros((2, num_hidden)))
    b = numpyro.param("b", jnp.zeros(2))
    c = numpyro.param("c", jnp.zeros(num_hidden))
    U = numpyro.param("U", jnp.zeros((num_hidden, num_hidden)))
    scale = numpyro.param("scale", jnp.ones(2), constraint=constraints.positive)
    with numpyro.plate("data", count_rows(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(event_shape=(num_hidden,)))
        bowl = 0.5 * jnp.sum(((v - b) / scale) ** 2, -1)
        ebm.energy("E", bowl - h @ c - jnp.sum((v @ W) * h, -1) - jnp.sum((h @ U) * h, -1))


def binary_states(num):
    return np.array(list(itertools.product([0, 1], repeat=num)))


def lateral_log_joint(p, v):
    """log p̃(v, h) at all states h, for one row."""
    h = jnp.asarray(binary_states(len(p["c"])))
    field = h @ (p["c"] + v @ p["W"]) + jnp.sum((h @ p["U"]) * h, -1)
    return field - 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2)


def lateral_system(data):
    def log_density(p, v):
        return jax.nn.logsumexp(lateral_log_joint(p, v))

    return System(
        lateral,
        None,
        LATERAL,
        data,
        log_density,
        jax.grad(log_density, 1),
        lambda p, v: jnp.trace(jax.hessian(log_density, 1)(p, v)),
    )


def mean_field(params, v, num_sweeps=500):
    """The best Bernoulli product for p(h | v), by exact coordinate ascent from many starts."""
    field = params["c"] + v @ params["W"]
    coupling = params["U"] + params["U"].T
    h = binary_states(len(params["c"]))
    log_p = h @ field + np.sum((h @ params["U"]) * h, -1)
    best, best_bound = None, -np.inf
    for start in np.random.default_rng(0).uniform(0.05, 0.95, size=(8, len(field))):
        m = start.copy()
        for _ in range(num_sweeps):
            for j in range(len(m)):
                m[j] = 1 / (1 + np.exp(-(field[j] + coupling[j] @ m)))
        q = np.prod(np.where(h, m, 1 - m), -1)
        bound = q @ (log_p - np.log(q))
        if bound > best_bound:
            best, best_bound = m, bound
    return np.log(best) - np.log1p(-best)


def table_guide(logits):
    """A guide that knows the logits of every row by heart."""

    def guide(data=None, **kwargs):
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            table = jnp.asarray(logits) + 0.0 * jnp.sum(v, -1, keepdims=True)
            numpyro.sample("h", dist.Bernoulli(logits=table).to_event(1))

    return guide
