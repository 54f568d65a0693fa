# SPDX-License-Identifier: Apache-2.0
"""What an array has to do with the rows of a data plate, and what holds of one of two such arrays.

An array has an axis along which every element reads its own row alone, or reads no row, or may mix
the rows. One that reads no row may itself have other values from place to place; where it meets
rows along such an axis, they differ by more than their own values.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["COLUMNS", "COUNTS", "READS", "MIXED", "NEVER", "STEP", "Rows", "joined", "mixed"]


class _Special:
    """An axis that is none of the array."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


MIXED: Any = _Special("MIXED")  # rows may read other rows
STEP: Any = _Special("STEP")  # all of the array belongs to the row at which a loop over rows is
COUNTS, NEVER, COLUMNS, READS = "counts", "never", "columns", "reads"


class Rows(NamedTuple):
    """What an array has to do with the rows.

    - **axis** - the axis of the rows; ``None`` if it reads none, ``MIXED`` if its rows may read
      one another.
    - **inner** - elements of that axis that belong to one row, next to each other: more than one
      where another axis was merged into it.
    - **varies** - of an array that reads no row: axes along which its elements may differ.
    - **labels** - of such an array: what it depends on.
    - **differs** - what may tell its rows apart besides their own values, as labels.
    - **note** - what is known of its values: that they count along an axis (``COUNTS``, axis), are
      false everywhere (``NEVER``, None), or have columns that count (``COLUMNS``, (axes by column,
      labels that only these have)); of a mixed array which operation reads several rows for
      certain (``READS``, its name).
    """

    axis: Any = None
    varies: frozenset[Any] = frozenset()
    labels: frozenset[str] = frozenset()
    differs: frozenset[str] = frozenset()
    note: tuple[str, Any] | None = None
    inner: int = 1

    @classmethod
    def data(cls, shape: Sequence[int], label: str) -> "Rows":
        """An array of known shape and unknown values."""
        varies = frozenset(i for i, size in enumerate(shape) if size > 1)
        return cls(None, varies, frozenset([label]))

    @classmethod
    def counted(cls, axis: int, label: str) -> "Rows":
        """The numbers 0, 1, … along an axis."""
        return cls(None, frozenset([axis]), frozenset([label]), note=(COUNTS, axis))

    @property
    def apart(self) -> frozenset[str]:
        """What tells the rows of a result apart that has its rows in axis 0."""
        return self.labels if self.axis is None and 0 in self.varies else self.differs


def mixed(arrays: Sequence[Rows], reads: str | None = None) -> Rows:
    """A result whose rows may read one another.

    :param arrays: what it was made of.
    :param str reads: the operation that reads several rows for certain, if one does.
    """
    labels = frozenset().union(*(x.differs | x.labels for x in arrays))
    notes = [x.note for x in arrays if x.axis is MIXED and x.note]
    if reads is not None:
        notes = [(READS, reads)]
    return Rows(MIXED, differs=labels, note=notes[0] if notes else None)


def joined(a: Rows, b: Rows) -> Rows:
    """What holds of an array that may be either of two."""
    if a.axis is None and b.axis is None:
        return Rows(None, a.varies | b.varies, a.labels | b.labels)
    of_rows = b if a.axis is None else a
    differs = a.differs | b.differs
    for x in (a, b):
        if x.axis is None:
            differs |= x.labels if of_rows.axis in x.varies else frozenset()
        elif x.axis is MIXED or (x.axis, x.inner) != (of_rows.axis, of_rows.inner):
            return mixed([a, b])
    return Rows(of_rows.axis, differs=differs, inner=of_rows.inner)
