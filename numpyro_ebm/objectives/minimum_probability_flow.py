# SPDX-License-Identifier: Apache-2.0
"""Minimum probability flow: what a jump process that tends to the model carries off the data."""

import jax
import jax.numpy as jnp

from numpyro_ebm.objectives.neighbours import NeighbourObjective

__all__ = ["MinimumProbabilityFlow"]


class MinimumProbabilityFlow(NeighbourObjective):
    r"""Minimum probability flow (MPF), between states that differ in one coordinate.

    .. math:: \mathcal L(θ) = E \sum_{y \sim x}
        \exp\Big( \tfrac12 \big[ E(x; θ) - E(y; θ) \big] \Big)

    over the neighbours y of a row x: every other value of every coordinate of the visible sites,
    with :math:`E = -\log\tilde p`. Jumps from x to y at the rate of its term leave the model
    invariant, and the loss is the rate at which they leave the rows. Under the model's own law the
    gradient is zero. The publication drops the terms whose y is itself among the rows; here all
    count, so that the loss is a mean over rows and batches of them are unbiased.

    It costs what :class:`PseudoLikelihood` costs. A row that the model finds very unlikely beside
    a neighbour weighs exponentially, and not linearly as there: it is the more moved by outliers,
    and where a difference of energies is beyond about 170 nats (1,400 in float64) the loss
    overflows, which stops the run. It is convex in the parameters of an energy that is linear in
    them.

    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :raises ModelError: when used, if a visible site is continuous or has infinitely many values, or
        the marginal has no exact value.

    Reference: Sohl-Dickstein, Battaglino, DeWeese, *New method for parameter estimation in
    probabilistic models: minimum probability flow*, Physical Review Letters 107, 220601, 2011.

    **Example**

    >>> import jax.numpy as jnp
    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def bit(data):
    ...     logit = numpyro.param("logit", 0.0)
    ...     with numpyro.plate("data", len(data)):
    ...         x = numpyro.sample("x", ebm.Counting(), obs=data)
    ...         ebm.energy("E", -logit * x)
    >>> data = jnp.array([1, 1, 1, 0])  # ¾ exp(-logit / 2) + ¼ exp(logit / 2), least at log 3
    >>> objective = ebm.MinimumProbabilityFlow()
    >>> loss = lambda logit: objective.loss(jax.random.key(0), {"logit": logit}, bit, None, data)
    >>> value, slope = jax.value_and_grad(loss)(jnp.log(3.0))
    >>> print(f"{value:.4f}, {abs(slope):.4f}")
    0.8660, 0.0000
    """

    is_scoring_rule = True

    def coordinate_loss(self, log_ratios: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(0.5 * log_ratios), 0)
