# SPDX-License-Identifier: Apache-2.0
"""Ratio matching between a row and the row moved, over sites of any kind."""

import jax

from numpyro_ebm.objectives.conditional_nce import ConditionalNCE

__all__ = ["KernelRatioMatching"]


class KernelRatioMatching(ConditionalNCE):
    r"""Kernel ratio matching (KRM): :class:`RatioMatching` for any symmetric kernel.

    .. math:: \mathcal L(θ) = 4\, E\, σ\big(\log\tilde p(y; θ) - \log\tilde p(v; θ)\big)^2, \qquad
        y \sim q(\cdot \mid v) = q(v \mid \cdot)

    with σ the logistic function. Let :math:`a(v, y) = p(v) / (p(v) + p(y))`, the probability that
    of two points the first one is the row, and a₀ that of the data's law p₀. Then

    .. math:: \mathcal L(θ) = 2 \sum_{v, y} q(y \mid v)\, \big(p_0(v) + p_0(y)\big)
        \big(a(v, y) - a_0(v, y)\big)^2 + \text{constant},

    since a(y, v) = 1 - a(v, y) and q is symmetric: least, whatever the kernel, where the model has
    the data's ratios. It is 1 where nothing tells y from v, and at most 4 at any row: an outlying
    row counts no more than that, where :class:`ConditionalNCE` has its log-ratio. As the noise of
    continuous sites falls, the gradient tends to σ²/2 times that of score matching. On D bits of
    which one is flipped it is 4/D times :class:`RatioMatching`, at a random bit.

    :param noise_scale: as for :class:`ConditionalNCE`, and so are the next ones.
    :param int noise_ratio: moved copies of each row.
    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :param flip_probability: the probability that a discrete coordinate moves; ``None`` for one of
        each row.
    :param str perturbation: ``"uniform"``, ``"cyclical"`` or ``"ordinal"``.
    :raises ModelError: as for :class:`ConditionalNCE`.

    Reference: Hyvärinen, *Some extensions of score matching*, 2007; Lyu, *Interpretation and
    generalization of score matching*, UAI 2009.

    **Example**

    >>> import jax, jax.numpy as jnp, numpyro
    >>> import numpyro_ebm as ebm
    >>> def bit(data):
    ...     logit = numpyro.param("logit", 0.0)
    ...     with numpyro.plate("data", len(data)):
    ...         x = numpyro.sample("x", ebm.Counting(), obs=data)
    ...         ebm.energy("E", -logit * x)
    >>> data = jnp.array([1, 1, 1, 0])  # 4 (¾ (1 - p)² + ¼ p²) at p = ¾
    >>> params = {"logit": jnp.log(3.0)}
    >>> round(float(ebm.KernelRatioMatching().loss(jax.random.key(0), params, bit, None, data)), 4)
    0.75
    """

    def pair_loss(self, log_ratios: jax.Array) -> jax.Array:
        return 4.0 * jax.nn.sigmoid(log_ratios) ** 2
