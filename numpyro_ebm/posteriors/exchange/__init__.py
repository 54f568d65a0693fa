# SPDX-License-Identifier: Apache-2.0
"""The exchange algorithm: exact posteriors where the model can only be simulated."""

from numpyro_ebm.posteriors.exchange.kernel import Exchange

__all__ = ["Exchange"]
