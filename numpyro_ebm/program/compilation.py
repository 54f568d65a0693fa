# SPDX-License-Identifier: Apache-2.0
"""Functions run as one compiled program, the arrays that they close over among its arguments.

A model closes over its data and, once its parameters are fixed, over these. Under a plain `jax.jit`
they become constants of the program, and the compiler evaluates whatever depends on nothing else:
the energy of a small network at the points of a grid took it ten seconds.

With the arrays outside, a call at other data, parameters or keys is the same program, however often
the functions that it is made of are made anew: the last ones are kept.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from numpyro_ebm._compat import Tracer
from numpyro_ebm.program.on_cpu import as_parts, eval_on_cpu

__all__ = ["compiled", "compiler_options", "constants_as_arguments", "is_traced", "run_compiled"]

COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}
"""On CPU: compiles several times faster than the default level and runs within a tenth of it."""


MOST_KEPT = 64
KEPT: "OrderedDict[Any, Any]" = OrderedDict()
"""The last programs, by all that the compiler is told of them."""


def run_compiled(
    fn: Callable[..., Any],
    *args: Any,
    unless: Any = (),
    options: dict[str, Any] | None = None,
) -> Any:
    """``fn(*args)`` as one program; inside of a function that is being traced, as a part of that.

    :param fn: a function of pytrees of arrays, which may close over others.
    :param args: its arguments.
    :param unless: a pytree of what it closes over, as far as that may be traced.
    :param dict options: what the compiler is told, such as :func:`compiler_options`.
    :return: what ``fn`` returns, a pytree of arrays.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.compilation import run_compiled
    >>> table = jnp.arange(3.0)
    >>> float(run_compiled(lambda x: jnp.sum(table * x), jnp.ones(3)))
    3.0
    """
    if is_traced(args, unless):
        return fn(*args)
    return compiled(fn, *args, options=options)(*args)


def compiled(
    fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """``fn`` as one program for arguments of the shapes and types of these.

    :param fn: a function of pytrees of arrays, which may close over others.
    :param args: its arguments, which nothing traces.
    :param dict options: what the compiler is told.
    :return: a function that does the same. It is traced once, and not compiled again where the
        program was compiled before.
    """
    program, constants = constants_as_arguments(fn, *args)
    jitted = jax.jit(program, compiler_options=options)
    if is_traced(constants):  # by a transformation that compiles nothing
        return partial(jitted, constants)
    executable = _executable(jitted.lower(constants, *args), (constants, args), options)
    return partial(executable, constants)


def _executable(lowered, args, options):
    """The executable; one that was compiled before where the program is the same."""
    text = lowered.as_text()
    if "callback" in text:  # a function of the host, which the text does not tell from others
        return lowered.compile()
    key = (
        hashlib.sha256(text.encode()).digest(),
        lowered.in_tree,
        lowered.out_tree,
        str((lowered.in_avals, lowered.out_info, options)),
        str(getattr(jax.config, "jax_default_device", None)),
        tuple(str(getattr(x, "sharding", None)) for x in jax.tree.leaves(args)),
    )
    executable = KEPT.pop(key, None) or lowered.compile()
    KEPT[key] = executable
    if len(KEPT) > MOST_KEPT:
        KEPT.popitem(last=False)
    return executable


def constants_as_arguments(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list]:
    """``fn`` as a function of the arrays that it closes over, then of its arguments.

    :param fn: a function of pytrees of arrays.
    :param args: its arguments, or their shapes and types.
    :return: the function, and the arrays.
    """
    with as_parts():
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)

    def program(constants, *args):
        leaves = jax.tree.leaves(args)
        leaves = eval_on_cpu(closed.jaxpr, constants, *leaves, in_loop=False)
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return program, closed.consts


def is_traced(*trees: Any) -> bool:
    """Whether a function is being traced, or one of the arrays given is traced."""
    # Inside of a `jit` new arrays are traced, whatever the arguments are.
    return any(isinstance(x, Tracer) for x in jax.tree.leaves((trees, jax.device_put(0))))


def compiler_options(*, convolutions: bool = False) -> dict[str, Any]:
    """What the compiler is told on this backend where a program runs for a while.

    :param bool convolutions: whether it holds convolutions, some of which the compiler writes out.
    """
    return COMPILER_OPTIONS if jax.default_backend() == "cpu" and not convolutions else {}
