# SPDX-License-Identifier: Apache-2.0
"""Convolutions in compiled loops on a CPU, with their axes in the order that is fast there.

XLA hands a convolution to a library if batch, space and channels come in this order, and brings
others into it; but of those in the body of a loop it makes loops of its own, several times slower.
Those of the derivatives of a network are always others, and all that trains or draws is a loop. So
they are put in order here: the same convolutions between transposes, as a program without a loop
has them. The program is rewritten after it was differentiated, with all loops inside of it.
"""

import logging
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_ebm._compat import ClosedJaxpr, eval_jaxpr
from numpyro_ebm.program.jaxprs import applied, inner_jaxprs, interpret, is_jaxpr

__all__ = ["eval_with_convolutions", "has_convolutions"]

logger = logging.getLogger(__name__)

CONVOLUTION, LOOPS = "conv_general_dilated", ("scan", "while")
FAST_TYPES = ("float16", "float32")


def has_convolutions(jaxpr: Any) -> bool:
    """Whether an operation of a jaxpr, or of one inside of it, is a convolution."""
    return any(
        eqn.primitive.name == CONVOLUTION or any(map(has_convolutions, inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def eval_with_convolutions(jaxpr: Any, consts: Any, *args: Any, in_loop: bool) -> list[Any]:
    """The results of a jaxpr; on a CPU the convolutions in its loops are put in order.

    :param jaxpr: a jaxpr.
    :param consts: the values of its constants.
    :param args: the values of its arguments.
    :param bool in_loop: whether it is the body of a loop itself.
    """
    if jax.default_backend() != "cpu" or not _num_slow(jaxpr, in_loop):
        return eval_jaxpr(jaxpr, consts, *args)
    _tell()
    return _eval_in_order(ClosedJaxpr(jaxpr, consts), args, in_loop)


@cache
def _tell():
    """Say it, once."""
    logger.info("The convolutions in loops have their axes put in order for this CPU.")


def _num_slow(jaxpr, in_loop):
    """How many convolutions are to be put in order."""
    total = 0
    for eqn in jaxpr.eqns:
        inside = in_loop or eqn.primitive.name in LOOPS
        total += (in_loop and _is_slow(eqn)) + sum(_num_slow(x, inside) for x in inner_jaxprs(eqn))
    return total


def _is_slow(eqn):
    if eqn.primitive.name != CONVOLUTION or eqn.params["batch_group_count"] != 1:
        return False
    types = {str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)}
    numbers = eqn.params["dimension_numbers"]
    return types <= {*FAST_TYPES} and numbers != _in_order(len(numbers.lhs_spec) - 2)


def _in_order(num_space):
    """Dimension numbers: batch, space, channels; of the kernel space, channels in, out."""
    space = range(1, num_space + 1)
    outside = 0, num_space + 1, *space
    kernel = num_space + 1, num_space, *range(num_space)
    return lax.ConvDimensionNumbers(outside, kernel, outside)


def _eval_in_order(closed, args, in_loop):
    def apply(eqn, operands):
        if in_loop and _is_slow(eqn):
            return [_put_in_order(eqn, *operands)]
        inside = in_loop or eqn.primitive.name in LOOPS
        if not any(_num_slow(x, inside) for x in inner_jaxprs(eqn)):
            return applied(eqn, operands)
        changed = jax.tree.map(lambda x: _rewritten(x, inside), eqn.params, is_leaf=is_jaxpr)
        return applied(eqn, operands, **changed)

    return interpret(closed, apply, args)


def _rewritten(x, in_loop):
    """A parameter of an operation: if it is a jaxpr, closed or not, with convolutions in order."""
    if not is_jaxpr(x) or not _num_slow(getattr(x, "jaxpr", x), in_loop):
        return x
    closed = x if hasattr(x, "consts") else ClosedJaxpr(x, ())
    shapes = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
        for v in closed.jaxpr.invars
    ]
    new = jax.make_jaxpr(lambda *args: _eval_in_order(closed, args, in_loop))(*shapes)
    return new if x is closed else new.jaxpr


def _put_in_order(eqn, lhs, rhs):
    """The same convolution, between transposes."""
    numbers = eqn.params["dimension_numbers"]
    (batch, channels, *space), (of, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    lhs = jnp.transpose(lhs, (batch, *space, channels))
    rhs = jnp.transpose(rhs, (*window, into, of))
    (found,) = applied(eqn, (lhs, rhs), dimension_numbers=_in_order(len(space)))
    batch, channels, *space = numbers.out_spec
    order = batch, *space, channels
    return jnp.transpose(found, [order.index(d) for d in range(len(order))])
