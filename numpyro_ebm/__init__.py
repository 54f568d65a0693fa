# SPDX-License-Identifier: Apache-2.0
"""Energy-based (latent variable) models as a first-class statement of NumPyro.

Declare a model with :func:`energy`, learn it with an objective and :class:`EnergySVI`, hold its
parameters with :func:`fixed`, and sample it with NumPyro's ``MCMC``.

>>> import numpyro_ebm as ebm
>>> ebm.Counting(num_values=2, event_shape=(4,)).event_shape
(4,)
"""

from numpyro_ebm import datasets, models
from numpyro_ebm.diagnostics import to_arviz
from numpyro_ebm.distributions import Counting, Lebesgue
from numpyro_ebm.errors import (
    ImproperSamplingError,
    ModelError,
    NonFiniteLossWarning,
    UnhandledEnergyError,
)
from numpyro_ebm.handlers import fixed
from numpyro_ebm.infer import MALA, ULA, EnergySVI, sample
from numpyro_ebm.marginal import Enumerated, Exact, LangevinRefinement, VaGES
from numpyro_ebm.objectives import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
    PosteriorScore,
    RelaxedELBO,
    ScoreMatching,
    SlicedScoreMatching,
)
from numpyro_ebm.primitives import energy, visible

__version__ = "0.1.0"

__all__ = [
    "MALA",
    "ULA",
    "Counting",
    "DenoisingScoreMatching",
    "EnergySVI",
    "Enumerated",
    "Exact",
    "ImproperSamplingError",
    "LangevinRefinement",
    "Lebesgue",
    "ModelError",
    "MultiscaleDenoisingScoreMatching",
    "NonFiniteLossWarning",
    "PosteriorScore",
    "RelaxedELBO",
    "ScoreMatching",
    "SlicedScoreMatching",
    "UnhandledEnergyError",
    "VaGES",
    "datasets",
    "energy",
    "fixed",
    "models",
    "sample",
    "to_arviz",
    "visible",
]
