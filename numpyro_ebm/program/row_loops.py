# SPDX-License-Identifier: Apache-2.0
"""Rows, followed through loops and branches: over other axes, or over the rows one at a time."""

from collections.abc import Callable, Sequence
from typing import Any

from numpyro_ebm.program.jaxprs import scan_parts
from numpyro_ebm.program.rows import MIXED, STEP, Rows, joined, mixed

__all__ = ["LOOPS"]

Walk = Callable[[Any, Sequence[Rows]], list[Rows]]


def _steady(step, carry):
    """The carry of a loop, so that another round does not change what holds of it."""
    carry = [x._replace(note=None) for x in carry]
    while True:
        results = step(carry)
        after = [joined(a, b) for a, b in zip(carry, results, strict=False)]
        if after == carry:
            return carry, results
        carry = after


def _scan(walk: Walk, eqn: Any, operands: Sequence[Rows]) -> list[Rows]:
    """A loop over another axis than the rows, or over the rows, one at a time."""
    inner = eqn.params["jaxpr"]
    num_consts, num_carry = scan_parts(eqn)
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    xs = operands[num_consts + num_carry :]
    over_rows = any(x.axis == 0 for x in xs)
    if over_rows and any(
        x.axis not in (None, 0) or x.inner > 1 or STEP in x.varies for x in operands
    ):
        return [mixed(operands)] * len(eqn.outvars)
    labels = frozenset(["the steps of a loop"]).union(*(x.labels | x.differs for x in operands))
    own = inner.jaxpr.invars[num_consts : num_consts + num_carry]
    pairs = zip(inner.jaxpr.outvars[:num_carry], own, strict=True)
    is_changed = [result is not variable for result, variable in pairs]
    inside = [_one_step(x, over_rows) for x in xs]

    def step(carry):
        if over_rows:
            pairs = zip(carry, is_changed, strict=True)
            carry = [_carried(x, labels) if changes else x for x, changes in pairs]
        return walk(inner, [*consts, *carry, *inside])

    carry, results = _steady(step, carry)
    if over_rows:
        carry = [x if x.axis is MIXED else x._replace(varies=x.varies - {STEP}) for x in carry]
    return [*carry, *(_all_steps(x, over_rows, labels) for x in results[num_carry:])]


def _carried(x, labels):
    """What one row hands on to the next: it mixes them, or counts them."""
    if x.axis is not None:
        return mixed([x])
    return x._replace(varies=x.varies | {STEP}, labels=x.labels | labels)


def _one_step(x, over_rows):
    """One step of an array that is scanned over."""
    if x.axis == 0:
        return x._replace(axis=STEP, note=None)
    axis = x.axis - 1 if isinstance(x.axis, int) else x.axis
    varies = {a if a is STEP else a - 1 for a in x.varies if a != 0}
    if over_rows and 0 in x.varies:
        varies.add(STEP)
    return x._replace(axis=axis, varies=frozenset(varies), note=None)


def _all_steps(x, over_rows, labels):
    """An array with the results of all steps."""
    if x.axis is MIXED:
        return x
    if x.axis is not None:
        axis = x.axis + 1 if isinstance(x.axis, int) else 0 if over_rows else STEP
        return x._replace(axis=axis, note=None)
    varies = {0, *(a if a is STEP else a + 1 for a in x.varies)}
    if over_rows:
        varies.discard(STEP)
    return Rows(None, frozenset(varies), x.labels | labels)


def _while(walk: Walk, eqn: Any, operands: Sequence[Rows]) -> list[Rows]:
    """A loop whose number of rounds does not depend on several rows."""
    num_test, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = operands[:num_test], operands[num_test : num_test + num_body]
    start = operands[num_test + num_body :]
    carry, _ = _steady(lambda carry: walk(eqn.params["body_jaxpr"], [*body, *carry]), start)
    (stops,) = walk(eqn.params["cond_jaxpr"], [*test, *carry])
    if stops.axis is MIXED:  # as long as the slowest row needs, in which others may be done
        stops = stops._replace(note=None)
    return [_decided_by(stops, x) for x in carry]


def _cond(walk: Walk, eqn: Any, operands: Sequence[Rows]) -> list[Rows]:
    """One of several functions."""
    which, *others = operands
    found = [walk(branch, others) for branch in eqn.params["branches"]]
    together = found[0]
    for results in found[1:]:
        together = [joined(a, b) for a, b in zip(together, results, strict=True)]
    return [_decided_by(which, x) for x in together]


def _decided_by(which, x):
    """A result of one of several functions, or of so many rounds."""
    if which.axis is None and STEP not in which.varies:
        return x if x.axis is not None else x._replace(labels=x.labels | which.labels)
    if which.axis is MIXED or x.axis not in (None, STEP):
        return mixed([which, x])
    differs = which.differs | x.differs
    for free in (which, x):
        if free.axis is None and STEP in free.varies:
            differs |= free.labels
    return Rows(STEP, differs=differs)


LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
"""What the results of a loop or branch have to do with the rows, by operation."""
