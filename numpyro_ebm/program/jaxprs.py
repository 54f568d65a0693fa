# SPDX-License-Identifier: Apache-2.0
"""Jaxprs read and rewritten: an interpreter for analyses, jits written out, zero terms left out.

:func:`at_zero` leaves out products with zero. A compiler may not, because zero times infinity is
not zero.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import ClosedJaxpr, Literal, is_dropped

__all__ = [
    "CALLS",
    "CUSTOM_RULES",
    "ELEMENTWISE",
    "JITS",
    "LOOPS",
    "applied",
    "at_zero",
    "called",
    "constants_of",
    "inner_jaxprs",
    "interpret",
    "is_integer",
    "is_jaxpr",
    "keeps_values",
    "moved_operands",
    "needed",
    "num_operations",
    "renamed",
    "scan_parts",
    "vanishes",
    "variables",
    "without_repeats",
    "written_out",
]

JITS, LOOPS = ("jit", "pjit"), ("scan", "while")

CUSTOM_RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", *CUSTOM_RULES}
"""Operations that call one function on all of their operands; see :func:`called`."""

ELEMENTWISE = set(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv "
    "erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le "
    "lgamma log log1p log2 logistic lt max min mul mulhi ne neg nextafter not one_minus_square or "
    "polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round "
    "rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt "
    "square stop_gradient sub tan tanh xor zeta".split()
)
"""Operations on arrays of one shape, or scalars, element by element."""

MOVES = set(
    "broadcast_in_dim concatenate copy copy_p expand_dims pad reshape rev slice split squeeze "
    "stack transpose unstack".split()
)
MOVES_BY = {
    "dynamic_slice": (0,),
    "gather": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter": (0, 2),
}
"""Operands that are moved; the others say where to."""

VANISH = {
    *("add_any", "broadcast_in_dim", "convert_element_type", "copy", "cumsum", "expand_dims"),
    *("integer_pow", "neg", "reduce_sum", "reshape", "rev", "slice", "square", "squeeze"),
    "transpose",
}
"""Operations of one argument that map zero to zero."""


def at_zero(fn: Callable[..., Any], x: Any) -> Any:
    """``fn`` at zeros, without the operations that zeros make vanish.

    Products with a zero count as zero, even where the other factor is not finite.

    :param fn: a function of a pytree of floating point arrays.
    :param x: a pytree like its argument; only shapes and types matter.
    :return: the value.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.jaxprs import at_zero
    >>> float(at_zero(lambda h: 3.0 + h @ jnp.ones(4), jnp.ones(4)))
    3.0
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(x)
    results = _evaluate_with_zeros(closed, [None] * len(jax.tree.leaves(x)))
    leaves = [_zeros(v) if y is None else y for v, y in zip(closed.jaxpr.outvars, results)]  # noqa: B905
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)


