# SPDX-License-Identifier: Apache-2.0
r"""Arrays of a program over finite states: tables over the coordinates that their elements read.

.. math:: a_e(x) = T_e[x_{c(e)}] \quad \text{or} \quad a_e(x) = T_e[x_{c(e)}, x_{d(e)}]

An element that reads one coordinate is a table over its states, whatever operations made it. In the
indicators :math:`X_{ck} = [x_c = k]` it is linear, :math:`\sum_k X_{ck} T_e[k]`, and an element
that reads two coordinates is bilinear. :mod:`~numpyro_ebm.program.multi_affine` puts real numbers
in the places of the indicators.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.program.constants import keep_known
from numpyro_ebm.program.jaxprs import applied

__all__ = [
    "FREE",
    "NOT_KNOWN",
    "NotMultiAffine",
    "Relaxation",
    "StateArray",
    "Unknown",
    "as_floats",
    "constant",
    "evaluate_states",
    "evaluate_floats",
    "merged_slots",
    "tabulated",
]

NOT_KNOWN = "made of integers or comparisons that have no values yet"
FREE = -1  # the label of an element that reads no coordinate


class NotMultiAffine(Exception):
    """Raised for an operation after which the indicators may not enter linearly one by one.

    Its message, where it has one, says why; else whoever walks through the program adds the
    operation.
    """


class Unknown(NamedTuple):
    """Integers or booleans that may have any values, as a group of a row has, or a mask."""

    shape: tuple[int, ...]


class StateArray:
    """An array of the program, as a function of states or of relaxed indicators.

    :param labels: which coordinate each element reads, integers of shape (slots, ...) with a slot
        for each of at most two; ``None`` where an element may read more.
    :param table: returns its values, of shape (states,) * slots + (...).
    :param relaxed: returns its values at the relaxed indicators, as floats.
    :param degree: a bound of the polynomial degree in the indicators.
    """

    def __init__(
        self,
        labels: np.ndarray | None,
        table: Callable[[], Any] | None,
        relaxed: Callable[[], Any],
        degree: int,
    ):
        self.labels, self.degree = labels, degree
        self._table, self._relaxed, self._values = table, relaxed, {}

    @property
    def is_constant(self) -> bool:
        """Whether it reads no coordinate."""
        return self.labels is not None and len(self.labels) == 0

    @property
    def is_unknown(self) -> bool:
        """Whether nothing is known of its values."""
        return self.is_constant and isinstance(self.table(), Unknown)

    def table(self) -> Any:
        """Its values at all states of the coordinates that an element reads."""
        if self._table is None:
            raise NotMultiAffine("an element reads more than two coordinates")
        return self._once("table", self._table)

    def relaxed(self) -> Any:
        """Its values at the relaxed indicators."""
        return self._once("relaxed", self._relaxed)

    def _once(self, name, compute):
        if name not in self._values:
            self._values[name] = compute()
        return self._values[name]


def constant(value: Any) -> StateArray:
    """An array that reads no coordinate."""
    shape = value.shape if isinstance(value, Unknown) else np.shape(value)
    labels = np.zeros((0, *shape), np.int32)
    return StateArray(labels, lambda: value, lambda: as_floats(value), 0)


def as_floats(x: Any) -> jax.Array:
    """An array with integers and booleans as floating point numbers."""
    if isinstance(x, Unknown):
        raise NotMultiAffine(f"it is {NOT_KNOWN}")
    return jnp.asarray(x, jnp.result_type(x, float))


def merged_slots(
    labels: Sequence[np.ndarray], shape: tuple[int, ...]
) -> tuple[np.ndarray, list[list[int]]]:
    """The slots of several arrays that are combined element by element.

    :param labels: of shape (slots, ...) each, which broadcast to ``shape``.
    :return: the labels of the result, and for every array the numbers of its slots in it.
    """
    merged: list[np.ndarray] = []
    places = []
    for own in labels:
        place: list[int] = []
        for slot in own:
            slot = np.broadcast_to(slot, shape)
            for i, other in enumerate(merged):
                if i not in place and np.all((slot < 0) | (other < 0) | (slot == other)):
                    merged[i] = np.where(other < 0, slot, other)
                    place.append(i)
                    break
            else:
                merged.append(slot)
                place.append(len(merged) - 1)
        places.append(place)
    return np.stack(merged) if merged else np.zeros((0, *shape), np.int32), places


def tabulated(
    fn: Callable[..., Any], tables: Sequence[Any], places: Sequence[Sequence[int]]
) -> Any:
    """The table of the result of an operation from those of its operands.

    :param fn: the operation, on arrays.
    :param tables: of shape (states,) * slots + (...) each.
    :param places: numbers of the slots of every operand among those of the result.
    """
    arguments = [
        jnp.transpose(x, [*np.argsort(p), *range(len(p), np.ndim(x))]) if len(p) > 1 else x
        for x, p in zip(tables, places, strict=True)
    ]
    for slot in sorted({i for place in places for i in place}, reverse=True):
        fn = jax.vmap(fn, in_axes=[0 if slot in place else None for place in places])
    with keep_known(arguments):
        return fn(*arguments)


def evaluate_states(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """The results of one operation at states."""
    return applied(eqn, [_typed(x, v.aval.dtype) for x, v in zip(values, eqn.invars, strict=True)])


def evaluate_floats(eqn: Any, values: Sequence[Any], fixed: Collection[int] = ()) -> Sequence[Any]:
    """The results of one operation at relaxed indicators: all are floats but the ``fixed`` ones."""
    if eqn.primitive.name in ("convert_element_type", "name"):
        return values
    dtype = jnp.result_type(*(x for i, x in enumerate(values) if i not in fixed), float)
    values = [x if i in fixed else jnp.asarray(x, dtype) for i, x in enumerate(values)]
    changes = {"preferred_element_type": None} if "preferred_element_type" in eqn.params else {}
    return applied(eqn, values, **changes)


def _typed(x, dtype):
    return x if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(x, dtype)


class Relaxation:
    """Indicators of all coordinates at real values.

    :param indicators: of shape (coordinates, states); of shape (coordinates,) where all have two
        states: the second one's, the first one's being one minus it.
    :param int num_states: the number of states.
    """

    def __init__(self, indicators: jax.Array, num_states: int):
        self.num_states = num_states
        self._indicators = indicators
        self._is_binary = jnp.ndim(indicators) == 1

    def of_table(self, labels: np.ndarray, table: Any) -> jax.Array:
        """An array at the indicators, from its table.

        :raises NotMultiAffine: if the table has infinite values, which zero times is not zero.
        """
        is_known = not_jax_tracer(table)
        if is_known:
            table = np.asarray(table)
            if not np.all(np.isfinite(table)):
                raise NotMultiAffine("it has infinite values")
        if not len(labels):
            return as_floats(table)
        if len(labels) == 1:
            return self._contracted(labels[0], table)
        same = (labels[0] == labels[1]) & (labels[0] >= 0)
        if np.all(same):
            return self._contracted(labels[0], _diagonal(table))
        pairs = self._pairs(labels, table)
        if not np.any(same):
            return pairs
        return jnp.where(same, self._contracted(labels[0], _diagonal(table)), pairs)

    def _at(self, labels):
        """The indicators of some coordinates, with an axis of states unless they are binary."""
        index, x = labels.ravel(), self._indicators
        if np.array_equal(index, np.arange(len(x))):
            found = x
        elif (
            index.size and np.array_equal(index, index[0] + np.arange(len(index))) and index[0] >= 0
        ):
            found = x[index[0] : index[0] + len(index)]
        else:
            if np.any(index < 0):  # free elements are those of the first state
                first = jnp.zeros_like(x[:1]) if self._is_binary else jnp.eye(1, x.shape[1])
                x = jnp.concatenate([x, first.astype(x.dtype)])
            found = x[np.where(index < 0, len(x) - 1, index)]
        return jnp.reshape(found, (*labels.shape, *x.shape[1:]))

    def _contracted(self, labels, table):
        r"""The sum over k of :math:`X_{c(e) k} T_e[k]`."""
        fewer = _without_repeats(labels, range(labels.ndim))
        if self._is_binary:
            first, second = as_floats(table[0]), as_floats(table[1])
            return jnp.broadcast_to(first + self._at(fewer) * (second - first), labels.shape)
        found = self._at(fewer)
        axes = [i for i in range(labels.ndim) if fewer.shape[i] > 1]
        if not_jax_tracer(table):
            table = _without_repeats(table, [i + 1 for i in axes])
            at = _axis_of_identity(table)
            if at is not None and fewer.shape[at] == 1:  # the indicators themselves
                found = jnp.moveaxis(jnp.squeeze(found, at), -1, at)
                return jnp.broadcast_to(found, labels.shape)
        kept = [i for i in range(labels.ndim) if table.shape[i + 1] > 1]
        table = jnp.reshape(as_floats(table), (len(table), *(table.shape[i + 1] for i in kept)))
        found = jnp.reshape(found, (*(fewer.shape[i] for i in axes), found.shape[-1]))
        out, states = sorted({*axes, *kept}), labels.ndim
        result = jnp.einsum(found, [*axes, states], table, [states, *kept], out)
        sizes = [labels.shape[i] if i in out else 1 for i in range(labels.ndim)]
        return jnp.broadcast_to(jnp.reshape(result, sizes), labels.shape)

    def _pairs(self, labels, table):
        r"""The sum over k and l of :math:`X_{c(e) k} X_{d(e) l} T_e[k, l]`."""
        left, right = (self._at(x) for x in labels)
        if self._is_binary:
            t = as_floats(table)
            first = t[0, 0] + right * (t[0, 1] - t[0, 0])
            return first + left * (
                t[1, 0] - t[0, 0] + right * (t[1, 1] - t[1, 0] - t[0, 1] + t[0, 0])
            )
        if not_jax_tracer(table):
            one = _without_repeats(table, range(2, table.ndim))
            if one.size == table.shape[0] * table.shape[1]:  # the same for all pairs
                return jnp.sum(left * (right @ as_floats(one.reshape(table.shape[:2])).T), -1)
        elements = list(range(labels.ndim - 1))
        first, second = labels.ndim, labels.ndim + 1
        inner = jnp.einsum(
            left,
            [*elements, first],
            as_floats(table),
            [first, second, *elements],
            [*elements, second],
        )
        return jnp.sum(inner * right, -1)


def _diagonal(table):
    return table[np.arange(len(table)), np.arange(len(table))]


def _without_repeats(x, axes):
    """An array of known values with one element along each axis where all are the same."""
    for axis in axes:
        one = np.take(x, [0], axis)
        if np.array_equal(np.broadcast_to(one, x.shape), x):
            x = one
    return x


def _axis_of_identity(table):
    """Which axis of the elements counts the states, in a table that is an identity; else None."""
    sizes = table.shape[1:]
    if sum(size > 1 for size in sizes) != 1 or max(sizes) != len(table):
        return None
    is_identity = np.array_equal(table.reshape(len(table), -1), np.eye(len(table)))
    return int(np.argmax(sizes)) if is_identity else None
