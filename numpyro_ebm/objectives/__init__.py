# SPDX-License-Identifier: Apache-2.0
"""Objectives: losses over rows that learn the parameters of an energy."""

from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.objectives.denoising import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
)
from numpyro_ebm.objectives.guide_loss import PosteriorScore, RelaxedELBO
from numpyro_ebm.objectives.score_matching import ScoreMatching, SlicedScoreMatching

__all__ = [
    "DenoisingScoreMatching",
    "MultiscaleDenoisingScoreMatching",
    "Objective",
    "PosteriorScore",
    "Problem",
    "RelaxedELBO",
    "ScoreMatching",
    "SlicedScoreMatching",
]
