# SPDX-License-Identifier: Apache-2.0
r"""Which coordinates of a row interact in a function, read off its jaxpr.

.. math:: (i, j) \notin \text{graph} \;\Rightarrow\; f(x) = g(x_{-j}) + g'(x_{-i})

Coordinates without an edge are conditionally independent given all others, so that a proper
colouring of the graph (:mod:`~numpyro_ebm.program.coloring`) divides the coordinates of a lattice
into a few groups that can be drawn at once. Every element of every intermediate array carries the
set of coordinates that it reads. Linear operations unite these sets; only the others (products,
comparisons, table lookups) add edges between the coordinates of an element. Constants are used with
their values: a matrix of couplings has edges where it is not zero. The graph may have too many
edges, never too few.

Reference: sparsity detection of Hessians, Gebremedhin, Manne, Pothen, *What color is your
Jacobian?*, SIAM Review 2005.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy.sparse import csr_matrix, vstack

from numpyro_ebm.program.constants import Constant, evaluate_later, evaluate_now, known
from numpyro_ebm.program.jaxprs import (
    ELEMENTWISE,
    called,
    interpret,
    is_integer,
    keeps_values,
    moved_operands,
)

__all__ = ["interactions"]

MAX_ENTRIES = 30_000_000  # entries of sparse matrices; with more, all coordinates may interact

LINEAR = {"add", "add_any", "convert_element_type", "neg", "sub"}
REDUCTIONS = set(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum".split()
)


class _CannotTell(Exception):
    """Raised where all coordinates may interact."""


def interactions(fn: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    r"""Graph of the coordinates of a row that may interact in ``fn``.

    .. math:: \text{no edge } (i, j) \;\Rightarrow\; Δ_i Δ_j f = 0 \text{ everywhere}

    :param fn: maps a dict of arrays of shape (rows, ...) to any arrays, row by row; it is traced,
        not run.
    :param dict inputs: arrays (or shapes with dtypes) like its argument. Coordinate i of a row is
        the i-th of all sites flattened one after the other, in the order of the dict.
    :return: a symmetric ``scipy.sparse.csr_matrix`` of booleans, of shape (coordinates,
        coordinates); ``None`` where all may interact.

    **Example**

    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.interactions import interactions
    >>> chain = lambda x: jnp.sum(x["s"][:, 1:] * x["s"][:, :-1], -1)
    >>> interactions(chain, {"s": jnp.ones((5, 4))}).toarray().astype(int)
    array([[0, 1, 0, 0],
           [1, 0, 1, 0],
           [0, 1, 0, 1],
           [0, 0, 1, 0]])
    >>> interactions(lambda x: jnp.sum(x["s"], -1) ** 2, {"s": jnp.ones((5, 4))})
    """
    names = list(inputs)
    closed = jax.make_jaxpr(lambda *leaves: fn(dict(zip(names, leaves, strict=True))))(
        *(inputs[name] for name in names)
    )
    sizes = [math.prod(v.aval.shape[1:]) for v in closed.jaxpr.invars]
    dimension = sum(sizes)
    if dimension == 0 or sum(math.prod(v.aval.shape) for v in closed.jaxpr.invars) > MAX_ENTRIES:
        return None
    reads, start = [], 0
    for var, size in zip(closed.jaxpr.invars, sizes, strict=True):
        columns = np.tile(np.arange(start, start + size), var.aval.shape[0])
        reads.append(_ones(np.arange(len(columns)), columns, (len(columns), dimension)))
        start += size
    walker = _DependencyWalker(dimension)
    try:
        walker.walk(closed, reads)
    except _CannotTell:
        return None
    graph = walker.edges + walker.edges.T
    graph.setdiag(False)
    graph.eliminate_zeros()
    return graph.tocsr()


def _ones(rows, columns, shape):
    if len(rows) > MAX_ENTRIES:
        raise _CannotTell
    return csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape)


class _DependencyWalker:
    """Values are sparse matrices (elements, coordinates) of what is read, or constants."""

    def __init__(self, dimension):
        self.dimension = dimension
        self.edges = csr_matrix((dimension, dimension), dtype=bool)

    def walk(self, closed, values):
        return interpret(closed, self.apply, values, known)

    def apply(self, eqn, operands):
        """Values of all outputs of one equation."""
        name = eqn.primitive.name
        if not eqn.outvars:  # an effect, such as printing
            return []
        if called(eqn) is not None:
            return self.walk(called(eqn), operands)
        if all(isinstance(x, Constant) for x in operands):
            return evaluate_later(eqn, operands)
        moved = self.move(eqn, operands)
        if moved is not None:
            return moved
        if name == "gather" and isinstance(operands[0], Constant):
            return [self.look_up(eqn, operands[1])]
        if name in REDUCTIONS:
            return [self.reduce(eqn, operands[0])]
        if name == "dot_general":
            return [self.contract(eqn, operands)]
        if name == "mul" or name in LINEAR or name in ELEMENTWISE:
            return [self.combine(eqn, operands)]
        return self.anything(eqn, operands)

    def join(self, left, right=None):
        """Edges between all coordinates of ``left`` and of ``right``, element by element."""
        right = left if right is None else right
        counts = np.diff(left.indptr).astype(float), np.diff(right.indptr)
        if np.any(np.minimum(*counts) == self.dimension) and self.dimension > 1:
            raise _CannotTell
        if counts[0] @ counts[1] > MAX_ENTRIES:
            raise _CannotTell
        self.edges = self.edges + left.T.tocsr() @ right

    def anything(self, eqn, operands):
        """An operation of which nothing is known."""
        union = sum(_union(x) for x in operands if not isinstance(x, Constant)) > 0
        union = csr_matrix(union)
        self.join(union)
        return [self.rows_of(union, np.zeros(math.prod(v.aval.shape), int)) for v in eqn.outvars]

    def rows_of(self, matrix, index):
        if np.diff(matrix.indptr).max(initial=0) * float(len(index)) > MAX_ENTRIES:
            if np.diff(matrix.indptr)[index].sum(dtype=float) > MAX_ENTRIES:
                raise _CannotTell
        return matrix[index]

    def move(self, eqn, operands):
        """Operations that only move elements: they are run on the indices of the elements."""
        moving = moved_operands(eqn)
        if moving is None:
            return None
        arguments, stack, start = [], [csr_matrix((1, self.dimension), dtype=bool)], 1
        for i, (x, v) in enumerate(zip(operands, eqn.invars, strict=True)):
            if i not in moving:
                value = x.get() if isinstance(x, Constant) else None
                if value is None:
                    return None
            elif isinstance(x, Constant):
                value = np.zeros(v.aval.shape, np.int32)
            else:
                size = math.prod(v.aval.shape)
                value = np.arange(start, start + size, dtype=np.int32).reshape(v.aval.shape)
                stack.append(x)
                start += size
            arguments.append(value)
        outputs = evaluate_now(eqn, arguments)
        stack = vstack(stack, format="csr")
        return [self.rows_of(stack, np.maximum(x.ravel(), 0)) for x in outputs]  # < 0: filled in

    def look_up(self, eqn, indices):
        """``table[x]`` reads what its indices read."""
        numbers, shape = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
        indices = self.group(indices, np.arange(math.prod(shape)) // shape[-1], shape[:-1])
        self.join(indices)
        out = eqn.outvars[0].aval.shape
        batch = [1 if axis in numbers.offset_dims else size for axis, size in enumerate(out)]
        index = np.arange(math.prod(shape[:-1])).reshape(batch)
        return self.rows_of(indices, np.broadcast_to(index, out).ravel())

    def group(self, reads, groups, shape):
        """What groups of elements read, group by group."""
        return _ones(groups, np.arange(len(groups)), (math.prod(shape), reads.shape[0])) @ reads

    def reduce(self, eqn, reads):
        shape, axes = eqn.invars[0].aval.shape, eqn.params["axes"]
        kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
        groups = np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), shape).ravel()
        result = self.group(reads, groups, kept)
        if eqn.primitive.name != "reduce_sum":
            self.join(result)
        return result

    def contract(self, eqn, operands):
        """Inner products: a constant operand is known by its zeros."""
        (contract, batch) = eqn.params["dimension_numbers"]
        order, shapes, sizes = [], [], []
        for v, summed, batched in zip(eqn.invars, contract, batch, strict=True):
            free = [a for a in range(v.aval.ndim) if a not in (*summed, *batched)]
            order.append((*batched, *free, *summed))
            size = lambda axes, v=v: math.prod(v.aval.shape[a] for a in axes)  # noqa: E731
            shapes.append((size(batched), size(free), size(summed)))
            sizes.append(v.aval.shape)
        (B, L, K), (_, R, _) = shapes
        index = [
            np.arange(math.prod(s)).reshape(s).transpose(o).reshape(t)
            for s, o, t in zip(sizes, order, shapes, strict=True)
        ]
        constant = [isinstance(x, Constant) for x in operands]
        out = B * L * R, sum(x.shape[0] for x in operands if not isinstance(x, Constant))
        if any(constant):
            c = constant.index(True)
            value, width = operands[c].get(), (L, R)[1 - c]
            nonzero = np.ones(shapes[c], bool)
            if value is not None:
                nonzero = value.transpose(order[c]).reshape(shapes[c]) != 0
            b, own, k = (x[:, None] for x in np.nonzero(nonzero))
            if b.size * float(width) > MAX_ENTRIES:
                raise _CannotTell
            other = np.arange(width)[None]
            left, right = (own, other) if c == 0 else (other, own)
            rows = (b * L + left) * R + right
            columns = np.broadcast_to(index[1 - c][b, other, k], rows.shape)
            return _ones(rows.ravel(), columns.ravel(), out) @ operands[1 - c]
        if B * L * R * float(K) > MAX_ENTRIES:
            raise _CannotTell
        at = np.arange(B * L * R).reshape(B, L, R, 1)
        pairs = [
            np.broadcast_to(x, (B, L, R, K)).ravel()
            for x in (index[0][:, :, None], index[1][:, None])
        ]
        left, right = (self.rows_of(x, i) for x, i in zip(operands, pairs, strict=True))
        self.join(left, right)
        return self.group(left + right, np.broadcast_to(at, (B, L, R, K)).ravel(), (B, L, R))

    def combine(self, eqn, operands):
        """Operations element by element, after broadcasting."""
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        reads = []
        for x, v in zip(operands, eqn.invars, strict=True):
            if isinstance(x, Constant):
                continue
            if v.aval.shape != shape:
                index = np.arange(x.shape[0]).reshape(v.aval.shape)
                x = self.rows_of(x, np.broadcast_to(index, shape).ravel())
            reads.append(x)
        union = sum(reads[1:], start=reads[0])
        keeps = keeps_values(eqn)
        if name == "mul" and len(reads) == 1 and keeps:
            factor = next(x for x in operands if isinstance(x, Constant)).get()
            if factor is not None and not np.all(factor):
                nonzero = np.broadcast_to(factor != 0, shape).ravel()
                union = union.multiply(nonzero[:, None]).tocsr().astype(bool)
                union.eliminate_zeros()
        elif name == "mul" and len(reads) == 2:
            self.join(*reads)
        elif name == "select_n" and isinstance(operands[0], Constant):
            pass  # which case is not known, but each element is one of them
        elif name == "div" and isinstance(operands[1], Constant):
            if is_integer(eqn.outvars[0]):
                self.join(union)
        elif name not in LINEAR or not keeps:
            self.join(union)
        return union


def _union(reads):
    return np.asarray(reads.sum(0)) > 0
