# SPDX-License-Identifier: Apache-2.0
r"""A network as the energy of real rows, such as images.

.. math:: p(v; θ) \propto p_0(v) \exp(-f_θ(v))

with a proper base distribution :math:`p_0`: a network alone need not have an integral, and outside
of the data, where no loss has seen it, it need not rise.

Reference: Xie, Lu, Zhu, Wu, *A theory of generative ConvNet*, ICML 2016.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.primitives import energy
from numpyro_ebm.models.image_networks import equinox_extra, row_shape
from numpyro_ebm.types import Model

__all__ = ["base_distribution", "module_site", "neural_energy"]


def module_site(owner: str, name: str, network: Any) -> Callable[[jax.Array], Any]:
    """An equinox module as a parameter of the model that is being run, a function of a row.

    :param str owner: the model, for the message.
    :param str name: of the module; that of its parameters is ``f"{name}$params"``.
    :param network: the module, with its initial weights.
    :raises ModelError: if ``network`` is no equinox module; when called, if it fails.
    :raises ImportError: without the extra ``networks``.
    """
    eqx = equinox_extra(owner)
    if not isinstance(network, eqx.Module):
        raise ModelError(
            f"{owner}: `{name}` must be an equinox module, such as "
            "`numpyro_ebm.models.mlp_network(rng_key, shape)`, got "
            f"{getattr(network, '__name__', type(network).__name__)}."
        )
    from numpyro.contrib.module import eqx_module

    function: Any = eqx_module(name, network)

    def of_row(x: jax.Array) -> Any:
        try:
            return function(x)
        except ModelError:  # which says more
            raise
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{owner}: the {name} fails on its input, which has shape {jnp.shape(x)} for a "
                f"row: {error} Make it with this shape."
            ) from error

    return of_row


def base_distribution(owner: str, base: Any, shape: int | tuple[int, ...]) -> Any:
    """The base distribution of a row: ``base``, or independent standard normals.

    :raises ModelError: if ``base`` has another event shape, or ``shape`` is none.
    """
    shape = row_shape(owner, shape)
    if base is None:
        return dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))
    if not isinstance(base, dist.Distribution) or base.event_shape != shape or base.batch_shape:
        raise ModelError(
            f"{owner}: `base` must be a distribution of event shape {shape} and no batch shape, "
            f"got {base!r}. `.expand(shape).to_event({len(shape)})` makes one."
        )
    return base


def neural_energy(network: Any, shape: int | tuple[int, ...], *, base: Any = None) -> Model:
    r"""A model whose energy is a network: :math:`E(v) = f(v) - \log p_0(v)`.

    :param network: an equinox module from a row to a number.
    :param shape: event shape of a row.
    :param base: :math:`p_0`, a distribution of this event shape; standard normals if ``None``.
        Centred at the data and twice as wide it confines chains and hardly bends the energy.
    :return: a NumPyro model ``model(data=None, *, num_rows=1)`` with the visible site ``v``, the
        energy ``E`` and the parameters ``network$params``.
    :raises ModelError: if ``base`` has another shape; when used, if ``network`` is no module.
    :raises ImportError: when used, without the extra ``networks``.

    Reference: Xie et al. 2016.

    **Example**

    >>> import jax, optax
    >>> import numpyro_ebm as ebm
    >>> network = ebm.models.mlp_network(jax.random.key(0), 2, widths=(16,))
    >>> model = ebm.models.neural_energy(network, 2)
    >>> data = ebm.datasets.rings(jax.random.key(1), 500)
    >>> svi = ebm.EnergySVI(model, None, optax.adam(1e-3), ebm.DenoisingScoreMatching(0.2))
    >>> fit = svi.run(jax.random.key(2), 10, data, batch_size=100, progress_bar=False)
    >>> list(fit.params)
    ['network$params']
    """
    base = base_distribution("neural_energy", base, shape)

    def model(data: Any = None, *, num_rows: int = 1) -> None:
        function = module_site("neural_energy", "network", network)
        with numpyro.plate("data", num_rows if data is None else len(data)):
            v = numpyro.sample("v", base, obs=data)
            energy("E", jax.vmap(function)(jnp.asarray(v)))

    return model
