# SPDX-License-Identifier: Apache-2.0
r"""The coefficients of a log-density that is quadratic in the values of a row.

.. math:: \log\tilde p(x) = \text{const} + b^\top (x - m) + \tfrac12 (x - m)^\top H (x - m)

b is the gradient at the center m, and H the derivative of the gradient along all axes at once, the
identity matrix. Both are evaluated operation by operation: terms that are zero are dropped, and a
product with a diagonal matrix becomes a scaling. H of the energy :math:`-s^\top J s` is then
:math:`J + J^\top` times a number, without a product of matrices.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.program.jaxprs import JITS, applied, interpret, vanishes

__all__ = ["quadratic_form"]

ADDITIONS = {"add": jnp.add, "add_any": jnp.add, "sub": jnp.subtract}


def quadratic_form(
    gradient: Callable[..., jax.Array], center: np.ndarray
) -> tuple[jax.Array | None, jax.Array] | None:
    """b and H, where the gradient consists of products with matrices and little else.

    :param gradient: maps (D, D), a point in every row, to the gradients at the points; affine.
    :param center: m, of shape (D,), a NumPy array.
    :return: b of shape (D,) or ``None`` if it is zero, and H of shape (D, D); or ``None`` instead
        of both where H has no simple form: with many zeros, a product with it may be more work
        than the gradient.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from numpyro_ebm.program.quadratic import quadratic_form
    >>> J = jnp.array([[0.0, 1.0], [0.0, 0.0]])
    >>> log_density = lambda x: jnp.sum(((2 * x - 1) @ J) * (2 * x - 1))
    >>> b, H = quadratic_form(jax.grad(log_density), np.full(2, 0.5, "float32"))
    >>> print(b, H.tolist())
    None [[0.0, 4.0], [4.0, 0.0]]
    """
    point = np.broadcast_to(center, (len(center), len(center)))
    identity = Selection(np.ones(len(center), point.dtype), np.arange(len(center)), center.shape)
    slope = jax.make_jaxpr(gradient)(point)
    derivative = jax.make_jaxpr(lambda t: jax.jvp(gradient, (point,), (t,))[1])(point)
    try:
        (b,) = _evaluate_structured(slope, [point])
        (H,) = _evaluate_structured(derivative, [identity])
    except NoSimpleForm:
        return None
    if H is None:
        H = jnp.zeros_like(point)
    if isinstance(H, Selection):
        H = H.dense()
    return None if b is None else b[0], H


class NoSimpleForm(Exception):
    """Raised for an operation on a diagonal matrix, or the like, whose result is not simple."""


class Selection:
    """A matrix with one entry in a row, such as a diagonal one; a row may be of any shape.

    :param vector: the entries, of shape (rows,).
    :param place: where in the row each of them is, as an index into its elements, (rows,).
    :param shape: the shape of a row.
    """

    def __init__(self, vector: Any, place: np.ndarray, shape: tuple[int, ...]):
        self.vector, self.place, self.shape = vector, place, shape

    def with_vector(self, vector: Any) -> "Selection":
        """Other entries in the same places."""
        return Selection(vector, self.place, self.shape)

    def __neg__(self):
        return self.with_vector(-self.vector)

    def dense(self) -> jax.Array:
        """The matrix as an array of shape (rows, *shape)."""
        size, rows = math.prod(self.shape), len(self.place)
        flat = jnp.zeros((rows, size), self.vector.dtype)
        flat = flat.at[np.arange(rows), self.place].set(self.vector)
        return jnp.reshape(flat, (rows, *self.shape))

    def entries_of(self, x: Any) -> Any:
        """The elements of another array in the same places."""
        if isinstance(x, Selection):
            if not np.array_equal(x.place, self.place):
                raise NoSimpleForm
            return x.vector
        if np.ndim(x) == 0:
            return x
        rows = len(self.place)
        flat = jnp.reshape(jnp.broadcast_to(x, (rows, *self.shape)), (rows, -1))
        return flat[np.arange(rows), self.place]


def _evaluate_structured(closed, args):
    """Evaluate a jaxpr; `None` stands for zeros, and operations on known values are run eagerly."""

    def apply(eqn, operands):
        name, vanished = eqn.primitive.name, [x is None for x in operands]
        if name in JITS:
            return _evaluate_structured(eqn.params["jaxpr"], operands)
        if any(vanished) and vanishes(eqn, vanished):
            return [None]
        if any(vanished) and name in ADDITIONS:
            other = operands[0] if vanished[1] else operands[1]
            other = -other if vanished[0] and name == "sub" else other
            is_diagonal = isinstance(other, Selection)
            return [other if is_diagonal else jnp.broadcast_to(other, eqn.outvars[0].aval.shape)]
        if any(isinstance(x, Selection) for x in operands):
            return [_of_selections(eqn, operands)]
        operands = [
            np.zeros(v.aval.shape, v.aval.dtype) if x is None else x
            for v, x in zip(eqn.invars, operands, strict=True)
        ]
        if not all(map(not_jax_tracer, operands)):
            return applied(eqn, operands)
        with jax.ensure_compile_time_eval():
            return [_or_none(x) for x in applied(eqn, operands)]

    return interpret(closed, apply, args, _or_none)


def _of_selections(eqn, operands):
    """One operation on at least one matrix with an entry in a row."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    which = 0 if isinstance(operands[0], Selection) else 1
    own, other = operands[which], operands[1 - which] if len(operands) > 1 else None
    if name in ("neg", "copy", "convert_element_type"):
        return own.with_vector((-own.vector if name == "neg" else own.vector).astype(out.dtype))
    if name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose"):
        return _rows_reshaped(eqn, own)
    if name == "reduce_sum":
        return _summed(own, eqn.params["axes"])
    if name in (*ADDITIONS, "mul", "div") and out.shape != (len(own.place), *own.shape):
        raise NoSimpleForm  # it is repeated along an axis
    if name in ADDITIONS:
        if isinstance(other, Selection):
            return own.with_vector(ADDITIONS[name](operands[0].vector, own.entries_of(operands[1])))
        return ADDITIONS[name](*(x.dense() if isinstance(x, Selection) else x for x in operands))
    if name == "mul":
        return own.with_vector(own.vector * own.entries_of(other))
    if name == "div" and which == 0:
        return own.with_vector(own.vector / own.entries_of(other))
    if name == "dot_general":
        return _contracted(eqn, operands, which)
    raise NoSimpleForm


