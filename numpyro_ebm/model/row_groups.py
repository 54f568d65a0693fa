# SPDX-License-Identifier: Apache-2.0
"""Any number of points of a row through a function of as many as the plate has rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm.types import SiteValues

__all__ = ["in_groups", "num_groups"]


def num_groups(num: int, num_rows: int) -> int:
    """How many plates of rows hold so many points."""
    return -(-num // num_rows)


def in_groups(
    fn: Callable[..., Any],
    num_rows: int,
    points: SiteValues,
    num: int | None = None,
    *,
    keys: jax.Array | None = None,
) -> Any:
    """Evaluate a function of one plate of rows at any number of points.

    :param fn: maps dicts of arrays with rows leading (and a key) to a pytree of such arrays.
    :param int num_rows: rows of the plate.
    :param dict points: arrays with points leading.
    :param int num: how many there are, where ``points`` is empty.
    :param keys: a key for every plate of rows, if ``fn`` takes one.
    :return: what ``fn`` gives at the points, these leading.
    """
    num = len(next(iter(points.values()))) if num is None else num
    if num == num_rows and keys is None:  # no vmap in a jaxpr that may be analysed
        return fn(points)
    groups = num_groups(num, num_rows)

    def pad(x):
        x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (groups * num_rows - num, *x.shape[1:]))])
        return jnp.reshape(x, (groups, num_rows, *x.shape[1:]))

    points = jax.tree.map(pad, points)
    result = jax.vmap(fn)(points) if keys is None else jax.vmap(fn)(points, keys)
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:]))[:num], result)
