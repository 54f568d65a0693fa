# SPDX-License-Identifier: Apache-2.0
"""Ways to integrate the latent sites out."""

from numpyro_ebm.marginal.base import Estimate, Marginal, choose
from numpyro_ebm.marginal.enumerated import Enumerated
from numpyro_ebm.marginal.exact import Exact
from numpyro_ebm.marginal.importance import ImportanceBound
from numpyro_ebm.marginal.refine import LangevinRefinement
from numpyro_ebm.marginal.unrolled import Unrolled
from numpyro_ebm.marginal.vages import VaGES

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
