# SPDX-License-Identifier: Apache-2.0
r"""Keys that a program splits off one another, hashed level by level in one loop.

A step splits its key, folds a number into one of the parts, splits that again: five to ten hashes
one after the other, of a few words each, and for each of them some two hundred operations to trace,
lower and compile. With JAX's Threefry they are all alike: the i-th part of a key, and the key with
i folded in, are the hash of the counter (0, i) by that key. So a table of parents and numbers says
what a loop over the levels of their tree does, and one hash is compiled. The keys are the same.

Arrays of a few keys, one for each particle or step, are read as so many keys.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_ebm._compat import ClosedJaxpr, Literal, set_xla_metadata
from numpyro_ebm.program.jaxprs import needed, variables
from numpyro_ebm.program.random_numbers import is_rolled, threefry

__all__ = ["with_keys_first"]

WORTH = 3
"""Hashes that have to be saved: a loop is a few programs itself."""

MOST = 32
"""Keys of an array at most: all levels are as wide as the widest."""


def with_keys_first(closed: Any, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """A closed jaxpr whose keys are among its arguments, and these; or what was given.

    :param closed: a closed jaxpr.
    :param args: the values of its arguments.
    """
    jaxpr = closed.jaxpr
    keys = _key_arrays(jaxpr) if jax.config.jax_threefry_partitionable else {}  # pyright: ignore
    rest = jaxpr.replace(eqns=[x for x in needed(jaxpr) if not keys.keys() & set(x.outvars)])
    rest = rest.replace(eqns=needed(rest))
    if _num_hashes(jaxpr) - _num_hashes(rest) < WORTH:
        return closed, args
    read = {*variables(rest.outvars), *(v for x in rest.eqns for v in variables(x.invars))}
    keys = {v: nodes for v, nodes in keys.items() if v in read}
    values = _hashed(keys.values(), dict(zip(jaxpr.invars, args, strict=True)))
    rest = rest.replace(invars=[*jaxpr.invars, *keys])
    return ClosedJaxpr(rest, closed.consts), [*args, *values]


def _key_arrays(jaxpr):
    """Arrays of keys, each key the hash ``(parent, number)``, from the jaxpr's arguments on."""
    known = {
        v: _nodes([v], ())
        for v in jaxpr.invars
        if v.aval.shape == () and str(v.aval.dtype) == "key<fry>"
    }
    roots = set(known)
    for eqn in needed(jaxpr):
        is_small = all(math.prod(v.aval.shape) <= MOST for v in eqn.outvars)
        if is_small and variables(eqn.invars[:1]) and eqn.invars[0] in known:
            found = _keys_made(eqn, known[eqn.invars[0]])
            known.update(zip(eqn.outvars, found, strict=False))
    return {v: nodes for v, nodes in known.items() if v not in roots}


def _keys_made(eqn, nodes):
    """The results of an operation on an array of keys; none if they are not known."""
    name, params = eqn.primitive.name, eqn.params
    if name == "random_split":
        numbers = range(math.prod(params["shape"]))
        found = [(key, i) for key in nodes.flat for i in numbers]
        return [_nodes(found, eqn.outvars[0].aval.shape)]
    if name == "random_fold_in" and isinstance(eqn.invars[1], Literal):
        number = int(eqn.invars[1].val)
        return [_nodes([(key, number) for key in nodes.flat], nodes.shape)]
    if name == "slice":
        bounds = params["start_indices"], params["limit_indices"]
        return [nodes[tuple(map(slice, *bounds, params["strides"] or [1] * nodes.ndim))]]
    if name == "squeeze":
        return [nodes.squeeze(tuple(params["dimensions"]))]
    if name == "unstack":  # of newer versions of JAX
        axis = params["axis"]
        return [x.squeeze(axis) for x in np.split(nodes, nodes.shape[axis], axis)]
    return []


def _nodes(found, shape):
    array = np.empty(len(found), object)
    array[:] = found
    return array.reshape(shape)


def _num_hashes(jaxpr):
    return sum(map(is_rolled, needed(jaxpr)))


def _hashed(arrays, arguments):
    """The values of arrays of keys."""
    levels: list[list[Any]] = []
    level_of: dict[Any, int] = {}

    def enter(key):
        if key not in level_of:
            parent = key[0]
            level_of[key] = 1 + enter(parent) if isinstance(parent, tuple) else 0
            levels.extend([] for _ in range(level_of[key] + 1 - len(levels)))
            levels[level_of[key]].append(key)
        return level_of[key]

    for nodes in arrays:
        for key in nodes.flat:
            enter(key)
    roots = list(dict.fromkeys(parent for parent, _ in levels[0]))
    width = max(map(len, levels))
    place = {key: i for i, key in enumerate(roots)}
    for i, level in enumerate(levels):
        place |= {key: len(roots) + i * width + j for j, key in enumerate(level)}
    table = np.zeros((2, len(levels), width), np.uint32)
    for i, level in enumerate(levels):
        for j, (parent, number) in enumerate(level):
            table[:, i, j] = place[parent], number

    @jax.jit
    def hashed_level(words, numbers):
        return jnp.stack(threefry(words[0], words[1], jnp.zeros_like(numbers), numbers))

    def one(words, level):
        start, parent, numbers = level
        mine = words.at[:, parent].get(mode="promise_in_bounds", wrap_negative_indices=False)
        with set_xla_metadata(inlineable="false"):
            found = hashed_level(mine, numbers)
        return lax.dynamic_update_slice_in_dim(words, found, start, 1), None

    words = jnp.stack([jax.random.key_data(arguments[key]) for key in roots], 1)
    words = jnp.pad(words, ((0, 0), (0, len(levels) * width)))
    starts = (len(roots) + width * np.arange(len(levels))).astype(np.int32)
    words, _ = lax.scan(one, words, (starts, table[0].astype(np.int32), table[1]))

    def array(nodes):
        places = [place[key] for key in nodes.flat]
        first, last = places[0], places[-1] + 1
        in_order = places == list(range(first, last))
        found = words[:, first:last] if in_order else words[:, np.array(places)]
        return jax.random.wrap_key_data(found.T.reshape(*nodes.shape, 2), impl="threefry2x32")

    return [array(nodes) for nodes in arrays]
