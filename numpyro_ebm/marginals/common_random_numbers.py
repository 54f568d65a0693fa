# SPDX-License-Identifier: Apache-2.0
r"""A marginal that is one function of θ: importance sampling with common random numbers.

.. math:: \log\hat p(v; θ) = \log\frac1L \sum_{i=1}^L \frac{\tilde p(v, h_i; θ)}{q(h_i | v)}

with the same particles whatever θ is. Everything an objective computes from it (its value, its
derivatives in θ) then belongs to one deterministic function, as Hamiltonian Monte Carlo needs; its
derivatives are those of self-normalised VaES and VaGES, consistent as L grows.
"""

import jax
from jax.lax import stop_gradient

from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.marginals.base import Estimate, Marginal, score_of
from numpyro_ebm.marginals.importance_bound import weighted_mean
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Params, SiteValues

__all__ = ["CommonRandomNumbers"]


class CommonRandomNumbers(Marginal):
    """Importance-weighted log p̃(v; θ) at fixed particles of a guide.

    :param int num_particles: L.
    """

    needs_guide = True
    value = "exact"  # of the function that it is
    corrects_guide = True

    def __init__(self, num_particles: int):
        self.num_particles = num_particles

    def check(self, row_model: RowModel, guide: Guide | None, order: int) -> None:
        pass  # what stands for it, `VaGES`, has been checked

    def bind(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        guide: Guide | None,
        params: Params,
        unconstrained: SiteValues,
        *,
        order: int = 2,
    ) -> Estimate:
        guide = self.required_guide(row_model, guide)
        visible, _ = row_model.constrain(stop_gradient(unconstrained))
        constants = stop_gradient(params)
        density = weighted_mean(rng_key, row_model, guide, constants, visible, self.num_particles)
        return Estimate(density, score_of(density, params))
