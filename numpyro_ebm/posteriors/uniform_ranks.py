# SPDX-License-Identifier: Apache-2.0
r"""Whether ranks are uniform on 0, ..., L: by their empirical distribution function.

.. math:: γ = \min_i\, 2 \min\{P(B_i \le C_i), P(B_i \ge C_i)\}, \qquad
    B_i \sim \text{Binomial}\Big(S, \frac{i + 1}{L + 1}\Big)

with :math:`C_i` how many of the S ranks are at most i. The p-value is the share of uniform samples
of ranks whose γ is as small.

Reference: Säilynoja, Bürkner, Vehtari, *Graphical test for discrete uniformity and its applications
in goodness-of-fit evaluation and multiple sample comparison*, Statistics and Computing 2022.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

__all__ = ["RankBands", "rank_bands"]

NUM_NULL = 20_000
"""Samples of uniform ranks: p-values are no smaller than one over their number."""


class RankBands(NamedTuple):
    """What S uniform ranks among L draws look like. Made by :func:`rank_bands`.

    - **tails** - two-sided binomial tail of each count at each rank, (L, S + 1).
    - **null** - γ of uniform samples, sorted.
    """

    tails: np.ndarray
    null: np.ndarray

    def distribution(self, ranks: np.ndarray) -> np.ndarray:
        """Empirical distribution functions at all L + 1 ranks of the columns of (S, K) ranks."""
        num = len(self.tails)
        return np.stack([np.mean(ranks <= i, 0) for i in range(num + 1)], -1)

    def p_values(self, ranks: np.ndarray) -> np.ndarray:
        """p-values of the columns of (S, K) ranks, (K,)."""
        counts = np.rint(self.distribution(ranks)[:, :-1] * len(ranks)).astype(int)
        gamma = _smallest(self.tails, counts)
        below = np.searchsorted(self.null, gamma * (1 + 1e-9), side="right")
        return (1 + below) / (1 + len(self.null))

    def band(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Where the functions of a share of uniform samples lie altogether, (L + 1,) each."""
        gamma = np.quantile(self.null, 1 - share)
        inside = self.tails >= gamma
        num = self.tails.shape[1] - 1
        low = np.argmax(inside, 1) / num
        high = (num - np.argmax(inside[:, ::-1], 1)) / num
        return np.append(low, 1.0), np.append(high, 1.0)


@lru_cache(maxsize=8)
def rank_bands(num_ranks: int, num_draws: int) -> RankBands:
    """The law of the statistic for uniform ranks.

    :param int num_ranks: S.
    :param int num_draws: L, draws of each posterior.
    :return: :class:`RankBands`.
    """
    from scipy.stats import binom

    at = np.arange(1, num_draws + 1)[:, None] / (num_draws + 1)
    count = np.arange(num_ranks + 1)
    below, above = binom.cdf(count, num_ranks, at), binom.sf(count - 1, num_ranks, at)
    tails = np.minimum(1.0, 2 * np.minimum(below, above))
    rng = np.random.default_rng(0)
    each = rng.multinomial(num_ranks, np.full(num_draws + 1, 1 / (num_draws + 1)), NUM_NULL)
    null = np.sort(_smallest(tails, np.cumsum(each, 1)[:, :-1]))
    return RankBands(tails, null)


def _smallest(tails, counts):
    """γ of counts at all ranks but the last, (samples, L)."""
    return np.min(tails[np.arange(len(tails)), counts], -1)
