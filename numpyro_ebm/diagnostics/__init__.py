# SPDX-License-Identifier: Apache-2.0
"""Judging models and runs."""

from numpyro_ebm.diagnostics.arviz import to_arviz

__all__ = ["to_arviz"]
