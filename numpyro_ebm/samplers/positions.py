# SPDX-License-Identifier: Apache-2.0
"""Positions, dicts of arrays with one point a row, as one array of coordinates."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm.types import SiteValues

__all__ = ["flatten_sites", "unflatten_sites"]


def flatten_sites(
    position: Mapping[str, Any], names: Sequence[str]
) -> tuple[jax.Array, Callable[[jax.Array], SiteValues]]:
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
    parts = [jnp.reshape(position[name], (len(position[name]), -1)) for name in names]
    return jnp.concatenate(parts, axis=1), partial(unflatten_sites, like=position, names=names)


def unflatten_sites(flat: jax.Array, like: Mapping[str, Any], names: Sequence[str]) -> SiteValues:
    """Undo :func:`flatten_sites`.

    :param flat: of shape (n, coordinates).
    :param dict like: arrays of shape (rows, ...), or their shapes and types.
    :param names: which sites, in their order.
    :return: dict of arrays of shape (n, ...).
    """
    parts, start = {}, 0
    for name in names:
        shape = like[name].shape[1:]
        stop = start + math.prod(shape)
        parts[name] = jnp.reshape(flat[:, start:stop], (len(flat), *shape))
        start = stop
    return parts
