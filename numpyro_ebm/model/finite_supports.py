# SPDX-License-Identifier: Apache-2.0
"""Values of unobserved sites in their own coordinates: where chains start, and which there are."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace

from numpyro_ebm.errors import ModelError

__all__ = ["initial_values", "support_values"]


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
    fn = site.fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
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
