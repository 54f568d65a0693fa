# SPDX-License-Identifier: Apache-2.0
"""How far a guide is from the posterior of the latents, and what that does to estimates."""

from numpyro_ebm.diagnostics.gap.bias import BiasBound
from numpyro_ebm.diagnostics.gap.posterior import PosteriorGap, posterior_gap

__all__ = ["BiasBound", "PosteriorGap", "posterior_gap"]
