# SPDX-License-Identifier: Apache-2.0
"""A fixed model cut down to one of its rows, where they share their log Z.

Whether they do is read off the operations of the energy: :mod:`~numpyro_ebm.model.row_analysis`.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Model, SiteValues

__all__ = ["placeholder_rows", "read_one_row"]


def read_one_row(
    model: Model, labels: Iterable[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RowModel | None:
    """The model on one row, if its rows come from nothing but some of its arguments.

    :param model: a model with fixed parameters.
    :param labels: labels of the arguments that are values of the rows, as in ``provenance``.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :return: a :class:`~numpyro_ebm.model.row_model.RowModel` of one row, or ``None``.
    """
    if not labels:
        return None
    arguments = Arguments(args, kwargs)
    one = arguments.with_arrays({label: arguments.arrays[label][:1] for label in labels})
    try:
        row_model = read_fixed_model(model, one.args, one.kwargs)
    except (ModelError, IndexError, TypeError, ValueError):
        return None  # it wants all its rows, which then are as many points at once
    return row_model if row_model.num_rows == 1 else None


def placeholder_rows(row_model: RowModel) -> SiteValues:
    """Placeholders of all sites, rows leading, real ones in unconstrained coordinates."""
    return row_model.to_rows(
        {
            name: site.transform.inv(site.value)
            if name in row_model.visible
            else jnp.asarray(site.value)
            for name, site in row_model.sites.items()
        }
    )
