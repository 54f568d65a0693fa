# SPDX-License-Identifier: Apache-2.0
r"""Random numbers of many steps drawn at once.

A step of a training loop is a function of a random key and of a state. The operations that depend
on the key alone, from splitting it to the last transformation of the noise, do not need the state:
they can be done for many steps in one vectorised pass before the loop. On a CPU every split and
every draw compiles to a separate loop, and these take most of the time of a short step.

:func:`split_off_draws` finds those operations in the jaxpr of a step. Noise that a step draws twice
by the same key is drawn once. The results do not change: each step uses the numbers of its key.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_ebm.program.jaxprs import needed, variables, without_repeats, written_out
from numpyro_ebm.program.on_cpu import as_parts, eval_on_cpu

__all__ = ["at", "scan_keys", "split_off_draws"]


def split_off_draws(
    fn: Callable[..., Any], key: jax.Array, *args: Any
) -> tuple[Callable[[jax.Array], Any], Callable[..., Any], int]:
    """Split ``fn(key, *args)`` into what depends on the key alone, and the rest.

    :param fn: a function of a random key and of pytrees of arrays.
    :param key: a key, or its shape and type; only these matter.
    :param args: arguments, or their shapes and types.
    :return: functions ``draw`` and ``finish`` with ``fn(key, *args) == finish(draw(key), *args)``,
        the latter the body of a loop, and the bytes of what ``draw`` returns.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from numpyro_ebm.program.draws import split_off_draws
    >>> def walk(key, x):
    ...     return x + jax.random.normal(key, x.shape)
    >>> draw, finish, size = split_off_draws(walk, jax.random.key(0), jnp.ones(3))
    >>> keys = jax.random.split(jax.random.key(1), 5)
    >>> jax.lax.scan(lambda x, d: (finish(d, x), None), jnp.ones(3), jax.vmap(draw)(keys))[0].shape
    (3,)
    >>> size
    12
    """
    with as_parts():
        closed, shape = written_out(fn, key, *args)
    jaxpr = without_repeats(closed.jaxpr)
    of_key, of_rest = {jaxpr.invars[0]}, set(jaxpr.invars[1:])
    early, late, kept = [], [], []
    for eqn in needed(jaxpr):
        read = variables(eqn.invars)
        if eqn.effects or any(v in of_rest for v in read):
            late.append(eqn)
            of_rest.update(eqn.outvars)
            kept += [v for v in read if v in of_key]
        elif any(v in of_key for v in read):
            early.append(eqn)
            of_key.update(eqn.outvars)
        else:  # a constant, which both may need
            early.append(eqn)
            late.append(eqn)
    kept += [v for v in variables(jaxpr.outvars) if v in of_key]
    kept = list(dict.fromkeys(kept))
    first = jaxpr.replace(eqns=early, invars=jaxpr.invars[:1], outvars=kept)
    second = jaxpr.replace(eqns=late, invars=[*kept, *jaxpr.invars[1:]])
    structure = jax.tree.structure(shape)

    def draw(key):
        return eval_on_cpu(first, closed.consts, key, in_loop=False)

    def finish(draws, *args):
        leaves = (*draws, *jax.tree.leaves(args))
        leaves = eval_on_cpu(second, closed.consts, *leaves, in_loop=True)
        return jax.tree.unflatten(structure, leaves)

    return draw, finish, sum(_num_bytes(v.aval) for v in kept)


def scan_keys(step: Callable[[jax.Array, Any], Any], carry: Any, keys: jax.Array) -> Any:
    """``carry = step(key, carry)`` for every key in turn, all random numbers drawn first.

    :param step: a function of a key and of the carry, which returns the next carry.
    :param carry: a pytree of arrays.
    :param keys: keys, leading.
    :return: the last carry.
    """
    if len(keys) == 1:
        return step(keys[0], carry)
    draw, finish, _ = split_off_draws(step, keys[0], carry)
    draws = jax.vmap(draw)(keys)
    return jax.lax.scan(lambda x, d: (finish(d, x), None), carry, draws, length=len(keys))[0]


def at(x: jax.Array, i: ArrayLike) -> jax.Array:
    """``x[i]`` for an index known not to be negative, without a test of it at every step."""
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False)


def _num_bytes(aval):
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        aval = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return math.prod(aval.shape) * aval.dtype.itemsize
