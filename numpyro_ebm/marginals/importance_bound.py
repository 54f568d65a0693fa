# SPDX-License-Identifier: Apache-2.0
r"""A lower bound on the marginal by importance sampling from the guide.

.. math:: \log\hat p(v; θ) = \log\frac1L \sum_{i=1}^L \frac{\tilde p(v, h_i; θ)}{q(h_i | v)},
    \qquad h_i \sim q(h | v)

:math:`\hat p` is unbiased for :math:`\tilde p(v; θ)`, so its logarithm is a lower bound in the mean
(Jensen) which rises to :math:`\log\tilde p(v; θ)` as L grows: the ELBO at L = 1, the IWAE bound
above. It is exact, without variance, where q is the posterior.

Use it where an objective needs *values* of log p̃(v), as variational noise contrast does. For
objectives made of scores ``VaGES`` is less biased at the same L; with ``KernelSteinDiscrepancy``
and a guide that ignores v this is the importance-sampled baseline of the VaGES paper (IS-KSD).

Reference: Burda, Grosse, Salakhutdinov, *Importance weighted autoencoders*, ICLR 2016; Rhodes,
Gutmann, *Variational noise-contrastive estimation*, AISTATS 2019.
"""

import math

import jax
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp

from numpyro_ebm.errors import check_integer
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.marginals.base import Estimate, Marginal, resampled_particle, score_of
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import LogDensity, Params, SiteValues

__all__ = ["ImportanceBound"]


class ImportanceBound(Marginal):
    """Importance-weighted bound on log p̃(v), from particles of a guide.

    :param int num_particles: L, the particles for the value and, independently of them, for its
        derivative.
    :raises ModelError: if ``num_particles`` is not a positive integer; when used, if the model has
        no latent sites or there is no guide.

    The particles and q(h_i | v) are held constant under differentiation in v and θ, so that
    derivatives are self-normalised importance estimates, consistent as L grows, for any guide.

    **Example**

    >>> import numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> objective = ebm.NCE(dist.Normal(0, 1), marginal=ebm.ImportanceBound(num_particles=5))
    >>> objective.marginal
    ImportanceBound(num_particles=5)
    """

    needs_guide = True
    value = "bound"

    def __init__(self, num_particles: int = 5):
        check_integer("ImportanceBound", num_particles=num_particles)
        self.num_particles = num_particles

    @property
    def corrects_guide(self) -> bool:
        return self.num_particles > 1  # the weight of a single particle is one

    def check(self, row_model: RowModel, guide: Guide | None, order: int) -> None:
        self.required_guide(row_model, guide)

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
        guide = self.required_guide(row_model, guide)
        visible, _ = row_model.constrain(stop_gradient(unconstrained))
        constants = stop_gradient(params)

        def bound(rng_key):
            return weighted_mean(rng_key, row_model, guide, constants, visible, self.num_particles)

        key_value, key_derivative = jax.random.split(rng_key)
        return Estimate(bound(key_derivative), score_of(bound(key_value), constants))

    def draw_latent(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        guide: Guide,
        params: Params,
        unconstrained: SiteValues,
    ) -> SiteValues:
        num = self.num_particles
        return resampled_particle(rng_key, row_model, guide, params, unconstrained, num)


def weighted_mean(
    rng_key: jax.Array,
    row_model: RowModel,
    guide: Guide,
    params: Params,
    visible: SiteValues,
    num_particles: int,
) -> LogDensity:
    """log of the mean weight of particles of q(h | v), as a function of θ and v around them.

    :param rng_key: key of the particles.
    :param dict params: parameters of the guide, constants.
    :param dict visible: values of the visible sites at which it is drawn from.
    :return: ``(params, unconstrained) -> (rows,)``.
    """
    latent = guide.draw(rng_key, params, visible, num_particles)
    log_q = jax.vmap(lambda h: guide.log_density(params, visible, h))(latent)

    def log_density(params, unconstrained):
        log_joint = jax.vmap(
            lambda h: row_model.unconstrained_log_density(params, unconstrained, h)
        )(latent)
        return logsumexp(log_joint - log_q, axis=0) - math.log(num_particles)

    return log_density
