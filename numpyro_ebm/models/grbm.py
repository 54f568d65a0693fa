# SPDX-License-Identifier: Apache-2.0
r"""Gaussian-Bernoulli restricted Boltzmann machine (GRBM).

.. math:: E(v, h) = \tfrac12 \Big\|\frac{v - b}{s}\Big\|^2 - c^\top h - v^\top W h

with real visible units v and binary hidden units h; W is not divided by the scale s. Then
:math:`p(v | h) = N(b + s^2 W h, s^2)` and :math:`p(h | v) = \text{Bernoulli}(σ(c + W^\top v))`: a
mixture of :math:`2^H` Gaussians with common variances.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.nn import softplus
from jax.scipy.special import logsumexp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.inputs import as_arrays
from numpyro_ebm.language.distributions import Counting, Lebesgue
from numpyro_ebm.language.primitives import energy, visible
from numpyro_ebm.types import Params

__all__ = ["grbm", "grbm_guide", "grbm_log_likelihood", "grbm_log_normalizer"]


def grbm(data: Any = None, *, num_visible: int = 2, num_hidden: int = 4, num_rows: int = 1) -> None:
    r"""A Gaussian-Bernoulli RBM as a NumPyro model.

    :param data: visible values of shape (rows, num_visible), or ``None`` to sample them.
    :param int num_visible: number of visible units, the dimension of v.
    :param int num_hidden: number of binary hidden units.
    :param int num_rows: rows of the data plate where ``data`` is ``None``.

    Sites: the parameters ``W`` (num_visible, num_hidden), ``b``, ``c`` and ``scale`` (positive);
    the visible site ``v``, the latent site ``h`` and the energy ``E`` in the plate ``data``.

    Reference: the energy of Bao et al., ICML 2021, section on Gaussian RBMs.

    **Example**

    >>> import jax
    >>> import numpyro
    >>> import numpyro_ebm as ebm
    >>> data = ebm.datasets.checkerboard(jax.random.key(0), 1_000)
    >>> svi = ebm.EnergySVI(
    ...     ebm.models.grbm, None, numpyro.optim.Adam(1e-3), ebm.DenoisingScoreMatching(0.05)
    ... )
    >>> fit = svi.run(jax.random.key(1), 10, data, batch_size=100, progress_bar=False)
    >>> fit.params["W"].shape
    (2, 4)
    """
    W: Any = numpyro.param("W", lambda key: 0.1 * jax.random.normal(key, (num_visible, num_hidden)))
    b: Any = numpyro.param("b", jnp.zeros(num_visible))
    c: Any = numpyro.param("c", jnp.zeros(num_hidden))
    scale: Any = numpyro.param("scale", jnp.ones(num_visible), constraint=dist.constraints.positive)
    with numpyro.plate("data", num_rows if data is None else len(data)):
        v = numpyro.sample("v", Lebesgue(event_shape=(num_visible,)), obs=data)
        h = numpyro.sample("h", Counting(num_values=2, event_shape=(num_hidden,)))
        bowl = 0.5 * jnp.sum(((v - b) / scale) ** 2, -1)
        energy("E", bowl - h @ c - jnp.sum((v @ W) * h, -1))


def grbm_guide(
    data: Any = None, *, num_visible: int = 2, num_hidden: int = 4, num_rows: int = 1
) -> None:
    r"""The amortised guide :math:`q(h | v) = \text{Bernoulli}(σ(d + A^\top v))` of a GRBM.

    It contains the exact posterior, at A = W and d = c.

    :param data: visible values of shape (rows, num_visible).
    :param int num_visible: as in :func:`grbm`.
    :param int num_hidden: as in :func:`grbm`.
    :param int num_rows: as in :func:`grbm`; unused.

    **Example**

    >>> import jax.numpy as jnp, numpyro
    >>> from numpyro_ebm.models import grbm_guide
    >>> guide = numpyro.handlers.seed(grbm_guide, 0)
    >>> numpyro.handlers.trace(guide).get_trace(jnp.zeros((3, 2)))["h"]["value"].shape
    (3, 4)
    """
    A: Any = numpyro.param("A", jnp.zeros((num_visible, num_hidden)))
    d: Any = numpyro.param("d", jnp.zeros(num_hidden))
    with numpyro.plate("data", len(data)):
        v = visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v @ A + d).to_event(1))


def grbm_log_normalizer(params: Params) -> jax.Array:
    r"""Exact log Z of a GRBM with few hidden units, by enumeration of h.

    .. math:: \log Z = \tfrac{D}{2}\log 2π + \sum_j \log s_j
        + \log \sum_h \exp\big(c^\top h + b^\top W h + \tfrac12 \|s \odot W h\|^2\big)

    :param dict params: ``W``, ``b``, ``c`` and ``scale``.
    :return: scalar, in nats.
    :raises ModelError: with more than 20 hidden units, which would take over a million terms.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.models.grbm import grbm_log_normalizer
    >>> params = {
    ...     "W": jnp.zeros((2, 3)),
    ...     "b": jnp.zeros(2),
    ...     "c": jnp.zeros(3),
    ...     "scale": jnp.ones(2),
    ... }
    >>> bool(jnp.allclose(grbm_log_normalizer(params), jnp.log(2 * jnp.pi * 2**3)))
    True
    """
    W, b, c, scale = _of_grbm("grbm_log_normalizer", params)
    num_visible, num_hidden = W.shape
    if num_hidden > 20:
        raise ModelError(f"grbm_log_normalizer enumerates h: {num_hidden} hidden units, over 20.")
    states = (jnp.arange(2**num_hidden)[:, None] >> jnp.arange(num_hidden)) & 1
    shift = states @ W.T
    log_terms = states @ c + shift @ b + 0.5 * jnp.sum((shift * scale) ** 2, -1)
    gaussian = 0.5 * num_visible * math.log(2 * math.pi) + jnp.sum(jnp.log(scale))
    return gaussian + logsumexp(log_terms)


def grbm_log_likelihood(params: Params, data: Any) -> jax.Array:
    r"""Exact log-likelihood of every row of ``data``, of shape (rows,), in nats.

    .. math:: \log p(v) = -\tfrac12 \Big\|\frac{v - b}{s}\Big\|^2
        + \sum_j \operatorname{softplus}\big(c_j + (W^\top v)_j\big) - \log Z

    :param dict params: ``W``, ``b``, ``c`` and ``scale``.
    :param data: rows of shape (rows, num_visible), an array or a data frame.
    :raises ModelError: as :func:`grbm_log_normalizer`, and if the rows are not those of ``W``.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.models.grbm import grbm_log_likelihood
    >>> params = {
    ...     "W": jnp.zeros((1, 1)),
    ...     "b": jnp.zeros(1),
    ...     "c": jnp.zeros(1),
    ...     "scale": jnp.ones(1),
    ... }
    >>> float(grbm_log_likelihood(params, jnp.zeros((1, 1)))[0])  # a standard normal
    -0.9189385...
    """
    W, b, c, scale = _of_grbm("grbm_log_likelihood", params)
    (data,), _ = as_arrays((data,))
    if jnp.shape(data)[-1:] != W.shape[:1]:
        raise ModelError(
            f"grbm_log_likelihood: the data have shape {jnp.shape(data)}, and W of shape {W.shape} "
            f"asks for (rows, {W.shape[0]})."
        )
    free = jnp.sum(softplus(c + data @ W), -1) - 0.5 * jnp.sum(((data - b) / scale) ** 2, -1)
    return free - grbm_log_normalizer(params)


def _of_grbm(owner, params):
    names = ("W", "b", "c", "scale")
    if not isinstance(params, dict) or not params.keys() >= set(names):
        found = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ModelError(
            f"{owner}: `params` must be a dict of {list(names)}, such as `fit.params`, got {found}."
        )
    return [params[name] for name in names]
