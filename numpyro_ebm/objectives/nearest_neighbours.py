# SPDX-License-Identifier: Apache-2.0
r"""The entropy of a distribution from distances of draws to their nearest neighbours.

.. math:: \hat H = \frac{d}{N} \sum_i \log ρ_i + \log V_d + \log(N - 1) + γ

with ρᵢ the distance of draw i to the nearest other one, V_d the volume of the unit ball in d
dimensions and γ Euler's constant. It tends to the entropy as N grows; draws in many dimensions
have a bias, which hardly depends on their law.

Reference: Kozachenko, Leonenko, *Sample estimate of the entropy of a random vector*, Problems of
Information Transmission 1987.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

__all__ = ["neighbour_entropy"]


def neighbour_entropy(draws: jax.Array) -> jax.Array:
    """Entropy in nats, differentiable in the draws.

    :param draws: independent draws, (draws, coordinates), two at the least, no two alike.
    :return: a scalar.
    """
    num, dimension = draws.shape
    x = stop_gradient(draws - jnp.mean(draws, 0))
    squares = jnp.sum(x**2, 1)
    apart = squares[:, None] + squares - 2 * x @ x.T  # no array of all differences
    nearest = jnp.argmin(jnp.where(jnp.eye(num, dtype=bool), jnp.inf, apart), 1)
    distances = jnp.sum((draws - draws[nearest]) ** 2, 1)
    log_volume = dimension / 2 * math.log(math.pi) - math.lgamma(dimension / 2 + 1)
    constant = log_volume + math.log(num - 1) + np.euler_gamma
    return dimension / 2 * jnp.mean(jnp.log(distances)) + constant
