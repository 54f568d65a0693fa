# SPDX-License-Identifier: Apache-2.0
"""From a prior and an energy to a posterior of the parameters.

It may import everything below: objectives, log normalizers, kernels and what they stand on.
"""
