# SPDX-License-Identifier: Apache-2.0
"""Objectives: losses over rows that learn the parameters of an energy.

They may import :mod:`numpyro_ebm.log_normalizers`, :mod:`numpyro_ebm.marginals` and what these
stand on. ``__all__`` is what :mod:`numpyro_ebm` gives and the manual lists.
"""

from numpyro_ebm.objectives.base import AuxiliaryNetwork as AuxiliaryNetwork
from numpyro_ebm.objectives.base import Objective as Objective
from numpyro_ebm.objectives.base import Problem as Problem
from numpyro_ebm.objectives.conditional_nce import ConditionalNCE
from numpyro_ebm.objectives.contrastive_divergence import ContrastiveDivergence
from numpyro_ebm.objectives.denoising import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
)
from numpyro_ebm.objectives.discrete_fisher import DiscreteFisher
from numpyro_ebm.objectives.energy_discrepancy import EnergyDiscrepancy
from numpyro_ebm.objectives.fisher_divergence import FisherDivergence
from numpyro_ebm.objectives.fisher_divergence import mlp_critic as mlp_critic
from numpyro_ebm.objectives.flow_contrastive import FlowContrastive
from numpyro_ebm.objectives.kernel_ratio_matching import KernelRatioMatching
from numpyro_ebm.objectives.maximum_likelihood import MaximumLikelihood
from numpyro_ebm.objectives.minimum_probability_flow import MinimumProbabilityFlow
from numpyro_ebm.objectives.nce import NCE
from numpyro_ebm.objectives.pseudo_likelihood import PseudoLikelihood
from numpyro_ebm.objectives.ranking_nce import RankingNCE
from numpyro_ebm.objectives.ratio_matching import RatioMatching
from numpyro_ebm.objectives.recovery_likelihood import RecoveryLikelihood
from numpyro_ebm.objectives.score_matching import ScoreMatching, SlicedScoreMatching
from numpyro_ebm.objectives.self_normalized import SelfNormalized
from numpyro_ebm.objectives.stein import KernelSteinDiscrepancy
from numpyro_ebm.objectives.weighted_sum import WeightedSum

__all__ = [
    "NCE",
    "ConditionalNCE",
    "ContrastiveDivergence",
    "DenoisingScoreMatching",
    "DiscreteFisher",
    "EnergyDiscrepancy",
    "FisherDivergence",
    "FlowContrastive",
    "KernelRatioMatching",
    "KernelSteinDiscrepancy",
    "MaximumLikelihood",
    "MinimumProbabilityFlow",
    "MultiscaleDenoisingScoreMatching",
    "PseudoLikelihood",
    "RankingNCE",
    "RatioMatching",
    "RecoveryLikelihood",
    "ScoreMatching",
    "SelfNormalized",
    "SlicedScoreMatching",
    "WeightedSum",
]
