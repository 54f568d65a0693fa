# SPDX-License-Identifier: Apache-2.0
r"""A latent-space prior: an energy of latents under a decoder.

.. math:: p(x, z; θ) \propto \exp(-f_α(z))\, N(z; 0, I)\, N(x; g_β(z), s^2 I)

The decoder is normalised given z, so that

.. math:: ∇_α \log p(x) = E_{p_α(z)} ∇_α f - E_{p(z | x)} ∇_α f, \qquad
    ∇_β \log p(x) = E_{p(z | x)} ∇_β \log N(x; g_β(z), s^2 I)

and the negative phase moves z alone. Latents are few and their energy is smooth: chains on it mix
where chains on images do not.

Reference: Pang, Han, Nijkamp, Zhu, Wu, *Learning latent space energy-based prior model*, NeurIPS
2020.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike

from numpyro_ebm.errors import check_integer, check_positive
from numpyro_ebm.language.primitives import energy
from numpyro_ebm.models.neural_energy import module_site
from numpyro_ebm.types import Model

__all__ = ["latent_prior"]


def latent_prior(
    network: Any, decoder: Any, num_latents: int, *, noise_scale: ArrayLike | None = 0.3
) -> Model:
    r"""A latent-space prior with a Gaussian decoder.

    :param network: an equinox module from z to a number, the energy f.
    :param decoder: an equinox module from z to the mean g of x, whose shape is that of x.
    :param int num_latents: dimension of z.
    :param noise_scale: s, a number or an array that broadcasts to a row; the positive parameter
        ``noise_scale`` if ``None``.
    :return: a NumPyro model ``model(data=None, *, num_rows=1)`` with the latent site ``z``, the
        visible site ``x``, the energy ``E`` and the parameters ``network$params`` and
        ``decoder$params``.
    :raises ModelError: if ``num_latents`` or ``noise_scale`` is not positive; when used, if a
        network is no module.
    :raises ImportError: when used, without the extra ``networks``.

    The chain of the negative phase hides x, ``numpyro.handlers.block(model, hide=["x"])``: x is
    drawn from the decoder. Posterior chains go on from epoch to epoch (``PersistentParticles``).

    Reference: Pang et al. 2020.

    **Example**

    >>> import jax, optax
    >>> from functools import partial
    >>> from numpyro.handlers import block
    >>> import numpyro_ebm as ebm
    >>> network = ebm.models.mlp_network(jax.random.key(0), 2, widths=(16,))
    >>> decoder = ebm.models.mlp_network(jax.random.key(1), 2, num_outputs=5, widths=(16,))
    >>> model = ebm.models.latent_prior(network, decoder, 2)
    >>> posterior = ebm.PersistentParticles(partial(ebm.MALA, step_size=0.1), 1, num_steps=5)
    >>> objective = ebm.ContrastiveDivergence(
    ...     lambda model: ebm.MALA(block(model, hide=["x"]), step_size=0.1),
    ...     num_steps=5,
    ...     marginal=posterior,
    ...     persistent=True,
    ... )
    >>> svi = ebm.EnergySVI(model, None, optax.adam(1e-3), objective)
    >>> fit = svi.run(rng_key, 2_000, data, batch_size=100)  # doctest: +SKIP
    """
    check_integer("latent_prior", num_latents=num_latents)
    if noise_scale is not None:
        check_positive("latent_prior", noise_scale=noise_scale)

    def model(data: Any = None, *, num_rows: int = 1) -> None:
        function = module_site("latent_prior", "network", network)
        decode = module_site("latent_prior", "decoder", decoder)
        scale: Any = noise_scale
        if scale is None:
            scale = numpyro.param("noise_scale", 0.3, constraint=dist.constraints.positive)
        with numpyro.plate("data", num_rows if data is None else len(data)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand((num_latents,)).to_event(1))
            mean = jax.vmap(decode)(jnp.asarray(z))
            numpyro.sample("x", dist.Normal(mean, scale).to_event(mean.ndim - 1), obs=data)
            energy("E", jax.vmap(function)(jnp.asarray(z)))

    return model
