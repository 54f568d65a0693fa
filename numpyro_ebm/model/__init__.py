# SPDX-License-Identifier: Apache-2.0
"""A NumPyro model read as arrays: rows, noise and priors, and what is checked of them.

It may import :mod:`numpyro_ebm.language`, :mod:`numpyro_ebm.program` and the ground floor.
"""
