# SPDX-License-Identifier: Apache-2.0
"""The axis of the rows, followed through the operations of a function.

An intermediate array reads no row, or has an axis along which every element reads its own row
alone, or may mix the rows. Unknown operations count as mixing, so that rows that are reported as
separate are separate.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from numpyro_ebm.program.jaxprs import ELEMENTWISE, called, interpret

__all__ = ["MIXED", "row_axes"]

ALONG_ONE = {
    **dict.fromkeys("cumlogsumexp cummax cummin cumprod cumsum".split(), "axis"),
    "sort": "dimension",
}
"""Operations along one axis that keep all axes, and the parameter that names it."""

OF_MATRICES = set("cholesky eigh lu qr svd triangular_solve".split())
"""Operations on the last two axes."""


class _Mixed:
    """The state of an array whose rows may read other rows."""


MIXED = _Mixed()


def row_axes(fn: Callable[..., Any], values: Any, axes: Sequence[int | None]) -> list[Any]:
    """Axes of the rows in the results of a function, where it keeps them apart.

    :param fn: a function of a pytree of arrays; it is traced, not run.
    :param values: its argument.
    :param axes: the axis of the rows of every leaf, in a list; ``None`` for a leaf without.
    :return: for every leaf of the result its axis of rows; ``None`` if it reads no row, and
        ``MIXED`` if its rows may read one another.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.row_axes import MIXED, row_axes
    >>> row_axes(lambda v: jnp.sum(v**2, -1), jnp.ones((5, 3)), [0])
    [0]
    >>> row_axes(lambda v: v - v.mean(0), jnp.ones((5, 3)), [0]) == [MIXED]
    True
    """
    return _walk(jax.make_jaxpr(fn)(values), axes)


def _walk(closed, states):
    return interpret(closed, _results, states, lambda _: None)


def _results(eqn, operands):
    state = None
    if any(x is MIXED for x in operands):
        state = MIXED
    elif any(x is not None for x in operands):
        state = _apply(eqn, operands)
    return state if isinstance(state, list) else [state] * len(eqn.outvars)


def _apply(eqn, operands):
    name, params = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.invars]
    axes = {x for x in operands if x is not None}
    axis = axes.pop()
    if called(eqn) is not None:
        return _walk(called(eqn), operands)
    if name == "scan":
        return _scan(eqn, operands)
    if name == "dot_general":
        return _contract(params["dimension_numbers"], operands, shapes)
    if name == "gather":
        return _gather(params, operands, shapes)
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        is_batch = operands[1] is None and params["batch_group_count"] == 1
        return numbers.out_spec[0] if is_batch and axis == numbers.lhs_spec[0] else MIXED
    if axes:  # what is left needs one axis for all
        return MIXED
    if name in ELEMENTWISE:
        result = eqn.outvars[0].aval.shape
        with_rows = [s for s, x in zip(shapes, operands, strict=True) if x is not None]
        same = all(len(s) == len(result) and s[axis] == result[axis] for s in with_rows)
        return axis if same else MIXED
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if name == "reshape":
        if params["dimensions"] is not None:  # another order of elements
            return MIXED
        return _reshaped(shapes[0], eqn.outvars[0].aval.shape, axis)
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "squeeze" or name.startswith(("reduce_", "arg")):
        return _without(params, axis)
    if name in ALONG_ONE:
        return axis if params[ALONG_ONE[name]] != axis else MIXED
    if name in ("concatenate", "stack", "split", "unstack"):
        return _joined(name, params, axis)
    if name == "rev":
        return MIXED if axis in params["dimensions"] else axis
    if name == "pad":
        return axis if tuple(params["padding_config"][axis]) == (0, 0, 0) else MIXED
    if name in ("slice", "dynamic_slice", "dynamic_update_slice"):
        return _sliced(name, eqn, operands, axis)
    if name == "top_k":
        return MIXED if axis == params.get("axis", -1) % len(shapes[0]) else axis
    if name in OF_MATRICES:
        return axis if axis < len(shapes[0]) - 2 else MIXED
    return MIXED


def _reshaped(before, after, axis):
    """The same axis, where as many elements precede it as before."""
    ahead = math.prod(before[:axis])
    for i, size in enumerate(after):
        if size == before[axis] and math.prod(after[:i]) == ahead:
            return i
    return MIXED


def _without(params, axis):
    gone = params.get("axes", params.get("dimensions"))
    if gone is None or axis in gone:
        return MIXED
    return axis - sum(other < axis for other in gone)


def _joined(name, params, axis):
    at = params["dimension" if name == "concatenate" else "axis"]
    if name == "stack":
        return axis + (at <= axis)
    if at == axis:
        return MIXED
    return axis - (at < axis) if name == "unstack" else axis


def _sliced(name, eqn, operands, axis):
    """A part of every row; the rows themselves stay as they are."""
    num_arrays = 2 if name == "dynamic_update_slice" else 1
    if any(x is not None for x in operands[num_arrays:]):
        return MIXED  # where the part begins depends on the rows
    whole = eqn.invars[0].aval.shape[axis]
    part = eqn.invars[1] if num_arrays == 2 else eqn.outvars[0]
    return axis if part.aval.shape[axis] == whole else MIXED


def _contract(numbers, operands, shapes):
    """Rows of one side only, or of both along the same batch dimension."""
    (left, right), batch = numbers
    sides = []
    for side, (axis, contracted) in enumerate(zip(operands, (left, right), strict=True)):
        if axis is None:
            continue
        if axis in batch[side]:
            sides.append(batch[side].index(axis))
            continue
        if axis in contracted:
            return MIXED
        free = [i for i in range(len(shapes[side])) if i not in contracted and i not in batch[side]]
        start = len(batch[0])
        if side == 1:
            start += len(shapes[0]) - len(left) - len(batch[0])
        sides.append(start + free.index(axis))
    is_one = len(sides) == 1 or (sides[0] == sides[1] and sides[0] < len(batch[0]))
    return sides[0] if is_one else MIXED


def _gather(params, operands, shapes):
    """Places of every row, the same in all or each with its own."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    table, index = operands[0], operands[1]
    rank = len(shapes[1]) - 1 + len(numbers.offset_dims)
    batch = [i for i in range(rank) if i not in numbers.offset_dims]
    places = set()
    if index is not None:
        if index == len(shapes[1]) - 1:
            return MIXED  # rows are coordinates of one place
        places.add(batch[index])
    if table in numbers.operand_batching_dims:
        pair = numbers.operand_batching_dims.index(table)
        places.add(batch[numbers.start_indices_batching_dims[pair]])
    elif table is not None:
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        if table in gone or index is not None or sizes[table] != shapes[0][table]:
            return MIXED
        kept = [i for i in range(len(shapes[0])) if i not in gone]
        places.add(numbers.offset_dims[kept.index(table)])
    return places.pop() if len(places) == 1 else MIXED


def _scan(eqn, operands):
    """A loop over another axis than the rows; its carry may gain an axis of rows on the way."""
    inner = eqn.params["jaxpr"]
    # Slices have an axis less inside; versions of JAX differ in how they count them otherwise.
    arguments = zip(eqn.invars, inner.jaxpr.invars, strict=True)
    results = zip(eqn.outvars, inner.jaxpr.outvars, strict=True)
    num_xs = sum(v.aval.ndim > u.aval.ndim for v, u in arguments)
    num_carry = sum(v.aval.ndim == u.aval.ndim for v, u in results)
    num_consts = len(operands) - num_xs - num_carry
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    xs = operands[num_consts + num_carry :]
    if any(x == 0 for x in xs):
        return MIXED
    inside = [x if x is None else x - 1 for x in xs]
    for _ in range(num_carry + 1):
        results = _walk(inner, [*consts, *carry, *inside])
        merged = [
            new if old is None else (old if new in (None, old) else MIXED)
            for old, new in zip(carry, results[:num_carry], strict=True)
        ]
        if merged == carry:
            ys = [x + 1 if isinstance(x, int) else x for x in results[num_carry:]]
            return [*carry, *ys]
        carry = merged
    return MIXED
