# SPDX-License-Identifier: Apache-2.0
"""log Z and log-likelihoods: the registry of methods, one method a file, and their parts.

``methods`` registers ``enumeration``, ``quadrature``, ``ais`` and ``smc``; ``integrand`` reads a
model for them, and ``visible_grid`` is log Z as a function of the parameters. The folder may import
:mod:`numpyro_ebm.marginals`, :mod:`numpyro_ebm.samplers` and what these stand on.
"""

from numpyro_ebm.log_normalizers.ais import annealed_importance_sampling
from numpyro_ebm.log_normalizers.likelihood import LogLikelihood, log_likelihood
from numpyro_ebm.log_normalizers.methods import log_normalizer
from numpyro_ebm.log_normalizers.nodes import log_sum_over_rows, quadrature_nodes
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.log_normalizers.schedule import adaptive_schedule
from numpyro_ebm.log_normalizers.smc import sequential_monte_carlo

__all__ = [
    "LogLikelihood",
    "LogNormalizer",
    "adaptive_schedule",
    "annealed_importance_sampling",
    "log_likelihood",
    "log_normalizer",
    "log_sum_over_rows",
    "quadrature_nodes",
    "sequential_monte_carlo",
]
