# SPDX-License-Identifier: Apache-2.0
"""What the tests of svi share."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm, grbm_guide

DATA = ebm.datasets.checkerboard(jax.random.key(7), 1_000)


def gaussian(data):
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def vages_dsm(**options):
    return ebm.EnergySVI(
        grbm,
        grbm_guide,
        optax.adam(1e-2),
        ebm.DenoisingScoreMatching(0.05, marginal=ebm.VaGES()),
        **{"num_guide_steps": 2, **options},
    )


def assert_same(left, right):
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)
