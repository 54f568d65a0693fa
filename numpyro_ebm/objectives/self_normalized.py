# SPDX-License-Identifier: Apache-2.0
"""Self-normalised likelihood: a lower bound on the log-likelihood, which learns log Z."""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import sigmoid

from numpyro_ebm.objectives.base import Problem
from numpyro_ebm.objectives.nce import LOG_NORMALIZER, NCE
from numpyro_ebm.types import Params

__all__ = ["SelfNormalized"]


class SelfNormalized(NCE):
    r"""Self-normalised likelihood (SNL): maximum likelihood with log Z learned beside the energy.

    .. math:: \mathcal L(θ, b) = -E_{\text{data}} \log\tilde p(v; θ) + b
        + e^{-b}\, E_q\, \frac{\tilde p(v; θ)}{q(v)} - 1 \;\ge\; -E_{\text{data}} \log p(v; θ)

    Since log Z ≤ b + Z e^{-b} - 1, with equality at b = log Z, the loss is above the negative
    log-likelihood of a row, in nats, and its minimum in b is that. The logarithm of a mean
    over noise draws, whose gradient is biased, is gone: value and gradient are unbiased with any
    number of draws and rows, and no classifier stands between. b is the
    objective's own parameter ``log_normalizer``, as for :class:`NCE`; :meth:`log_normalizer` adds
    its standard error.

    The noise has to cover the model: where p̃/q is large a few draws carry the whole loss, which
    overflows at a log-ratio of about 88 (709 in float64), and that stops the run. :class:`NCE`
    bends such ratios and is the safer one with rough noise; this one is a likelihood.

    With ``ImportanceBound`` the data term is an upper bound of the loss's and the noise term stays
    unbiased for any guide, so that the whole is a lower bound on the log-likelihood as well.

    :param noise: q, as for :class:`NCE`.
    :param int noise_ratio: noise draws for each row.
    :param marginal: how latent sites are integrated out, by a marginal with exact values or
        by :class:`~numpyro_ebm.ImportanceBound`.
    :param noise_optim: optimiser of a noise with parameters; a copy of the energy's if ``None``.
    :param int num_noise_steps: its steps in each round.
    :param init_log_normalizer: where b starts; the importance-sampling estimate by the noise if
        ``None``.
    :raises ModelError: as for :class:`NCE`: among others where the energy reads covariates, so that
        every row has a log Z of its own.

    Warns :class:`~numpyro_ebm.errors.FarNoiseWarning` at the end of a run if the noise hardly has
    draws where the rows are, or few others. A mode of the model that neither meets is not seen.

    Reference: Senetaire et al., *Learning energy-based models by self-normalising the likelihood*,
    2025, arXiv 2503.07021.

    **Example**

    >>> import jax, numpyro, optax
    >>> import numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = 0.5 * jax.random.normal(jax.random.key(0), (5_000,))
    >>> objective = ebm.SelfNormalized(dist.Normal(0, 1))
    >>> svi = ebm.EnergySVI(gaussian, None, optax.adam(0.03), objective)
    >>> fit = svi.run(jax.random.key(1), 500, data, progress_bar=False)
    >>> exact = 0.5 * jax.numpy.log(2 * jax.numpy.pi / fit.params["precision"])
    >>> bool(abs(fit.params["log_normalizer"] - exact) < 0.05)
    True
    """

    method = "SNL"
    far_noise = "almost no row lies where it has draws, or almost no draw where there are rows"

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        row_model, point = problem.row_model, problem.unconstrained
        rows = self._rows(params, *self.contrast(rng_key, params, problem))
        # What makes it the likelihood of the row's values: constants of the parameters.
        log_noise = self.read_noise(row_model).log_density(stop_gradient(params), point)
        values, log_det = row_model.constrain(point)
        return row_model.mean(rows - log_noise + log_det + row_model.log_reference(values))

    def _rows(self, params, at_data, at_noise):
        shift = params[LOG_NORMALIZER]
        return shift - at_data + jnp.mean(jnp.exp(at_noise - shift), 0) - 1.0

    def overlap(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        """2 ∫ p q / (p + q), the lower one by rows and by draws: 1 where p = q, 0 if apart."""
        at_data, at_noise = self.contrast(rng_key, params, problem)
        shift, mean = params[LOG_NORMALIZER], problem.row_model.mean
        both = mean(sigmoid(shift - at_data)), mean(sigmoid(at_noise - shift))
        return 2.0 * jnp.minimum(*both) / mean(jnp.ones_like(at_data))
