# SPDX-License-Identifier: Apache-2.0
"""What the program (jaxpr) of a function tells: each file is named after what it finds.

It may import :mod:`numpyro_ebm.errors` only, and knows nothing of NumPyro.
"""
