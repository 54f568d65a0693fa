# SPDX-License-Identifier: Apache-2.0
"""From a prior and an energy to a posterior of the parameters, and what follows from it.

It may import everything below: objectives, log normalizers, kernels and what these stand on.
"""

from numpyro_ebm.posteriors.emulation import EmulatedLogNormalizer, emulate_log_normalizer
from numpyro_ebm.posteriors.exchange import Exchange
from numpyro_ebm.posteriors.generalized import generalized
from numpyro_ebm.posteriors.normalized import normalized
from numpyro_ebm.posteriors.predictive import predictive
from numpyro_ebm.posteriors.simulation_based_calibration import (
    SimulationBasedCalibration,
    simulation_based_calibration,
)

__all__ = [
    "EmulatedLogNormalizer",
    "Exchange",
    "SimulationBasedCalibration",
    "emulate_log_normalizer",
    "generalized",
    "normalized",
    "predictive",
    "simulation_based_calibration",
]
