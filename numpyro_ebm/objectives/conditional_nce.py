# SPDX-License-Identifier: Apache-2.0
"""Conditional noise contrast: the noise is the row, moved."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import softplus

from numpyro_ebm.errors import check_integer, check_positive
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.objectives.directions import each
from numpyro_ebm.objectives.overlap import mean_overlap, warn_if_apart
from numpyro_ebm.objectives.symmetric_kernel import Perturbation, SymmetricKernel
from numpyro_ebm.types import Params

__all__ = ["ConditionalNCE"]


class ConditionalNCE(Objective):
    r"""Conditional noise contrast (CNCE): the noise is the row, moved by a symmetric kernel.

    .. math:: \mathcal L(θ) = E \log\big(1 + \tilde p(y; θ)/\tilde p(v; θ)\big), \qquad
        y \sim q(\cdot \mid v) = q(v \mid \cdot)

    The kernel cancels and so does log Z, covariates or not. Continuous sites are moved by Gaussian
    noise, y = v + σε: as σ falls the gradient tends to σ²/4 times that of score matching; a σ of
    the order of the data's own scale tells most. Of discrete sites one coordinate of each row
    changes its value, or each by itself with a probability: one bit at a time is
    :class:`PseudoLikelihood` at a random coordinate, which that takes without noise; several at
    a time see what single ones cannot, modes that differ in more of them.

    :param noise_scale: σ, in the units of v (of its unconstrained coordinates on other
        supports than the reals). If ``None``, the standard deviation of each coordinate in the
        other rows of the batch over √D, with D the number of real coordinates of a row. For
        continuous sites.
    :param int noise_ratio: moved copies of each row.
    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :param flip_probability: the probability that a coordinate of a discrete site moves; ``None``
        for exactly one of each row. For discrete sites, as ``perturbation`` is.
    :param str perturbation: where it then goes: ``"uniform"``, to any other value; ``"cyclical"``,
        one place up or down, round and round; ``"ordinal"``, one place up or down, but never
        beyond the ends, where it stays; counts without an end are moved so.
    :raises ModelError: if ``noise_scale`` or ``noise_ratio`` is not positive, ``flip_probability``
        is not inside (0, 1) or ``perturbation`` is unknown; when used, if an option is for a
        kind of sites that the model has none of, a visible site is continuous, ``noise_scale`` is
        not given and there are less than three rows, a discrete one has values that are not moved
        so, or the marginal has no exact values.

    Warns :class:`~numpyro_ebm.errors.FarNoiseWarning` at the end of a run if rows and their copies
    are told apart without doubt, so that the loss is flat.

    Reference: Ceylan, Gutmann, ICML 2018.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.ConditionalNCE(noise_scale=0.5, noise_ratio=4).noise_ratio
    4
    >>> import jax, jax.numpy as jnp, numpyro
    >>> def pair(data):
    ...     coupling = numpyro.param("J", 0.0)
    ...     with numpyro.plate("data", len(data)):
    ...         x = numpyro.sample("x", ebm.Counting(event_shape=(2,)), obs=data)
    ...         s = 2 * x - 1
    ...         ebm.energy("E", -coupling * s[:, 0] * s[:, 1])
    >>> data = jnp.array([[0, 0], [1, 1], [1, 1], [0, 1]])  # E[s₀ s₁] = ½ = tanh J
    >>> objective = ebm.ConditionalNCE()  # one bit of each row is flipped
    >>> loss = lambda J: objective.loss(jax.random.key(0), {"J": J}, pair, None, data)
    >>> bool(abs(jax.grad(loss)(jnp.arctanh(0.5))) < 1e-6)
    True
    """

    order = 1
    needs = "value"

    def __init__(
        self,
        noise_scale: float | None = None,
        noise_ratio: int = 1,
        marginal: Marginal | None = None,
        *,
        flip_probability: float | None = None,
        perturbation: Perturbation = "uniform",
    ):
        name = type(self).__name__
        if noise_scale is not None:
            check_positive(name, noise_scale=noise_scale)
        check_integer(name, noise_ratio=noise_ratio)
        self._kernel = SymmetricKernel(name, noise_scale, flip_probability, perturbation)
        self.noise_scale = noise_scale
        self.noise_ratio = noise_ratio
        self.flip_probability = flip_probability
        self.perturbation = perturbation
        super().__init__(marginal)

    def check_sites(self, row_model: RowModel) -> None:
        self.check_observed(row_model)
        self._kernel.check_sites(row_model)

    def pair_loss(self, log_ratios: jax.Array) -> jax.Array:
        """Loss of rows and their moved copies, from log p̃(y) - log p̃(v)."""
        return softplus(log_ratios)

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        log_ratios = self._log_ratios(rng_key, params, problem)
        return problem.row_model.mean(self.pair_loss(log_ratios))

    def _log_ratios(self, rng_key, params, problem):
        """log p̃ at the moved copies minus at the rows, (noise_ratio, rows)."""
        key_noise, key_marginal = jax.random.split(rng_key)
        row_model, point = problem.row_model, problem.unconstrained
        estimate = self.estimate(key_marginal, params, problem)
        here = estimate.log_density(params, point)

        def there(rng_key):
            return estimate.log_density(params, self._kernel.draw(rng_key, row_model, point))

        return each(there, jax.random.split(key_noise, self.noise_ratio)) - here

    def statistics(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any = None
    ) -> Any:
        slope = jnp.vectorize(jax.grad(self.pair_loss))
        log_ratios = self._log_ratios(rng_key, params, problem)
        return mean_overlap(problem.row_model, slope(log_ratios) / slope(0.0))

    def review(self, statistics: Any) -> None:
        warn_if_apart(
            type(self).__name__,
            statistics,
            "rows and their moved copies are told apart without doubt",
            "the loss is flat, and the parameters are hardly determined. Move rows less far "
            "(`noise_scale=None` goes by the data, `flip_probability=None` changes one "
            "coordinate), or take a score-based objective or PseudoLikelihood.",
        )
