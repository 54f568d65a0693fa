# SPDX-License-Identifier: Apache-2.0
"""Sites whose coordinates have finitely many values."""

import jax.numpy as jnp

from numpyro_ebm.errors import ModelError
from numpyro_ebm.marginals.enumerated import num_values_of
from numpyro_ebm.model.row_model import lowest_value

__all__ = ["finite_values", "shifted"]


def finite_values(site, owner):
    """Values of one coordinate of a discrete site: lowest, lowest + 1, …, lowest + K - 1.

    :param RowSite site: the site.
    :param str owner: who asks, for the error.
    :return: the lowest value and K.
    :raises ModelError: if there are infinitely many values, or not the same in all elements.
    """
    if not site.fn.has_enumerate_support:
        raise ModelError(
            f"{owner}: the visible site '{site.name}' has infinitely many values, or none that "
            "NumPyro can enumerate. Use NCE, or a finite base measure such as `Counting(K)`."
        )
    try:
        return lowest_value(site.fn.support), num_values_of(site.fn)
    except (NotImplementedError, TypeError):
        raise ModelError(
            f"{owner}: the values of the visible site '{site.name}' must be the same for all its "
            "elements, and known before the model runs."
        ) from None


def shifted(values, shift, lowest, num_values):
    """Move the values lowest, …, lowest + K - 1 on by ``shift`` < K places, round and round."""
    dtype = jnp.result_type(values)
    wide = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(int)  # no overflow
    moved = jnp.asarray(values, wide) + jnp.asarray(shift, wide)
    return jnp.where(moved >= lowest + num_values, moved - num_values, moved).astype(dtype)
