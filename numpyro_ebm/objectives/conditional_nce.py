# SPDX-License-Identifier: Apache-2.0
"""Conditional noise contrast: the noise is the row, moved."""

import jax
from jax.nn import softplus

from numpyro_ebm.errors import check_integer, check_positive
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.objectives.directions import draw_like, each
from numpyro_ebm.types import Params

__all__ = ["ConditionalNCE"]


class ConditionalNCE(Objective):
    r"""Conditional noise contrast (CNCE): the noise is the row, moved by a symmetric kernel.

    .. math:: \mathcal L(θ) = E \log\big(1 + \tilde p(y; θ)/\tilde p(v; θ)\big), \qquad
        y = v + σε,\ ε \sim N(0, I)

    The kernel cancels and so does log Z, covariates or not. As σ falls the gradient tends to σ²/4
    times that of score matching; a σ of the order of the data's own scale tells most.

    :param float noise_scale: σ, in the units of v (of its unconstrained coordinates on other
        supports than the reals).
    :param int noise_ratio: moved copies of each row.
    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :raises ModelError: if the arguments are not positive; when used, if a visible site is discrete
        or the marginal has no exact values.

    Reference: Ceylan, Gutmann, ICML 2018.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.ConditionalNCE(noise_scale=0.5, noise_ratio=4)
    ConditionalNCE(noise_scale=0.5, noise_ratio=4, marginal=None)
    """

    order = 1
    needs = "value"

    def __init__(self, noise_scale: float, noise_ratio: int = 1, marginal: Marginal | None = None):
        check_positive("ConditionalNCE", noise_scale=noise_scale)
        check_integer("ConditionalNCE", noise_ratio=noise_ratio)
        self.noise_scale = noise_scale
        self.noise_ratio = noise_ratio
        super().__init__(marginal)

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        key_noise, key_marginal = jax.random.split(rng_key)
        estimate = self.estimate(key_marginal, params, problem)
        here = estimate.log_density(params, problem.unconstrained)

        def there(rng_key):
            noise = draw_like(jax.random.normal, rng_key, problem.unconstrained)
            moved = {k: x + self.noise_scale * noise[k] for k, x in problem.unconstrained.items()}
            return estimate.log_density(params, moved)

        moved = each(there, jax.random.split(key_noise, self.noise_ratio))
        return problem.row_model.mean(softplus(moved - here))
