# SPDX-License-Identifier: Apache-2.0
"""Random numbers with their rounds written out are JAX's own, bit for bit, wherever drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from numpyro_ebm.program import random_numbers
from numpyro_ebm.program.compilation import constants_as_arguments, run_compiled
from numpyro_ebm.program.jaxprs import inner_jaxprs

KEY = jax.random.key(7)


def bits(key, shape=(3, 5)):
    return jax.random.bits(key, shape)


def repeated(draw):
    def fn(key):
        keys = jax.random.split(key, 3)
        return lax.scan(lambda x, k: (x + draw(k), draw(k)), jnp.zeros_like(draw(key)), keys)

    return fn


def until(key):
    """A key that is folded in and split from round to round."""

    def body(carry):
        i, key, _ = carry
        key, mine = jax.random.split(jax.random.fold_in(key, i))
        return i + 1, key, bits(mine)

    i, key, x = lax.while_loop(lambda c: jax.random.uniform(c[1]) < 0.9, body, (0, key, bits(key)))
    return i, jax.random.key_data(key), x


def branches(key):
    return lax.cond(jax.random.bernoulli(key), lambda k: bits(k), lambda k: ~bits(k), key)


DRAWS = {
    "odd sizes": lambda key: [bits(key, (n,)) for n in (0, 1, 2, 7)],
    "no axes": lambda key: bits(key, ()),
    "narrow and wide": lambda key: [jax.random.bits(key, (6,), t) for t in ("uint8", "uint16")],
    "keys": lambda key: jax.random.key_data(jax.random.split(key, (2, 3))),
    "many keys": lambda key: jax.vmap(bits)(jax.random.split(key, 4)),
    "numbers folded in": lambda key: jax.vmap(lambda i: bits(jax.random.fold_in(key, i)))(
        jnp.array([-1, 0, 2**31 - 1])
    ),
    "integers": lambda key: jax.random.randint(key, (9,), -5, 1000),
    "normals": lambda key: jax.random.normal(key, (9,)),
    "an order": lambda key: jax.random.permutation(key, 50),
    "gammas": lambda key: jax.random.gamma(key, 0.7, (9,)),
    "counts": lambda key: jax.random.poisson(key, 3.0, (9,)),
    "words of an old key": lambda key: jax.random.normal(jax.random.key_data(key), (4,)),
    "a loop": repeated(bits),
    "a loop in a loop": repeated(lambda key: repeated(bits)(key)[1].sum(0)),
    "an open loop": until,
    "a branch": branches,
    "a function of its own": jax.jit(bits),
    "a derivative": lambda key: jax.grad(
        lambda x: jnp.sum(jnp.sin(x * jax.random.normal(key, (4,))))
    )(0.3),
    "recomputed": lambda key: jax.grad(
        jax.checkpoint(lambda x: jnp.sum(jnp.sin(x * jax.random.normal(key, (4,)))))
    )(0.3),
    "another generator": lambda key: jax.random.normal(jax.random.key(3, impl="rbg"), (4,)),
}


def hashes(jaxpr):
    inside = [x for eqn in jaxpr.eqns for x in inner_jaxprs(eqn)]
    return sum(map(random_numbers.is_rolled, jaxpr.eqns)) + sum(map(hashes, inside))


@pytest.mark.parametrize("name", DRAWS)
def test_programs_draw_the_same_bits(name):
    fn = DRAWS[name]
    program, constants = constants_as_arguments(fn, KEY)
    assert not hashes(jax.make_jaxpr(program)(constants, KEY).jaxpr)
    jax.tree.map(np.testing.assert_array_equal, run_compiled(fn, KEY), jax.jit(fn)(KEY))


@pytest.mark.slow
def test_the_other_way_to_count_is_kept():
    """Without the option that lets devices count apart, JAX counts otherwise."""
    with jax.threefry_partitionable(False):
        drawn = run_compiled(lambda key: bits(jax.random.split(key)[1]), KEY)
        np.testing.assert_array_equal(drawn, bits(jax.random.split(KEY)[1]))
    assert (drawn != bits(jax.random.split(KEY)[1])).any()


def test_words_are_those_of_the_paper():
    """A known answer of Threefry-2x32-20, from the test vectors of Random123."""
    words = [np.uint32(x) for x in (0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3)]
    assert [int(x) for x in random_numbers.threefry(*words)] == [0xC4923A9C, 0x483DF7A0]
