# SPDX-License-Identifier: Apache-2.0
"""Energy-based (latent variable) models as a first-class statement of NumPyro.

Declare a model with :func:`energy`, learn it with an objective and :class:`EnergySVI`, hold its
parameters with :func:`fixed`, and sample it with NumPyro's ``MCMC``.

>>> import numpyro_ebm as ebm
>>> ebm.Counting(num_values=2, event_shape=(4,)).event_shape
(4,)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from numpyro_ebm import datasets, marginals, mcmc, models, objectives
from numpyro_ebm.errors import (
    ConvergenceWarning,
    EmulationWarning,
    FarNoiseWarning,
    ImproperSamplingError,
    InterruptedWarning,
    ModelError,
    NonFiniteLossWarning,
    NormalizerDisagreementWarning,
    QuadratureWarning,
    ShortAuxiliaryWarning,
    UnhandledEnergyError,
    WidthWarning,
)
from numpyro_ebm.guides.losses import PosteriorScore, RelaxedELBO
from numpyro_ebm.language.distributions import Counting, Lebesgue
from numpyro_ebm.language.fixed import fixed
from numpyro_ebm.language.handlers import integrated
from numpyro_ebm.language.primitives import energy, visible
from numpyro_ebm.language.temper import temper
from numpyro_ebm.log_normalizers import log_likelihood, log_normalizer
from numpyro_ebm.marginals import *  # noqa: F403
from numpyro_ebm.mcmc import *  # noqa: F403
from numpyro_ebm.model.given import given
from numpyro_ebm.model.priors import prior
from numpyro_ebm.objectives import *  # noqa: F403
from numpyro_ebm.svi import Checkpoint, EnergySVI, load, save

if TYPE_CHECKING:
    from numpyro_ebm import diagnostics
    from numpyro_ebm.diagnostics import (
        auxiliary_adequacy,
        compare,
        energy_gap,
        fisher_divergence,
        plots,
        posterior_gap,
        stein_test,
        to_arviz,
    )
    from numpyro_ebm.posteriors import (
        Exchange,
        emulate_log_normalizer,
        generalized,
        normalized,
        predictive,
        simulation_based_calibration,
    )

__version__ = "0.2.0"

__all__ = [
    "Checkpoint",
    "Counting",
    "EnergySVI",
    "Exchange",
    "ConvergenceWarning",
    "EmulationWarning",
    "FarNoiseWarning",
    "ImproperSamplingError",
    "InterruptedWarning",
    "Lebesgue",
    "ModelError",
    "NonFiniteLossWarning",
    "NormalizerDisagreementWarning",
    "PosteriorScore",
    "QuadratureWarning",
    "RelaxedELBO",
    "ShortAuxiliaryWarning",
    "UnhandledEnergyError",
    "WidthWarning",
    "auxiliary_adequacy",
    "compare",
    "datasets",
    "diagnostics",
    "emulate_log_normalizer",
    "energy",
    "energy_gap",
    "fisher_divergence",
    "fixed",
    "generalized",
    "given",
    "integrated",
    "load",
    "log_likelihood",
    "log_normalizer",
    "models",
    "normalized",
    "plots",
    "posterior_gap",
    "predictive",
    "prior",
    "stein_test",
    "save",
    "simulation_based_calibration",
    "temper",
    "to_arviz",
    "visible",
]
__all__ += marginals.__all__
__all__ += mcmc.__all__
__all__ += objectives.__all__

_LATER = ("diagnostics", "posteriors")
"""Folders that declaring, learning and sampling do without: imported when first asked for."""

if not TYPE_CHECKING:  # a type checker would take any name for one of the package

    def __getattr__(name):
        if name in _LATER:
            return import_module(f"numpyro_ebm.{name}")
        for folder in _LATER if name in __all__ else ():
            module = import_module(f"numpyro_ebm.{folder}")
            if name in module.__all__:
                return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LATER})
