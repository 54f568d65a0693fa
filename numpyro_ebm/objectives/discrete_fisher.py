# SPDX-License-Identifier: Apache-2.0
"""Discrete Fisher divergence: ratios of probabilities at neighbouring values, counts included."""

import jax
import jax.numpy as jnp

from numpyro_ebm.objectives.neighbours import NeighbourObjective

__all__ = ["DiscreteFisher"]


class DiscreteFisher(NeighbourObjective):
    r"""Discrete Fisher divergence (DFD): score matching with ratios in the place of derivatives.

    .. math:: \mathcal L(θ) = E \sum_d
        \left[ \frac{\tilde p(x^{d-}; θ)}{\tilde p(x; θ)} \right]^2
        - 2\, \frac{\tilde p(x; θ)}{\tilde p(x^{d+}; θ)}

    with :math:`x^{d\pm}` the row with coordinate d at its next or previous value: round and round
    for finitely many values, and one up or down for counts. Up to a constant it is the mean squared
    error, over the rows, of the ratios :math:`p(x^{d-})/p(x)`, so that it is least where they are
    those of the data. Counts need no end: of a site on all integers from a lowest value on
    (``Counting(math.inf)``, ``Poisson``, ...) only x and its two neighbours are evaluated, and
    below the lowest value p is 0. That makes it the loss of Conway–Maxwell–Poisson models and
    other laws of counts without a sum over them.

    The loss may be negative. Ratios weigh exponentially: one row that the model finds very unlikely
    beside a neighbour dominates, as in :class:`MinimumProbabilityFlow`, and where a difference of
    energies is beyond about 44 nats (350 in float64) the loss overflows, which stops the run. The
    model has to give every neighbour of a row a positive probability.

    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :raises ModelError: when used, if a visible site is continuous or takes infinitely many values
        that are not all integers from a lowest one on, or the marginal has no exact value.

    Reference: Matsubara, Knoblauch, Briol, Oates, *Generalised Bayesian inference for discrete
    intractable likelihood*, Journal of the American Statistical Association 2024.

    **Example**

    >>> import math
    >>> import jax.numpy as jnp
    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def geometric(data):
    ...     rate = numpyro.param("rate", 1.0)
    ...     with numpyro.plate("data", len(data)):
    ...         x = numpyro.sample("x", ebm.Counting(math.inf), obs=data)
    ...         ebm.energy("E", rate * x)
    >>> data = jnp.array([0, 1, 0, 3])  # ½ r² - 2 r with r = exp(rate), least at r = 2
    >>> objective = ebm.DiscreteFisher()
    >>> loss = lambda t: objective.loss(jax.random.key(0), {"rate": t}, geometric, None, data)
    >>> value, slope = jax.value_and_grad(loss)(jnp.log(2.0))
    >>> print(f"{value:.4f}, {abs(slope):.4f}")
    -2.0000, 0.0000
    """

    adjacent = True
    is_scoring_rule = True

    def coordinate_loss(self, log_ratios: jax.Array) -> jax.Array:
        after, before = log_ratios[0], log_ratios[-1]
        return jnp.exp(2.0 * before) - 2.0 * jnp.exp(-after)
