# SPDX-License-Identifier: Apache-2.0
"""The training rows that are nearest to draws, and whether a model has learned rows by heart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm.diagnostics.classifier import Auroc, auroc
from numpyro_ebm.diagnostics.two_samples import flat_rows, squared_distances
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.printed import brief

__all__ = ["NearestRows", "nearest_rows"]


class NearestRows(NamedTuple):
    """What :func:`nearest_rows` found.

    - **nearest** - the nearest training rows of every draw, the nearest first, (draws, num).
    - **distance** - how far they are, (draws, num).
    - **held_out_distance** - from held-out rows to their nearest training row, (rows,), or
      ``None``.
    - **closer** - :class:`Auroc`: how often a draw is nearer to the training rows than a held-out
      row is; above ½ for copies, below it for draws unlike the data; or ``None``.
    """

    nearest: jax.Array
    distance: jax.Array
    held_out_distance: jax.Array | None
    closer: Auroc | None

    __repr__ = brief


def nearest_rows(
    draws: Any, data: Any, *, held_out: Any = None, num_neighbours: int = 1
) -> NearestRows:
    """The training rows nearest to draws, in Euclidean distance.

    :param draws: draws of the model, (draws, ...).
    :param data: the rows it was trained on, (rows, ...).
    :param held_out: rows of the same source that it has not seen; their distances are what draws
        of a model that generalises have.
    :param int num_neighbours: how many for every draw.
    :return: :class:`NearestRows`. ``data[found.nearest[:, 0]]`` beside the draws is the picture.
    :raises ModelError: if the rows do not fit together, or there are fewer than asked for.

    The error of ``closer`` is that of independent draws and rows, given the training rows.

    **Example**

    >>> import jax
    >>> import numpyro_ebm as ebm
    >>> data, fresh = jax.random.normal(jax.random.key(0), (2, 200, 5))
    >>> found = ebm.diagnostics.nearest_rows(data + 0.01, data, held_out=fresh)
    >>> found.nearest[:3, 0].tolist(), float(found.closer.value)
    ([0, 1, 2], 1.0)
    """
    check_integer("nearest_rows", num_neighbours=num_neighbours)
    x, rows = flat_rows("nearest_rows", draws=draws, data=data)
    if num_neighbours > len(rows):
        raise ModelError(f"nearest_rows: {num_neighbours} neighbours of {len(rows)} rows.")
    negative, index = jax.lax.top_k(-squared_distances(x, rows), num_neighbours)
    distance, fresh, closer = jnp.sqrt(-negative), None, None
    if held_out is not None:
        unseen, rows = flat_rows("nearest_rows", held_out=held_out, data=data)
        fresh = jnp.sqrt(jnp.min(squared_distances(unseen, rows), 1))
        closer = auroc(-distance[:, 0], -fresh)
    return NearestRows(index, distance, fresh, closer)
