# SPDX-License-Identifier: Apache-2.0
"""Ranking noise contrast: find the row among draws of the noise."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Problem
from numpyro_ebm.objectives.noise_contrast import NoiseContrast
from numpyro_ebm.objectives.overlap import mean_overlap, overlap_of_many, warn_if_apart
from numpyro_ebm.types import Params

__all__ = ["RankingNCE"]


class RankingNCE(NoiseContrast):
    r"""Ranking (InfoNCE-like) noise contrast, without log Z.

    .. math:: \mathcal L(θ) = -E \log\frac{w(v_0)}{\sum_{k=0}^{ν} w(v_k)}, \qquad
        w(v) = \tilde p(v; θ)/q(v),

    where v₀ is the row and v₁ … v_ν are its own draws of the noise. Normalizers cancel in every
    row, so that energies may read covariates.

    :param noise: as for :class:`~numpyro_ebm.NCE`, without parameters. A function of the model's
        arguments may return one of every row, made of covariates:
        ``lambda x, v=None: dist.Normal(x @ w, 1.0)``.
    :param int noise_ratio: ν, noise draws for each row. The loss is near log(ν + 1) where noise and
        data cannot be told apart, and more draws are more efficient.
    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :raises ModelError: if ``noise_ratio`` is not a positive integer; when used, if the noise does
        not fit the visible sites or the marginal has no exact values.

    Warns :class:`~numpyro_ebm.errors.FarNoiseWarning` at the end of a run if rows are found without
    doubt, so that the loss is flat.

    Reference: Ma, Collins, EMNLP 2018.

    **Example**

    >>> import numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> objective = ebm.RankingNCE(dist.Normal(0, 1), noise_ratio=10)
    >>> objective.noise_ratio
    10
    """

    needs = "value"

    def __init__(self, noise: Any, noise_ratio: int = 10, marginal: Marginal | None = None):
        super().__init__(noise, noise_ratio, marginal)

    def check_sites(self, row_model: RowModel) -> None:
        super().check_sites(row_model)
        names = sorted(self.read_noise(row_model).parameters(default_key()))
        if names:
            raise ModelError(
                f"RankingNCE: the noise has the parameter(s) {', '.join(map(repr, names))}, and "
                "RankingNCE trains no noise. Give it fixed, or use NCE."
            )

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        everyone = self._everyone(rng_key, params, problem)
        return problem.row_model.mean(logsumexp(everyone, 0) - everyone[0])

    def _everyone(self, rng_key, params, problem):
        """log w of the rows, first, and of their draws: (1 + noise_ratio, rows)."""
        at_data, at_noise = self.contrast(rng_key, params, problem)
        return jnp.concatenate([at_data[None], at_noise])

    def statistics(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any = None
    ) -> Any:
        everyone = self._everyone(rng_key, params, problem)
        return mean_overlap(problem.row_model, overlap_of_many(everyone))

    def review(self, statistics: Any) -> None:
        warn_if_apart(
            "RankingNCE",
            statistics,
            "the noise is far from the data",
            "every row is found among its draws without doubt, and the loss is flat. Choose a "
            "noise closer to the data (a fitted Gaussian, a function of the covariates), or "
            "ConditionalNCE or a score-based objective.",
        )
