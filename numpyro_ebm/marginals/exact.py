# SPDX-License-Identifier: Apache-2.0
"""No latent sites: the row log-joint is the marginal."""

from numpyro_ebm.marginals.base import ExactMarginal

__all__ = ["Exact"]


class Exact(ExactMarginal):
    r"""The marginal of a model without latent sites.

    .. math:: \log \tilde p(v; θ) = -E(v; θ) + \log b(v)

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.ScoreMatching(marginal=ebm.Exact())
    ScoreMatching(marginal=Exact())
    """

    def why_not(self, row_model):
        if not row_model.latent:
            return None
        return (
            f"Exact() is for models without latent sites; this one has {sorted(row_model.latent)}. "
            "Use `Enumerated()` for small discrete latents, `VaGES()` with a guide for any."
        )

    def log_density(self, row_model, params, values):
        return row_model.log_density(params, values)

    def conditional(self, row_model, params, values):
        return lambda rng_key: {}
