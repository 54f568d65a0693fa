# SPDX-License-Identifier: Apache-2.0
"""No latent sites: the row log-joint is the marginal."""

from numpyro_ebm.errors import ModelError
from numpyro_ebm.marginals.base import Estimate, Marginal, score_of

__all__ = ["Exact"]


class Exact(Marginal):
    r"""The marginal of a model without latent sites.

    .. math:: \log \tilde p(v; θ) = -E(v; θ) + \log b(v)

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.ScoreMatching(marginal=ebm.Exact())
    ScoreMatching(marginal=Exact())
    """

    def check(self, row_model, guide, order):
        if row_model.latent:
            raise ModelError(
                f"Exact() is for models without latent sites; this one has "
                f"{sorted(row_model.latent)}. Use `Enumerated()` for small discrete latents, "
                "`VaGES()` with a guide for any."
            )

    def bind(self, rng_key, row_model, guide, params, unconstrained, *, order=2):
        self.check(row_model, guide, order)

        def log_density(params, unconstrained):
            return row_model.unconstrained_log_density(params, unconstrained, {})

        return Estimate(log_density, score_of(log_density, params))
