# SPDX-License-Identifier: Apache-2.0
"""What the tests of objectives share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.infer.mcmc import MCMCKernel
from oracles import binary_states

import numpyro_ebm as ebm

KEY = jax.random.key(0)


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


class DrawState(NamedTuple):
    z: dict
    rng_key: jax.Array


class Draw(MCMCKernel):
    """Ignores where it is, and draws from ``draw(rng_key, params, num_rows)``."""

    sample_field = "z"

    def __init__(self, model, draw):
        self.params, self.draw = model.params, draw

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        self.num_rows = len(init_params["v"])
        return DrawState(self.draw(rng_key, self.params, self.num_rows), rng_key)

    def sample(self, state, model_args, model_kwargs):
        rng_key, key_draw = jax.random.split(state.rng_key)
        return DrawState(self.draw(key_draw, self.params, self.num_rows), rng_key)


class Stay(MCMCKernel):
    """Does not move."""

    sample_field = "z"

    def __init__(self, model):
        pass

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        return DrawState(init_params, rng_key)

    def sample(self, state, model_args, model_kwargs):
        return state


def draw_grbm(rng_key, p, num_rows, with_latents=False):
    """h from its enumerated law, v given h."""
    key_h, key_v = jax.random.split(rng_key)
    states = jnp.asarray(binary_states(len(p["c"])))
    h = states[jax.random.categorical(key_h, grbm_log_states(p), shape=(num_rows,))]
    noise = jax.random.normal(key_v, (num_rows, len(p["b"])))
    v = p["b"] + p["scale"] ** 2 * (h @ p["W"].T) + p["scale"] * noise
    return {"v": v, "h": h} if with_latents else {"v": v}


def grbm_log_states(p):
    h = binary_states(len(p["c"]))
    shift = h @ p["W"].T
    return h @ p["c"] + shift @ p["b"] + 0.5 * jnp.sum((shift * p["scale"]) ** 2, -1)


RBM = {
    "W": np.random.default_rng(2).normal(size=(4, 3)),
    "b": np.array([0.3, -0.5, 0.2, -0.1]),
    "c": np.array([-0.2, 0.4, 0.1]),
}


BITS = np.array([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0]])


def rbm(data=None):
    W = numpyro.param("W", jnp.zeros((4, 3)))
    b, c = numpyro.param("b", jnp.zeros(4)), numpyro.param("c", jnp.zeros(3))
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(4,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(event_shape=(3,)))
        ebm.energy("E", -v @ b - h @ c - jnp.sum((v @ W) * h, -1))


def rbm_plated(data=None):
    """Visible and hidden units in plates of their own, the rows last."""
    W = numpyro.param("W", jnp.zeros((4, 3)))
    b, c = numpyro.param("b", jnp.zeros(4)), numpyro.param("c", jnp.zeros(3))
    with numpyro.plate("data", 1 if data is None else len(data), dim=-1):
        with numpyro.plate("visible", 4, dim=-2):
            v = numpyro.sample("v", ebm.Counting(), obs=None if data is None else data.T)
        ebm.energy("E_v", -(b @ v))
        with numpyro.plate("hidden", 3, dim=-2):
            h = numpyro.sample("h", ebm.Counting())
            ebm.energy("E_h", -(W.T @ v + c[:, None]) * h)


ISING = {"J": np.array([0.9, -0.6, 0.4, 0.7]), "field": np.array([0.3, -0.2, 0.1, -0.4])}


def ising_log_density(p, bits):
    spins = 2.0 * bits - 1.0
    return spins @ p["field"] + (spins * jnp.roll(spins, -1, -1)) @ p["J"]


def ising(data=None):
    p = {name: numpyro.param(name, jnp.zeros(4)) for name in ISING}
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(4,)), obs=data)
        ebm.energy("E", -ising_log_density(p, v))


def regression(x, data):
    w = numpyro.param("w", jnp.array(0.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * jnp.exp(w * x) * (v - w * x) ** 2)
