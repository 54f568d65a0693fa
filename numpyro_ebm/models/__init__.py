# SPDX-License-Identifier: Apache-2.0
"""Ready NumPyro models."""

from numpyro_ebm.models.grbm import grbm, grbm_guide, grbm_log_likelihood, grbm_log_normalizer

__all__ = ["grbm", "grbm_guide", "grbm_log_likelihood", "grbm_log_normalizer"]
