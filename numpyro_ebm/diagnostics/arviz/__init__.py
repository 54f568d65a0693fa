# SPDX-License-Identifier: Apache-2.0
"""ArviZ data of fits, draws and posteriors, which invent no likelihood."""

from numpyro_ebm.diagnostics.arviz.convert import to_arviz

__all__ = ["to_arviz"]
