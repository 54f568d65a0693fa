# SPDX-License-Identifier: Apache-2.0
r"""How well a model denoises rows that it has not seen, at one noise scale or at many.

.. math:: \ell(σ) = E\, \tfrac12 \| σ\, s(v + σ ε; θ) + ε \|^2, \qquad ε \sim N(0, I)

with s the score of the model: half the squared error of the denoised row
:math:`\tilde v + σ^2 s(\tilde v)` in units of σ. It needs no log Z and no chains.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.diagnostics.reading import pick_marginal, read_rows
from numpyro_ebm.errors import ModelError, check_integer, check_positive
from numpyro_ebm.language.handlers import restricted
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.printed import brief
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model, Params

__all__ = ["DenoisingLoss", "denoising_loss"]


class DenoisingLoss(NamedTuple):
    """What :func:`denoising_loss` found; scalars, or one for each noise scale.

    - **value** - the mean over rows: 0 for a model that knows the clean row, half the number of
      coordinates for a score of zero.
    - **standard_error** - of the mean, over rows.
    - **by_row** - of every row, noise scales leading.
    """

    value: jax.Array
    standard_error: jax.Array
    by_row: jax.Array

    __repr__ = brief


@explaining
def denoising_loss(
    rng_key: jax.Array,
    model: Model,
    data: Any,
    *args: Any,
    noise_scale: ArrayLike,
    num_draws: int = 8,
    marginal: Marginal | None = None,
    guide: Model | None = None,
    guide_params: Params | None = None,
    **kwargs: Any,
) -> DenoisingLoss:
    r"""The denoising loss of a fixed model at rows.

    :param rng_key: random key of the noise. The same key is the same noise for two models, whose
        difference is then known better: take it row by row, from ``by_row``.
    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param data: rows, the model's first argument: an array, or a dict of them, rows leading.
    :param args: further arguments of the model.
    :param noise_scale: σ, in unconstrained coordinates; a number or a vector of them.
    :param int num_draws: draws of the noise for every row.
    :param marginal: how latent sites are integrated out; exactly by default. ``VaGES
        (num_particles)`` takes VaES with a guide, whose variance adds to the loss.
    :param guide: a guide q(h | v), for such a marginal.
    :param dict guide_params: its parameters.
    :param kwargs: keyword arguments of the model and the guide.
    :return: :class:`DenoisingLoss`.
    :raises ModelError: if the model has free parameters, no visible site is real, there are fewer
        than two rows, or a score is not finite.

    Discrete visible sites, such as labels, are held at the data. At small σ the loss sees what is
    near the data alone, and not the weights of modes: look at several scales, up to the width of
    the data.

    Reference: Vincent, *A connection between score matching and denoising autoencoders*, 2011.

    **Example**

    >>> import jax, jax.numpy as jnp, numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data, precision):
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = jax.random.normal(jax.random.key(0), (500,))
    >>> losses = [
    ...     ebm.diagnostics.denoising_loss(
    ...         jax.random.key(1), ebm.fixed(gaussian, {}), data, t, noise_scale=1.0
    ...     ).value
    ...     for t in (0.5, 2.0)
    ... ]
    >>> bool(losses[0] < losses[1])  # the smoothed data have precision 0.5
    True
    """
    check_positive("denoising_loss", noise_scale=noise_scale)
    check_integer("denoising_loss", num_draws=num_draws)
    row_model = read_rows("denoising_loss", model, data, args, kwargs)
    labels = [name for name, site in row_model.visible.items() if site.is_discrete]
    if len(labels) == len(row_model.visible):
        raise ModelError(f"denoising_loss adds noise to rows, and all of {labels} are discrete.")
    if labels:
        model = restricted(row_model.model, labels, ())
        row_model = read_rows("denoising_loss", model, data, args, kwargs)
    if row_model.num_rows < 2:
        raise ModelError("denoising_loss: two rows at least, for an error.")
    marginal, reader, params = pick_marginal(
        "denoising_loss", row_model, marginal, guide, guide_params
    )
    scales = jnp.asarray(noise_scale, jnp.result_type(float))

    def of_rows(scale, rng_key):
        key_noise, key_marginal = jax.random.split(rng_key)
        clean = row_model.flatten(row_model.unconstrain_visible())
        noise = jax.random.normal(key_noise, clean.shape, clean.dtype)
        point = row_model.unflatten(clean + scale * noise)
        estimate = marginal.bind(key_marginal, row_model, reader, params, point, order=1)
        score = row_model.flatten(estimate.score(point))
        return 0.5 * jnp.sum((scale * score + noise) ** 2, -1)

    def run(scales, keys):
        one = lambda scale: jnp.mean(jax.lax.map(lambda key: of_rows(scale, key), keys), 0)  # noqa: E731
        return jax.lax.map(one, scales)

    by_row = run_compiled(run, jnp.ravel(scales), jax.random.split(rng_key, num_draws))
    if not_jax_tracer(by_row) and not np.all(np.isfinite(by_row)):
        bad = int(np.argmin(np.all(np.isfinite(by_row), 0)))
        raise ModelError(f"denoising_loss: the score is not finite at row {bad} with its noise.")
    by_row = jnp.reshape(by_row, (*scales.shape, -1))
    error = jnp.std(by_row, -1, ddof=1) / np.sqrt(row_model.num_rows)
    return DenoisingLoss(jnp.mean(by_row, -1), error, by_row)
