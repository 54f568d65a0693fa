# SPDX-License-Identifier: Apache-2.0
r"""Keys that a program splits off one another, hashed level by level in one loop.

A step splits its key, folds a number into one of the parts, splits that again: five to ten hashes
one after the other, of a few words each, and for each of them some two hundred operations to trace,
lower and compile. With JAX's Threefry they are all alike: the i-th part of a key, and the key with
i folded in, are the hash of the counter (0, i) by that key. So a table of parents and numbers says
what a loop over the levels of their tree does, and one hash is compiled. The keys are the same.
"""

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


def with_keys_first(closed: Any, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """A closed jaxpr whose keys are among its arguments, and these; or what was given.

    :param closed: a closed jaxpr.
    :param args: the values of its arguments.
    """
    jaxpr = closed.jaxpr
    parents = _parents(jaxpr) if jax.config.jax_threefry_partitionable else {}  # pyright: ignore
    rest = jaxpr.replace(eqns=[x for x in needed(jaxpr) if not parents.keys() & set(x.outvars)])
    rest = rest.replace(eqns=needed(rest))
    if _num_hashes(jaxpr) - _num_hashes(rest) < WORTH:
        return closed, args
    read = {*variables(rest.outvars), *(v for x in rest.eqns for v in variables(x.invars))}
    keys = [v for v in parents if v in read]
    values = _hashed(keys, parents, dict(zip(jaxpr.invars, args, strict=True)))
    rest = rest.replace(invars=[*jaxpr.invars, *keys])
    return ClosedJaxpr(rest, closed.consts), [*args, *values]


def _parents(jaxpr):
    """The key and the number that every key is the hash of, from the jaxpr's arguments on."""
    known = {v for v in jaxpr.invars if v.aval.shape == () and str(v.aval.dtype) == "key<fry>"}
    parents, parts, part = {}, {}, {}
    for eqn in needed(jaxpr):
        name = eqn.primitive.name
        if name not in ("random_split", "random_fold_in", "slice", "squeeze", "unstack"):
            continue
        key, out = eqn.invars[0], eqn.outvars[0]
        if isinstance(key, Literal):
            continue
        if name == "random_split" and key in known and len(eqn.params["shape"]) == 1:
            parts[out] = key
        elif name == "slice" and key in parts and out.aval.shape == (1,):
            part[out] = parts[key], eqn.params["start_indices"][0]
        elif name == "squeeze" and key in part:
            parents[out] = part[key]
        elif name == "unstack" and key in parts:  # of newer versions of JAX
            parents.update((v, (parts[key], i)) for i, v in enumerate(eqn.outvars))
        elif name == "random_fold_in" and key in known and isinstance(eqn.invars[1], Literal):
            parents[out] = key, int(eqn.invars[1].val)
        known.update(v for v in eqn.outvars if v in parents)
    return parents


def _num_hashes(jaxpr):
    return sum(map(is_rolled, needed(jaxpr)))


def _hashed(keys, parents, arguments):
    """The values of some keys."""
    levels: list[list[Any]] = []
    level_of: dict[Any, int] = {}

    def enter(key):
        if key not in level_of:
            parent = parents[key][0]
            level_of[key] = 1 + enter(parent) if parent in parents else 0
            levels.extend([] for _ in range(level_of[key] + 1 - len(levels)))
            levels[level_of[key]].append(key)
        return level_of[key]

    for key in keys:
        enter(key)
    roots = list(dict.fromkeys(parents[key][0] for key in levels[0]))
    width = max(map(len, levels))
    place = {key: i for i, key in enumerate(roots)}
    for i, level in enumerate(levels):
        place |= {key: len(roots) + i * width + j for j, key in enumerate(level)}
    table = np.zeros((2, len(levels), width), np.uint32)
    for i, level in enumerate(levels):
        for j, key in enumerate(level):
            table[:, i, j] = place[parents[key][0]], parents[key][1]

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
    return [jax.random.wrap_key_data(words[:, place[k]], impl="threefry2x32") for k in keys]
