# SPDX-License-Identifier: Apache-2.0
r"""A network as the energy of a response given covariates.

.. math:: p(y | x; θ) = \frac{p_0(y) \exp(-f_θ(x, y))}{Z(x; θ)}

Every row has a normalizer of its own. It stands for any density, with branches, skew or unequal
spread, where a regression has to choose one.

Reference: Gustafsson, Danelljan, Bhat, Schön, *Energy-based models for deep probabilistic
regression*, ECCV 2020.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.primitives import energy
from numpyro_ebm.models.neural_energy import base_distribution, module_site
from numpyro_ebm.types import Model

__all__ = ["conditional_energy"]


def conditional_energy(
    network: Any, shape: int | tuple[int, ...] = (), *, base: Any = None
) -> Model:
    r"""A conditional model :math:`E(y; x) = f(x, y) - \log p_0(y)`.

    :param network: an equinox module from one vector, the entries of x and after them those of y,
        to a number.
    :param shape: event shape of y.
    :param base: :math:`p_0`, a distribution of this event shape; standard normals if ``None``.
    :return: a NumPyro model ``model(y, x)`` with the visible site ``y`` (``None`` to draw it), the
        covariates x of shape (rows, ...), the energy ``E`` and the parameters ``network$params``.
    :raises ModelError: if ``base`` has another shape; when used, if ``network`` is no module, or
        there are no covariates.
    :raises ImportError: when used, without the extra ``networks``.

    In one or two dimensions of y ``MaximumLikelihood`` is exact; else ``RankingNCE`` and
    ``ContrastiveDivergence`` know rows with normalizers of their own. (``NCE`` with one constant
    does not, and refuses.)

    Reference: Gustafsson et al. 2020.

    **Example**

    >>> import jax, optax
    >>> import numpyro_ebm as ebm
    >>> x = jax.random.normal(jax.random.key(0), (500, 1))
    >>> y = x[:, 0] + 0.5 * jax.random.normal(jax.random.key(1), (500,))
    >>> network = ebm.models.mlp_network(jax.random.key(2), 2, widths=(16,))
    >>> model = ebm.models.conditional_energy(network)
    >>> svi = ebm.EnergySVI(model, None, optax.adam(0.01), ebm.ScoreMatching())
    >>> fit = svi.run(jax.random.key(3), 50, y, x, progress_bar=False)
    >>> bool(fit.losses[-1] < fit.losses[0])
    True
    """
    base = base_distribution("conditional_energy", base, shape)

    def model(y: Any = None, x: Any = None) -> None:
        if x is None:
            raise ModelError("conditional_energy: the model is called as `model(y, x)`, x given.")
        function = module_site("conditional_energy", "network", network)
        covariates = jnp.reshape(jnp.asarray(x), (len(x), -1))
        with numpyro.plate("data", len(x)):
            y = numpyro.sample("y", base, obs=y)
            entries = jnp.reshape(jnp.asarray(y), (len(x), -1))
            energy("E", jax.vmap(function)(jnp.concatenate([covariates, entries], -1)))

    return model
