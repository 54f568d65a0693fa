# SPDX-License-Identifier: Apache-2.0
"""Models whose rows have weights and masks, with one parameter and real or binary visible sites."""

from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

import numpyro_ebm as ebm

ROWS = 6
WEIGHTS = (0.5, 2.0, 1.0, 3.0, 0.25, 1.5)


def weighted(weights, mask):
    """The handlers of weights and of a mask, if there are any."""
    stack = ExitStack()
    if weights is not None:
        stack.enter_context(handlers.scale(scale=weights))
    if mask is not None:
        stack.enter_context(handlers.mask(mask=mask))
    return stack


def visible_site(data):
    """The value of the visible site, and a number a row."""
    discrete = jnp.issubdtype(data.dtype, jnp.integer)
    base = ebm.Counting(event_shape=(2,)) if discrete else ebm.Lebesgue()
    v = numpyro.sample("v", base, obs=data)
    return v, 2.0 * v - 1.0 if discrete else v


def plain(data, weights=None, mask=None):
    precision = numpyro.param("precision", 1.3)
    with numpyro.plate("data", len(data)), weighted(weights, mask):
        v, x = visible_site(data)
        square = -x[:, 0] * x[:, 1] + 0.2 * x[:, 0] if jnp.ndim(v) > 1 else 0.5 * x**2
        ebm.energy("E", precision * square)


def latent(data, weights=None, mask=None):
    """A binary latent beside the visible site."""
    shift = numpyro.param("precision", 1.3)
    with numpyro.plate("data", len(data)), weighted(weights, mask):
        v, x = visible_site(data)
        h = numpyro.sample("h", ebm.Counting())
        x = jnp.sum(x, -1) if jnp.ndim(v) > 1 else x
        ebm.energy("E", 0.5 * x**2 - shift * h * x + 0.2 * h)


def guide(data, weights=None, mask=None):
    slope = numpyro.param("slope", 1.0)
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        x = jnp.sum(2.0 * v - 1.0, -1) if jnp.ndim(v) > 1 else v
        numpyro.sample("h", dist.Bernoulli(logits=slope * x - 0.2))


def all_parameters(objective, model, reader, data):
    """Values of all parameters, those of the guide and of the objective among them."""
    params = {"precision": jnp.array(1.3)}
    if reader is not None:
        params["slope"] = jnp.array(0.8)
    key = jax.random.key(0)
    problem = objective.prepare(key, params, model, reader, (data,), {})
    for network in objective.networks:
        params |= {k: jnp.asarray(v[0]) for k, v in network.parameters(key, problem).items()}
    own = objective.own_parameters(key, params, problem)
    return params | {k: jnp.asarray(v[0]) for k, v in own.items()}
