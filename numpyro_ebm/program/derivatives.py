# SPDX-License-Identifier: Apache-2.0
r"""Values whose derivatives of the first order are estimators: what those of the second are.

With z(θ) an array and ⊥ a stop of gradients, ``z · f(θ)`` has twice the value and the gradient of
½f² where z = ⊥f, for the price of one reverse pass (:func:`half_value` takes half of the value
alone); and the Hessian of something else.
Where z is a function of θ like any other, a stop that holds for one differentiation only,
:func:`constant_once`, gives all its derivatives. Where z is an estimate independent of f nothing
does, and :func:`once_differentiable` refuses.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.program.compilation import constants_as_arguments

__all__ = ["constant_once", "half_value", "once_differentiable", "without_derivatives"]


@jax.custom_jvp
def constant_once(x: Any) -> Any:
    r"""``x``, constant to the first differentiation and to no later one.

    :param x: a pytree of floating point arrays.
    :return: the same.

    **Example**

    >>> import jax
    >>> from numpyro_ebm.program.derivatives import constant_once, half_value
    >>> half_square = lambda x: half_value(constant_once(x) * x)
    >>> f, df = half_square, jax.grad(half_square)
    >>> float(f(3.0)), float(df(3.0)), float(jax.grad(df)(3.0))
    (4.5, 3.0, 1.0)
    """
    return x


@constant_once.defjvp
def _(primals, tangents):
    return primals[0], jax.tree.map(jnp.zeros_like, tangents[0])


@jax.custom_jvp
def half_value(x: jax.Array) -> jax.Array:
    r"""x / 2 with the first derivative of x.

    It is ``x - constant_once(x) / 2``, also where x is infinite.

    :param x: a floating point array.
    :return: the same shape.
    """
    return 0.5 * x


@half_value.defjvp
def _(primals, tangents):
    return 0.5 * primals[0], tangents[0]


def once_differentiable(x: jax.Array, why: str) -> jax.Array:
    """``x``, whose first derivatives are right and whose second ones raise.

    :param x: a floating point array.
    :param str why: the message of the error.
    :return: the same.
    :raises ModelError: when differentiated twice, also inside of `jit`, `vmap` and `scan`.

    **Example**

    >>> import jax
    >>> from numpyro_ebm.program.derivatives import once_differentiable
    >>> df = jax.grad(lambda x: once_differentiable(x**2, "There is no Hessian."))
    >>> float(df(3.0))
    6.0
    >>> jax.grad(df)(3.0)
    Traceback (most recent call last):
    numpyro_ebm.errors.ModelError: There is no Hessian...
    """

    @jax.custom_jvp
    def same(x):
        return x

    @jax.custom_jvp
    def one(x):
        return jnp.ones((), jnp.result_type(x))

    @same.defjvp
    def _(primals, tangents):
        # The factor depends on x as far as JAX can see: the next differentiation meets its rule.
        return primals[0], tangents[0] * one(primals[0])

    @one.defjvp
    def _(primals, tangents):
        raise ModelError(why)

    return same(x)


def without_derivatives(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` as a function whose derivatives in what it closes over are zero.

    Those in its arguments stay: a Markov chain at a density with parameters needs the one and not
    the other.

    :param fn: a function of pytrees of arrays.
    :return: the same.

    **Example**

    >>> import jax
    >>> from numpyro_ebm.program.derivatives import without_derivatives
    >>> f = lambda a, x: without_derivatives(lambda x: a * x)(x)
    >>> [float(y) for y in jax.grad(f, (0, 1))(2.0, 3.0)]
    [0.0, 2.0]
    """

    def stopped(*args):
        program, constants = constants_as_arguments(fn, *args)
        return program(jax.lax.stop_gradient(constants), *args)

    return stopped
