# SPDX-License-Identifier: Apache-2.0
r"""JAX's random numbers on a CPU with the rounds of their generator written out.

Every split and every draw is a hash of counters by Threefry-2x32 in twenty rounds. On a CPU, JAX
makes a loop of the rounds: a dozen small kernels to compile, which read and write all the numbers
again and again. Written out, the rounds are one kernel that keeps them in registers. They are the
same bits, integers modulo :math:`2^{32}`. On other devices, JAX writes them out itself.

Reference: Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.
"""

from typing import Any

import jax
import numpy as np

from numpyro_ebm._compat import define_prng_impl, set_xla_metadata, threefry_prng_impl
from numpyro_ebm.program.jaxprs import JITS, applied, interpret

__all__ = ["is_rolled", "threefry", "unrolled"]

HASHES = ("random_bits", "random_fold_in", "random_split")
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = np.uint32(0x1BD11BDA)


def is_rolled(eqn: Any) -> bool:
    """Whether an operation of a jaxpr hashes by a key of JAX's Threefry."""
    return eqn.primitive.name in HASHES and str(eqn.invars[0].aval.dtype) == "key<fry>"


def unrolled(eqn: Any, keys: jax.Array, *operands: Any) -> list[Any]:
    """The results of such an operation, the rounds of its hash written out.

    :param eqn: the operation.
    :param keys: its first operand.
    :param operands: the other ones.
    """

    @jax.jit
    def hashed(keys, *operands):
        keys = jax.random.wrap_key_data(jax.random.key_data(keys), impl=WRITTEN_OUT)
        (found,) = applied(eqn, (keys, *operands))
        if eqn.primitive.name == "random_bits":
            return found
        return jax.random.wrap_key_data(jax.random.key_data(found), impl="threefry2x32")

    # Fused with what comes next, the compiler would hash once for each that reads it.
    with set_xla_metadata(inlineable="false"):
        return [hashed(keys, *operands)]


def _with_rounds(fn):
    """A function of a key's two words, and of more, with the rounds of its hashes written out."""

    def call(key, *static):
        return _in_full(jax.make_jaxpr(lambda key: fn(key, *static))(key), [key])[0]

    return call


def _fold_in(key, data):
    closed = jax.make_jaxpr(threefry_prng_impl.fold_in)(key, data)
    return _in_full(closed, [key, data])[0]


def _in_full(closed, arguments):
    def apply(eqn, operands):
        if eqn.primitive.name in JITS:
            return _in_full(eqn.params["jaxpr"], operands)
        if eqn.primitive.name == "threefry2x32":
            with set_xla_metadata(inlineable="true"):
                return threefry(*operands)
        return applied(eqn, operands)

    return interpret(closed, apply, arguments)


@jax.jit
def threefry(
    key1: jax.Array, key2: jax.Array, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32-20 of the counters ``left`` and ``right``, element by element."""
    keys = key1, key2, key1 ^ key2 ^ PARITY
    left, right = left + key1, right + key2
    for block in range(5):
        for shift in ROTATIONS[block % 2]:
            left = left + right
            right = left ^ (right << np.uint32(shift) | right >> np.uint32(32 - shift))
        left = left + keys[(block + 1) % 3]
        right = right + keys[(block + 2) % 3] + np.uint32(block + 1)
    return left, right


WRITTEN_OUT = define_prng_impl(
    key_shape=(2,),
    seed=threefry_prng_impl.seed,
    split=_with_rounds(threefry_prng_impl.split),
    random_bits=_with_rounds(threefry_prng_impl.random_bits),
    fold_in=_fold_in,
    name="threefry2x32, written out",
    tag="fry, written out",
)
"""Threefry as JAX has it, but for the rounds."""
