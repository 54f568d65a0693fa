# SPDX-License-Identifier: Apache-2.0
"""Rows, followed through the operations of a function: where they lie, and what tells them apart.

Unknown operations count as mixing the rows and as varying from row to row, so that rows that are
reported as separate are separate, and rows that are reported as alike are alike.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from numpyro_ebm._compat import ClosedJaxpr, Literal, not_jax_tracer
from numpyro_ebm.program.axis_maps import new_variation, place_of
from numpyro_ebm.program.jaxprs import called, interpret
from numpyro_ebm.program.row_loops import LOOPS
from numpyro_ebm.program.rows import COLUMNS, COUNTS, MIXED, NEVER, STEP, Rows, mixed

__all__ = ["follow_rows", "row_axes"]


def row_axes(fn: Callable[..., Any], values: Any, axes: Sequence[int | None]) -> list[Any]:
    """Axes of the rows in the results of a function, where it keeps them apart.

    :param fn: a function of a pytree of arrays; it is traced, not run.
    :param values: its argument.
    :param axes: the axis of the rows of every leaf, in a list; ``None`` for a leaf without.
    :return: for every leaf of the result its axis of rows; ``None`` if it reads no row, and
        ``MIXED`` if its rows may read one another.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.row_axes import row_axes
    >>> from numpyro_ebm.program.rows import MIXED
    >>> row_axes(lambda v: jnp.sum(v**2, -1), jnp.ones((5, 3)), [0])
    [0]
    >>> row_axes(lambda v: v - v.mean(0), jnp.ones((5, 3)), [0]) == [MIXED]
    True
    """
    found = follow_rows(fn, values, [Rows(axis) for axis in axes])
    return [x.axis if x.inner == 1 else MIXED for x in found]


def follow_rows(fn: Callable[..., Any], values: Any, rows: Sequence[Rows]) -> list[Rows]:
    """What the results of a function have to do with the rows.

    :param fn: a function of a pytree of arrays; it is traced, not run.
    :param values: its argument.
    :param rows: what every leaf of it has to do with the rows, a list of :class:`Rows`.
    :return: the same for every leaf of the result.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.row_axes import follow_rows
    >>> from numpyro_ebm.program.rows import Rows
    >>> group = jnp.array([0, 0, 1, 1])
    >>> def fn(x):
    ...     return x["v"] - x["effect"][group], x["v"] - x["effect"].mean()
    >>> values = {"effect": jnp.ones(2), "v": jnp.ones(4)}
    >>> found = follow_rows(fn, values, [Rows.data((2,), "effect"), Rows(0)])
    >>> [sorted(x.differs) for x in found]
    [['an array of shape (4,) that the model closes over', 'effect'], []]
    """
    return follow_rows_of(jax.make_jaxpr(fn)(values), rows)


def follow_rows_of(closed: ClosedJaxpr, rows: Sequence[Rows]) -> list[Rows]:
    """The same as :func:`follow_rows` for a function that is traced already."""
    return interpret(closed, _results, rows, _constant)


def _constant(x):
    """An array that the program holds; it varies along the axes where its values do."""
    shape = np.shape(x)
    if not shape or max(shape) == 1:
        return Rows()
    label = f"an array of shape {shape} that the model closes over"
    if not not_jax_tracer(x) or not hasattr(x.dtype, "kind"):
        return Rows.data(shape, label)
    x = np.asarray(x)
    axes = [i for i, n in enumerate(shape) if n > 1 and np.any(x != np.take(x, [0], i))]
    is_count = x.ndim == 1 and np.array_equal(x, np.arange(len(x)))
    return Rows.counted(0, label) if is_count else Rows(None, frozenset(axes), frozenset([label]))


def _results(eqn, operands):
    name = eqn.primitive.name
    if called(eqn) is not None:
        return follow_rows_of(called(eqn), operands)
    if name in LOOPS and not any(x.axis is MIXED for x in operands):
        return LOOPS[name](follow_rows_of, eqn, operands)
    if name == "iota":
        found = Rows.counted(eqn.params["dimension"], "numbers counted along the rows")
    else:
        found = _apply(eqn, operands)
    return [_of_shape(found, v.aval.shape) for v in eqn.outvars]


def _of_shape(rows, shape):
    """Along an axis of one element nothing varies."""
    axes = [a for a in rows.varies if a is STEP or (a < len(shape) and shape[a] > 1)]
    return rows._replace(varies=frozenset(axes))


def _apply(eqn, operands):
    note = _note(eqn, operands)
    if note == "first":  # the other branch is never taken
        return operands[1]
    if any(x.axis is MIXED for x in operands):
        return mixed(operands)
    differs = frozenset().union(*(x.differs for x in operands))
    places = {_row_place(eqn, i, x, operands) for i, x in enumerate(operands) if x.axis is not None}
    if len(places) > 1 or MIXED in places:
        return mixed(operands, eqn.primitive.name if _reads_several(eqn, operands) else None)
    free = [(i, x) for i, x in enumerate(operands) if x.axis is None]
    varies = {i: _spread(eqn, i, x) for i, x in free}
    if not places:
        labels = frozenset().union(*(x.labels for _, x in free))
        new = new_variation(eqn)
        if new and not labels:
            labels = frozenset([f"the operation '{eqn.primitive.name}'"])
        return Rows(None, new.union(*varies.values()), labels, note=note)
    ((axis, inner),) = places
    own = frozenset()
    if eqn.primitive.name == "gather" and operands[0].axis is not None:
        own = _own_numbers(operands[1])
    differs -= own
    for i, x in free:
        is_looked_up = eqn.primitive.name == "gather" and i == 0 and differs
        if axis in varies[i] or is_looked_up:
            differs |= x.labels - own
    return Rows(axis, differs=differs, note=note, inner=inner)


def _reads_several(eqn, operands):
    """Whether an operation goes over the rows, and does not only lay them out anew."""
    if eqn.primitive.name.startswith(("gather", "scatter", "cum")):
        return True
    rows = [(i, x.axis) for i, x in enumerate(operands) if isinstance(x.axis, int)]
    return any(place_of(eqn, i, axis).axes == frozenset() for i, axis in rows)


def _row_place(eqn, operand, rows, operands):
    """The axis of the rows in a result, and how many elements of a row lie along it."""
    axis, shape, result = rows.axis, eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    if axis is STEP:
        return STEP, 1
    if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is None:
        return _reshaped(shape, result, axis, rows.inner)
    axes, is_aligned = place_of(eqn, operand, axis)
    if eqn.primitive.name == "gather" and operand == 0:
        is_batch = axis in eqn.params["dimension_numbers"].operand_batching_dims
        if rows.inner == 1 and eqn.params["slice_sizes"][axis] == 1 and not is_batch:
            axes, is_aligned = _own_places(eqn, axis, operands[1].note)
    if axes is None or len(axes) != 1 or not is_aligned:
        return MIXED
    (place,) = axes
    return (place, rows.inner) if result[place] == shape[axis] else MIXED


def _reshaped(before, after, axis, inner):
    """Where a row is as many elements next to each other, after as many others, as before."""
    num_rows = before[axis] // inner
    for i, size in enumerate(after):
        if math.prod(after[:i]) == math.prod(before[:axis]) and size % num_rows == 0:
            return i, size // num_rows
    return MIXED


def _own_places(eqn, axis, note):
    """Where every row is looked up at its own number, as in ``x[jnp.arange(len(x)), k]``."""
    numbers = eqn.params["dimension_numbers"]
    if note is None or axis not in numbers.start_index_map:
        return frozenset(), False
    kind, counted = note
    rank = eqn.invars[1].aval.ndim
    if kind == COUNTS and counted != rank - 1 and eqn.invars[1].aval.shape[-1] == 1:
        kind, counted = COLUMNS, {0: counted}
    elif kind == COLUMNS:
        counted, _ = counted
    column = numbers.start_index_map.index(axis)
    if kind != COLUMNS or column not in counted:
        return frozenset(), False
    batch = [i for i in range(eqn.outvars[0].aval.ndim) if i not in numbers.offset_dims]
    return frozenset([batch[counted[column]]]), True


def _own_numbers(index):
    """What tells rows apart in an index only because every row is looked up at its own number."""
    kind, found = index.note or ("", ({}, frozenset()))
    if kind == COLUMNS:
        return found[1]
    return index.labels if kind == COUNTS else frozenset()


def _spread(eqn, operand, rows):
    """Axes of a result along which an operand that reads no row makes it vary."""
    found = set()
    for axis in rows.varies:
        axes = {STEP} if axis is STEP else place_of(eqn, operand, axis).axes
        found |= set(range(max(v.aval.ndim for v in eqn.outvars))) if axes is None else axes
    return found


def _note(eqn, operands):
    """What is known of the values of a result, of those that count rows."""
    name, notes = eqn.primitive.name, [x.note for x in operands]
    kinds = [None if x is None else x[0] for x in notes]
    if name == "select_n" and kinds[:2] == [NEVER, COUNTS]:
        return "first"
    if COUNTS not in kinds:
        return notes[0] if name in ("convert_element_type", "copy") else None
    if name == "lt" and kinds[0] == COUNTS and _is_zero(eqn.invars[1]):
        return NEVER, None
    if name == "clamp" and kinds[1] == COUNTS and _is_zero(eqn.invars[0]):
        size, high = eqn.invars[1].aval.shape[notes[1][1]], eqn.invars[2]
        return notes[1] if isinstance(high, Literal) and np.all(high.val >= size - 1) else None
    if name == "concatenate":
        last = eqn.outvars[0].aval.ndim - 1
        widths = [v.aval.shape[last] for v in eqn.invars]
        if eqn.params["dimension"] != last or set(widths) != {1}:
            return None
        columns = {i: x[1] for i, x in enumerate(notes) if x and x[0] == COUNTS}
        others = [x for i, x in enumerate(operands) if i not in columns]
        own = frozenset().union(*(operands[i].labels for i in columns))
        return COLUMNS, (columns, own.difference(*(x.labels | x.differs for x in others)))
    if name in ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy"):
        place = _row_place(eqn, 0, Rows(notes[0][1]), operands)
        return None if place is MIXED or place[1] > 1 else (COUNTS, place[0])
    return None


def _is_zero(atom):
    return isinstance(atom, Literal) and np.ndim(atom.val) == 0 and atom.val == 0
