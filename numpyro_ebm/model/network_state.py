# SPDX-License-Identifier: Apache-2.0
"""The state of a network (batch statistics, spectral norm, dropout) in a model: it is held.

An energy is a function of its row and of the parameters, so that nothing that a network changes
when it is called may last. Its state stays as the network was made; random keys in it, of dropout,
are drawn anew with the model's own, once a round. Batch statistics of the batch in hand couple its
rows, and are refused as such.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from numpyro_ebm.errors import ModelError

__all__ = ["held_state"]


def held_state(msg: dict[str, Any]) -> Any:
    """The value of a `mutable` site.

    :param dict msg: its message, on the way back.
    :raises ModelError: if the state is not known.
    """
    given, (made, *_) = msg["value"], msg["args"]
    if given is None:
        raise ModelError(
            f"The state '{msg['name']}' of a network is asked for without a start: `flax_module("
            "..., mutable=...)` makes it only where it makes the parameters. Declare the network "
            "by `nnx_module`; or hold the state yourself, in a module that closes over it."
        )
    if given is not made:  # by who goes on from a trace, with the keys of that one
        return given
    return jax.tree.map(_with_new_keys, made)


def _with_new_keys(x):
    if not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        return x
    rng_key: Any = numpyro.prng_key()
    return jnp.reshape(jax.random.split(rng_key, math.prod(jnp.shape(x))), jnp.shape(x))
