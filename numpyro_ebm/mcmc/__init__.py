# SPDX-License-Identifier: Apache-2.0
"""Kernels for NumPyro's ``MCMC``, and ``sample``, which picks one.

It may import :mod:`numpyro_ebm.samplers`, :mod:`numpyro_ebm.marginals` and what these stand on.
``__all__`` is what :mod:`numpyro_ebm` gives and the manual lists.
"""

from numpyro_ebm.mcmc.annealed import AnnealedLangevin
from numpyro_ebm.mcmc.block_gibbs import BlockGibbs
from numpyro_ebm.mcmc.discrete_langevin import DiscreteLangevin
from numpyro_ebm.mcmc.kernel_choice import choose_kernel as choose_kernel
from numpyro_ebm.mcmc.langevin import MALA, ULA
from numpyro_ebm.mcmc.mclmc import MCLMC
from numpyro_ebm.mcmc.replica_exchange import ReplicaExchange
from numpyro_ebm.mcmc.replicas_of_kernel import ReplicasOfKernel as ReplicasOfKernel
from numpyro_ebm.mcmc.sampling import sample
from numpyro_ebm.mcmc.swendsen_wang import SwendsenWang
from numpyro_ebm.mcmc.underdamped import UnderdampedLangevin

__all__ = [
    "MALA",
    "MCLMC",
    "ULA",
    "AnnealedLangevin",
    "BlockGibbs",
    "DiscreteLangevin",
    "ReplicaExchange",
    "SwendsenWang",
    "UnderdampedLangevin",
    "sample",
]
