# SPDX-License-Identifier: Apache-2.0
"""Inference: training and sampling of energy-based models in NumPyro's protocols."""

from numpyro_ebm.infer.block_gibbs import BlockGibbs
from numpyro_ebm.infer.fisher import fisher_divergence
from numpyro_ebm.infer.kernels import MALA, ULA
from numpyro_ebm.infer.sampling import sample
from numpyro_ebm.infer.svi import EnergySVI, EnergySVIState

__all__ = [
    "MALA",
    "ULA",
    "BlockGibbs",
    "EnergySVI",
    "EnergySVIState",
    "fisher_divergence",
    "sample",
]
