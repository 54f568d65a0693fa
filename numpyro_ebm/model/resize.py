# SPDX-License-Identifier: Apache-2.0
"""A model read at another number of rows, where that can be shown to be the same model of a row.

Sums over states evaluate the energy at as many points as there are states, and the plate has as
many rows as there are data. Models are written for any number of rows, ``len(data)``: the same
model is read again with as many rows as there are states, and both programs are compared, operation
by operation. The comparison fails for an energy that depends on the number of rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import Literal, ShapedArray, not_jax_tracer
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.axis_maps import place_of
from numpyro_ebm.program.jaxprs import called, needed
from numpyro_ebm.program.row_loops import LOOPS

__all__ = ["with_rows"]

SIZES = ("limit_indices", "new_sizes", "shape", "sizes", "slice_sizes")
"""Parameters of operations that hold sizes of arrays, which may be numbers of rows."""


def with_rows(row_model: RowModel, num_rows: int) -> RowModel | None:
    """The same model of a row, with another number of them.

    Arguments with a row each repeat their first one; only the visible sites read them. Where that
    does not do, numbers among the arguments that are the number of rows are changed as well.

    :param RowModel row_model: the model, read; its energy reads no covariates.
    :param int num_rows: how many rows are wanted.
    :return: a :class:`~numpyro_ebm.model.row_model.RowModel`, or ``None``: the number of rows is
        not that of an argument, or the energy of a row depends on it.
    """
    if num_rows == row_model.num_rows:
        return row_model
    if row_model.covariates or row_model.total_rows != row_model.num_rows:
        return None

    def first_row(x):
        if not hasattr(x, "shape") or x.shape[:1] != (row_model.num_rows,):
            return x
        return jnp.broadcast_to(x[:1], (num_rows, *x.shape[1:]))

    def number(x):
        return num_rows if type(x) is int and x == row_model.num_rows else first_row(x)

    for change in (first_row, number):
        args, kwargs = jax.tree.map(change, (row_model.args, row_model.kwargs))
        try:
            other = read_model(row_model.model, args, kwargs, row_model.parameters)
        except Exception:  # the model may be written for its number of rows
            continue
        if (other.num_rows, other.total_rows) != (num_rows, num_rows) or other.covariates:
            continue
        if _row_shapes(other) == _row_shapes(row_model) and _is_same_of_a_row(row_model, other):
            return other
    return None


def _is_same_of_a_row(row_model, other):
    programs = []
    for one in (row_model, other):
        values = {name: site.value for name, site in one.sites.items()}
        programs.append(jax.make_jaxpr(one.log_density)(one.parameters, values))
    return _Comparison(row_model.num_rows, other.num_rows).programs(*programs)


class _Comparison:
    """Whether two jaxprs are the same but for their rows, n in one and m in the other."""

    def __init__(self, n, m):
        self.n, self.m = n, m

    def programs(self, a, b):
        return _all(_equal, a.consts, b.consts) and self.operations(a.jaxpr, b.jaxpr)

    def operations(self, a, b):
        twin = dict(zip([*a.constvars, *a.invars], [*b.constvars, *b.invars], strict=True))

        def atom(x, y):
            if isinstance(x, Literal) or isinstance(y, Literal):
                both = isinstance(x, Literal) and isinstance(y, Literal)
                return both and _equal(x.val, y.val)
            return twin[x] is y

        first, second = needed(a), needed(b)  # the indices of a plate are made and not used
        if len(first) != len(second):
            return False
        for p, q in zip(first, second, strict=True):
            if p.primitive is not q.primitive or not _all(atom, p.invars, q.invars):
                return False
            if not self.parameters(p.primitive.name, p.params, q.params):
                return False
            if called(p) is None and p.primitive.name not in LOOPS and not _keeps_rows(p, q):
                return False
            twin.update(zip(p.outvars, q.outvars, strict=True))
        return _all(atom, a.outvars, b.outvars)

    def parameters(self, name, a, b):
        """Parameters of an operation: sizes may be numbers of rows, all others are the same."""
        if a.keys() != b.keys():
            return False
        # Indices and random numbers differ from row to row.
        is_sized = name != "iota" and not name.startswith(("random", "threefry"))
        return all(self.values(a[k], b[k], is_sized and k in SIZES) for k in a)

    def values(self, a, b, are_sizes):
        if isinstance(a, tuple | list) and isinstance(b, tuple | list):
            return _all(partial(self.values, are_sizes=are_sizes), a, b)
        if hasattr(a, "jaxpr") and hasattr(a, "consts"):  # closed ones have operations as well
            return self.programs(a, b)
        if hasattr(a, "eqns"):
            return self.operations(a, b)
        if isinstance(a, ShapedArray):
            return a.dtype == b.dtype and self.values(a.shape, b.shape, True)
        if are_sizes and isinstance(a, int | np.integer):
            return a == b or a * self.m == b * self.n
        # Rules of derivatives are new objects in every program; they follow from its operations.
        return callable(a) or hasattr(a, "call_wrapped") or _equal(a, b)


def _keeps_rows(p, q):
    """Whether an operation leaves the axes whose sizes differ, the rows, as they are."""
    for operand, (x, y) in enumerate(zip(p.invars, q.invars, strict=True)):
        for axis, (a, b) in enumerate(zip(x.aval.shape, y.aval.shape, strict=True)):
            if a != b and not place_of(p, operand, axis).axes:
                return False
    return True


def _row_shapes(row_model):
    values = row_model.to_rows({name: site.value for name, site in row_model.sites.items()})
    return {name: jnp.shape(x)[1:] for name, x in values.items()}


def _all(fn, xs, ys):
    return len(xs) == len(ys) and all(map(fn, xs, ys))


def _equal(x, y):
    if x is y:
        return True
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return bool(x == y)
    concrete = not_jax_tracer(x) and not_jax_tracer(y)
    return concrete and np.shape(x) == np.shape(y) and bool(np.all(np.asarray(x) == np.asarray(y)))
