# SPDX-License-Identifier: Apache-2.0
"""One chain a row, one model evaluation a step.

A BlackJAX kernel moves one chain and asks for the log-density of one position. The model of a plate
evaluates all its rows at once. :func:`per_row` turns the log-density of all rows into one of a
single row that, under :func:`jax.vmap` over the rows, evaluates the whole plate once, value and
gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm._compat import ClosedJaxpr, jaxpr_as_fun
from numpyro_ebm.errors import ModelError
from numpyro_ebm.types import LogDensity

__all__ = ["per_row"]


def per_row(log_density: LogDensity, like: tuple[Any, ...] | None = None) -> LogDensity:
    """Log-density of one row, to be used under ``jax.vmap`` over all rows.

    :param log_density: maps positions with rows leading, and further arguments that the rows share
        (a temperature), to an array of shape (rows,), row by row.
    :param tuple like: arguments of ``log_density``, or their shapes. Needed where a kernel calls it
        within a loop of its own and it closes over values that are being traced, as a model does
        that another block of ``Gibbs`` conditions; it is then traced here, once.
    :return: a function of one row's position and the shared arguments, differentiable in the
        position. Outside of ``jax.vmap`` its value is NaN, because the other rows are not known
        there.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.samplers.per_row import per_row
    >>> rows = per_row(lambda x: -0.5 * jnp.sum(x**2, -1))
    >>> jax.vmap(jax.grad(rows))(jnp.array([[1.0], [2.0]])).ravel()
    Array([-1., -2.], dtype=float32)
    """
    if like is None:
        return _per_row(lambda rows, _, *shared: log_density(rows, *shared), ())
    traced = jax.make_jaxpr(log_density)(*like)

    def evaluate(rows, closed_over, *shared):
        function = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, closed_over))
        (values,) = function(*jax.tree.leaves((rows, *shared)))
        return values

    return _per_row(evaluate, list(traced.consts))


def _per_row(log_density, closed_over):
    @jax.custom_batching.custom_vmap
    def value_and_grad(position, shared):
        dtype = jnp.result_type(*jax.tree.leaves(position))
        return jnp.full((), jnp.nan, dtype), position

    @value_and_grad.def_vmap
    def _(axis_size, in_batched, position, shared):
        if any(jax.tree.leaves(in_batched[1])):
            raise ModelError("`per_row`: the arguments after the position must not vary by row.")
        values, pullback = jax.vjp(lambda x: log_density(x, *shared), position)
        (gradients,) = pullback(jnp.ones_like(values))
        return (values, gradients), (True, jax.tree.map(lambda _: True, position))

    @jax.custom_vjp
    def one_row(position, *shared):
        return value_and_grad(position, shared)[0]

    def forward(position, *shared):
        value, gradient = value_and_grad(position, shared)
        return value, (gradient, shared)

    def backward(residuals, cotangent):
        gradient, shared = residuals
        return (jax.tree.map(lambda g: cotangent * g, gradient), *(None for _ in shared))

    one_row.defvjp(forward, backward)
    return lambda position, *shared: one_row(position, closed_over, *shared)
