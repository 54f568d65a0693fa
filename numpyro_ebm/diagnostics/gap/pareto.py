# SPDX-License-Identifier: Apache-2.0
r"""Shape k of the tail of importance weights, by which to tell whether they can be trusted.

By how much x the largest weights exceed all others follows a generalised Pareto law,

.. math:: \Pr(X > x) = (1 + k x / σ)^{-1/k}

whose k is fitted. Moments of the weights of order 1/k and above are infinite: from 0.5 on there is
no variance, and above 0.7 means over the weights hardly improve with their number.

Reference: Vehtari, Simpson, Gelman, Yao, Gabry, *Pareto smoothed importance sampling*, JMLR 2024;
Zhang, Stephens, *A new and efficient estimation method for the generalized Pareto distribution*,
Technometrics 2009.
"""

import math

import numpy as np

__all__ = ["pareto_shapes"]

FEWEST_IN_TAIL = 5
"""Weights that a tail is fitted to."""

ROUNDING = 1e-6
"""Difference of weights, the largest being one, that is none."""


def pareto_shapes(log_w):
    """Shape of the generalised Pareto law of the largest weights, of every row.

    :param log_w: logarithms of the weights, (weights, rows), up to a constant of the row.
    :return: (rows,); minus infinity where the largest weights are equal, NaN if there are too few.
    """
    num = len(log_w)
    weights = np.sort(np.exp(log_w - log_w.max(0)), axis=0)
    size = math.ceil(min(0.2 * num, 3 * math.sqrt(num)))
    if size < FEWEST_IN_TAIL:
        return np.full(log_w.shape[1], np.nan)
    above = weights[-size:] - weights[-size - 1]
    return np.array([_pareto_shape(x[x > ROUNDING]) for x in above.T])


def _pareto_shape(x):
    """Fit of Zhang and Stephens (2009), with the weak prior of Vehtari et al.; ``x`` ascends."""
    num = len(x)
    if num < FEWEST_IN_TAIL or x[-1] - x[0] < ROUNDING:
        return -np.inf  # the largest weights are many and equal: no tail
    count = 30 + math.isqrt(num)
    quartile = x[int(num / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - np.sqrt(count / (np.arange(count) + 0.5))) / (3 * quartile)
    shape = np.mean(np.log1p(-b[:, None] * x), 1)
    profile = num * (np.log(-b / shape) - shape - 1)
    posterior = np.exp(profile - profile.max())
    b = np.sum(b * posterior) / np.sum(posterior)
    return (num * np.mean(np.log1p(-b * x)) + 5) / (num + 10)
