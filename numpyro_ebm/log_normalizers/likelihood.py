# SPDX-License-Identifier: Apache-2.0
r"""Log-likelihoods of held-out rows under a fixed energy-based model.

.. math:: \log p(v) = \log \int \tilde p(v, h; θ)\, dh - \log Z
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers import methods
from numpyro_ebm.log_normalizers.divergence import divergence_error
from numpyro_ebm.log_normalizers.integrand import read_integrand
from numpyro_ebm.log_normalizers.methods import MethodName, run_method
from numpyro_ebm.log_normalizers.options import Options
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model.reading import read_fixed_model, read_model
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.printed import brief
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model

__all__ = ["LogLikelihood", "log_likelihood"]


class LogLikelihood(NamedTuple):
    """Log-likelihoods of rows, with their errors. See :func:`log_likelihood`.

    - **value** - log p(v) of every row, in nats, (rows,).
    - **mcse** - their standard errors, (rows,): those of log Z and of the latents' integral.
    - **log_normalizer** - the :class:`~numpyro_ebm.log_normalizers.LogNormalizer` used. Its error
      is the same for all rows, so that it does not average out.
    """

    value: jax.Array
    mcse: jax.Array
    log_normalizer: LogNormalizer

    __repr__ = brief


@overload
def log_likelihood(
    rng_key: jax.Array,
    model: Model,
    *args: Any,
    log_normalizer: LogNormalizer | ArrayLike | None = None,
    with_error: Literal[False] = False,
    method: MethodName | Sequence[MethodName] | None = None,
    **kwargs: Any,
) -> jax.Array: ...
@overload
def log_likelihood(
    rng_key: jax.Array,
    model: Model,
    *args: Any,
    log_normalizer: LogNormalizer | ArrayLike | None = None,
    with_error: Literal[True],
    method: MethodName | Sequence[MethodName] | None = None,
    **kwargs: Any,
) -> LogLikelihood: ...
@explaining
def log_likelihood(
    rng_key: jax.Array,
    model: Model,
    *args: Any,
    log_normalizer: LogNormalizer | ArrayLike | None = None,
    with_error: bool = False,
    method: MethodName | Sequence[MethodName] | None = None,
    **kwargs: Any,
) -> jax.Array | LogLikelihood:
    r"""Log-likelihood of observed rows under a fixed energy-based model.

    .. math:: \log p(v) = \log \int \tilde p(v, h; θ)\, dh - \log Z

    Latent sites are summed or integrated out exactly where they can be; else their integral is
    annealed, row by row, as log Z is.

    :param rng_key: random key.
    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param args: arguments of the model, held-out rows among them.
    :param log_normalizer: log Z: a number, an array of shape (rows,) or what
        :func:`~numpyro_ebm.log_normalizer` returned; computed if ``None``.
    :param bool with_error: return a :class:`LogLikelihood` with standard errors.
    :param method: as for :func:`~numpyro_ebm.log_normalizer`, for log Z if it is computed.
    :param kwargs: keyword arguments of the model; those of
        :func:`~numpyro_ebm.log_normalizer` (``num_particles``, ...) go there.
    :return: array of shape (rows,), in nats; :class:`LogLikelihood` if ``with_error``.
    :raises ModelError: as :func:`~numpyro_ebm.log_normalizer`, and if no site is observed.

    With log Z from AIS or SMC, log-likelihoods are too large in expectation; those of annealed
    latents are too small.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> params = {
    ...     "W": jnp.zeros((1, 1)),
    ...     "b": jnp.zeros(1),
    ...     "c": jnp.zeros(1),
    ...     "scale": jnp.ones(1),
    ... }
    >>> model, data = ebm.fixed(ebm.models.grbm, params), jnp.array([[0.0], [1.0]])
    >>> ebm.log_likelihood(jax.random.key(0), model, data, num_visible=1, num_hidden=1)
    Array([-0.918..., -1.418...], dtype=float32)
    """
    own = {k: kwargs.pop(k) for k in list(kwargs) if k in Options._fields}
    key_z, key_latent = jax.random.split(rng_key)
    row_model = read_model(model, args, kwargs)
    if not row_model.visible:
        raise ModelError(
            "log_likelihood: the model has no observed site. Pass the rows as the model's data."
        )
    if row_model.parameters or not row_model.is_fixed:
        read_fixed_model(model, args, kwargs)  # raises, and says why
    log_z = log_normalizer
    if log_z is None:
        log_z = methods.log_normalizer(key_z, model, *args, method=method, **own, **kwargs)
    elif not isinstance(log_z, LogNormalizer):
        log_z = LogNormalizer(jnp.asarray(log_z), 0.0, math.inf, "given")
    if jnp.shape(log_z.value) not in ((), (row_model.num_rows,)):
        raise ModelError(
            f"log_likelihood: `log_normalizer` has shape {jnp.shape(log_z.value)}; it is a number, "
            f"or one for each of the {row_model.num_rows} rows."
        )
    if jnp.shape(log_z.value) == () and row_model.num_rows > 1:
        check_rows_alike(
            row_model,
            "log_likelihood: one log Z was given for all rows",
            f"Give an array of shape ({row_model.num_rows},).",
        )
    inner, error = _sum_latents(key_latent, row_model, args, kwargs, Options(**own))
    inner = inner - row_model.log_reference(row_model.visible_values)
    value = row_model.weigh(inner - log_z.value)
    if not with_error:
        return value
    mcse = jnp.broadcast_to(jnp.sqrt(error**2 + jnp.asarray(log_z.mcse) ** 2), value.shape)
    return LogLikelihood(value, row_model.weigh(mcse), log_z)


def _sum_latents(rng_key, row_model, args, kwargs, options):
    """log ∫ p̃(v, h) dh of every row and its error."""
    try:
        marginal = exact_marginal(row_model)
    except ModelError:
        integrand = read_integrand(rng_key, row_model.model, args, kwargs, unconditioned=False)
        result = run_method(rng_key, integrand, None, options)
        return jnp.broadcast_to(result.value, (row_model.num_rows,)), jnp.asarray(result.mcse)
    value = jax.jit(lambda: marginal.log_density(row_model, {}, row_model.visible_values))()
    seen = jax.lax.stop_gradient(value)
    if row_model.latent and not_jax_tracer(seen) and np.any(np.isnan(seen)):
        raise divergence_error(row_model.latent, "its logarithm is no number in some rows")
    return value, 0.0
