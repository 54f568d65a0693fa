# SPDX-License-Identifier: Apache-2.0
"""Positions, dicts of arrays with one point a row, as one array of coordinates."""

import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["flatten_sites"]


def flatten_sites(position, names):
    """The named sites as one array of shape (rows, coordinates), and the way back.

    :param dict position: arrays of shape (rows, ...).
    :param names: which sites, in their order.
    :return: the array, and a function that maps arrays of shape (n, coordinates), for any number n
        of rows, to a dict of the named sites.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.samplers.positions import flatten_sites
    >>> flat, unflatten = flatten_sites({"x": jnp.ones((3, 2, 2)), "y": jnp.zeros(3)}, ("x", "y"))
    >>> flat.shape, unflatten(flat[:1])["x"].shape
    ((3, 5), (1, 2, 2))
    """
    parts = {name: jnp.reshape(position[name], (len(position[name]), -1)) for name in names}
    ends = np.cumsum([0, *(x.shape[1] for x in parts.values())])

    def unflatten(flat):
        pieces = (lax.slice_in_dim(flat, *ends[i : i + 2], axis=1) for i in range(len(names)))
        return {
            name: jnp.reshape(x, (len(flat), *jnp.shape(position[name])[1:]))
            for name, x in zip(names, pieces, strict=True)
        }

    return jnp.concatenate(list(parts.values()), axis=1), unflatten
