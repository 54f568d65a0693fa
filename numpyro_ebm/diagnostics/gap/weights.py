# SPDX-License-Identifier: Apache-2.0
r"""Values of the latent sites, weighted under a guide and under the posterior.

.. math:: w = \frac{\tilde p(v, h)}{q(h | v)}, \qquad \log\tilde p(v) = \log E_q\, w
    \ge E_q \log w = \mathrm{ELBO}

The values are either all states of discrete latents, so that sums over them are exact, or draws of
the guide. Of draws the ELBO is a mean without bias, and :math:`\log\tilde p(v)` is given in closed
form or bounded from below by the logarithm of the mean weight (Burda et al., ICLR 2016).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model.finite_supports import in_all_rows, joint_states, num_joint_states
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import SiteValues

__all__ = ["Weights", "all_states", "choose_method", "weigh_particles", "weigh_states"]


class Weights(NamedTuple):
    """Weights of points, that is of values of the latent sites, and what follows from them.

    - **q** - under the guide, (points, rows), with sum one over the points.
    - **p** - under the posterior, the same.
    - **elbo** - mean under the guide of log p̃(v, h) - log q, (rows,).
    - **log_marginal** - log p̃(v), or its importance-weighted bound, (rows,).
    - **error** - standard error of ``log_marginal - elbo``, (rows,).
    - **ess** - effective number of draws of the guide as weighted draws of the posterior, (rows,).
    """

    q: jax.Array
    p: jax.Array
    elbo: jax.Array
    log_marginal: jax.Array
    error: jax.Array
    ess: jax.Array


def choose_method(row_model: RowModel, max_states: int) -> str:
    """How log p̃(v) is found.

    :return: ``"enumerate"``, from all states; ``"marginal"``, in closed form; ``"importance"``,
        from the weights of draws.
    """
    try:
        num_states = num_joint_states(row_model, row_model.latent, "posterior_gap")
    except ModelError:
        num_states = math.inf
    if num_states <= max_states:
        return "enumerate"
    try:
        exact_marginal(row_model)
    except ModelError:
        return "importance"
    return "marginal"


def weigh_states(log_joint: jax.Array, log_guide: jax.Array, num_particles: int) -> Weights:
    """Weigh all states, (states, rows): sums over them are exact.

    :param num_particles: draws of the guide of which to give the effective number.
    """
    log_w = log_joint - log_guide
    log_marginal = logsumexp(log_joint, 0)
    q, p = jnp.exp(log_guide), jnp.exp(log_joint - log_marginal)
    elbo = jnp.sum(jnp.where(q > 0, q * log_w, 0.0), 0)
    # Of draws of q, as their number grows: E_q[w]² / E_q[w²].
    square = jnp.where(q > 0, p * p / q, jnp.where(p > 0, jnp.inf, 0))
    ess = num_particles / jnp.sum(square, 0)
    return Weights(q, p, elbo, log_marginal, jnp.zeros(log_w.shape[1]), ess)


def weigh_particles(
    log_joint: jax.Array, log_guide: jax.Array, log_marginal: jax.Array | None = None
) -> Weights:
    """Weigh draws of the guide, (draws, rows); log p̃(v) from them as well if it is not given."""
    log_w = log_joint - log_guide
    num = len(log_w)
    q, p = jnp.full_like(log_w, 1 / num), jax.nn.softmax(log_w, 0)
    # What a draw contributes to the difference of log p̃(v) and the ELBO, to first order.
    influence = log_w
    if log_marginal is None:
        log_marginal = logsumexp(log_w, 0) - math.log(num)
        influence = jnp.exp(log_w - log_marginal) - log_w
    error = jnp.std(influence, 0, ddof=1) / math.sqrt(num)
    return Weights(q, p, jnp.mean(log_w, 0), log_marginal, error, 1 / jnp.sum(p * p, 0))


def all_states(row_model: RowModel) -> SiteValues:
    """All joint states of the latent sites, every one in all rows, states leading."""
    states = joint_states(row_model, row_model.latent, "posterior_gap")
    return jax.vmap(partial(in_all_rows, row_model))(states)
