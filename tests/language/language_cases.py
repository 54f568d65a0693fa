# SPDX-License-Identifier: Apache-2.0
"""What the tests of language share."""

import jax.numpy as jnp
import numpyro

import numpyro_ebm as ebm

X = jnp.array([0.5, -1.0, 2.0])


def gaussian(data=None, *, num_rows=3):
    theta = numpyro.param("theta", 2.0)
    with numpyro.plate("data", num_rows if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def outside(data):
    v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
    ebm.energy("E", jnp.sum(v**2))
