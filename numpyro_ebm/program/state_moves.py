# SPDX-License-Identifier: Apache-2.0
"""Operations that only move elements of arrays, or look them up, on tables over states."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.program.constants import evaluate_now
from numpyro_ebm.program.state_tables import (
    FREE,
    NotMultiAffine,
    StateArray,
    constant,
    evaluate_floats,
    evaluate_states,
    merged_slots,
    tabulated,
)

__all__ = ["element", "look_up", "move_elements", "stacked"]


def move_elements(
    walker: Any, eqn: Any, operands: list[StateArray], moved: Sequence[int]
) -> list[StateArray]:
    """Elements of the ``moved`` operands: the operation is run on their labels."""
    if any(not x.is_constant for i, x in enumerate(operands) if i not in moved):
        raise NotMultiAffine
    fixed = {i: x.table() for i, x in enumerate(operands) if i not in moved}
    labels = None
    if all(operands[i].labels is not None for i in moved):
        if not all(map(not_jax_tracer, fixed.values())):
            raise NotMultiAffine  # where to is not known
        labels = _labels_after(eqn, operands, fixed)
    return [_moved(walker, eqn, operands, fixed, labels, i) for i in range(len(eqn.outvars))]


def look_up(walker: Any, eqn: Any, operands: list[StateArray]) -> StateArray:
    """``table[x]``: every component of an index may read a coordinate, two at most."""
    numbers, indices = eqn.params["dimension_numbers"], operands[1]
    shape = eqn.invars[1].aval.shape
    if indices.labels is None:
        raise NotMultiAffine
    parts = [indices.labels[..., i] for i in range(shape[-1])]
    labels, places = merged_slots(parts, shape[:-1])
    out = eqn.outvars[0].aval.shape
    batch = [1 if axis in numbers.offset_dims else size for axis, size in enumerate(out)]
    labels = np.broadcast_to(labels.reshape(len(labels), *batch), (len(labels), *out))
    if not walker.has_table(labels):
        raise NotMultiAffine

    def table():
        own = indices.table()
        tables = [operands[0].table(), *(own[..., i] for i in range(shape[-1]))]
        fn = lambda x, *at: evaluate_states(eqn, (x, jnp.stack(at, -1)))[0]  # noqa: E731
        return tabulated(fn, tables, [[], *places])

    return walker.of_table(labels, table)


def element(walker: Any, x: StateArray, i: int) -> StateArray:
    """One step of an array that a loop goes over."""
    if x.is_constant:
        return constant(x.table()[i])
    if x.labels is None:
        return StateArray(None, None, lambda: x.relaxed()[i], x.degree)
    at = (slice(None),) * len(x.labels)
    return walker.of_table(x.labels[:, i], lambda: x.table()[*at, i], lambda: x.relaxed()[i])


def stacked(walker: Any, steps: Sequence[StateArray]) -> StateArray:
    """The results of all steps of a loop."""
    if all(x.is_constant for x in steps):
        return constant(jnp.stack([x.table() for x in steps]))
    relaxed = lambda: jnp.stack([x.relaxed() for x in steps])  # noqa: E731
    degree = max(x.degree for x in steps)
    own = [x.labels for x in steps if x.labels is not None and len(x.labels) < 2]
    if len(own) < len(steps):
        return StateArray(None, None, relaxed, degree)
    labels = [x[0] if len(x) else np.full(x.shape[1:], FREE) for x in own]

    def table():
        number = walker.relaxation.num_states
        tables = [[x.table()] * number if x.is_constant else x.table() for x in steps]
        return jnp.stack([jnp.stack([*x]) for x in tables], 1)

    return walker.of_table(np.stack(labels)[None], table, relaxed)


def _labels_after(eqn, operands, fixed):
    num_slots = max(len(x.labels) for i, x in enumerate(operands) if i not in fixed)

    def of_slot(slot):
        arguments = []
        for i, (x, v) in enumerate(zip(operands, eqn.invars, strict=True)):
            own = fixed.get(i)
            if own is None:
                own = x.labels[slot] + 1 if slot < len(x.labels) else np.zeros(v.aval.shape, int)
                own = np.asarray(own, np.int32)
            arguments.append(own)
        return [np.maximum(x, 0) - 1 for x in evaluate_now(eqn, arguments)]  # < 0: filled in

    return [np.stack(x) for x in zip(*map(of_slot, range(num_slots)), strict=True)]


def _moved(walker, eqn, operands, fixed, labels, i):
    def relaxed():
        values = [fixed[j] if j in fixed else x.relaxed() for j, x in enumerate(operands)]
        return evaluate_floats(eqn, values, fixed)[i]

    if labels is None:
        return StateArray(None, None, relaxed, max(x.degree for x in operands))

    def table():
        places = [[] if j in fixed else range(len(x.labels)) for j, x in enumerate(operands)]
        tables = [fixed[j] if j in fixed else x.table() for j, x in enumerate(operands)]
        return tabulated(lambda *xs: evaluate_states(eqn, xs)[i], tables, places)

    return walker.of_table(labels[i], table, relaxed)
