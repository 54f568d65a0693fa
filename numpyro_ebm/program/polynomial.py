# SPDX-License-Identifier: Apache-2.0
r"""How a function depends on its inputs: polynomial degree and separability, read off its jaxpr.

.. math:: \deg(f + g) \le \max(\deg f, \deg g), \qquad \deg(f g) \le \deg f + \deg g

A log-density of degree 2 is Gaussian, one of degree 1 in binary units makes them independent. Such
a statement has to hold everywhere: no number of evaluations can show it, but the operations of the
function can. Use :func:`structure` where a closed form is only right for polynomials. Unknown
operations count as infinite degree, so that the bounds are conservative.

Reference: an abstract interpretation in the sense of Cousot, Cousot, POPL 1977.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ebm._compat import Literal
from numpyro_ebm.program.jaxprs import CUSTOM_RULES, called, interpret, is_integer, keeps_values

__all__ = ["Structure", "degree", "structure"]

CONSTANT = -1  # the label of an element that reads no input
MAX_LABELS = 10_000_000

LINEAR = set(
    "add add_any broadcast_in_dim concatenate convert_element_type copy copy_p cumsum expand_dims "
    "neg optimization_barrier pad reduce_sum reduce_window_sum reshape rev slice split squeeze "
    "stack sub transpose unstack".split()
)
LINEAR_IN_FIRST = {"div", "dynamic_slice", "gather"}  # the other operands must be constant
BILINEAR = {"conv_general_dilated", "dot_general", "mul"}


class Structure(NamedTuple):
    """What is known of a function of several coordinates.

    - **degree** - upper bound of its polynomial degree, jointly in all of them; may be ``inf``.
    - **separable** - whether it is certainly a sum of functions of one coordinate each, so that its
      Hessian is diagonal.
    - **true_gradient** - whether its derivatives are those of its operations: no custom rule.
    """

    degree: float
    separable: bool
    true_gradient: bool


class _Value(NamedTuple):
    """An array of a jaxpr: ``labels`` say which one coordinate each element reads, if it is one."""

    degree: float = 0
    labels: object = None  # None: an element may read several
    separable: bool = True
    truth: object = None  # of booleans: what they all are at finite inputs


def degree(fn: Callable[..., Any], inputs: Any) -> float:
    r"""Upper bound of the polynomial degree of all outputs of ``fn``, jointly in all inputs.

    .. math:: \deg f \le \texttt{degree(f, x)}

    :param fn: function of one pytree of arrays; it is traced, not run.
    :param inputs: pytree of arrays (or of shapes with dtypes) like its argument.
    :return: an integer, or ``inf`` where the outputs are no polynomials as far as can be told.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.polynomial import degree
    >>> degree(lambda x: jnp.sum(x["a"] ** 2 * x["b"]) + 1, {"a": jnp.ones(3), "b": jnp.ones(3)})
    3
    >>> degree(lambda x: jnp.exp(x), 1.0)
    inf
    """
    return structure(fn, inputs).degree


def structure(fn: Callable[..., Any], inputs: Any) -> Structure:
    r"""Degree and separability of all outputs of ``fn`` in all coordinates of ``inputs``.

    .. math:: f(x) = \sum_j f_j(x_j) \quad \text{if separable}

    :param fn: function of one pytree of arrays; it is traced, not run.
    :param inputs: pytree of arrays (or of shapes with dtypes) like its argument.
    :return: a :class:`Structure`, true at all finite inputs.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.polynomial import structure
    >>> structure(lambda x: jnp.sum((x - 1) ** 2), jnp.ones(3))
    Structure(degree=2, separable=True, true_gradient=True)
    >>> structure(lambda x: jnp.sum(x) ** 2, jnp.ones(3)).separable
    False
    """
    closed = jax.make_jaxpr(fn)(inputs)
    values, start = [], 0
    for var in closed.jaxpr.invars:
        size = math.prod(var.aval.shape)
        labels = np.arange(start, start + size).reshape(var.aval.shape)
        values.append(_Value(1, labels if start + size <= MAX_LABELS else None))
        start += size
    walker = _DegreeWalker()
    outputs = walker.walk(closed, values)
    return Structure(
        max((x.degree for x in outputs), default=0),
        all(x.separable for x in outputs),
        not walker.met_custom_rule,
    )


class _DegreeWalker:
    def __init__(self):
        self.met_custom_rule = False

    def walk(self, closed, values):
        return interpret(closed, self.apply, values, lambda _: _Value())

    def apply(self, eqn, operands):
        """Values of all outputs of one equation."""
        name, inputs = eqn.primitive.name, [x for x in operands if x.degree]
        truth = _truth(eqn, operands)
        if truth is not None or not inputs:
            value = _Value(0 if not inputs else math.inf, None, not inputs, truth)
        elif called(eqn) is not None:
            self.met_custom_rule |= name in CUSTOM_RULES
            return self.walk(called(eqn), operands)
        elif name == "select_n":
            value = _select(eqn, operands)
        elif name in LINEAR and keeps_values(eqn):
            value = _linear(eqn, operands)
        elif name in LINEAR_IN_FIRST:
            is_linear = not any(x.degree for x in operands[1:]) and not (
                name == "div" and is_integer(eqn.outvars[0])
            )
            value = _linear(eqn, operands) if is_linear else _unknown()
        elif name == "triangular_solve" and not operands[0].degree:
            value = _linear(eqn, operands)
        elif name in BILINEAR:
            value = _product(eqn, operands)
        elif name in ("integer_pow", "square", "pow"):
            value = _power(eqn, operands)
        else:
            value = _unknown()
        return [value] * len(eqn.outvars)


def _unknown():
    return _Value(math.inf, None, False)


def _truth(eqn, operands):
    """Comparisons that hold at all finite inputs: NumPyro masks log-densities by `isfinite`."""
    name = eqn.primitive.name
    if name in ("and", "or", "not", "broadcast_in_dim", "reshape", "copy", "reduce_and", "squeeze"):
        truths = [x.truth for x in operands]
        if None in truths or not truths:
            return None
        return not truths[0] if name == "not" else (any if name == "or" else all)(truths)
    if not operands or not 0 < operands[0].degree < math.inf:
        return None
    if name == "is_finite" or (name == "eq" and eqn.invars[0] is eqn.invars[1]):
        return True
    if name == "ne" and isinstance(eqn.invars[1], Literal) and np.all(np.isinf(eqn.invars[1].val)):
        return True
    return None


def _select(eqn, operands):
    which, *cases = operands
    if which.truth is not None:
        return cases[int(which.truth)]
    return _unknown() if which.degree else _linear(eqn, operands[:1] + cases)


def _linear(eqn, operands):
    return _Value(
        max(x.degree for x in operands),
        _moved_labels(eqn, operands),
        all(x.separable for x in operands),
    )


def _product(eqn, operands):
    first, second = operands
    total = first.degree + second.degree
    labels = _moved_labels(eqn, operands)
    if not (first.degree and second.degree):
        return _Value(total, labels, first.separable and second.separable)
    if eqn.primitive.name == "dot_general":
        return _Value(total, None, _is_sum_of_local_products(eqn, operands))
    return _Value(total, labels, labels is not None)


def _power(eqn, operands):
    exponent = eqn.params.get("y", 2)
    if eqn.primitive.name == "pow":
        exponent = getattr(eqn.invars[1], "val", math.nan)
        exponent = float(exponent) if np.ndim(exponent) == 0 else math.nan
    if not 0 <= exponent < math.inf or exponent != int(exponent):
        return _unknown()
    if exponent == 0:
        return _Value()
    total, labels = operands[0].degree * int(exponent), operands[0].labels
    separable = labels is not None or (exponent == 1 and operands[0].separable)
    return _Value(total, labels, separable)


def _labels(value, var):
    if value.degree:
        return value.labels
    return np.broadcast_to(CONSTANT, var.aval.shape)


def _moved_labels(eqn, operands):
    """Labels after an operation that moves elements, or combines them one by one; else None."""
    p, name, shape = eqn.params, eqn.primitive.name, eqn.outvars[0].aval.shape
    labels = [_labels(x, v) for x, v in zip(operands, eqn.invars, strict=True)]
    if any(x is None for x in labels) or math.prod(shape) > MAX_LABELS:
        return None
    x = labels[0]
    if name in ("add", "add_any", "sub", "mul", "div", "select_n"):
        return _agreement(labels, shape)
    if name in ("neg", "copy", "copy_p", "convert_element_type"):
        return x
    if name == "broadcast_in_dim":
        sizes = [1] * len(shape)
        for size, axis in zip(x.shape, p["broadcast_dimensions"], strict=True):
            sizes[axis] = size
        return np.broadcast_to(x.reshape(sizes), shape)
    if name == "transpose":
        return x.transpose(p["permutation"])
    if name == "slice":
        bounds = (p["start_indices"], p["limit_indices"], p["strides"] or (1,) * x.ndim)
        return x[tuple(map(slice, *bounds))]
    if name == "rev":
        return np.flip(x, p["dimensions"])
    if name == "concatenate":
        return np.concatenate(labels, p["dimension"])
    if name == "squeeze" or (name == "reshape" and p.get("dimensions") is None):
        return x.reshape(shape)
    return None


def _agreement(labels, shape):
    """The label that all operands have at an element, constants aside; None if two differ."""
    result = np.broadcast_to(CONSTANT, shape)
    for x in labels:
        if np.any((result != CONSTANT) & (x != CONSTANT) & (result != x)):
            return None
        result = np.where(result == CONSTANT, x, result)
    return result


def _is_sum_of_local_products(eqn, operands):
    """Whether an inner product multiplies every coordinate with itself alone, as in x · x."""
    (contract, batch) = eqn.params["dimension_numbers"]
    aligned = []
    for value, axes, batched in zip(operands, contract, batch, strict=True):
        order = (*batched, *axes)
        if value.labels is None or len(order) != value.labels.ndim:
            return False
        aligned.append(value.labels.transpose(order))
    return _agreement(aligned, aligned[0].shape) is not None