def written_out(fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The closed jaxpr of ``fn(*args)`` with the functions under `jax.jit` in it written out.

    :param fn: a function of pytrees of arrays.
    :param args: its arguments, or their shapes and types.
    :return: the jaxpr, and the shape of the result.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    flat = jax.make_jaxpr(lambda *leaves: _evaluate_with_zeros(closed, leaves))(
        *jax.tree.leaves(args)
    )
    return flat, shape


def constants_of(fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Arrays that ``fn`` reads besides its arguments: closed over, written down, or counted up.

    :param fn: a function of pytrees of arrays.
    :param args: its arguments, or their shapes and types.
    :return: list of arrays, or of shapes of those that the function itself makes.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.jaxprs import constants_of
    >>> [x.shape for x in constants_of(lambda x: x + jnp.arange(3), jnp.ones(3))]
    [(3,)]
    """
    closed = jax.make_jaxpr(fn)(*args)
    found = list(closed.consts)

    def visit(jaxpr):
        for eqn in needed(jaxpr):
            found.extend(v.val for v in eqn.invars if isinstance(v, Literal) and np.ndim(v.val))
            if eqn.primitive.name == "iota":
                found.append(eqn.outvars[0].aval)
            for inner in filter(is_jaxpr, _parameters(eqn)):
                found.extend(getattr(inner, "consts", ()))
                visit(getattr(inner, "jaxpr", inner))

    visit(closed.jaxpr)
    return found


def applied(eqn: Any, operands: Sequence[Any], **changes: Any) -> list[Any]:
    """The results of one operation of a jaxpr, on these operands.

    :param changes: parameters of the operation with other values.
    """
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*operands, **params)
    return results if eqn.primitive.multiple_results else [results]


def scan_parts(eqn: Any) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried from step to step."""
    # Slices have an axis less inside; versions of JAX differ in how they count them otherwise.
    arguments = zip(eqn.invars, eqn.params["jaxpr"].jaxpr.invars, strict=True)
    results = zip(eqn.outvars, eqn.params["jaxpr"].jaxpr.outvars, strict=True)
    num_xs = sum(v.aval.ndim > u.aval.ndim for v, u in arguments)
    num_carry = sum(v.aval.ndim == u.aval.ndim for v, u in results)
    return len(eqn.invars) - num_xs - num_carry, num_carry


def called(eqn: Any) -> Any:
    """The closed jaxpr of the function that an operation calls on all its operands, or ``None``."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr") if eqn.primitive.name in CALLS else ()
    for inner in (eqn.params[name] for name in names if name in eqn.params):
        closed = inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ())
        return closed if len(closed.jaxpr.invars) == len(eqn.invars) else None
    return None


def interpret(
    closed: Any,
    apply: Callable[..., Any],
    arguments: Sequence[Any],
    constant: Callable[[Any], Any] = lambda x: x,
) -> list[Any]:
    """Evaluate a jaxpr with another meaning of its values and operations.

    :param closed: a closed jaxpr.
    :param apply: ``(eqn, operands) -> results``, the meaning of one operation.
    :param arguments: the values of its arguments.
    :param constant: maps an array that the jaxpr holds to the value that stands for it.
    :return: list of the values of its results.
    """
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.invars, arguments, strict=True))
    values.update(zip(jaxpr.constvars, map(constant, closed.consts), strict=True))

    def read(atom):
        return constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for eqn in needed(jaxpr):
        results = apply(eqn, [read(v) for v in eqn.invars])
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def needed(jaxpr: Any) -> list[Any]:
    """The operations of a jaxpr that its results depend on."""
    wanted, eqns = set(variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or wanted & set(eqn.outvars):
            eqns.append(eqn)
            wanted |= set(variables(eqn.invars))
    return eqns[::-1]


def moved_operands(eqn: Any) -> Sequence[int] | None:
    """The operands of which an operation moves elements, as the others say; ``None`` for others."""
    name, number = eqn.primitive.name, len(eqn.invars)
    if name in MOVES or name == "select_n":
        return range(int(name == "select_n"), number)
    return MOVES_BY.get(name)


def num_operations(closed: Any) -> int:
    """About how many numbers a program computes, those that a product of matrices adds up too."""
    total = 0
    for eqn in needed(closed.jaxpr):
        inner = called(eqn)
        if inner is not None:
            total += num_operations(inner)
            continue
        number = sum(math.prod(v.aval.shape) for v in eqn.outvars)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            number *= math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        total += number
    return total


def renamed(jaxpr: Any, same: dict[Any, Any]) -> Any:
    """The same jaxpr with variables replaced by others, or by literals.

    :param dict same: what stands for a variable, which may be replaced itself.
    """

    def named(atom):
        while not isinstance(atom, Literal) and atom in same:
            atom = same[atom]
        return atom

    eqns = [eqn.replace(invars=[named(v) for v in eqn.invars]) for eqn in jaxpr.eqns]
    return jaxpr.replace(eqns=eqns, outvars=[named(v) for v in jaxpr.outvars])


def without_repeats(jaxpr: Any) -> Any:
    """The same jaxpr without operations that repeat an earlier one on the same operands.

    A compiler merges them as well, except for loops; on a CPU a draw of random numbers is a loop.
    """
    first, same, eqns = {}, {}, []

    def named(atom):
        return atom if isinstance(atom, Literal) else same.get(atom, atom)

    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=[named(v) for v in eqn.invars])
        signature = _signature(eqn)
        if signature is None or _is_dropped(first.get(signature, ()), eqn.outvars):
            eqns.append(eqn)
        elif signature in first:
            same.update(zip(eqn.outvars, first[signature], strict=True))
        else:
            first[signature] = eqn.outvars
            eqns.append(eqn)
    return jaxpr.replace(eqns=eqns, outvars=[named(v) for v in jaxpr.outvars])


def variables(atoms: Any) -> list[Any]:
    """Those of the atoms that are not literals."""
    return [v for v in atoms if not isinstance(v, Literal)]


def _is_dropped(earlier, later):
    """Whether the earlier of two equal operations drops a result that the later one keeps."""
    return any(map(is_dropped, earlier)) and len(later) > 1


def _signature(eqn):
    """A key that is the same for equal operations; `None` where it cannot be made."""
    if eqn.effects:
        return None
    operands = tuple(
        (v.aval, np.asarray(v.val).tobytes()) if isinstance(v, Literal) else v for v in eqn.invars
    )
    signature = eqn.primitive, operands, tuple(sorted(eqn.params.items()))
    try:
        hash(signature)
    except TypeError:
        return None
    return signature


def _evaluate_with_zeros(closed, args):
    """Evaluate a jaxpr, `None` standing for zeros; jits are written out."""

    def apply(eqn, operands):
        name, vanished = eqn.primitive.name, [x is None for x in operands]
        if name in JITS:
            return _evaluate_with_zeros(eqn.params["jaxpr"], operands)
        if any(vanished) and vanishes(eqn, vanished):
            return [None]
        if any(vanished) and name in ("add", "sub"):
            other = operands[0] if vanished[1] else operands[1]
            other = -other if vanished[0] and name == "sub" else other
            return [jnp.broadcast_to(other, eqn.outvars[0].aval.shape)]
        pairs = zip(eqn.invars, operands, strict=True)
        return applied(eqn, [_zeros(v) if x is None else x for v, x in pairs])

    return interpret(closed, apply, args)


def vanishes(eqn: Any, vanished: Sequence[bool]) -> bool:
    """Whether the result of an operation is zero, given which of its operands are."""
    name = eqn.primitive.name
    if name in ("mul", "dot_general"):
        return True
    if name in VANISH:
        return all(vanished)
    if name in ("add", "sub"):
        return all(vanished)
    return name == "div" and vanished[0]


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs that an operation has among its parameters, branches and bodies of loops."""
    return [getattr(x, "jaxpr", x) for x in _parameters(eqn) if is_jaxpr(x)]


def _parameters(eqn):
    return jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)


def is_jaxpr(x: Any) -> bool:
    """Whether something is a jaxpr, closed or not."""
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def _zeros(variable):
    return jnp.zeros(variable.aval.shape, variable.aval.dtype)


def is_integer(variable: Any) -> bool:
    """Whether a variable holds integers or booleans."""
    return not jnp.issubdtype(variable.aval.dtype, jnp.inexact)


def keeps_values(eqn: Any) -> bool:
    """Whether a linear operation is one in its number type: no rounding, no wrapping around."""
    dtype = eqn.outvars[0].aval.dtype
    if eqn.primitive.name == "convert_element_type":
        before = eqn.invars[0].aval.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            return not jnp.issubdtype(before, jnp.complexfloating)
        return is_integer(eqn.invars[0]) and dtype.kind != "b" and np.can_cast(before, dtype)
    if eqn.primitive.name in ("neg", "sub"):
        return not jnp.issubdtype(dtype, jnp.unsignedinteger)
    return True
