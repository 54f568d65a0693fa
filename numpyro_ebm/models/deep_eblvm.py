# SPDX-License-Identifier: Apache-2.0
r"""Deep energy-based latent variable model: a joint energy of rows and latents.

.. math:: E(v, h) = g_3\big( a,\; h + g_2(a) \big), \qquad a = g_1(v)

with features :math:`g_1` of the row, an additive coupling :math:`g_2` of these with the latents,
and a read-out :math:`g_3`, under base distributions of v and h. Neither p(v | h) nor p(h | v) has a
name: VaGES learns it with a guide.

Reference: Bao, Xu, Li, Hong, Zhu, Zhang, *Variational (gradient) estimate of the score function in
energy-based latent variable models*, ICML 2021, section on deep EBLVMs; the coupling, Dinh,
Krueger, Bengio, *NICE*, 2015.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.primitives import energy, visible
from numpyro_ebm.models.neural_energy import base_distribution, module_site
from numpyro_ebm.types import Model

__all__ = ["deep_eblvm", "deep_eblvm_guide"]


def deep_eblvm(
    features: Any,
    coupling: Any,
    readout: Any,
    shape: int | tuple[int, ...],
    latent: Any,
    *,
    base: Any = None,
) -> Model:
    r"""A deep latent variable model :math:`E(v, h) = g_3(g_1(v), h + g_2(g_1(v)))`.

    :param features: :math:`g_1`, an equinox module from a row to a vector.
    :param coupling: :math:`g_2`, a module from such a vector to one of the length of h.
    :param readout: :math:`g_3`, a module from both vectors, the features first, to a number.
    :param shape: event shape of a row.
    :param latent: base distribution of h, a vector: its length for that many standard normals, or
        such as ``Counting(2, event_shape=(4,))``.
    :param base: base distribution of v; standard normals if ``None``.
    :return: a NumPyro model ``model(data=None, *, num_rows=1)`` with the sites ``v`` and ``h``, the
        energy ``E`` and the parameters ``features$params``, ``coupling$params`` and
        ``readout$params``.
    :raises ModelError: if a base distribution has another shape; when used, if a network is no
        module.
    :raises ImportError: when used, without the extra ``networks``.

    Reference: Bao et al. 2021.

    **Example**

    >>> import jax, optax
    >>> import numpyro_ebm as ebm
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> network = ebm.models.mlp_network
    >>> model = ebm.models.deep_eblvm(
    ...     network(keys[0], (2,), num_outputs=8, widths=(16,)),
    ...     network(keys[1], (8,), num_outputs=3, widths=(16,)),
    ...     network(keys[2], (8 + 3,), widths=(16,)),
    ...     shape=2,
    ...     latent=3,
    ... )
    >>> guide = ebm.models.deep_eblvm_guide(network(keys[3], (2,), num_outputs=2 * 3), 3)
    >>> objective = ebm.DenoisingScoreMatching(0.3, ebm.VaGES(4))
    >>> svi = ebm.EnergySVI(model, guide, optax.adam(1e-3), objective)
    >>> fit = svi.run(rng_key, 2_000, data, batch_size=100)  # doctest: +SKIP
    """
    base = base_distribution("deep_eblvm", base, shape)
    h_base = _latent_distribution(latent)

    def model(data: Any = None, *, num_rows: int = 1) -> None:
        networks = {"features": features, "coupling": coupling, "readout": readout}
        g = {name: module_site("deep_eblvm", name, x) for name, x in networks.items()}
        with numpyro.plate("data", num_rows if data is None else len(data)):
            v = numpyro.sample("v", base, obs=data)
            h: Any = numpyro.sample("h", h_base)
            a = jax.vmap(g["features"])(jnp.asarray(v))
            shifted = h + jax.vmap(g["coupling"])(a)
            a = jnp.broadcast_to(a, (*shifted.shape[:-1], a.shape[-1]))
            both = jnp.concatenate([a, shifted], -1)
            values = jax.vmap(g["readout"])(jnp.reshape(both, (-1, both.shape[-1])))
            energy("E", jnp.reshape(values, both.shape[:-1]))

    return model


def deep_eblvm_guide(network: Any, num_hidden: int) -> Model:
    r"""The Gaussian guide :math:`q(h | v) = N(m(v), \operatorname{diag} s(v)^2)` of a deep EBLVM.

    :param network: an equinox module from a row to twice ``num_hidden`` numbers, means and
        logarithms of standard deviations.
    :param int num_hidden: length of h.
    :return: a NumPyro guide ``guide(data, *, num_rows=1)`` with the parameters ``guide$params``.
    :raises ModelError: when used, if ``network`` is no module, or its output has another length.

    **Example**

    >>> import jax, jax.numpy as jnp, numpyro
    >>> import numpyro_ebm as ebm
    >>> network = ebm.models.mlp_network(jax.random.key(0), (2,), num_outputs=6)
    >>> guide = numpyro.handlers.seed(ebm.models.deep_eblvm_guide(network, 3), 0)
    >>> numpyro.handlers.trace(guide).get_trace(jnp.zeros((5, 2)))["h"]["value"].shape
    (5, 3)
    """

    def guide(data: Any, *, num_rows: int = 1) -> None:
        function = module_site("deep_eblvm_guide", "guide", network)
        with numpyro.plate("data", len(data)):
            v = visible("v", data)
            found = jax.vmap(function)(jnp.asarray(v))
            if found.shape[1:] != (2 * num_hidden,):
                raise ModelError(
                    f"deep_eblvm_guide: the network gives outputs of shape {found.shape[1:]} for "
                    f"{num_hidden} latents; make it with `num_outputs={2 * num_hidden}`."
                )
            mean, log_scale = jnp.split(found, 2, -1)
            numpyro.sample("h", dist.Normal(mean, jnp.exp(log_scale)).to_event(1))

    return guide


def _latent_distribution(latent):
    if isinstance(latent, int) and not isinstance(latent, bool):
        return base_distribution("deep_eblvm", None, latent)
    shape = getattr(latent, "event_shape", None)
    return base_distribution("deep_eblvm", latent, (math.prod(shape or (1,)),))
