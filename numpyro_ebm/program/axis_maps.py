# SPDX-License-Identifier: Apache-2.0
"""Where an operation puts the axes of its operands."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numpyro_ebm.program.jaxprs import ELEMENTWISE

__all__ = ["Place", "new_variation", "place_of"]

ALONG_ONE = {
    **dict.fromkeys("cumlogsumexp cummax cummin cumprod cumsum".split(), "axis"),
    **{"sort": "dimension", "top_k": "axis", "concatenate": "dimension", "split": "axis"},
}
"""Operations along one axis that keep all axes, and the parameter that names it."""

REDUCES = ("reduce_", "arg")
"""How the names of operations begin that reduce axes."""

OF_MATRICES = set("cholesky eigh lu qr svd triangular_solve".split())
"""Operations on the last two axes."""


class Place(NamedTuple):
    """Where an axis of an operand is found in the result.

    - **axes** - the axes of the result along which its elements are spread: none if the axis is
      summed over or looked up; ``None`` if nothing is known.
    - **is_aligned** - whether element n along the one axis there reads element n of the operand.
    """

    axes: frozenset[int] | None
    is_aligned: bool = False


EVERYWHERE, GONE = Place(None), Place(frozenset())


def place_of(eqn: Any, operand: int, axis: int) -> Place:
    """Where one axis of an operand of an operation of a jaxpr goes; unknown ones go everywhere.

    :param eqn: the operation.
    :param int operand: number of the operand.
    :param int axis: its axis.
    :return: a :class:`Place`.
    """
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        same = eqn.invars[operand].aval.ndim == eqn.outvars[0].aval.ndim
        return _at(axis) if same else EVERYWHERE
    if name in ALONG_ONE:
        shape = eqn.invars[operand].aval.shape
        return _at(axis, axis != eqn.params.get(ALONG_ONE[name], -1) % len(shape))
    if name in RULES:
        return RULES[name](eqn, operand, axis)
    if name in OF_MATRICES:
        return _at(axis) if axis < eqn.invars[operand].aval.ndim - 2 else EVERYWHERE
    if name.startswith(REDUCES) and "axes" in eqn.params:
        return _without(eqn.params["axes"], axis)
    return _scatter(eqn, operand, axis) if name.startswith("scatter") else EVERYWHERE


def new_variation(eqn: Any) -> frozenset[int]:
    """Axes along which an operation makes values differ that did not: unknown ones, all.

    :param eqn: the operation.
    """
    name, params = eqn.primitive.name, eqn.params
    if name in KEEPS_EQUALS or name in ELEMENTWISE or "axes" in params and name.startswith(REDUCES):
        return frozenset()
    rank = max(v.aval.ndim for v in eqn.outvars)
    if name == "conv_general_dilated" and params["batch_group_count"] == 1:
        return frozenset(params["dimension_numbers"].out_spec[2:])  # at the borders
    if name in ALONG_ONE or name == "stack":
        return frozenset([params[ALONG_ONE.get(name, "axis")] % rank])
    if name == "pad":
        return frozenset(i for i, x in enumerate(params["padding_config"]) if tuple(x) != (0, 0, 0))
    return frozenset(range(rank))


def _at(axis, is_aligned=True):
    return Place(frozenset([axis]), is_aligned)


def _without(gone, axis):
    return GONE if axis in gone else _at(axis - sum(other < axis for other in gone))


def _reshape(eqn, operand, axis):
    """The same axis where as many elements precede it, else all those that share its elements."""
    if eqn.params["dimensions"] is not None:  # another order of elements
        return EVERYWHERE
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    inner = math.prod(before[axis + 1 :])
    outer, found = inner * before[axis], set()
    for i, size in enumerate(after):
        low = math.prod(after[i + 1 :])
        if (low, size) == (inner, before[axis]):
            return _at(i)
        if size > 1 and low < outer and inner < low * size:
            found.add(i)
    return Place(frozenset(found))


def _dynamic_update(eqn, operand, axis):
    full = eqn.invars[1].aval.shape[axis] == eqn.invars[0].aval.shape[axis]
    return _at(axis, operand == 0 or full)


def _pad(eqn, operand, axis):
    return _at(axis, tuple(eqn.params["padding_config"][axis]) == (0, 0, 0))


def _stack(eqn, operand, axis):
    return _at(axis + (eqn.params["axis"] <= axis))


def _unstack(eqn, operand, axis):
    at = eqn.params["axis"]
    return EVERYWHERE if at == axis else _at(axis - (at < axis))


def _contract(eqn, operand, axis):
    """Contracted axes are summed over; batch axes lead, and free ones follow, of the left first."""
    contracted, batch = eqn.params["dimension_numbers"]
    if axis in contracted[operand]:
        return GONE
    if axis in batch[operand]:
        return _at(batch[operand].index(axis))
    ranks = [v.aval.ndim for v in eqn.invars]
    free = [i for i in range(ranks[operand]) if i not in (*contracted[operand], *batch[operand])]
    start = len(batch[0])
    if operand == 1:
        start += ranks[0] - len(contracted[0]) - len(batch[0])
    return _at(start + free.index(axis))


def _convolve(eqn, operand, axis):
    """Batches stay apart; channels of the kernel become those of the result."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.params["batch_group_count"] != 1:
        return EVERYWHERE
    spec = (numbers.lhs_spec, numbers.rhs_spec)[operand]
    place = spec.index(axis)  # batch or output channels, input channels, places
    if operand == 1:
        return _at(numbers.out_spec[1], False) if place == 0 else GONE
    return _at(numbers.out_spec[place], place == 0)


