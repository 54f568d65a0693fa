# SPDX-License-Identifier: Apache-2.0
r"""Polynomials in indicators written out: which monomials they have, with which coefficients.

.. math:: g(X) = \sum_t a_t \prod_{v \in S_t} X_v, \qquad
    X_v^2 = X_v, \quad X_{ck} X_{cl} = 0 \text{ for } k \neq l

Which products there are follows from the program and its constants; the coefficients may depend on
parameters that are not known yet. What reads one variable, such as the change of one tie in a
network, is then a sum over the few monomials that hold it.

Reference: sums of products of few terms, Boros and Hammer, *Pseudo-Boolean optimization*, Discrete
Applied Mathematics 2002.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.program.constants import evaluate_now, keep_known
from numpyro_ebm.program.jaxprs import applied, called, interpret, moved_operands

__all__ = ["Monomials", "monomials"]

MAX_TERMS = 2_000_000  # that are held together
NONE = -1  # in the place of a variable: there is none
KEPT = {"convert_element_type", "copy", "copy_p", "name", "stop_gradient"}


class Monomials(NamedTuple):
    """Products of variables and their coefficients.

    - **variables** - integers of shape (terms, degree), -1 where a product has fewer.
    - **coefficients** - of shape (terms,).
    """

    variables: np.ndarray
    coefficients: Any


class _NotWrittenOut(Exception):
    """Raised for an operation that is none of a polynomial, and for too many products."""


class _Sums(NamedTuple):
    """An array of sums: which element a product belongs to, in the order of a flat array."""

    shape: tuple[int, ...]
    elements: np.ndarray
    variables: np.ndarray
    coefficients: Any

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=int))


def monomials(fn: Callable[[jax.Array], jax.Array], num: int, width: int = 1) -> Monomials | None:
    """A function of indicators as a sum of products.

    :param fn: maps indicators of shape (num,) to a number. It is traced, not run.
    :param int num: number of variables.
    :param int width: so many that follow each other exclude one another, the states of a
        coordinate; 1 where each variable is a coordinate of two states.
    :return: :class:`Monomials`; ``None`` for what is no polynomial by its operations, or has too
        many products.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.monomials import monomials
    >>> found = monomials(lambda x: 3.0 * x[0] * jnp.sum(x) ** 2, 2)
    >>> found.variables.tolist(), found.coefficients.tolist()
    ([[-1, 0], [0, 1]], [3.0, 9.0])
    """
    closed = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((num,), jnp.result_type(float)))
    each = np.arange(num)
    try:
        (result,) = interpret(
            closed, _Expansion(num, width).apply, [_Sums((num,), each, each[:, None], np.ones(num))]
        )
    except _NotWrittenOut:
        return None
    return Monomials(result.variables, result.coefficients) if isinstance(result, _Sums) else None


class _Expansion:
    """The meaning of operations on sums of products; arrays without variables stay arrays."""

    def __init__(self, num, width):
        self.num, self.width = num, width

    def apply(self, eqn, operands):
        name = eqn.primitive.name
        if not any(isinstance(x, _Sums) for x in operands):
            with keep_known(operands):
                return applied(eqn, operands)
        inner = called(eqn)
        if inner is not None:
            return interpret(inner, self.apply, operands)
        moved = moved_operands(eqn)
        if moved is not None:
            return self._moved(eqn, operands, moved)
        shape = eqn.outvars[0].aval.shape
        if name in KEPT and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return operands
        if name == "neg":
            return [self._scaled(operands[0], -1.0)]
        if name in ("add", "add_any", "sub"):
            first, second = (self._spread(self._lifted(x), shape) for x in operands)
            return [self._merged([first, self._scaled(second, -1.0 if name == "sub" else 1.0)])]
        if name == "mul":
            return [self._times(*(self._spread(self._lifted(x), shape) for x in operands))]
        if name == "div" and not isinstance(operands[1], _Sums):
            inverse = operands[1]
            inverse = 1.0 / (np.asarray(inverse) if not_jax_tracer(inverse) else inverse)
            return [self._times(operands[0], self._spread(self._lifted(inverse), shape))]
        if name in ("integer_pow", "square"):
            return [self._power(operands[0], eqn.params.get("y", 2))]
        if name == "reduce_sum":
            return [self._reduced(operands[0], eqn.params["axes"], shape)]
        if name == "dot_general":
            first, second = map(self._lifted, operands)
            return [self._contracted(first, second, eqn, shape)]
        raise _NotWrittenOut

    def _lifted(self, x):
        """An array as sums; zeros that are known are left out."""
        if isinstance(x, _Sums):
            return x
        elements = np.arange(np.size(x))
        if not_jax_tracer(x):
            flat = np.asarray(x).astype(float).ravel()
            elements = np.flatnonzero(flat)
            flat = flat[elements]
        else:
            flat = jnp.ravel(x)
        return _Sums(np.shape(x), elements, np.zeros((len(elements), 0), int), flat)

    def _spread(self, x, shape):
        """A scalar beside an array."""
        if x.shape == shape:
            return x
        return self._taken(x, np.broadcast_to(np.arange(x.size).reshape(x.shape), shape))

    def _scaled(self, x, factor):
        return x if factor == 1.0 else x._replace(coefficients=x.coefficients * factor)

    def _taken(self, x, source):
        """Elements of an array, by their numbers; what has none is a zero."""
        at, terms = _pairs(np.ravel(source), x.elements)
        return _Sums(np.shape(source), at, x.variables[terms], x.coefficients[terms])

    def _moved(self, eqn, operands, moved):
        """Operations that move elements are run on their numbers."""
        if any(isinstance(x, _Sums) for i, x in enumerate(operands) if i not in moved):
            raise _NotWrittenOut
        if not all(not_jax_tracer(x) for i, x in enumerate(operands) if i not in moved):
            raise _NotWrittenOut
        arguments, own, start = list(operands), [], 1
        for i in moved:
            x = self._lifted(operands[i])
            arguments[i] = np.arange(start, start + x.size, dtype=np.int32).reshape(x.shape)
            own.append(x._replace(shape=(1,), elements=x.elements + start))
            start += x.size
        both = self._joined(own, (start,))
        return [self._taken(both, np.maximum(x, 0)) for x in evaluate_now(eqn, arguments)]

    def _joined(self, sums, shape):
        degree = max(x.variables.shape[1] for x in sums)
        variables = [
            np.pad(x.variables, ((0, 0), (degree - x.variables.shape[1], 0)), constant_values=NONE)
            for x in sums
        ]
        return _Sums(
            shape,
            np.concatenate([x.elements for x in sums]),
            np.concatenate(variables),
            _concatenated([x.coefficients for x in sums]),
        )

    def _merged(self, sums):
        """The sum of several arrays, each product once."""
        x = self._joined(sums, sums[0].shape)
        if len(x.elements) > MAX_TERMS or x.size * (self.num + 1.0) ** x.variables.shape[1] > 2e18:
            raise _NotWrittenOut
        key = x.elements.astype(np.int64)
        for own in x.variables.T:
            key = key * (self.num + 1) + own + 1
        found, first, place = np.unique(key, return_index=True, return_inverse=True)
        coefficients = x.coefficients
        if not not_jax_tracer(coefficients):
            if len(found) == len(key):
                return x
            zeros = jnp.zeros(len(found), coefficients.dtype)
            coefficients = zeros.at[place].add(coefficients)
            return _Sums(x.shape, x.elements[first], x.variables[first], coefficients)
        coefficients = np.bincount(place, coefficients, len(found))
        first, coefficients = first[coefficients != 0], coefficients[coefficients != 0]
        return _Sums(x.shape, x.elements[first], x.variables[first], coefficients)

    def _times(self, x, y):
        left, right = _pairs(x.elements, y.elements)
        return self._product(x, y, left, right, x.elements[left], x.shape)

    def _power(self, x, power):
        if power < 1:
            raise _NotWrittenOut
        result = x
        for _ in range(power - 1):
            result = self._times(result, x)
        return result

    def _product(self, x, y, left, right, elements, shape):
        """The products of pairs of terms, each of which belongs to an element."""
        both = np.sort(np.concatenate([x.variables[left], y.variables[right]], 1), 1)
        again = np.zeros(both.shape, bool)
        again[:, 1:] = (both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)
        both = np.sort(np.where(again, NONE, both), 1)
        apart = (both[:, 1:] // self.width != both[:, :-1] // self.width) | (both[:, :-1] < 0)
        kept = np.flatnonzero(np.all(apart, 1))
        both, left, right = both[kept], left[kept], right[kept]
        while both.shape[1] and np.all(both[:, 0] == NONE):
            both = both[:, 1:]
        coefficients = x.coefficients[left] * y.coefficients[right]
        return self._merged([_Sums(shape, elements[kept], both, coefficients)])

    def _reduced(self, x, axes, shape):
        index = np.unravel_index(x.elements, x.shape)
        kept = [i for i in range(len(x.shape)) if i not in axes]
        return self._merged([x._replace(shape=shape, elements=_number(index, kept, x.shape))])

    def _contracted(self, x, y, eqn, shape):
        contracted, batch = eqn.params["dimension_numbers"]
        indices = [np.unravel_index(a.elements, a.shape) for a in (x, y)]
        keys, rest, sizes = [], [], []
        for a, index, own, same in zip((x, y), indices, contracted, batch, strict=True):
            keys.append(_number(index, [*same, *own], a.shape))
            free = [i for i in range(len(a.shape)) if i not in (*own, *same)]
            rest.append(_number(index, free, a.shape))
            sizes.append(int(np.prod([a.shape[i] for i in free], dtype=int)))
        left, right = _pairs(*keys)
        first = _number(indices[0], batch[0], x.shape)[left]
        elements = (first * sizes[0] + rest[0][left]) * sizes[1] + rest[1][right]
        return self._product(x, y, left, right, elements, shape)


def _number(index, axes, shape):
    """The flat numbers of the indices along some axes, in this order."""
    number = np.zeros(len(index[0]) if index else 1, int)
    for i in axes:
        number = number * shape[i] + index[i]
    return number


def _pairs(first, second):
    """Places in two arrays of integers at which they are equal."""
    order = np.argsort(second, kind="stable")
    ordered = second[order]
    start, end = np.searchsorted(ordered, first), np.searchsorted(ordered, first, "right")
    counts = end - start
    if counts.sum() > MAX_TERMS:
        raise _NotWrittenOut
    left = np.repeat(np.arange(len(first)), counts)
    offset = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
    return left, order[np.repeat(start, counts) + offset]


def _concatenated(coefficients):
    if all(map(not_jax_tracer, coefficients)):
        return np.concatenate(coefficients)
    return jnp.concatenate([jnp.asarray(x) for x in coefficients])
