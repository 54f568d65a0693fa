# SPDX-License-Identifier: Apache-2.0
r"""Energy discrepancy: the energy of the data against the energy of what the data might have been.

.. math:: \operatorname{ED}(θ) = E_{p(x)}[U(x; θ)] - E_{p(x)} E_{q(y \mid x)}[U_q(y; θ)],
    \qquad U_q(y; θ) = -\log \int q(y \mid x')\, e^{-U(x'; θ)}\, dx'

with :math:`U = -\log\tilde p` and a kernel q that perturbs the data. It takes neither derivatives
in x nor a sampler, and serves continuous, discrete and mixed sites alike: the choice for energies
with expensive or no derivatives, and for modes that score matching cannot weigh.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import ModelError, check_integer, check_positive
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.objectives.overlap import mean_overlap, overlap_of_many, warn_if_apart
from numpyro_ebm.objectives.symmetric_kernel import Perturbation, SymmetricKernel
from numpyro_ebm.types import Params

__all__ = ["EnergyDiscrepancy"]

DEFAULT_PROBABILITY = 0.1


class EnergyDiscrepancy(Objective):
    r"""Energy discrepancy (ED), with M perturbations of every row.

    .. math:: \mathcal L(θ) = E \log\Big( \frac wM
        + \frac 1M \sum_{j=1}^M \frac{\tilde p(x^j; θ)}{\tilde p(x; θ)} \Big),
        \qquad y \sim q(\cdot \mid x),\ x^j \sim q(\cdot \mid y)

    where q is symmetric. On continuous sites it is Gaussian, in unconstrained coordinates, and all
    :math:`x^j = x + tξ + tξ^j` share ξ. On discrete sites every coordinate moves independently with
    a small probability.

    *Limits.* As :math:`t → 0`, ED/t² tends to the loss of score matching, which is blind to the
    weights of far modes. As t grows, ED tends to the negative log-likelihood up to a constant, and
    its Monte Carlo error grows, quickly so in many dimensions. On discrete sites ED *is* the
    negative log-likelihood where the perturbation is uniform over all K values, at
    :math:`ε = (K - 1) / K`.

    *Bias.* The loss and its gradient are unbiased for :math:`\mathcal L`, which itself tends to ED
    as M grows, with a bias of order 1/M that is negative at w = 0. At w = 1 the loss is that of
    telling x from its M perturbations, the ranking form of conditional noise-contrastive
    estimation: it is minimised by the law of the data for *every* M, only its value is biased. At
    other w the minimiser is biased by O(1/M), and at w = 0 a flexible energy has no minimum: with
    the couplings of a 4 × 4 Ising model, M = 16 and 2,000 draws, the error at w = 1 is at most 1.1
    times that of maximum likelihood, at w = 0 twice to twenty times.

    :param float noise_scale: t, the standard deviation of the Gaussian perturbation, in
        unconstrained coordinates. If ``None``, that of each coordinate in the other rows of the
        batch over √D, with D the number of real coordinates of a row: wide enough to see what lies
        between rows, and not so wide that in many dimensions every row is told from its
        perturbations. For continuous sites.
    :param int num_samples: M, perturbations of each row.
    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :param float w: weight of the row itself, which stabilises the logarithm; 1 unless there is a
        reason.
    :param float flip_probability: ε, the probability that a coordinate of a discrete site is
        perturbed. For discrete sites, as ``perturbation`` is.
    :param str perturbation: where it then goes: ``"uniform"``, to any other value; ``"cyclical"``,
        one place up or down, round and round; ``"ordinal"``, one place up or down, but never
        beyond the ends (so that a bit flips with probability ε/2), which counts can as well.
    :raises ModelError: if ``noise_scale`` is not positive, ``num_samples`` is not a positive
        integer, ``w`` is negative, ``flip_probability`` is not inside (0, 1) or ``perturbation`` is
        unknown; when used, if an option is for a kind of sites that the model has none of, a
        discrete visible site has infinitely many values that are not moved so, the marginal has no
        exact value, or ``noise_scale`` is not given and there are less than three rows.

    Warns :class:`~numpyro_ebm.errors.FarNoiseWarning` at the end of a run if rows are told from
    their perturbations without doubt: the loss then stands at its bound, log(w/M), and is flat.

    Reference: Schröder et al., *Energy discrepancies: a score-independent loss for energy-based
    models*, NeurIPS 2023; for discrete and mixed data, Schröder et al., *Energy-based modelling for
    discrete and mixed data via heat equations on structured spaces*, NeurIPS 2024.

    **Example**

    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.param("precision", 1.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> objective = ebm.EnergyDiscrepancy(noise_scale=1.0, num_samples=16)
    >>> data = 0.5 * jax.random.normal(jax.random.key(0), (2_000,))
    >>> loss = lambda t: objective.loss(jax.random.key(1), {"precision": t}, gaussian, None, data)
    >>> bool(abs(jax.grad(loss)(4.0)) < 0.02)
    True
    """

    needs = "value"
    order = 1

    def __init__(
        self,
        noise_scale: float | None = None,
        num_samples: int = 16,
        marginal: Marginal | None = None,
        *,
        w: float = 1.0,
        flip_probability: float = DEFAULT_PROBABILITY,
        perturbation: Perturbation = "uniform",
    ):
        if noise_scale is not None:
            check_positive("EnergyDiscrepancy", noise_scale=noise_scale)
        check_integer("EnergyDiscrepancy", num_samples=num_samples)
        if not 0 <= w < math.inf:
            raise ModelError(f"EnergyDiscrepancy: `w` must be zero or positive, got {w!r}.")
        self._kernel = SymmetricKernel(
            "EnergyDiscrepancy", noise_scale, flip_probability, perturbation, DEFAULT_PROBABILITY
        )
        self.noise_scale = noise_scale
        self.num_samples = num_samples
        self.w = w
        self.flip_probability = flip_probability
        self.perturbation = perturbation
        super().__init__(marginal)

    def check_sites(self, row_model: RowModel) -> None:
        self.check_observed(row_model)
        self._kernel.check_sites(row_model)

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        log_ratios = self._log_ratios(rng_key, params, problem)
        rows = jax.nn.logsumexp(log_ratios, axis=0) - math.log(self.num_samples)
        return problem.row_model.mean(rows)

    def _log_ratios(self, rng_key, params, problem):
        """log p̃(xʲ) - log p̃(x) of all perturbations, led by log w if there is any w."""
        key_marginal, key_y, key_samples = jax.random.split(rng_key, 3)
        row_model, point = problem.row_model, problem.unconstrained
        estimate = self.estimate(key_marginal, params, problem)
        here = estimate.log_density(params, point)
        y = self._kernel.draw(key_y, row_model, point)

        def log_ratio(key):
            return estimate.log_density(params, self._kernel.draw(key, row_model, y)) - here

        log_ratios = jax.vmap(log_ratio)(jax.random.split(key_samples, self.num_samples))
        if self.w > 0:
            own = jnp.full_like(log_ratios[:1], math.log(self.w))
            log_ratios = jnp.concatenate([own, log_ratios])
        return log_ratios

    def statistics(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any = None
    ) -> Any:
        if not self.w:
            return None  # without a bound that the loss could stand at
        log_ratios = self._log_ratios(rng_key, params, problem)
        return mean_overlap(problem.row_model, overlap_of_many(log_ratios))

    def review(self, statistics: Any) -> None:
        if statistics is not None:
            warn_if_apart(
                "EnergyDiscrepancy",
                statistics,
                "rows are told from their perturbations without doubt",
                "the loss stands at its bound, log(w/M), and is flat. Lower `noise_scale` (`None` "
                "goes by the data) or `flip_probability`, or take a score-based objective.",
            )
