# SPDX-License-Identifier: Apache-2.0
r"""An energy that is told the noise on its rows, for denoising and recovery likelihood.

.. math:: E(v, σ) = \frac{\|v\|^2}{2 (s^2 + σ^2)}
    - \frac{s}{σ} f\Big(\frac{v}{\sqrt{s^2 + σ^2}}, \log σ\Big)

with s the standard deviation of the data. The first term is the energy of Gaussian data, and the
factor s/σ is the one by which a gradient of f of order one makes up for what is missing to the
noise: at small σ it is all of it, at large σ nothing.

Reference: Salimans, Ho, *Should EBMs model the energy or the score?*, 2021; the scales are those of
Karras, Aittala, Aila, Laine, *Elucidating the design space of diffusion-based generative models*,
2022, for a score.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from numpyro_ebm.errors import ModelError, check_positive
from numpyro_ebm.language.distributions import Lebesgue
from numpyro_ebm.language.primitives import energy
from numpyro_ebm.models.image_networks import row_shape
from numpyro_ebm.models.neural_energy import module_site
from numpyro_ebm.types import Model

__all__ = ["noise_conditional_energy"]


def noise_conditional_energy(
    network: Any, shape: int | tuple[int, ...], *, data_scale: float
) -> Model:
    r"""A model :math:`E(v, σ)` of rows with noise of the standard deviation σ.

    :param network: f, an equinox module from an array of shape ``(2, *shape)``, the row u in units
        of its own scale and log σ everywhere, to a number.
    :param shape: event shape of a row.
    :param float data_scale: s, about the standard deviation of the data, which should have a mean
        near zero.
    :return: a NumPyro model ``model(data=None, sigma=0.1, *, num_rows=1)`` with the visible site
        ``v``, the energy ``E`` and the parameters ``network$params``. ``sigma`` is a number or an
        array of shape (rows,).
    :raises ModelError: if ``data_scale`` is not positive; when used, if ``network`` is no module,
        or gives more than a number.
    :raises ImportError: when used, without the extra ``networks``.

    Train it by ``MultiscaleDenoisingScoreMatching(None, noise_argument="sigma")`` or
    ``RecoveryLikelihood(noise_scales, noise_argument="sigma")``, and draw by ``AnnealedLangevin``
    of the same ``noise_argument``.

    Reference: Salimans & Ho 2021.

    **Example**

    >>> import jax, optax
    >>> import numpyro_ebm as ebm
    >>> network = ebm.models.mlp_network(jax.random.key(0), (2, 3), widths=(32,))
    >>> model = ebm.models.noise_conditional_energy(network, 3, data_scale=1.0)
    >>> objective = ebm.MultiscaleDenoisingScoreMatching(
    ...     None, noise_argument="sigma", min_noise_scale=0.1, max_noise_scale=3.0
    ... )
    >>> data = jax.random.normal(jax.random.key(1), (500, 3))
    >>> svi = ebm.EnergySVI(model, None, optax.adam(1e-3), objective)
    >>> fit = svi.run(jax.random.key(2), 10, data, batch_size=100, progress_bar=False)
    >>> list(fit.params)
    ['network$params']
    """
    check_positive("noise_conditional_energy", data_scale=data_scale)
    shape = row_shape("noise_conditional_energy", shape)

    def model(data: Any = None, sigma: Any = 0.1, *, num_rows: int = 1) -> None:
        function = module_site("noise_conditional_energy", "network", network)
        size = num_rows if data is None else len(data)
        with numpyro.plate("data", size):
            v: Any = numpyro.sample("v", Lebesgue(shape), obs=data)
            of_row = partial(_energy_of_row, function, data_scale)
            energy("E", jax.vmap(of_row)(jnp.asarray(v), jnp.broadcast_to(sigma, (size,))))

    return model


def _energy_of_row(function, scale, v, sigma):
    variance = scale**2 + sigma**2
    level = jnp.broadcast_to(jnp.log(sigma), v.shape).astype(v.dtype)
    found = function(jnp.stack([v / jnp.sqrt(variance), level]))
    if jnp.shape(found):
        raise ModelError(
            f"noise_conditional_energy: the network gives an output of shape {jnp.shape(found)} "
            "where a number is wanted; make it without `num_outputs`."
        )
    return 0.5 * jnp.sum(v**2) / variance - scale / sigma * found
