# SPDX-License-Identifier: Apache-2.0
"""Keys hashed in one loop are those that JAX splits off one after the other."""

import jax
import numpy as np
import pytest

from numpyro_ebm.program.draws import scan_keys, split_off_draws
from numpyro_ebm.program.jaxprs import inner_jaxprs, written_out
from numpyro_ebm.program.on_cpu import eval_on_cpu

KEYS = jax.random.key(7), jax.random.key(11)


def chain(key, other):
    key = jax.random.fold_in(jax.random.split(key, 3)[1], 5)
    return jax.random.split(jax.random.split(key)[1], 4)[3]


def tree(key, other):
    """Leaves of all levels, two on one branch, numbers at the ends, and keys split as a whole."""
    a, b, c = jax.random.split(key, 3)
    d = jax.random.fold_in(b, 2**32 - 1)
    e, f = jax.random.split(jax.random.fold_in(c, 2))
    return a, d, jax.random.fold_in(d, 0), jax.random.split(e, 5), e, jax.random.split(f)[0]


def two_roots(key, other):
    of_key, of_other = jax.random.split(key)[1], jax.random.split(other, 5)[4]
    return jax.random.fold_in(of_other, 3), jax.random.split(of_key)[0], of_other


def number_of_an_array(key, other):
    """A number that is not known before: that key and those of it are left as they are."""
    number = jax.random.key_data(other)[1]
    return chain(key, other), jax.random.split(jax.random.fold_in(key, number))[1]


def arrays(key, other):
    """Keys of particles split again, some of them left out, and more keys than are worth it."""
    a, b, c = jax.random.split(key, 3)
    parts = jax.vmap(lambda key: jax.random.split(key, 3)[1:])(jax.random.split(a, 4))
    folded = jax.vmap(lambda key: jax.random.fold_in(key, 6))(jax.random.split(b, 5)[::2])
    many = jax.vmap(jax.random.split)(jax.random.split(jax.random.fold_in(c, 1), 40))
    return parts, parts[2], parts[::2, 1], folded, many, many[3]


def num_programs(jaxpr, name="hashed_level"):
    """How many functions of a name it calls."""
    inside = [x for eqn in jaxpr.eqns for x in inner_jaxprs(eqn)]
    return sum(x.params.get("name") == name for x in jaxpr.eqns) + sum(
        num_programs(x, name) for x in inside
    )


@pytest.mark.parametrize("fn", [chain, tree, two_roots, number_of_an_array, arrays])
def test_keys_are_the_same(fn):
    """Of many keys side by side, as rounds are drawn ahead; the hash stands in a loop, once."""
    closed, _ = written_out(fn, *KEYS)
    many = [jax.random.split(key, 3) for key in KEYS]

    def program(*keys):
        return eval_on_cpu(closed.jaxpr, closed.consts, *keys, in_loop=False)

    assert num_programs(jax.make_jaxpr(program)(*KEYS).jaxpr) == 1
    found, expected = jax.jit(jax.vmap(program))(*many), jax.jit(jax.vmap(fn))(*many)
    for x, y in zip(found, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(jax.random.key_data(x), jax.random.key_data(y))


def test_steps_of_a_loop_are_hashed_with_the_rest():
    """A loop of steps inside of a round leaves its keys to the program that it is a part of."""

    def a_round(key, x):
        key, key_steps = jax.random.split(key)
        step = lambda key, x: x + jax.random.normal(jax.random.split(key)[1])  # noqa: E731
        return scan_keys(step, x, jax.random.split(key_steps, 3)) + jax.random.normal(key)

    draw, _, _ = split_off_draws(a_round, KEYS[0], 1.0)
    jaxpr = jax.make_jaxpr(draw)(KEYS[0]).jaxpr
    assert (num_programs(jaxpr), num_programs(jaxpr, "hashed")) == (1, 2)  # keys, and two draws


def test_the_other_way_to_count_is_left_alone():
    """Without the option that lets devices count apart, the parts of a key are other hashes."""
    with jax.threefry_partitionable(False):
        closed, _ = written_out(chain, *KEYS)
        found = eval_on_cpu(closed.jaxpr, closed.consts, *KEYS, in_loop=False)
        expected = chain(*KEYS)
    np.testing.assert_array_equal(jax.random.key_data(found[0]), jax.random.key_data(expected))
