# SPDX-License-Identifier: Apache-2.0
r"""The coefficients of a log-density that is quadratic in the values of a row.

.. math:: \log\tilde p(x) = \text{const} + b^\top (x - m) + \tfrac12 (x - m)^\top H (x - m)

b is the gradient at the center m, and H the derivative of the gradient along all axes at once, the
identity matrix. Both are evaluated operation by operation: terms that are zero are dropped, and a
product with a diagonal matrix becomes a scaling. H of the energy :math:`-s^\top J s` is then
:math:`J + J^\top` times a number, without a product of matrices.
"""

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
    identity = Diagonal(np.ones(len(center), point.dtype))
    slope = jax.make_jaxpr(gradient)(point)
    derivative = jax.make_jaxpr(lambda t: jax.jvp(gradient, (point,), (t,))[1])(point)
    try:
        (b,) = _evaluate_structured(slope, [point])
        (H,) = _evaluate_structured(derivative, [identity])
    except NoSimpleForm:
        return None
    if H is None:
        H = jnp.zeros_like(point)
    if isinstance(H, Diagonal):
        H = jnp.diag(H.vector)
    return None if b is None else b[0], H


class NoSimpleForm(Exception):
    """Raised for an operation whose result on a diagonal matrix is not known to be simple."""


class Diagonal:
    """A diagonal matrix, with a row for each axis."""

    def __init__(self, vector: Any):
        self.vector = vector

    def __neg__(self):
        return Diagonal(-self.vector)


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
            is_diagonal = isinstance(other, Diagonal)
            return [other if is_diagonal else jnp.broadcast_to(other, eqn.outvars[0].aval.shape)]
        if any(isinstance(x, Diagonal) for x in operands):
            return [_of_diagonals(eqn, operands)]
        operands = [
            np.zeros(v.aval.shape, v.aval.dtype) if x is None else x
            for v, x in zip(eqn.invars, operands, strict=True)
        ]
        if not all(map(not_jax_tracer, operands)):
            return applied(closed.jaxpr, eqn, operands)
        with jax.ensure_compile_time_eval():
            return [_or_none(x) for x in applied(closed.jaxpr, eqn, operands)]

    return interpret(closed, apply, args, _or_none)


def _of_diagonals(eqn, operands):
    """One operation on at least one diagonal matrix."""
    name = eqn.primitive.name
    x, y = [*operands, None][:2]
    both = isinstance(x, Diagonal) and isinstance(y, Diagonal)
    if name in ("neg", "copy", "convert_element_type", "transpose"):
        vector = (-x if name == "neg" else x).vector
        return Diagonal(vector.astype(eqn.outvars[0].aval.dtype))
    if name == "reduce_sum":
        return x.vector if len(eqn.params["axes"]) == 1 else jnp.sum(x.vector)
    if name in ADDITIONS:
        if both:
            return Diagonal(ADDITIONS[name](x.vector, y.vector))
        x, y = (jnp.diag(z.vector) if isinstance(z, Diagonal) else z for z in (x, y))
        return ADDITIONS[name](x, y)
    if name == "mul":
        return Diagonal(_along(x) * _along(y))
    if name == "div" and not isinstance(y, Diagonal):
        return Diagonal(x.vector / _along(y))
    if name == "dot_general":
        (left, right), batch = eqn.params["dimension_numbers"]
        if len(left) == 1 and batch == ((), ()):
            if both:
                return Diagonal(_along(x) * _along(y))
            if isinstance(x, Diagonal):
                return jnp.moveaxis(_scaled(y, x.vector, right[0]), right[0], 0)
            return jnp.moveaxis(_scaled(x, y.vector, left[0]), left[0], -1)
        vector: Any = y if isinstance(x, Diagonal) else x
        if not left and batch == ((0,), (0,)) and np.ndim(vector) == 1:  # it scales the rows
            return Diagonal(_along(x) * _along(y))
    raise NoSimpleForm


def _along(x):
    """The diagonal of a matrix, an axis of length one repeated; vectors and numbers as they are."""
    if isinstance(x, Diagonal):
        return x.vector
    if np.ndim(x) > 2:
        raise NoSimpleForm
    if np.ndim(x) < 2:
        return x
    return jnp.diagonal(jnp.broadcast_to(x, (max(x.shape), max(x.shape))))


def _scaled(x, factor, axis):
    """An array times a vector along one of its axes."""
    return factor.reshape([-1 if i == axis else 1 for i in range(np.ndim(x))]) * x


def _or_none(x):
    """`None` for an array that is known to be zero."""
    is_known = not_jax_tracer(x) and jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return None if is_known and not np.asarray(x).any() else x
