# SPDX-License-Identifier: Apache-2.0
"""Sites whose coordinates have finitely many values: which they are; and where chains start."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace

from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.distributions import Counting, lowest_value
from numpyro_ebm.language.sites import unwrap

__all__ = ["finite_values", "initial_values", "num_values_of", "shifted", "support_values"]


def initial_values(rng_key, row_model, init_strategy, init_params):
    """Initial values of all unobserved sites: those of the strategy, and those that are given."""
    prepared = substitute(seed(row_model.model, rng_key), substitute_fn=init_strategy)
    model_trace = trace(prepared).get_trace(*row_model.args, **row_model.kwargs)
    z = {name: jnp.asarray(model_trace[name]["value"]) for name in row_model.sites}
    for name, x in (init_params or {}).items():
        if name not in z or jnp.shape(x) != z[name].shape:
            shapes = {k: v.shape for k, v in z.items()}
            raise ModelError(
                f"`init_params` has '{name}' of shape {jnp.shape(x)}; the unobserved sites "
                f"and their shapes are {shapes}."
            )
        z[name] = jnp.asarray(x, z[name].dtype)
    return z


def support_values(site, who):
    """The values of one coordinate of a discrete site, as a NumPy array of shape (K,)."""
    fn = unwrap(site.fn)
    if not fn.has_enumerate_support:
        raise ModelError(
            f"{who}: the site '{site.name}' ({type(fn).__name__}) has no finite number of "
            "values to weigh."
        )
    with jax.ensure_compile_time_eval():  # concrete inside of `jit` too
        values = np.asarray(fn.enumerate_support(expand=False))
    if values.size != len(values):
        raise ModelError(
            f"{who}: the values of the site '{site.name}' ({type(fn).__name__}) are arrays, "
            "not numbers; write it with `Counting(num_values)`."
        )
    return values.ravel()


def num_values_of(fn):
    """Number of values of one coordinate of a finite discrete distribution."""
    fn = unwrap(fn)
    if isinstance(fn, Counting):
        return fn.num_values
    return fn.enumerate_support(expand=False).shape[0]


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
