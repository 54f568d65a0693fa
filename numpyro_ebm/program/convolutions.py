# SPDX-License-Identifier: Apache-2.0
"""Convolutions in compiled loops on a CPU, with their axes in the order that is fast there.

XLA hands a convolution to a library if batch, space and channels come in this order, and brings
others into it; but of those in the body of a loop it makes loops of its own, several times slower.
Those of the derivatives of a network are always others, and all that trains or draws is a loop. So
they are put in order here: the same convolutions between transposes, as a program without a loop
has them. See :mod:`~numpyro_ebm.program.on_cpu`.
"""

import logging
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm.program.jaxprs import applied, inner_jaxprs

__all__ = ["has_convolutions", "is_slow", "put_in_order"]

logger = logging.getLogger(__name__)

CONVOLUTION = "conv_general_dilated"
FAST_TYPES = ("float16", "float32")


def has_convolutions(jaxpr: Any) -> bool:
    """Whether an operation of a jaxpr, or of one inside of it, is a convolution."""
    return any(
        eqn.primitive.name == CONVOLUTION or any(map(has_convolutions, inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def is_slow(eqn: Any) -> bool:
    """Whether an operation is a convolution that loops of a CPU are slow at."""
    if eqn.primitive.name != CONVOLUTION or eqn.params["batch_group_count"] != 1:
        return False
    types = {str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)}
    numbers = eqn.params["dimension_numbers"]
    return types <= {*FAST_TYPES} and numbers != _in_order(len(numbers.lhs_spec) - 2)


@cache
def _tell():
    """Say it, once."""
    logger.info("The convolutions in loops have their axes put in order for this CPU.")


def _in_order(num_space):
    """Dimension numbers: batch, space, channels; of the kernel space, channels in, out."""
    space = range(1, num_space + 1)
    outside = 0, num_space + 1, *space
    kernel = num_space + 1, num_space, *range(num_space)
    return lax.ConvDimensionNumbers(outside, kernel, outside)


def put_in_order(eqn: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The same convolution, between transposes."""
    _tell()
    numbers = eqn.params["dimension_numbers"]
    (batch, channels, *space), (of, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    lhs = jnp.transpose(lhs, (batch, *space, channels))
    rhs = jnp.transpose(rhs, (*window, into, of))
    (found,) = applied(eqn, (lhs, rhs), dimension_numbers=_in_order(len(space)))
    batch, channels, *space = numbers.out_spec
    order = batch, *space, channels
    return jnp.transpose(found, [order.index(d) for d in range(len(order))])
