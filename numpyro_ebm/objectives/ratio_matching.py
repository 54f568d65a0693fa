# SPDX-License-Identifier: Apache-2.0
"""Ratio matching: the squared probability, given the others, of the value a bit does not have."""

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.row_site import RowSite
from numpyro_ebm.objectives.neighbours import NeighbourObjective

__all__ = ["RatioMatching"]


class RatioMatching(NeighbourObjective):
    r"""Ratio matching (RM): score matching for bits.

    .. math:: \mathcal L(θ) = E \sum_d
        \left[ \frac{1}{1 + \tilde p(x; θ) / \tilde p(\bar x^d; θ)} \right]^2

    with :math:`\bar x^d` the row with bit d flipped: the squared probability, given the others, of
    the value that the bit does not have. It costs what :class:`PseudoLikelihood` costs and, being
    bounded in every coordinate, is less moved by outlying rows.

    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :raises ModelError: when used, if a visible site is not binary, or the marginal has no exact
        value.

    Reference: Hyvärinen, *Some extensions of score matching*, 2007.

    **Example**

    >>> import jax.numpy as jnp
    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def bit(data):
    ...     logit = numpyro.param("logit", 0.0)
    ...     with numpyro.plate("data", len(data)):
    ...         x = numpyro.sample("x", ebm.Counting(), obs=data)
    ...         ebm.energy("E", -logit * x)
    >>> data = jnp.array([1, 1, 1, 0])  # ¾ (1 - p)² + ¼ p² at p = ¾
    >>> params = {"logit": jnp.log(3.0)}
    >>> round(float(ebm.RatioMatching().loss(jax.random.key(0), params, bit, None, data)), 4)
    0.1875
    """

    is_scoring_rule = True

    def check_num_values(self, site: RowSite, num_values: int) -> None:
        if num_values > 2:
            raise ModelError(
                f"RatioMatching is for binary sites, and the visible site '{site.name}' has "
                f"{num_values} values. Use PseudoLikelihood."
            )

    def coordinate_loss(self, log_ratios: jax.Array) -> jax.Array:
        return jnp.sum(jax.nn.sigmoid(log_ratios) ** 2, 0)
