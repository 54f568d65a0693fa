# SPDX-License-Identifier: Apache-2.0
"""Judging models, fits and draws: discrepancies, gaps, tests, ArviZ data and plots.

It may import :mod:`numpyro_ebm.svi`, :mod:`numpyro_ebm.objectives` and what these stand on.
"""

from numpyro_ebm.diagnostics import plots
from numpyro_ebm.diagnostics.adequacy import AuxiliaryAdequacy, auxiliary_adequacy
from numpyro_ebm.diagnostics.arviz import to_arviz
from numpyro_ebm.diagnostics.comparison import compare
from numpyro_ebm.diagnostics.energies import EnergyGap, energy_gap
from numpyro_ebm.diagnostics.fisher import FisherDivergenceResult, fisher_divergence
from numpyro_ebm.diagnostics.gap import BiasBound, PosteriorGap, posterior_gap
from numpyro_ebm.diagnostics.stein import SteinTest, stein_test

__all__ = [
    "AuxiliaryAdequacy",
    "BiasBound",
    "EnergyGap",
    "FisherDivergenceResult",
    "PosteriorGap",
    "SteinTest",
    "auxiliary_adequacy",
    "compare",
    "energy_gap",
    "fisher_divergence",
    "plots",
    "posterior_gap",
    "stein_test",
    "to_arviz",
]
