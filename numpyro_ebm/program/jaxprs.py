# SPDX-License-Identifier: Apache-2.0
"""Functions rewritten through their jaxprs: jits written out, terms that vanish left out.

What a compiler may not do, because zero times a number is not zero where the number is infinite,
and what a person writing the same function by hand would do without a thought.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import DropVar, Literal

__all__ = [
    "CALLS",
    "CUSTOM_RULES",
    "ELEMENTWISE",
    "JITS",
    "applied",
    "at_zero",
    "constants_of",
    "inner_jaxpr",
    "needed",
    "vanishes",
    "variables",
    "without_repeats",
    "written_out",
]

JITS = ("jit", "pjit")

CUSTOM_RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", *CUSTOM_RULES}
"""Operations that call one function on all of their operands; see :func:`inner_jaxpr`."""

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

VANISH = {
    *("add_any", "broadcast_in_dim", "convert_element_type", "copy", "cumsum", "expand_dims"),
    *("integer_pow", "neg", "reduce_sum", "reshape", "rev", "slice", "square", "squeeze"),
    "transpose",
}
"""Operations of one argument that map zero to zero."""


def at_zero(fn, x):
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
    results = _evaluate_with_zeros(closed.jaxpr, closed.consts, [None] * len(jax.tree.leaves(x)))
    leaves = [_zeros(v) if y is None else y for v, y in zip(closed.jaxpr.outvars, results)]  # noqa: B905
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)


def written_out(fn, *args):
    """The closed jaxpr of ``fn(*args)`` with the functions under `jax.jit` in it written out.

    :param fn: a function of pytrees of arrays.
    :param args: its arguments, or their shapes and types.
    :return: the jaxpr, and the shape of the result.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    flat = jax.make_jaxpr(partial(_evaluate_leaves, closed))(*jax.tree.leaves(args))
    return flat, shape


def constants_of(fn, *args):
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
            found.extend(v.val for v in eqn.invars if isinstance(v, Literal) and v.aval.shape)
            if eqn.primitive.name == "iota":
                found.append(eqn.outvars[0].aval)
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    found.extend(getattr(inner, "consts", ()))
                    visit(getattr(inner, "jaxpr", inner))

    visit(closed.jaxpr)
    return found


def applied(jaxpr, eqn, operands):
    """The results of one operation of a jaxpr, on these operands."""
    pairs = zip(eqn.invars, operands, strict=True)
    given = {v: x for v, x in pairs if not isinstance(v, Literal)}
    one = jaxpr.replace(eqns=[eqn], constvars=(), invars=list(given), outvars=eqn.outvars)
    return jax.core.eval_jaxpr(one, (), *given.values())


def inner_jaxpr(eqn):
    """The jaxpr of a function that an operation calls, or ``None``."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            return getattr(eqn.params[name], "jaxpr", eqn.params[name])
    return None


def needed(jaxpr):
    """The operations of a jaxpr that its results depend on."""
    wanted, eqns = set(variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or wanted & set(eqn.outvars):
            eqns.append(eqn)
            wanted |= set(variables(eqn.invars))
    return eqns[::-1]


def without_repeats(jaxpr):
    """The same jaxpr, with operations that repeat an earlier one on the same operands left out.

    A compiler merges them as well, but not loops, and a draw of random numbers is one on a CPU.
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


def variables(atoms):
    """Those of the atoms that are not literals."""
    return [v for v in atoms if not isinstance(v, Literal)]


def _is_dropped(earlier, later):
    """Whether an operation threw a result away that the later one keeps."""
    return any(isinstance(v, DropVar) for v in earlier) and len(later) > 1


def _signature(eqn):
    """What two equal operations have in common; `None` where that cannot be said."""
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


def _evaluate_leaves(closed, *leaves):
    return _evaluate_with_zeros(closed.jaxpr, closed.consts, leaves)


def _evaluate_with_zeros(jaxpr, consts, args):
    """Evaluate a jaxpr, `None` standing for zeros; jits are written out."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        vanished = [x is None for x in operands]
        if eqn.primitive.name in JITS:
            inner = eqn.params["jaxpr"]
            results = _evaluate_with_zeros(inner.jaxpr, inner.consts, operands)
        elif any(vanished) and vanishes(eqn, vanished):
            results = [None]
        elif any(vanished) and eqn.primitive.name in ("add", "sub"):
            other = operands[0] if vanished[1] else operands[1]
            other = -other if vanished[0] and eqn.primitive.name == "sub" else other
            results = [jnp.broadcast_to(other, eqn.outvars[0].aval.shape)]
        else:
            filled = [_zeros(v) if x is None else x for v, x in zip(eqn.invars, operands)]  # noqa: B905
            results = applied(jaxpr, eqn, filled)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def vanishes(eqn, vanished):
    """Whether the result of an operation is zero, given which of its operands are."""
    name = eqn.primitive.name
    if name in ("mul", "dot_general"):
        return True
    if name in VANISH:
        return all(vanished)
    if name in ("add", "sub"):
        return all(vanished)
    return name == "div" and vanished[0]


def _is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def _zeros(variable):
    return jnp.zeros(variable.aval.shape, variable.aval.dtype)
