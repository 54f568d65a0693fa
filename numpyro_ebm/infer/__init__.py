# SPDX-License-Identifier: Apache-2.0
"""Inference: training and sampling of energy-based models in NumPyro's protocols."""

from numpyro_ebm.diagnostics.fisher import fisher_divergence
from numpyro_ebm.log_normalizers import LogLikelihood, log_likelihood, log_normalizer
from numpyro_ebm.mcmc.annealed import AnnealedLangevin
from numpyro_ebm.mcmc.block_gibbs import BlockGibbs
from numpyro_ebm.mcmc.discrete_langevin import DiscreteLangevin
from numpyro_ebm.mcmc.langevin import MALA, ULA
from numpyro_ebm.mcmc.mclmc import MCLMC
from numpyro_ebm.mcmc.replica_exchange import ReplicaExchange
from numpyro_ebm.mcmc.sampling import choose_kernel, sample
from numpyro_ebm.mcmc.underdamped import UnderdampedLangevin
from numpyro_ebm.posteriors.emulation import EmulatedLogNormalizer, emulate_log_normalizer
from numpyro_ebm.posteriors.exchange.kernel import Exchange
from numpyro_ebm.posteriors.generalized import generalized
from numpyro_ebm.posteriors.normalized import normalized
from numpyro_ebm.svi.energy_svi import EnergySVI, EnergySVIState

__all__ = [
    "MALA",
    "MCLMC",
    "ULA",
    "AnnealedLangevin",
    "BlockGibbs",
    "DiscreteLangevin",
    "EmulatedLogNormalizer",
    "EnergySVI",
    "EnergySVIState",
    "Exchange",
    "LogLikelihood",
    "ReplicaExchange",
    "UnderdampedLangevin",
    "choose_kernel",
    "emulate_log_normalizer",
    "fisher_divergence",
    "generalized",
    "log_likelihood",
    "log_normalizer",
    "normalized",
    "sample",
]
