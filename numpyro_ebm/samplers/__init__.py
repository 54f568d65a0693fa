# SPDX-License-Identifier: Apache-2.0
"""Samplers of unnormalised densities, in BlackJAX's shape; they know log-densities, not NumPyro."""
