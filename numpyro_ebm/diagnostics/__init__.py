# SPDX-License-Identifier: Apache-2.0
"""Judging models and runs."""

from numpyro_ebm.diagnostics import plots
from numpyro_ebm.diagnostics.arviz import to_arviz
from numpyro_ebm.diagnostics.auxiliary import AuxiliaryAdequacy, auxiliary_adequacy
from numpyro_ebm.diagnostics.energies import EnergyGap, energy_gap
from numpyro_ebm.diagnostics.gap import PosteriorGap, posterior_gap
from numpyro_ebm.diagnostics.gap_bias import BiasBound
from numpyro_ebm.diagnostics.stein import SteinTest, stein_test

__all__ = [
    "AuxiliaryAdequacy",
    "BiasBound",
    "EnergyGap",
    "PosteriorGap",
    "SteinTest",
    "auxiliary_adequacy",
    "energy_gap",
    "plots",
    "posterior_gap",
    "stein_test",
    "to_arviz",
]
