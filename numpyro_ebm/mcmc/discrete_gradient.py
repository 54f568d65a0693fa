# SPDX-License-Identifier: Apache-2.0
"""Whether an energy has a gradient in its discrete sites."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.polynomial import structure
from numpyro_ebm.types import SiteValues

__all__ = ["sites_without_gradient"]

NUM_TRIES = 5  # random states


def sites_without_gradient(
    rng_key: jax.Array, row_model: RowModel, z: SiteValues, values: Mapping[str, Any]
) -> list[str]:
    """Discrete sites in which the energy changes while its gradient vanishes at random states.

    :param row_model: a fixed model whose unobserved sites are discrete.
    :param dict z: values of the sites.
    :param dict values: the possible values of one coordinate, by name.
    :return: sorted list of names.
    """

    def to_floats(z):
        return {name: x.astype(jnp.result_type(x, float)) for name, x in z.items()}

    def log_density(z):
        return row_model.log_density({}, z)

    if structure(log_density, to_floats(z)).degree < np.inf:
        return []  # a polynomial, which has one

    def at(key):
        moved = dict(z)
        for name, x in z.items():
            key, key_site = jax.random.split(key)
            choices = jnp.asarray(values[name], x.dtype)
            moved[name] = jax.random.choice(key_site, choices, x.shape)
        gradient = jax.grad(lambda z: jnp.sum(log_density(z)))(to_floats(moved))
        # The change from moving one site alone.
        here = log_density(moved)
        change = {name: log_density({**moved, name: x}) - here for name, x in z.items()}
        return gradient, change

    @jax.jit
    def is_broken(rng_key):
        gradients, changes = jax.lax.map(at, jax.random.split(rng_key, NUM_TRIES))
        return {
            name: jnp.all(gradients[name] == 0) & jnp.any(jnp.isfinite(change) & (change != 0))
            for name, change in changes.items()
        }

    return sorted(name for name, broken in is_broken(rng_key).items() if broken)
