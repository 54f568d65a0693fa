# SPDX-License-Identifier: Apache-2.0
"""The log-density of a fixed model in the indicators of its discrete sites."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from numpyro_ebm.model.resize import with_rows
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.multi_affine import MultiAffine, multi_affine

__all__ = ["discrete_form"]


def discrete_form(row_model: RowModel, values: Mapping[str, np.ndarray]) -> MultiAffine | None:
    """log p̃ of the rows of a model, affine in the indicators of every discrete coordinate.

    :param row_model: a model whose parameters are fixed.
    :param dict values: the possible values of one coordinate, of shape (K,), by discrete site.
    :return: of one row where all are alike; ``None`` where it is not seen to have this form.
    """
    one = with_rows(row_model, 1) or row_model
    rows = one.to_rows({name: jnp.asarray(site.value) for name, site in one.sites.items()})

    def log_density(_, rows):
        return one.log_density({}, one.from_rows(rows))

    form = multi_affine(log_density, {}, {name: rows[name] for name in sorted(rows)}, values)
    return form if form is not None and form.is_affine else None
