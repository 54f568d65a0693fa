# SPDX-License-Identifier: Apache-2.0
"""What a user writes in a model: ``energy`` and ``visible``, base measures, handlers.

It may import :mod:`numpyro_ebm.errors` only.
"""
