# SPDX-License-Identifier: Apache-2.0
"""Programs as they are fast on a CPU, rewritten where JAX's way to write them is slow there.

Keys are split in one loop (:mod:`~numpyro_ebm.program.key_trees`), random numbers hashed without
one (:mod:`~numpyro_ebm.program.random_numbers`), and the
convolutions in loops have their axes put in order (:mod:`~numpyro_ebm.program.convolutions`). A
program is rewritten after it was differentiated, with all loops, branches and functions inside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

from numpyro_ebm._compat import ClosedJaxpr, eval_jaxpr
from numpyro_ebm.program.convolutions import is_slow, put_in_order
from numpyro_ebm.program.jaxprs import CALLS, LOOPS, applied, inner_jaxprs, interpret, is_jaxpr
from numpyro_ebm.program.key_trees import with_keys_first
from numpyro_ebm.program.random_numbers import is_rolled, unrolled

__all__ = ["as_parts", "eval_on_cpu"]

INSIDE = {"cond", *LOOPS, *CALLS}
"""Operations whose jaxprs are rewritten; those of others may not be programs of their own."""

ARE_PARTS = ContextVar("ARE_PARTS", default=False)


@contextmanager
def as_parts() -> Iterator[None]:
    """Programs traced inside are parts of one that is rewritten as a whole, later."""
    before = ARE_PARTS.set(True)
    try:
        yield
    finally:
        ARE_PARTS.reset(before)


def eval_on_cpu(jaxpr: Any, consts: Any, *args: Any, in_loop: bool) -> list[Any]:
    """The results of a jaxpr; on a CPU what is slow there is rewritten.

    :param jaxpr: a jaxpr.
    :param consts: the values of its constants.
    :param args: the values of its arguments.
    :param bool in_loop: whether it is the body of a loop itself.
    """
    if jax.default_backend() != "cpu" or ARE_PARTS.get() or not _changes(jaxpr, in_loop):
        return eval_jaxpr(jaxpr, consts, *args)
    return _rewritten(*with_keys_first(ClosedJaxpr(jaxpr, consts), args), in_loop)


def _changes(jaxpr, in_loop):
    """Whether something in a jaxpr is to be rewritten."""
    return any(
        is_rolled(eqn)
        or (in_loop and is_slow(eqn))
        or any(_changes(x, in_loop or eqn.primitive.name in LOOPS) for x in _inside(eqn))
        for eqn in jaxpr.eqns
    )


def _inside(eqn):
    return inner_jaxprs(eqn) if eqn.primitive.name in INSIDE else []


def _rewritten(closed, args, in_loop):
    def apply(eqn, operands):
        if is_rolled(eqn):
            return unrolled(eqn, *operands)
        if in_loop and is_slow(eqn):
            return [put_in_order(eqn, *operands)]
        inside = in_loop or eqn.primitive.name in LOOPS
        if not any(_changes(x, inside) for x in _inside(eqn)):
            return applied(eqn, operands)
        changed = jax.tree.map(lambda x: _parameter(x, inside), eqn.params, is_leaf=is_jaxpr)
        return applied(eqn, operands, **changed)

    return interpret(closed, apply, args)


def _parameter(x, in_loop):
    """A parameter of an operation; if it is a jaxpr, closed or not, then rewritten."""
    if not is_jaxpr(x) or not _changes(getattr(x, "jaxpr", x), in_loop):
        return x
    closed = x if hasattr(x, "consts") else ClosedJaxpr(x, ())
    shapes = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
        for v in closed.jaxpr.invars
    ]
    new = jax.make_jaxpr(lambda *args: _rewritten(closed, args, in_loop))(*shapes)
    return new if x is closed else new.jaxpr
