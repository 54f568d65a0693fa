# SPDX-License-Identifier: Apache-2.0
r"""Whether all rows of a fixed model share their log Z, and the model cut down to one of them.

.. math:: \log Z_n = \log \int\!\!\int \tilde p(v, h; θ, x_n)\, dh\, dv

depends on the row n where the energy reads covariates x, or an array that the model closes over.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import eval_provenance, not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.finite_supports import finite_values
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Model, SiteValues

__all__ = ["covariates_of", "placeholder_rows", "read_one_row", "rows_differ"]


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


def covariates_of(row_model: RowModel) -> list[str]:
    """Labels of arguments with a value for every row that the density of its sites reads."""
    traced = row_model.traced
    traced.check_arguments()
    arrays = traced.arguments.arrays
    values = {name: site.value for name, site in row_model.sites.items()}

    def run(**labelled):
        return traced.with_arrays(labelled).evaluate("terms", {**row_model.plates, **values})

    read_by = frozenset().union(*eval_provenance(run, **arrays).values())
    rows = row_model.num_rows, row_model.total_rows
    return sorted(label for label in read_by if arrays[label].shape[0] in rows)


def rows_differ(row_model: RowModel) -> bool:
    """Whether rows have densities of their own, of which a closed-over array may be the reason.

    Every row is given the same random points; parameters that are traced tell no difference.
    """
    if row_model.num_rows == 1:
        return False
    shapes = jax.eval_shape(lambda: placeholder_rows(row_model))

    def densities(rng_key):
        rows = {}
        for key, (name, x) in zip(
            jax.random.split(rng_key, len(shapes)), sorted(shapes.items()), strict=True
        ):
            if name in row_model.visible:
                one = jax.random.normal(key, x.shape[1:], x.dtype)
            else:
                lowest, num_values = finite_values(row_model.sites[name], "log_normalizer")
                one = jax.random.randint(key, x.shape[1:], lowest, lowest + num_values, x.dtype)
            rows[name] = jnp.broadcast_to(one, x.shape)
        z = row_model.from_rows(rows)
        values, log_det = row_model.constrain({k: z[k] for k in row_model.visible})
        return row_model.log_density({}, {**z, **values}) + log_det

    with jax.ensure_compile_time_eval():  # numbers under `jit` too, if the model has no tracers
        values = jax.lax.map(densities, jax.random.split(jax.random.key(0), 4))
    if not not_jax_tracer(values):
        return False
    first = np.asarray(values)[:, :1]
    return bool(np.any(np.abs(np.asarray(values) - first) > 1e-3 * (1 + np.abs(first))))


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
