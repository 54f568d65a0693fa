# SPDX-License-Identifier: Apache-2.0
"""Guides q(h | v) read as arrays, and the losses they are trained by.

It may import :mod:`numpyro_ebm.language` and the ground floor.
"""
