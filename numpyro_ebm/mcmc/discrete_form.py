# SPDX-License-Identifier: Apache-2.0
"""The log-density of a fixed model in the indicators of its discrete sites."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.resize import with_rows
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.multi_affine import MultiAffine, multi_affine
from numpyro_ebm.types import LogDensity

__all__ = ["check_discrete", "discrete_form"]


def check_discrete(row_model: RowModel, who: str) -> LogDensity:
    """The log-density of rows, of a model whose unobserved sites are all discrete.

    :param row_model: a model whose parameters are fixed.
    :param str who: the name of the kernel.
    :raises ModelError: if it has others.
    """
    continuous, discrete = sorted(row_model.visible), sorted(row_model.latent)
    if not discrete:
        raise ModelError(
            f"{who} moves discrete sites, and {continuous} are continuous. Use "
            "`numpyro_ebm.MALA`, or `numpyro_ebm.BlockGibbs` where they are Gaussian given each "
            "other."
        )
    if continuous:
        raise ModelError(
            f"{who} moves discrete sites, and {continuous} are continuous. Draw them in a block of "
            f"their own: `numpyro.infer.Gibbs([(MALA(model), {continuous}), ({who}(model), "
            f"{discrete})])`."
        )
    return lambda rows: row_model.log_density({}, row_model.from_rows(rows))


def discrete_form(
    row_model: RowModel, values: Mapping[str, np.ndarray], *, in_pairs: bool = False
) -> MultiAffine | None:
    """log p̃ of the rows of a model, affine in the indicators of every discrete coordinate.

    :param row_model: a model whose parameters are fixed.
    :param dict values: the possible values of one coordinate, of shape (K,), by discrete site.
    :param bool in_pairs: a form of degree two will do that is not affine, where a coordinate meets
        itself.
    :return: of one row where all are alike; ``None`` where it is not seen to have this form.
    """
    one = with_rows(row_model, 1) or row_model
    rows = one.to_rows({name: jnp.asarray(site.value) for name, site in one.sites.items()})

    def log_density(_, rows):
        return one.log_density({}, one.from_rows(rows))

    rows = {name: rows[name] for name in sorted(rows)}
    return multi_affine(log_density, {}, rows, values, in_pairs=in_pairs)
