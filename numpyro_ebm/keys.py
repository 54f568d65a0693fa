# SPDX-License-Identifier: Apache-2.0
"""The random key that the library takes where it has to run a program and nobody gave it one."""

import jax

__all__ = ["DEFAULT_SEED", "default_key"]

DEFAULT_SEED = 1_618_033_988
"""A number that no user takes: draws of the library are then not those of the caller's key."""


def default_key() -> jax.Array:
    """The key of every run: for shapes and placeholders, and where ``rng_key=None`` is allowed."""
    return jax.random.key(DEFAULT_SEED)
