# SPDX-License-Identifier: Apache-2.0
"""log Z: what an estimate of it is, and how it is computed exactly."""

from numpyro_ebm.normalizer.exact import log_sum_over_rows, quadrature_nodes
from numpyro_ebm.normalizer.result import LogNormalizer

__all__ = ["LogNormalizer", "log_sum_over_rows", "quadrature_nodes"]
