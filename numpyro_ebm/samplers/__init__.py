# SPDX-License-Identifier: Apache-2.0
"""Samplers of unnormalised log-densities in BlackJAX's shape, independent of NumPyro.

It may import :mod:`numpyro_ebm.program` and errors.
"""
