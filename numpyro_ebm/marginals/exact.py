# SPDX-License-Identifier: Apache-2.0
"""No latent sites: the row log-joint is the marginal."""

from collections.abc import Callable

import jax

from numpyro_ebm.marginals.base import ExactMarginal
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Params, SiteValues

__all__ = ["Exact"]


class Exact(ExactMarginal):
    r"""The marginal of a model without latent sites.

    .. math:: \log \tilde p(v; θ) = -E(v; θ) + \log b(v)

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.ScoreMatching(marginal=ebm.Exact())
    ScoreMatching(marginal=Exact())
    """

    def why_not(self, row_model: RowModel) -> str | None:
        if not row_model.latent:
            return None
        return (
            f"Exact() is for models without latent sites; this one has {sorted(row_model.latent)}. "
            "Use `Enumerated()` for small discrete latents, `GaussianLatents()` where they are "
            "Gaussian given the rest, `VaGES()` with a guide for any."
        )

    def log_density(self, row_model: RowModel, params: Params, values: SiteValues) -> jax.Array:
        return row_model.log_density(params, values)

    def conditional(
        self, row_model: RowModel, params: Params, values: SiteValues
    ) -> Callable[[jax.Array], SiteValues]:
        return lambda rng_key: {}
