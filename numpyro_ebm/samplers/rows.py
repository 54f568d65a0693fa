# SPDX-License-Identifier: Apache-2.0
"""One chain a row, one model evaluation a step.

A BlackJAX kernel moves one chain and asks for the log-density of one position. The model of a plate
evaluates all its rows at once. :func:`per_row` turns the log-density of all rows into one of a
single row that, under :func:`jax.vmap` over the rows, evaluates the whole plate once, value and
gradient.
"""

import jax
import jax.numpy as jnp

__all__ = ["per_row"]


def per_row(log_density):
    """Log-density of one row, to be used under ``jax.vmap`` over all rows.

    :param log_density: maps positions with rows leading to an array of shape (rows,), row by row.
    :return: a function of one row's position. Outside of ``jax.vmap`` its value is NaN, because the
        other rows are not known there.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.samplers.rows import per_row
    >>> rows = per_row(lambda x: -0.5 * jnp.sum(x**2, -1))
    >>> jax.vmap(jax.grad(rows))(jnp.array([[1.0], [2.0]])).ravel()
    Array([-1., -2.], dtype=float32)
    """

    @jax.custom_batching.custom_vmap
    def value_and_grad(position):
        dtype = jnp.result_type(*jax.tree.leaves(position))
        return jnp.full((), jnp.nan, dtype), position

    @value_and_grad.def_vmap
    def _(axis_size, in_batched, position):
        values, pullback = jax.vjp(log_density, position)
        (gradients,) = pullback(jnp.ones_like(values))
        return (values, gradients), (True, jax.tree.map(lambda _: True, position))

    @jax.custom_vjp
    def one_row(position):
        return value_and_grad(position)[0]

    def forward(position):
        return value_and_grad(position)

    def backward(gradient, cotangent):
        return (jax.tree.map(lambda g: cotangent * g, gradient),)

    one_row.defvjp(forward, backward)
    return one_row
