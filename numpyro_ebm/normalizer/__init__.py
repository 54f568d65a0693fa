# SPDX-License-Identifier: Apache-2.0
"""log Z: what an estimate of it is, and the ways to compute it, exactly or by annealing."""

from numpyro_ebm.normalizer.ais import annealed_importance_sampling
from numpyro_ebm.normalizer.exact import log_sum_over_rows, quadrature_nodes
from numpyro_ebm.normalizer.result import LogNormalizer
from numpyro_ebm.normalizer.smc import adaptive_schedule, sequential_monte_carlo

__all__ = [
    "LogNormalizer",
    "adaptive_schedule",
    "annealed_importance_sampling",
    "log_sum_over_rows",
    "quadrature_nodes",
    "sequential_monte_carlo",
]
