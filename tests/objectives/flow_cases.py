# SPDX-License-Identifier: Apache-2.0
"""What the tests of objectives share."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints, transforms

import numpyro_ebm as ebm

KEY = jax.random.key(3)
RNG = np.random.default_rng(4)


def gaussian(data):
    m = numpyro.param("m", jnp.array(0.0))
    t = numpyro.param("t", jnp.array(1.0), constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * t * v**2 - m * v)


def function():
    loc = numpyro.param("loc", jnp.array(1.0))
    scale = numpyro.param("flow_scale", jnp.array(2.0), constraint=constraints.positive)
    return dist.Normal(loc, scale)


def in_the_plate(data):
    loc = numpyro.param("loc", jnp.array(1.0))
    scale = numpyro.param("flow_scale", jnp.array(2.0), constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        numpyro.sample("v", dist.Normal(loc, scale))


def distribution():
    return dist.Normal(jnp.array(1.0), jnp.array(2.0))


def stack():
    return [transforms.AffineTransform(jnp.array(1.0), jnp.array(2.0))]


def train(model, objective, data, num_steps, *, lr=0.03, seed=1, **options):
    optim = optax.adam(optax.cosine_decay_schedule(lr, num_steps))
    svi = ebm.EnergySVI(model, None, optim, objective)
    return svi.run(jax.random.key(seed), num_steps, data, progress_bar=False, **options)


FLOWS = {
    "function": (function, ("loc", "flow_scale")),
    "in the plate": (in_the_plate, ("loc", "flow_scale")),
    "distribution": (distribution(), ("flow.loc", "flow.scale")),
    "transforms": (stack(), ("flow.transforms.0.0", "flow.transforms.0.1")),
}


DATA = 0.3 + 0.6 * RNG.normal(size=2_000)
