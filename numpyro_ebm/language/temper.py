# SPDX-License-Identifier: Apache-2.0
"""The handler that multiplies the energies of a model by an inverse temperature."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.primitives import Messenger

from numpyro_ebm.errors import ModelError, check_not_negative
from numpyro_ebm.language.questions import INVERSE_TEMPERATURE
from numpyro_ebm.signatures import checked

__all__ = ["multiply_temperature", "temper"]


class temper(Messenger):
    r"""Multiply the energies of a model by an inverse temperature.

    .. math:: p_β(v, h; θ) \propto b(v)\, b(h)\, e^{-β E(v, h; θ)}

    At β = 1 it is the model, at β = 0 its base measure b, and above 1 the model sharpened around
    its modes. It is the path of replica exchange, of annealed importance sampling and of tempered
    sequential Monte Carlo. The normalizer changes with β: hold the parameters with
    :class:`~numpyro_ebm.fixed`, inside or outside. Tempered twice, the factors multiply.

    :param model: a NumPyro model with energy statements.
    :param inverse_temperature: β, a non-negative scalar.
    :return: a NumPyro model with the same arguments.
    :raises ModelError: if β is negative, not finite, or not a scalar.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data=None):
    ...     with numpyro.plate("data", 1):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * v**2)
    >>> hot = ebm.temper(ebm.fixed(gaussian, {}), 0.25)
    >>> float(numpyro.infer.util.log_density(hot, (jnp.array([2.0]),), {}, {})[0])
    -0.5
    """

    @checked
    def __init__(self, fn: Callable[..., Any] | None = None, inverse_temperature: ArrayLike = 1.0):
        if jnp.ndim(inverse_temperature) > 0:
            raise ModelError(
                "`temper`: `inverse_temperature` must be a scalar, got an array of shape "
                f"{jnp.shape(inverse_temperature)}."
            )
        beta: Any = inverse_temperature
        check_not_negative("temper", inverse_temperature=beta)
        self.inverse_temperature = inverse_temperature
        super().__init__(fn)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == INVERSE_TEMPERATURE:
            multiply_temperature(msg, self.inverse_temperature)


def multiply_temperature(msg: dict[str, Any], inverse_temperature: ArrayLike) -> None:
    """Answer an energy that asks for its factor with one more."""
    before = 1.0 if msg["value"] is None else msg["value"]
    msg["value"] = before * inverse_temperature