def _rows_reshaped(eqn, own):
    """Rows stay rows, and the elements of a row keep their order."""
    out, name, rows = eqn.outvars[0].aval.shape, eqn.primitive.name, len(own.place)
    if name == "transpose" and own.shape == (rows,) and np.array_equal(own.place, np.arange(rows)):
        return own  # the matrix is symmetric
    moves = name == "transpose" and sum(size > 1 for size in own.shape) > 1
    first = eqn.params.get("permutation", eqn.params.get("broadcast_dimensions", (0,)))[0]
    is_same = out[:1] == (rows,) and math.prod(out[1:]) == math.prod(own.shape)
    if not is_same or moves or first != 0:
        raise NoSimpleForm
    return Selection(own.vector, own.place, out[1:])


def _summed(own, axes):
    if 0 in axes:
        if len(axes) == 1 + len(own.shape):
            return jnp.sum(own.vector)
        if len(axes) > 1:
            raise NoSimpleForm
        return jnp.reshape(jnp.sum(own.dense(), 0), own.shape)
    return _summed_over(own, axes, own.vector)


def _summed_over(own, axes, vector):
    """The matrix summed over axes of its rows, with these entries."""
    kept = [i for i in range(len(own.shape)) if i + 1 not in axes]
    shape = tuple(own.shape[i] for i in kept)
    if not shape:
        return vector
    index = np.unravel_index(own.place, own.shape)
    place = np.asarray(np.ravel_multi_index([index[i] for i in kept], shape))
    return Selection(vector, place, shape)


def _contracted(eqn, operands, which):
    """The rows or columns of the other factor, scaled."""
    contracted, batch = eqn.params["dimension_numbers"]
    own, other = operands[which], operands[1 - which]
    axes, others = contracted[which], contracted[1 - which]
    if isinstance(other, Selection):
        is_plain = axes == others == (1,) and own.shape == other.shape == (len(own.place),)
        if is_plain and not batch[0]:
            return own.with_vector(own.vector * own.entries_of(other))
        raise NoSimpleForm
    if not axes and batch == ((0,), (0,)) and np.ndim(other) == 1:  # it scales the rows
        return own.with_vector(own.vector * other)
    if batch != ((), ()) or not axes:
        raise NoSimpleForm
    if 0 in axes:
        if axes != (0,):
            raise NoSimpleForm
        # Columns of a product with the transposed matrix.
        is_diagonal = own.shape == own.place.shape and np.array_equal(
            own.place, np.arange(len(own.place))
        )
        if not is_diagonal:
            raise NoSimpleForm
        index = (own.place,)
    else:
        index = np.unravel_index(own.place, own.shape)
        index = tuple(index[i - 1] for i in axes)
        if np.ndim(other) == len(others):  # a weight for each element
            weights = jnp.transpose(other, others)[index]
            return _summed_over(own, axes, own.vector * weights)
        if any(size > 1 and i + 1 not in axes for i, size in enumerate(own.shape)):
            raise NoSimpleForm
    rows = jnp.moveaxis(jnp.asarray(other), others, range(len(others)))[index]
    rows = jnp.reshape(own.vector, (-1, *[1] * (rows.ndim - 1))) * rows
    out = eqn.outvars[0].aval.shape
    return jnp.reshape(rows if which == 0 else jnp.moveaxis(rows, 0, -1), out)


def _or_none(x):
    """`None` for an array that is known to be zero."""
    is_known = not_jax_tracer(x) and jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return None if is_known and not np.asarray(x).any() else x
