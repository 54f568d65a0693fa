# SPDX-License-Identifier: Apache-2.0
r"""Joint energy model (JEM): a classifier whose logits are a density as well.

.. math:: p(v, y; θ) \propto p_0(v) \exp(f_θ(v)_y)

so that :math:`p(y | v)` is exactly the softmax of the logits f(v), and
:math:`p(v) \propto p_0(v) \sum_y \exp(f_θ(v)_y)`. The label is summed out where it is missing.

Reference: Grathwohl, Wang, Jacobsen, Duvenaud, Norouzi, Swersky, *Your classifier is secretly an
energy based model and you should treat it like one*, ICLR 2020.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.language.distributions import Counting
from numpyro_ebm.language.fixed import FIT_TEMPERATURE
from numpyro_ebm.language.primitives import energy
from numpyro_ebm.models.neural_energy import base_distribution, module_site
from numpyro_ebm.types import Model, Params

__all__ = ["jem", "jem_logits"]


def jem(network: Any, shape: int | tuple[int, ...], num_classes: int, *, base: Any = None) -> Model:
    r"""A joint energy model :math:`E(v, y) = -f(v)_y - \log p_0(v)`.

    :param network: an equinox module from a row to ``num_classes`` logits.
    :param shape: event shape of a row.
    :param int num_classes: number of classes.
    :param base: :math:`p_0`, a distribution of this event shape; standard normals if ``None``.
    :return: a NumPyro model ``model(v=None, y=None, known=None, *, num_rows=1)`` with the visible
        sites ``v`` and ``y`` (integers; latent if not given), the energy ``E`` and the parameters
        ``network$params``. ``known``, booleans, says which labels are there.
    :raises ModelError: if ``base`` has another shape; when used, if ``network`` is no module, or
        has another number of outputs.
    :raises ImportError: when used, without the extra ``networks``.

    Train log p(v) by chains beside the cross-entropy of p(y | v), as the example does. Chains of
    one class: ``numpyro.handlers.condition(model, {"y": labels})``.

    Reference: Grathwohl et al. 2020.

    **Example**

    >>> import jax, optax
    >>> from functools import partial
    >>> import numpyro_ebm as ebm
    >>> y = jax.random.bernoulli(jax.random.key(0), 0.5, (200,)).astype(int)
    >>> v = 2.0 * y[:, None] - 1.0 + 0.3 * jax.random.normal(jax.random.key(1), (200, 2))
    >>> network = ebm.models.mlp_network(jax.random.key(2), 2, num_outputs=2, widths=(16,))
    >>> model = ebm.models.jem(network, 2, 2)
    >>> chains = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=0.1), persistent=True)
    >>> objective = chains.on("v") + ebm.PseudoLikelihood().on("y", given="v")
    >>> svi = ebm.EnergySVI(model, None, optax.adam(0.01), objective)
    >>> fit = svi.run(jax.random.key(3), 100, v, y, progress_bar=False)
    >>> logits = ebm.models.jem_logits(network, fit.params, v)
    >>> bool((logits.argmax(-1) == y).mean() > 0.95)
    True
    """
    check_integer("jem", minimum=2, num_classes=num_classes)
    base = base_distribution("jem", base, shape)

    def model(v: Any = None, y: Any = None, known: Any = None, *, num_rows: int = 1) -> None:
        function = module_site("jem", "network", network)
        with numpyro.plate("data", num_rows if v is None else len(v)):
            v = numpyro.sample("v", base, obs=v)
            y = numpyro.sample("y", Counting(num_classes), obs=y, obs_mask=known)
            logits = _logits_of_rows(function, v, num_classes)
            energy("E", -jnp.sum(jax.nn.one_hot(y, num_classes) * logits, -1))

    return model


def jem_logits(network: Any, params: Params, v: Any) -> jax.Array:
    r"""The logits :math:`f(v)` of a :func:`jem`, of shape (rows, classes).

    :math:`\operatorname{softmax} f(v)` is p(y | v), and :math:`\operatorname{logsumexp} f(v) +
    \log p_0(v)` is log p(v) up to log Z, by which unlike rows are found. At a temperature T that
    the fit says (``ContrastiveDivergence(temperature=)``) they are f(v)/T.

    :param network: the module the model was made of.
    :param dict params: its parameters, such as ``fit.params``.
    :param v: rows, of shape (rows, ...).
    :raises ModelError: if the network is no module, or ``params`` lack its parameters.

    **Example**

    >>> import jax, jax.numpy as jnp, numpyro
    >>> import numpyro_ebm as ebm
    >>> network = ebm.models.mlp_network(jax.random.key(0), 2, num_outputs=3)
    >>> model = numpyro.handlers.seed(ebm.models.jem(network, 2, 3), 0)
    >>> trace = numpyro.handlers.trace(model).get_trace(jnp.zeros((5, 2)), jnp.zeros(5, int))
    >>> params = {"network$params": trace["network$params"]["value"]}
    >>> ebm.models.jem_logits(network, params, jnp.zeros((5, 2))).shape
    (5, 3)
    """
    if "network$params" not in params:
        raise ModelError(f"jem_logits: `params` lack 'network$params', got {sorted(params)}.")
    with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
        function = module_site("jem_logits", "network", network)
    return jax.vmap(function)(jnp.asarray(v)) / params.get(FIT_TEMPERATURE, 1.0)


def _logits_of_rows(function, v, num_classes):
    logits = jax.vmap(function)(v)
    if jnp.shape(logits)[1:] != (num_classes,):
        raise ModelError(
            f"jem: the network gives outputs of shape {jnp.shape(logits)[1:]} for {num_classes} "
            f"classes; make it with `num_outputs={num_classes}`."
        )
    return logits
