# SPDX-License-Identifier: Apache-2.0
r"""Noise contrast: learn an energy, and its log Z, by telling data from noise.

With :math:`G(v) = \log\tilde p(v; θ) - \log Z - \log ν - \log q(v)` and ν draws of a noise q for
every row of the data,

.. math:: \mathcal L(θ, \log Z) = -E_{\text{data}} \log σ(G(v)) - ν\, E_q \log σ(-G(v))

is the loss of a classifier whose optimum is the data's density, normalised: log Z is a parameter
like any other. Nothing is sampled from the model and no derivative in v is taken, so that v may be
of any kind. Members of the family:

- ``NCE``: the loss above; with ``ImportanceBound`` it is variational NCE.
- ``SelfNormalized``: a bound on the likelihood by the same noise, with the same log Z.
- ``RankingNCE``: which of ν + 1 points is the row? It needs no log Z, and so stays right where
  covariates give every row a normalizer of its own.
- ``ConditionalNCE``: the noise is the row itself, moved; no noise to choose, no log Z.
  ``KernelRatioMatching`` compares the same two points by a bounded loss.

The known failure: where the noise is far from the data every point is told apart without effort,
and the loss is flat. ``NCE`` warns when a run ends so.

Reference: Gutmann, Hyvärinen, *Noise-contrastive estimation of unnormalized statistical models*,
JMLR 2012; Rhodes, Gutmann, *Variational noise-contrastive estimation*, AISTATS 2019; Ma, Collins,
*Noise contrastive estimation and negative sampling for conditional models*, EMNLP 2018 (ranking);
Ceylan, Gutmann, *Conditional noise-contrastive estimation*, ICML 2018.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from numpyro_ebm.errors import check_integer
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.noise import Noise
from numpyro_ebm.model.noise_forms import check_noise
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.types import Params, SiteValues

__all__ = ["NoiseContrast"]


class NoiseContrast(Objective):
    """What objectives with a noise distribution share."""

    order = 1
    noise_name = "noise"  # of the argument

    def __init__(self, noise: Any, noise_ratio: int, marginal: Marginal | None):
        check_integer(type(self).__name__, noise_ratio=noise_ratio)
        check_noise(type(self).__name__, **{self.noise_name: noise})
        self.noise = noise
        self.noise_ratio = noise_ratio
        super().__init__(marginal)

    def check_sites(self, row_model: RowModel) -> None:
        self.check_observed(row_model)
        self.read_noise(row_model).refuse_own_rows()

    def read_noise(self, row_model: RowModel) -> Noise:
        """The noise, beside a model."""
        return Noise(self.noise, row_model)

    def contrast(
        self, rng_key: jax.Array, params: Params, problem: Problem
    ) -> tuple[jax.Array, jax.Array]:
        """log p̃ - log q at the data, (rows,), and at the noise, (noise_ratio, rows)."""
        key_draw, key_data, key_noise = jax.random.split(rng_key, 3)
        noise = self.read_noise(problem.row_model)
        constants = stop_gradient(params)
        draws = stop_gradient(noise.draw(key_draw, constants, self.noise_ratio))
        log_model, log_noise = self.densities(params, problem, noise, draws, key_data, key_noise)
        found = log_model - log_noise
        return found[0], found[1:]

    def densities(
        self,
        params: Params,
        problem: Problem,
        noise: Noise,
        draws: SiteValues,
        key_data: jax.Array,
        key_noise: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """log p̃ and log q at the data and at draws of the noise, each (1 + noise_ratio, rows)."""

        def one(rng_key, point):
            estimate = self.estimate(rng_key, params, problem._replace(unconstrained=point))
            return estimate.log_density(params, point), noise.log_density(params, point)

        # Data and noise in one evaluation of the model.
        points = {
            name: jnp.concatenate([jnp.asarray(x, draws[name].dtype)[None], draws[name]])
            for name, x in problem.unconstrained.items()
        }
        keys = jnp.concatenate([key_data[None], jax.random.split(key_noise, self.noise_ratio)])
        return jax.vmap(one)(keys, points)
