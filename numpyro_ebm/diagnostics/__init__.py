# SPDX-License-Identifier: Apache-2.0
"""Judging models, fits and draws: discrepancies, gaps, tests, ArviZ data and plots.

It may import :mod:`numpyro_ebm.svi`, :mod:`numpyro_ebm.objectives` and what these stand on.
"""

from numpyro_ebm.diagnostics import plots
from numpyro_ebm.diagnostics.adequacy import AuxiliaryAdequacy, auxiliary_adequacy
from numpyro_ebm.diagnostics.arviz import to_arviz
from numpyro_ebm.diagnostics.classifier import Auroc, Classification, auroc, classification
from numpyro_ebm.diagnostics.comparison import compare
from numpyro_ebm.diagnostics.denoising_loss import DenoisingLoss, denoising_loss
from numpyro_ebm.diagnostics.energies import EnergyGap, energy_gap
from numpyro_ebm.diagnostics.fisher import FisherDivergenceResult, fisher_divergence
from numpyro_ebm.diagnostics.frechet import (
    FrechetDistance,
    cosine_features,
    frechet_distance,
)
from numpyro_ebm.diagnostics.gap import BiasBound, PosteriorGap, posterior_gap
from numpyro_ebm.diagnostics.likelihood_bounds import LikelihoodBounds, log_likelihood_bounds
from numpyro_ebm.diagnostics.nearest import NearestRows, nearest_rows
from numpyro_ebm.diagnostics.stein import SteinTest, stein_test
from numpyro_ebm.diagnostics.two_samples import TwoSampleTest, two_sample_test

__all__ = [
    "Auroc",
    "AuxiliaryAdequacy",
    "BiasBound",
    "Classification",
    "DenoisingLoss",
    "EnergyGap",
    "FisherDivergenceResult",
    "FrechetDistance",
    "LikelihoodBounds",
    "NearestRows",
    "PosteriorGap",
    "SteinTest",
    "TwoSampleTest",
    "auroc",
    "auxiliary_adequacy",
    "classification",
    "compare",
    "cosine_features",
    "denoising_loss",
    "energy_gap",
    "fisher_divergence",
    "frechet_distance",
    "log_likelihood_bounds",
    "nearest_rows",
    "plots",
    "posterior_gap",
    "stein_test",
    "to_arviz",
    "two_sample_test",
]
