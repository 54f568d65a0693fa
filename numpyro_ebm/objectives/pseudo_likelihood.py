# SPDX-License-Identifier: Apache-2.0
r"""Pseudo-likelihood: every coordinate given all others.

.. math:: \log p(x_d = a \mid x_{-d}; θ) = \log\tilde p(a, x_{-d}; θ)
    - \log\sum_b \tilde p(b, x_{-d}; θ)

No sampler and no tuning: the first choice for discrete data. All conditionals of a row come from
one gradient where the energy is a sum of products of tables of single sites, as nearly all discrete
energies are, however they are written; otherwise from an evaluation for every neighbour. It is
blind to what single coordinates cannot tell: the weights of modes that differ in many coordinates.
"""

import jax
import jax.numpy as jnp

from numpyro_ebm.objectives.neighbours import NeighbourObjective

__all__ = ["PseudoLikelihood"]


class PseudoLikelihood(NeighbourObjective):
    r"""Pseudo-likelihood (PL): every coordinate given all others.

    .. math:: \mathcal L(θ) = -E \sum_d \log p(x_d \mid x_{-d}; θ)

    over all coordinates of all visible sites; one of K values that is missing (``obs_mask=``) adds
    log K. For a binary coordinate the term is
    :math:`\operatorname{softplus}\big(\log\tilde p(\bar x^d) - \log\tilde p(x)\big)` with
    :math:`\bar x^d` the row with bit d flipped. Consistent, and exact where coordinates are
    independent; less efficient than maximum likelihood where they are strongly coupled.

    Lookups, one-hot codes, comparisons, products and sums over pairs or more of them, adjacency
    matrices, `vmap` and `scan` are seen through, with any parameters, at rows that differ too
    (:mod:`numpyro_ebm.program.multi_affine`). A maximum or a nonlinear function over many sites is
    not, nor are latent sites; a log message at level INFO says so.

    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :raises ModelError: when used, if a visible site is continuous or has infinitely many values, or
        the marginal has no exact value.

    Reference: Besag, *Statistical analysis of non-lattice data*, 1975.

    **Example**

    >>> import jax.numpy as jnp
    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def pair(data):
    ...     coupling = numpyro.param("J", 0.0)
    ...     with numpyro.plate("data", len(data)):
    ...         x = numpyro.sample("x", ebm.Counting(event_shape=(2,)), obs=data)
    ...         s = 2 * x - 1
    ...         ebm.energy("E", -coupling * s[:, 0] * s[:, 1])
    >>> data = jnp.array([[0, 0], [1, 1], [1, 1], [0, 1]])  # E[s₀ s₁] = ½ = tanh J
    >>> loss = lambda J: ebm.PseudoLikelihood().loss(jax.random.key(0), {"J": J}, pair, None, data)
    >>> bool(abs(jax.grad(loss)(jnp.arctanh(0.5))) < 1e-6)
    True
    """

    is_scoring_rule = True

    def coordinate_loss(self, log_ratios: jax.Array) -> jax.Array:
        if len(log_ratios) == 1:
            return jax.nn.softplus(log_ratios[0])
        here = jnp.zeros_like(log_ratios[:1])
        return jax.nn.logsumexp(jnp.concatenate([here, log_ratios]), axis=0)
