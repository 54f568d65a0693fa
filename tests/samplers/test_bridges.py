# SPDX-License-Identifier: Apache-2.0
"""The bridges of the exchange algorithm, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.samplers.exchange import _cross_bridges


def test_every_bridge_weighs_the_data_that_have_moved_to_it():
    """log p̃(y; θ) = θ y, from 3 to 0 over two bridges, and a transition that adds θ to y."""

    def log_density(theta, y):
        return theta[:, 0] * y

    def transition(rng_key, theta, y):
        return y + theta[:, 0]

    start, end, y = jnp.array([[3.0]]), jnp.array([[0.0]]), jnp.array([0.25])
    found = _cross_bridges(jax.random.key(3), y, start, end, log_density, transition, 2)
    # Each weight is -y: at 0.25, after θ = 2 at 2.25, and after θ = 1 at 3.25.
    np.testing.assert_allclose(found, -(0.25 + 2.25 + 3.25), rtol=1e-6)