def _gather(eqn, operand, axis):
    """Axes of the indices become those of the places; of the table those of what lies there."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rank = eqn.outvars[0].aval.ndim
    batch = [i for i in range(rank) if i not in numbers.offset_dims]
    if operand == 1:
        return GONE if axis == eqn.invars[1].aval.ndim - 1 else _at(batch[axis])
    if axis in numbers.operand_batching_dims:
        pair = numbers.operand_batching_dims.index(axis)
        return _at(batch[numbers.start_indices_batching_dims[pair]])
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    if axis in gone:
        return GONE
    shape = eqn.invars[0].aval.shape
    kept = [i for i in range(len(shape)) if i not in gone]
    return _at(numbers.offset_dims[kept.index(axis)], sizes[axis] == shape[axis])


def _scatter(eqn, operand, axis):
    """The result is laid out as the operand; updates fill windows in it, at the indices."""
    numbers = eqn.params["dimension_numbers"]
    shapes = [v.aval.shape for v in eqn.invars]
    windows = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(len(shapes[0])) if i not in windows]
    batch = [i for i in range(len(shapes[2])) if i not in numbers.update_window_dims]
    pairs = zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    places = {batch[index]: own for index, own in pairs}
    if operand == 0:
        at = kept.index(axis) if axis in kept else None
        is_whole = at is not None and shapes[2][numbers.update_window_dims[at]] == shapes[0][axis]
        return _at(axis, is_whole or axis in numbers.operand_batching_dims)
    if operand == 1:
        axis = batch[axis] if axis < len(shapes[1]) - 1 else -1
    elif axis in numbers.update_window_dims:
        own = kept[numbers.update_window_dims.index(axis)]
        return _at(own, shapes[2][axis] == shapes[0][own])
    return _at(places[axis]) if axis in places else EVERYWHERE


RULES: dict[str, Callable[[Any, int, int], Place]] = {
    "broadcast_in_dim": lambda eqn, _, axis: _at(eqn.params["broadcast_dimensions"][axis]),
    "reshape": _reshape,
    "transpose": lambda eqn, _, axis: _at(eqn.params["permutation"].index(axis)),
    "squeeze": lambda eqn, _, axis: _without(eqn.params["dimensions"], axis),
    "rev": lambda eqn, _, axis: _at(axis, axis not in eqn.params["dimensions"]),
    "slice": lambda _, __, axis: _at(axis),
    "dynamic_slice": lambda _, __, axis: _at(axis),
    "dynamic_update_slice": _dynamic_update,
    "pad": _pad,
    "stack": _stack,
    "unstack": _unstack,
    "dot_general": _contract,
    "conv_general_dilated": _convolve,
    "gather": _gather,
}
"""Places by operation. A part of an axis is another size, which the caller compares."""

KEEPS_EQUALS = {*RULES, "sort", "split"} - {
    *("conv_general_dilated", "dynamic_update_slice", "pad", "stack")
}
"""Operations whose results are equal from place to place where their operands are."""
