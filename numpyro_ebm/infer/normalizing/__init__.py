# SPDX-License-Identifier: Apache-2.0
"""log Z and log-likelihoods of fixed models: which method, on what, and whether it can be right."""

from numpyro_ebm.infer.normalizing.front import log_normalizer
from numpyro_ebm.infer.normalizing.likelihood import LogLikelihood, log_likelihood

__all__ = ["LogLikelihood", "log_likelihood", "log_normalizer"]
