# SPDX-License-Identifier: Apache-2.0
r"""Whether a contrast still tells anything at the end of a run, or stands at its bound.

Losses that tell rows from other points have a bound, at which every point is told apart without
doubt. There they are flat: the run changes nothing, and its losses look converged.

.. math:: \text{overlap} = E\,\Big|\frac{∂ \mathcal L}{∂ r}\Big| \Big/
    \Big|\frac{∂ \mathcal L}{∂ r}\Big|_{r = 0}

with r the log-ratio of the two: 1 where nothing tells them apart, and 0 at the bound.
"""

import warnings

import jax
import jax.numpy as jnp

from numpyro_ebm._compat import find_stack_level, not_jax_tracer
from numpyro_ebm.errors import FarNoiseWarning
from numpyro_ebm.model.row_model import RowModel

__all__ = ["LOW_OVERLAP", "mean_overlap", "overlap_of_many", "warn_if_apart"]

LOW_OVERLAP = 0.02
"""Overlap of noise and data, 1 at best, under which a run warns."""


def mean_overlap(row_model: RowModel, rows: jax.Array) -> jax.Array:
    """The mean over the rows that count, of an array of shape (..., rows)."""
    return row_model.mean(rows) / row_model.mean(jnp.ones(row_model.num_rows))


def overlap_of_many(log_weights: jax.Array) -> jax.Array:
    """Overlap of rows with the points that they are to be found among.

    :param log_weights: array of shape (1 + points, rows), those of the rows first.
    :return: array of shape (rows,), the share of the others over what it is among equals.
    """
    num = len(log_weights)
    return (1.0 - jax.nn.softmax(log_weights, 0)[0]) * num / (num - 1)


def warn_if_apart(owner: str, overlap: jax.Array, what: str, remedy: str) -> None:
    """Warn :class:`~numpyro_ebm.errors.FarNoiseWarning` if the overlap is low.

    :param str owner: the objective.
    :param overlap: its overlap at the end of a run; traced values are not looked at.
    :param str what: what is told apart from what.
    :param str remedy: what follows, and what to do instead.
    """
    if not_jax_tracer(overlap) and not overlap > LOW_OVERLAP:
        warnings.warn(
            FarNoiseWarning(f"{owner}: {what} (overlap {float(overlap):.2g} of 1): {remedy}"),
            stacklevel=find_stack_level(),
        )
