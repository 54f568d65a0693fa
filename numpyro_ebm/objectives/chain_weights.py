# SPDX-License-Identifier: Apache-2.0
r"""Persistent chains that carry the work of training, by Jarzynski's equality.

.. math:: \log w_c \leftarrow \log w_c + \log\frac{\tilde p(x_c; θ_{t+1})}{\tilde p(x_c; θ_t)},
    \qquad \log Z(θ) = \log E\, w, \qquad E_{p(x; θ)} f = \frac{E\, w f}{E\, w}

Chains that begin at a distribution q with the weights p̃/q, and are weighted by the change of their
density whenever the parameters move, stand for the model at any time, however slowly their kernel
mixes, and their mean weight is Z. All the kernel has to do is to leave p invariant, row by row.

Chains that push the parameters are no fair measure of log Z: a chance excess of some of them lowers
their own density, in every round anew, and the sum of these is a drift of many nats. So half of
the chains give the gradient, and the other half, which the parameters know nothing of, measures.
The measuring ones are parted into islands that are resampled each for itself: their mean weights
are independent unbiased estimates of Z, and give its error.

Reference: Carbone, Hua, Coste, Vanden-Eijnden, *Efficient training of energy-based models using
Jarzynski equality*, NeurIPS 2023; Jarzynski, *Nonequilibrium equality for free energy differences*,
1997.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import softmax
from jax.scipy.special import logsumexp

from numpyro_ebm._compat import find_stack_level, systematic
from numpyro_ebm.errors import ConvergenceWarning, ModelError
from numpyro_ebm.log_normalizers.particles import log_mean_weight
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.types import SiteValues

__all__ = [
    "check_num_chains",
    "gradient_weights",
    "read_log_normalizer",
    "resampled",
    "review_weights",
]

ISLANDS = 16
"""Populations of measuring chains, each with an estimate of Z of its own."""

LARGEST_ERROR = 0.5
"""Standard error of log Z, in nats, above which a run warns; it is 1 where one group is all."""

LEAST_ESS = 0.5
"""Share of a population below which its effective number has it resampled."""


def check_num_chains(num_chains: int) -> None:
    """Raise unless there are enough chains."""
    if num_chains < 4 * ISLANDS:
        raise ModelError(
            f"ContrastiveDivergence: of weighted chains half measure log Z, in {ISLANDS} groups, "
            f"and {num_chains} are too few. Set `num_chains` to {4 * ISLANDS} at the least; some "
            "hundreds or thousands are usual."
        )


def _num_measuring(num_chains: int) -> int:
    """How many of the chains measure, the last ones."""
    return num_chains // (2 * ISLANDS) * ISLANDS


def resampled(
    rng_key: jax.Array, position: SiteValues, log_weights: jax.Array
) -> tuple[SiteValues, jax.Array]:
    """The chains with every population resampled whose effective number is below one half.

    Weights are absolute: after resampling each is the mean weight of its population.

    :param rng_key: random key.
    :param dict position: arrays of shape (chains, ...).
    :param log_weights: log-weights of the chains, (chains,).
    :return: both, anew.
    """
    num = len(log_weights)
    first = num - _num_measuring(num)
    key_gradient, key_islands = jax.random.split(rng_key)
    index, weights = _choose(key_gradient, log_weights[:first])
    islands = jnp.reshape(log_weights[first:], (ISLANDS, -1))
    chosen, others = jax.vmap(_choose)(jax.random.split(key_islands, ISLANDS), islands)
    chosen += first + jnp.arange(ISLANDS)[:, None] * islands.shape[1]
    index = jnp.concatenate([index, chosen.ravel()])
    return jax.tree.map(lambda x: x[index], position), jnp.concatenate([weights, others.ravel()])


def review_weights(log_weights: jax.Array) -> None:
    """Warn :class:`~numpyro_ebm.ConvergenceWarning` if chains know next to nothing of log Z."""
    found = read_log_normalizer(log_weights)
    if float(found.mcse) > LARGEST_ERROR:
        warnings.warn(
            ConvergenceWarning(
                "ContrastiveDivergence: the weights of the persistent chains are so uneven that "
                f"log Z is known to no better than {float(found.mcse):.2g} nats, and the gradient "
                "is that of few chains. Begin at a distribution that covers the model (`initial`), "
                "take more chains (`num_chains`) or kernel steps, or lower the learning rate."
            ),
            stacklevel=find_stack_level(),
        )


def _choose(rng_key, log_weights):
    """Which chains of a population go on, and their log-weights."""
    num = len(log_weights)
    total = logsumexp(log_weights)
    share = softmax(log_weights)
    low = 1 / jnp.sum(share**2) < LEAST_ESS * num
    index = jnp.clip(systematic(rng_key, share, num), 0, num - 1)
    mean = total - jnp.log(num)
    return jnp.where(low, index, jnp.arange(num)), jnp.where(low, mean, log_weights)


def gradient_weights(log_weights: jax.Array) -> jax.Array:
    """Weights, which sum to one, of the chains that give the gradient, the first ones."""
    num = len(log_weights)
    return softmax(log_weights[: num - _num_measuring(num)])


def read_log_normalizer(log_weights: jax.Array) -> LogNormalizer:
    """What the chains know of log Z."""
    num = len(log_weights)
    first = num - _num_measuring(num)
    islands = jnp.reshape(log_weights[first:], (ISLANDS, -1))
    means = logsumexp(islands, 1) - np.log(islands.shape[1])
    value, mcse, _ = log_mean_weight(means)
    ess = [1 / jnp.sum(softmax(x) ** 2) for x in (log_weights[first:], log_weights[:first])]
    return LogNormalizer(
        value,
        mcse,
        ess[0],
        "weighted persistent chains",
        "below",
        {"islands": means, "gradient_ess": ess[1]},
    )
