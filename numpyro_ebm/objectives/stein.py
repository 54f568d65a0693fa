# SPDX-License-Identifier: Apache-2.0
r"""Kernelised Stein discrepancy: compare the model's score with the data through a kernel.

.. math:: \mathrm{KSD}(θ) = E_{v, v'}\big[k\,s·s' + s·∇_{v'} k + s'·∇_v k
    + \operatorname{tr} ∇_v ∇_{v'} k\big], \qquad s = s(v; θ),\ s' = s(v'; θ)

over independent v and v' of the data: zero if and only if model and data agree (for the kernels
here), with no sampler, no log Z and no derivative of the score in v. With ``VaGES`` it is
VaGES-KSD; with an exact one, plain KSD; with ``ImportanceBound``, IS-KSD.

Use it where second derivatives are out of reach and noise is not wanted. It is blind to the
proportions of separated modes, as all objectives made of scores, and its signal fades with the
dimension and with a bandwidth far below the spread of the data.

Reference: Liu, Lee, Jordan, *A kernelized Stein discrepancy for goodness-of-fit tests*, ICML 2016;
Chwialkowski, Strathmann, Gretton, ICML 2016; with latents, Bao et al., ICML 2021.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from numpyro_ebm.errors import ModelError, check_positive
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.program.derivatives import constant_once, half_value
from numpyro_ebm.types import Params, SiteValues

__all__ = ["KernelSteinDiscrepancy"]

# Radial kernels as functions of t = |v - v'|²/ℓ², with their first two derivatives in t.
KERNELS = {
    "rbf": (
        lambda t: jnp.exp(-0.5 * t),
        lambda t: -0.5 * jnp.exp(-0.5 * t),
        lambda t: 0.25 * jnp.exp(-0.5 * t),
    ),
    "imq": (
        lambda t: (1 + t) ** -0.5,
        lambda t: -0.5 * (1 + t) ** -1.5,
        lambda t: 0.75 * (1 + t) ** -2.5,
    ),
}


class KernelSteinDiscrepancy(Objective):
    r"""Kernelised Stein discrepancy (KSD), as a U-statistic over the batch.

    .. math:: \widehat{\mathrm{KSD}}(θ) = \frac{1}{n(n-1)} \sum_{i \ne j} κ_θ(v_i, v_j)

    with κ the expression in the bracket above. Its value is the squared discrepancy of the
    literature; being unbiased, it may be negative near the optimum.

    :param marginal: how latent sites are integrated out. The two sides of κ use independent
        particles.
    :param str kernel: ``"rbf"``, :math:`\exp(-\|v - v'\|^2 / 2ℓ^2)`, or ``"imq"``,
        :math:`(1 + \|v - v'\|^2/ℓ^2)^{-1/2}`.
    :param bandwidth: ℓ, in the units of v, or ``"median"``: the median distance between the rows of
        the batch, over the pairs that are taken.
    :param str pairs: ``"all"`` for the n(n-1) pairs of the U-statistic; ``"square"`` for these and
        the n pairs of a row with itself, the V-statistic: biased upwards, and never negative;
        ``"halves"`` for the n/2 pairs (v_i, v_{i+n/2}), as the authors of VaGES-KSD take (with
        bandwidth 0.1). Only their right-hand sides are differentiated, twice over, which needs
        rows in random order: train with a ``batch_size``.
    :param weight: w, a positive function from the unconstrained coordinates of the rows, (rows, D),
        to (rows,); the kernel is then w(v) k(v, v') w(v'), which is robust where w falls off like
        the score grows: outliers count less and less. ``None`` for w = 1.
    :raises ModelError: if an option is unknown or ``bandwidth`` is not positive; when used, if a
        visible site is discrete, or the batch has fewer than two rows, or an odd number of them
        with ``pairs="halves"``.

    On supports other than the reals everything is in unconstrained coordinates.

    **Example**

    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.param("precision", 1.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = jax.random.normal(jax.random.key(0), (1_000,))
    >>> ksd = ebm.KernelSteinDiscrepancy(kernel="imq")
    >>> loss = lambda t: ksd.loss(jax.random.key(1), {"precision": t}, gaussian, None, data)
    >>> bool(abs(loss(1.0)) < 0.01 < loss(2.0))
    True
    """

    def __init__(
        self,
        marginal: Marginal | None = None,
        *,
        kernel: Literal["rbf", "imq"] = "rbf",
        bandwidth: float | Literal["median"] = "median",
        pairs: Literal["all", "square", "halves"] = "all",
        weight: Callable[[jax.Array], jax.Array] | None = None,
    ):
        if kernel not in KERNELS:
            raise ModelError(
                f"KernelSteinDiscrepancy: `kernel` must be one of {sorted(KERNELS)}, got "
                f"{kernel!r}."
            )
        if bandwidth != "median":
            check_positive("KernelSteinDiscrepancy", bandwidth=bandwidth)
        if pairs not in ("all", "square", "halves"):
            raise ModelError(
                "KernelSteinDiscrepancy: `pairs` must be 'all', 'square' or 'halves', got "
                f"{pairs!r}."
            )
        if weight is not None and not callable(weight):
            raise ModelError(
                "KernelSteinDiscrepancy: `weight` must be a function of the rows' coordinates, got "
                f"{weight!r}."
            )
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.pairs = pairs
        self.weight = weight
        super().__init__(marginal)

    @property
    def is_loss(self) -> bool:
        return self.pairs != "halves"  # of which one side alone is differentiated

    def check_sites(self, row_model: RowModel) -> None:
        super().check_sites(row_model)
        check_rows_alike(
            row_model,
            "KernelSteinDiscrepancy compares rows as draws of one density",
            "Use DenoisingScoreMatching, ScoreMatching, RankingNCE or ContrastiveDivergence.",
        )

    def perturb(
        self, rng_key: jax.Array, row_model: RowModel
    ) -> tuple[SiteValues, Any, jax.Array | None]:
        rows = row_model.num_rows
        if rows < 2:
            raise ModelError("KernelSteinDiscrepancy compares rows, and the batch has only one.")
        if self.pairs == "halves" and rows % 2:
            raise ModelError(
                f"KernelSteinDiscrepancy: pairs='halves' needs an even number of rows, got {rows}. "
                "Pass an even `batch_size`, or pairs='all'."
            )
        return super().perturb(rng_key, row_model)

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        row_model, point = problem.row_model, problem.unconstrained
        estimate = self.estimate(rng_key, params, problem)
        points, scores = row_model.flatten(point), row_model.flatten(estimate.score(point))
        of_pairs = self._halves if self.pairs == "halves" else self._all_pairs
        counts = row_model.row_weights
        if self.weight is None:
            z, rest = of_pairs(points, scores, None, counts)
        else:  # κ of a weighted kernel is w w' κ at the score s + ∇ log w
            weights, slope = _weigh(self.weight, points)
            z, rest = of_pairs(points, scores + slope, weights, counts)
            rest = rest + jnp.sum(z * slope)
        z = row_model.unflatten(constant_once(z))
        # κ is bilinear in the scores of its sides: one derivative of log p̃ along z gives both.
        _, along = jax.jvp(lambda u: estimate.log_density(params, u), (point,), (z,))
        total = jnp.sum(along)
        return constant_once(rest) + 2.0 * half_value(total)

    def _scale(self, square_distances, counts):
        """1/ℓ², with pairs that count so often, or once if that is ``None``."""
        if not isinstance(self.bandwidth, str):
            return 1.0 / self.bandwidth**2
        distances = jnp.sqrt(stop_gradient(square_distances))
        if counts is None:
            median, mean = jnp.median(distances), jnp.mean(distances)
        else:
            median = _weighted_median(distances, counts)
            mean = jnp.average(distances, weights=counts)
        # Where most rows are equal the median is zero, which is no bandwidth: the mean then.
        return 1.0 / jnp.where(median > 0, median, mean) ** 2

    def _all_pairs(self, points, scores, weights, counts):
        """Weights z_j of s_j, with Σ_j z_j·s_j + rest = KSD and 2 Σ_j z_j·∂s_j its gradient."""
        kernel, first, second = KERNELS[self.kernel]
        num, dimension = points.shape
        square = jnp.sum((points[:, None] - points) ** 2, -1)
        upper = jnp.triu_indices(num, 1)
        count = None if counts is None else counts[:, None] * counts
        scale = self._scale(square[upper], None if count is None else count[upper])
        t = scale * square
        if self.pairs == "all":
            pair = (1.0 - jnp.eye(num, dtype=t.dtype)) / (num * (num - 1))
        else:
            pair = jnp.full((num, num), 1.0 / num**2, t.dtype)
        if count is not None:
            pair = _share(pair * count, counts)
        if weights is not None:
            pair = weights[:, None] * weights * pair
        k, slope = pair * kernel(t), 2.0 * scale * pair * first(t)
        # Σ_i ∇_{v_i} k = Σ_i slope_ij (v_i - v_j), and Σ_j ∇_{v_j} k is minus its transpose.
        pull = slope @ points - jnp.sum(slope, 1, keepdims=True) * points
        curvature = -2.0 * scale * jnp.sum(pair * (dimension * first(t) + 2.0 * t * second(t)))
        return k @ scores + pull, jnp.sum(scores * pull) + curvature

    def _halves(self, points, scores, weights, counts):
        kernel, first, second = KERNELS[self.kernel]
        half, dimension = points.shape[0] // 2, points.shape[1]
        left, right = points[:half], points[half:]
        square = jnp.sum((left - right) ** 2, -1)
        count = None if counts is None else counts[:half] * counts[half:]
        scale = self._scale(square, count)
        t = scale * square
        pair: Any = 1.0 / half if count is None else _share(count, counts)
        pair = pair if weights is None else weights[:half] * weights[half:] * pair
        towards = 2.0 * scale * (pair * first(t))[:, None] * (left - right)  # ∇_v k
        z = (pair * kernel(t))[:, None] * scores[:half] + towards
        rest = -jnp.sum(scores[:half] * towards)
        curvature = -2.0 * scale * jnp.sum(pair * (dimension * first(t) + 2.0 * t * second(t)))
        return jnp.concatenate([jnp.zeros_like(z), z]), rest + curvature


def _share(count, counts):
    """Weights of pairs whose sum is the mean weight of a row."""
    total = jnp.sum(count)
    return jnp.mean(counts) * count / jnp.where(total > 0, total, 1.0)


def _weighted_median(x, weights):
    """The median of numbers that count as often as their weights say."""
    order = jnp.argsort(x)
    x, share = x[order], jnp.cumsum(weights[order])
    share, rounding = share / share[-1], 8 * jnp.finfo(share.dtype).eps
    low, high = jnp.searchsorted(share, jnp.array([0.5 - rounding, 0.5 + rounding]))
    return 0.5 * (x[low] + x[high])


def _weigh(weight, points):
    """w of every row, and ∇ log w."""
    weights = weight(points)
    if jnp.shape(weights) != (len(points),):
        raise ModelError(
            "KernelSteinDiscrepancy: `weight` maps the coordinates of the rows, of shape "
            f"{points.shape}, to one weight each, and returned the shape {jnp.shape(weights)}."
        )
    return weights, jax.grad(lambda x: jnp.sum(jnp.log(weight(x))))(points)
