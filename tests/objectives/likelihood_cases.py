# SPDX-License-Identifier: Apache-2.0
"""What the tests of objectives share."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from oracles import jit

import numpyro_ebm as ebm

KEY = jax.random.key(0)


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


def assert_likelihood(model, params, args, expected, objective=None, rtol=1e-8):
    """Value and gradient are those of ``expected``, the closed form."""
    objective = ebm.MaximumLikelihood() if objective is None else objective
    args = arrays(args if isinstance(args, tuple) else (args,))

    def loss(params):
        return objective.loss(KEY, params, model, None, *args)

    value, gradient = jit(jax.value_and_grad(loss))(arrays(params))
    true_value, true_gradient = jit(jax.value_and_grad(expected))(arrays(params))
    np.testing.assert_allclose(value, true_value, rtol=rtol)
    for name, x in true_gradient.items():
        np.testing.assert_allclose(gradient[name], x, rtol=rtol, atol=rtol, err_msg=name)


EDGES = [(i, i + 1) for i in range(9) if i % 3 < 2] + [(i, i + 3) for i in range(6)]


def ising_log_density(p, bits):
    """Of the last axis of bits; spins are ±1."""
    spins = 2.0 * bits - 1.0
    left, right = np.array(EDGES).T
    return spins @ p["field"] + (spins[..., left] * spins[..., right]) @ p["J"]


def ising(data):
    p = {
        "J": numpyro.param("J", jnp.zeros(len(EDGES))),
        "field": numpyro.param("field", jnp.zeros(9)),
    }
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(9,)), obs=data)
        ebm.energy("E", -ising_log_density(p, v))
