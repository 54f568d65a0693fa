# SPDX-License-Identifier: Apache-2.0
"""Rows compared by evaluation, where operations do not tell whether they are apart.

Whether a row reads others is tried at all rows, some of which are changed: at the data themselves,
each row in the place of another one, and at random values.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.distributions import scalar_support
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.row_site import RowSite

__all__ = ["coupled_terms", "row_axis_of"]

SPREADS = (1.0, 3.0)
"""Half-widths of the random values, in unconstrained coordinates. For discrete sites the first
changes all units of a row, the second one in three."""


def coupled_terms(row_model: RowModel, names: list[str]) -> list[str]:
    """Those of the terms that change in some rows when the values of other rows do.

    Which rows are changed follows the binary digits of their indices: two rows differ in one.

    :param RowModel row_model: the model.
    :param names: names of terms.
    """
    found = set()
    with jax.ensure_compile_time_eval():  # also inside of a `jit`
        known = _at_known_values(row_model)
        terms = jax.jit(known.terms)
        for seed, spread in enumerate([None, *SPREADS]):
            found |= _changed(known, terms, sorted(row_model.sites), seed, spread, names)
    return [name for name in names if name in found]


def _changed(row_model, terms, moving, seed, spread, names):
    """Names of terms that a change of other rows changes; ``spread`` is ``None`` for the data."""
    key_params, key_values, key_moved = jax.random.split(jax.random.key(seed), 3)
    params = _random_parameters(row_model, key_params)
    here = _data_or_random(row_model, moving, key_values, spread)
    if spread is None:
        there = {
            name: jnp.roll(x, 1, row_axis_of(row_model.sites[name], x, row_model))
            for name, x in here.items()
        }
    else:
        keys = jax.random.split(key_moved, len(moving))
        there = {
            name: _elsewhere(key, here[name], row_model.sites[name].fn.support, spread)
            for name, key in zip(moving, keys, strict=True)
        }
    before, found = terms({**params, **here}), set()
    for moves in _halves(row_model.num_rows):
        values = {}
        for name, x in here.items():
            axis = row_axis_of(row_model.sites[name], x, row_model)
            mask = moves.reshape(-1, *[1] * (jnp.ndim(x) - axis - 1))
            values[name] = jnp.where(mask, there[name], x)
        after = terms({**params, **values})
        if not all(map(not_jax_tracer, after.values())):
            raise ModelError(
                f"Cannot tell whether the terms {names} of a row depend on other rows: their "
                "operations do not show it, and they cannot be evaluated here, where the model is "
                "traced. Write them for one row under `jax.vmap`, or with `jnp.einsum`."
            )
        found |= {x for x in names if _differs(before[x], after[x], ~moves)}
    return found


def row_axis_of(site: RowSite, value: jax.Array, row_model: RowModel) -> int:
    """Axis of the rows in a value of a site, in its own coordinates."""
    return jnp.ndim(value) + row_model.dim - site.event_dim


def _random_parameters(row_model, rng_key):
    priors = {name: fn.support for name, fn in row_model.priors.items()}
    supports = {**row_model.constraints, **priors}
    keys = jax.random.split(rng_key, max(len(supports), 1))
    return {
        name: _somewhere(key, row_model.parameters[name], supports[name])
        for name, key in zip(sorted(supports), keys)  # noqa: B905
    }


def _data_or_random(row_model, names, rng_key, spread):
    """The data where they are known, if the spread is not that of random values."""
    keys, found = jax.random.split(rng_key, max(len(names), 1)), {}
    for name, key in zip(names, keys):  # noqa: B905
        site = row_model.sites[name]
        is_data = name in row_model.visible and not_jax_tracer(site.value)
        if is_data and spread is None:
            found[name] = jnp.asarray(site.value)
        else:
            found[name] = _somewhere(key, site.value, site.fn.support, spread or 1.0)
    return found


def _at_known_values(row_model):
    """The model with ones in the place of arguments that are traced."""
    if all(map(not_jax_tracer, jax.tree.leaves((row_model.args, row_model.kwargs)))):
        return row_model
    known = row_model.args, row_model.kwargs, row_model.traced.data
    args, kwargs, data = jax.tree.map(_known, known)
    for name, site in row_model.visible.items():  # a support may not have what is put for the data
        if not not_jax_tracer(site.value):
            like = jax.ShapeDtypeStruct(jnp.shape(site.value), jnp.result_type(site.value))
            data = {**data, name: _somewhere(default_key(), like, site.fn.support)}
    return row_model.traced.at(args, kwargs, data).bind()


def _halves(num_rows):
    """Sets of rows: for any two rows, each is in a set that does not hold the other."""
    rows = np.arange(num_rows)
    for digit in range((num_rows - 1).bit_length()):
        bit = (rows >> digit & 1).astype(bool)
        yield from (bit, ~bit)


def _differs(before, after, where):
    """Whether numbers differ by more than rounding; infinite ones and NaN are as they are."""
    gap = jnp.abs(after - before) > 64 * jnp.finfo(before.dtype).eps * (1 + jnp.abs(before))
    is_special = ~(jnp.isfinite(before) & jnp.isfinite(after))
    same = (before == after) | (jnp.isnan(before) & jnp.isnan(after))
    return bool(jnp.any(where & jnp.where(is_special, ~same, gap)))


def _known(x):
    """An argument, or ones in its place if it is traced."""
    return x if not_jax_tracer(x) or not hasattr(x, "shape") else jnp.ones(x.shape, x.dtype)


def _somewhere(rng_key, value, support, spread=1.0):
    """A random value on a support, of the shape of another."""
    leaves, tree = jax.tree.flatten(value)
    if not jax.tree_util.treedef_is_leaf(tree):  # parameters of a network
        keys = jax.random.split(rng_key, max(len(leaves), 1))
        return tree.unflatten(_near_zero(k, x) for k, x in zip(keys, leaves))  # noqa: B905
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if support.is_discrete:
        low = jnp.asarray(getattr(scalar_support(support), "lower_bound", 0))
        up = low + jax.random.bernoulli(rng_key, 0.5, shape)
        return _if_supported(support, up, low).astype(jnp.result_type(dtype, low))
    transform = biject_to(support)
    like = jax.ShapeDtypeStruct(transform.inverse_shape(shape), dtype)
    return transform(spread * _near_zero(rng_key, like))


def _elsewhere(rng_key, value, support, spread):
    """Another value on a support; on a discrete one the next or previous number, at some units."""
    if not support.is_discrete:
        return _somewhere(rng_key, value, support, spread)
    is_moved = jax.random.bernoulli(rng_key, 1 / spread, value.shape)
    return jnp.where(is_moved, _if_supported(support, value + 1, value - 1), value)


def _if_supported(support, wanted, other):
    """``wanted`` where it lies on a discrete support, and ``other`` elsewhere."""
    inside = scalar_support(support)(wanted)
    return jnp.where(
        inside.reshape(inside.shape + (1,) * (wanted.ndim - inside.ndim)), wanted, other
    )


def _near_zero(rng_key, like):
    dtype = jnp.result_type(like)
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.ones(jnp.shape(like), dtype)
    return jax.random.uniform(rng_key, jnp.shape(like), dtype, -1.0, 1.0)
