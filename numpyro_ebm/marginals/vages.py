# SPDX-License-Identifier: Apache-2.0
r"""VaES and VaGES: variational estimates of the score and of its gradient, by a cumulant surrogate.

With particles :math:`h_1, …, h_L \sim q(h | v)` and :math:`δ_i = \log\tilde p(v, h_i; θ) -
⊥[\log\tilde p(v, h_i; θ)]` (⊥ stops gradients), the surrogate

.. math:: \log\hat p(v; θ) = k_1(δ) + \tfrac12 k_2(δ) + \tfrac16 k_3(δ)

with :math:`k_n` the unbiased k-statistics of :math:`δ_1, …, δ_L` has value 0 and, if q is the
posterior, the derivatives of :math:`\log\tilde p(v; θ)` without bias: one derivative from the first
term (VaES), two from the first two terms (VaGES, with its L/(L-1) covariance), three from all.

Use it for latents that cannot be summed out, with any NumPyro guide. The bias of both estimates is
of the order of the square root of KL(q ‖ p(h | v)).

Reference: Bao, Xu, Li, Hong, Zhu, Zhang, *Variational (gradient) estimate of the score function in
energy-based latent variable models*, ICML 2021.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import softmax

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.marginals.base import Estimate, Marginal, resampled_particle, score_of
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Params, SiteValues

__all__ = ["VaGES", "cumulant_surrogate"]


class VaGES(Marginal):
    """Variational (gradient) estimate of the score, from particles of a guide.

    :param int num_particles: L, the particles for the value of the score and, independently of
        them, the particles for its derivative. At least 2, and at least 3 where an objective takes
        third derivatives (score matching and sliced score matching).
    :param bool importance_weighted: weigh particles by p̃(v, h)/q(h | v). The estimates are then
        consistent as L grows for any q, at the price of a larger variance.
    :param refine: moves particles from q towards the posterior before they are used, for instance
        :class:`~numpyro_ebm.LangevinRefinement` for continuous latents or
        :class:`~numpyro_ebm.KernelRefinement` for any; ``None`` for none.
    :raises ModelError: if ``num_particles`` is less than 2: the covariance of one particle is
        undefined.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.VaGES(num_particles=2)
    VaGES(num_particles=2, importance_weighted=False, refine=None)
    >>> objective = ebm.DenoisingScoreMatching(0.05, marginal=ebm.VaGES(num_particles=2))
    """

    needs_guide = True
    value = None

    def __init__(
        self,
        num_particles: int = 2,
        importance_weighted: bool = False,
        refine: Callable[..., SiteValues] | None = None,
    ):
        check_integer("VaGES", 2, num_particles=num_particles)
        if importance_weighted and refine is not None:
            raise ModelError(
                "VaGES: refined particles have no known density, so `refine` and "
                "`importance_weighted` exclude each other."
            )
        if isinstance(refine, type) or hasattr(refine, "sample"):
            raise ModelError(
                "VaGES: `refine` moves particles, such as `LangevinRefinement(5)` or "
                f"`KernelRefinement(BlockGibbs)`, got {refine!r}."
            )
        self.num_particles = num_particles
        self.importance_weighted = importance_weighted
        self.refine = refine

    @property
    def corrects_guide(self) -> bool:
        return self.importance_weighted

    def check(self, row_model: RowModel, guide: Guide | None, order: int) -> None:
        self.required_guide(row_model, guide)
        if order > self.num_particles:
            raise ModelError(
                f"VaGES: this objective takes derivatives of order {order} and needs as many "
                f"particles, got num_particles={self.num_particles}. Pass "
                f"`VaGES(num_particles={order})` or more."
            )

    def bind(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        guide: Guide | None,
        params: Params,
        unconstrained: SiteValues,
        *,
        order: int = 2,
    ) -> Estimate:
        self.check(row_model, guide, order)
        guide = self.required_guide(row_model, guide)
        visible, _ = row_model.constrain(stop_gradient(unconstrained))
        # Two independent sets in one run of the guide: for the value, and for the derivative.
        latent = self._particles(rng_key, row_model, guide, params, visible, 2 * self.num_particles)
        halves = [
            jax.tree.map(lambda x, i=i: x[i * self.num_particles :][: self.num_particles], latent)
            for i in range(2)
        ]

        def log_weights(half, log_joint):
            if not self.importance_weighted:
                return None
            log_q = jax.vmap(lambda h: guide.log_density(params, visible, h))(halves[half])
            return stop_gradient(log_joint - log_q)

        def surrogate(half, order):
            def log_density(params, unconstrained):
                log_joint = jax.vmap(
                    lambda h: row_model.unconstrained_log_density(params, unconstrained, h)
                )(halves[half])
                return cumulant_surrogate(log_joint, order, log_weights(half, log_joint))

            return log_density

        return Estimate(surrogate(1, order), score_of(surrogate(0, 1), stop_gradient(params)))

    def draw_latent(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        guide: Guide,
        params: Params,
        unconstrained: SiteValues,
    ) -> SiteValues:
        if self.importance_weighted:
            num = self.num_particles
            return resampled_particle(rng_key, row_model, guide, params, unconstrained, num)
        visible, _ = row_model.constrain(unconstrained)
        latent = self._particles(rng_key, row_model, guide, params, visible, 1)
        return {name: x[0] for name, x in latent.items()}

    def _particles(self, rng_key, row_model, guide, params, visible, num_particles):
        """Particles of the guide, refined where it is asked for."""
        key_draw, key_refine = jax.random.split(rng_key)
        latent = guide.draw(key_draw, params, visible, num_particles)
        if self.refine is None:
            return latent
        return self.refine(key_refine, row_model, stop_gradient(params), visible, latent)


def cumulant_surrogate(
    log_joint: jax.Array, order: int, log_weights: jax.Array | None = None
) -> jax.Array:
    r"""The surrogate :math:`k_1(δ) + k_2(δ)/2 + k_3(δ)/6`, of value zero.

    :param log_joint: log p̃(v, h_i; θ), of shape (particles, rows).
    :param int order: number of terms, 1 to 3: the highest derivative that is to be unbiased.
    :param log_weights: log importance weights of the particles, of the same shape, or ``None``. The
        averages over particles, pairs and triples that make the k-statistics are then weighted by
        the products of their weights, which keeps them unbiased for equal weights and consistent
        for any.
    :return: array of shape (rows,).

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.marginals.vages import cumulant_surrogate
    >>> float(cumulant_surrogate(jnp.ones((3, 1)), order=3)[0])
    0.0
    >>> f = lambda x: cumulant_surrogate(x * jnp.array([[1.0], [3.0]]), order=2)[0]
    >>> float(jax.grad(f)(1.0)), float(jax.grad(jax.grad(f))(1.0))  # mean and variance of 1 and 3
    (2.0, 2.0)
    """
    delta = log_joint - stop_gradient(log_joint)
    num = delta.shape[0]
    if log_weights is None:
        mean = jnp.mean(delta, 0)
        total = mean
        if order >= 2:
            total = total + 0.5 / (num - 1) * jnp.sum((delta - mean) ** 2, 0)
        if order >= 3:
            k3 = num / ((num - 1) * (num - 2)) * jnp.sum((delta - mean) ** 3, 0)
            total = total + k3 / 6.0
        return total
    total = jnp.sum(softmax(log_weights, 0) * delta, 0)
    for size, kernel in ((2, _pair_variance), (3, _triple_third_cumulant)):
        if order >= size:
            # U-statistics: kernels of distinct particles, weighted by the product of their weights.
            index = jnp.asarray(_subsets(num, size))
            weights = softmax(jnp.sum(log_weights[index], 1), 0)
            factorial = 2.0 if size == 2 else 6.0
            total = total + jnp.sum(weights * kernel(delta[index]), 0) / factorial
    return total


def _subsets(num, size):
    from itertools import combinations

    return list(combinations(range(num), size))


def _pair_variance(delta):
    return 0.5 * (delta[:, 0] - delta[:, 1]) ** 2


def _triple_third_cumulant(delta):
    # The k-statistic of three values, n² m₃ / ((n - 1)(n - 2)) with n = 3.
    return 1.5 * jnp.sum((delta - jnp.mean(delta, 1, keepdims=True)) ** 3, 1)
