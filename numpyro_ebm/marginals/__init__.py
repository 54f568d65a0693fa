# SPDX-License-Identifier: Apache-2.0
"""Ways to integrate the latent sites out."""

from numpyro_ebm.marginals.base import Estimate, Marginal, choose
from numpyro_ebm.marginals.enumerated import Enumerated
from numpyro_ebm.marginals.exact import Exact
from numpyro_ebm.marginals.importance_bound import ImportanceBound
from numpyro_ebm.marginals.langevin_refinement import LangevinRefinement
from numpyro_ebm.marginals.unrolled import Unrolled
from numpyro_ebm.marginals.vages import VaGES

__all__ = [
    "Enumerated",
    "Estimate",
    "Exact",
    "ImportanceBound",
    "LangevinRefinement",
    "Marginal",
    "Unrolled",
    "VaGES",
    "choose",
]
