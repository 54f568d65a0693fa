# SPDX-License-Identifier: Apache-2.0
r"""Whether the energy of a row is a function of that row alone.

.. math:: \frac{∂ E_i}{∂ v_j} = 0 \quad (i \neq j)

Rows are independent draws of one density: objectives average over them, kernels move and accept
them one by one, and log Z is that of one row. An energy that subtracts the mean of the batch, or
takes differences of neighbouring rows, has another normalizer, and every method would silently be
wrong. The axis of the rows is followed through the operations of the energy, without running it
(:mod:`~numpyro_ebm.program.row_axes`). Where that does not prove the rows to be separate, the
energy is evaluated at few rows, some of which are changed.
"""

from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.distributions import scalar_support
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.row_axes import MIXED, row_axes

__all__ = ["check_rows"]

FEW = 8
"""Number of rows at which an energy is evaluated, if its model can be read with so few."""

SPREADS = (1.0, 3.0)
"""Half-widths of the random values, in unconstrained coordinates. For discrete sites the first
changes all units of a row, the second one in three."""


def check_rows(row_model: RowModel) -> None:
    """Raise if the density of a row depends on the values of other rows.

    :param RowModel row_model: the model.
    :raises ModelError: naming the energy and what to write instead.
    """
    if row_model.num_rows < 2:
        return
    values = {name: site.value for name, site in row_model.sites.items()}
    axes = [
        _axis(row_model, row_model.sites[name], jnp.ndim(values[name])) for name in sorted(values)
    ]
    names = []

    def terms(values):
        found = row_model.terms({**row_model.parameters, **values})
        names[:] = sorted(found)
        return [found[name] for name in names]

    states = row_axes(terms, values, axes)
    doubtful = [name for name, state in zip(names, states, strict=True) if state is MIXED]
    for name in _coupled(row_model, doubtful) if doubtful else ():
        kind = "energy" if name in row_model.energies else "site"
        raise ModelError(
            f"The {kind} '{name}' of a row depends on other rows of the plate '{row_model.plate}' "
            "(through a mean over the rows, or a difference of neighbours, say). Rows are "
            "independent draws, and their normalizer is that of one row. Put coordinates that "
            "interact into one row, as event dimensions (`event_shape=`), and compute statistics "
            "of the data outside the model."
        )


def _coupled(row_model, names):
    """Those of the terms that change in some rows when the values of other rows do.

    Which rows are changed follows the binary digits of their indices: two rows differ in one.
    """
    found, moving = set(), sorted(row_model.sites)  # not those that were set aside as observed
    with jax.ensure_compile_time_eval():  # also inside of a `jit`
        known = _at_few_rows(row_model)
        for seed, spread in enumerate(SPREADS):
            with suppress(Exception):  # the model may refuse random values
                known = known or _at_known_values(row_model, row_model.num_rows)
                terms = jax.jit(known.terms)
                found |= _changed(known, terms, moving, jax.random.key(seed), spread, names)
    return [name for name in names if name in found]


def _changed(row_model, terms, moving, rng_key, spread, names):
    supports = {
        **row_model.constraints,
        **{name: fn.support for name, fn in row_model.priors.items()},
    }
    sites = [(name, row_model.sites[name]) for name in moving]
    keys = iter(jax.random.split(rng_key, len(supports) + 2 * len(sites)))
    params = {
        name: _somewhere(next(keys), row_model.parameters[name], supports[name])
        for name in sorted(supports)
    }
    here = {name: _somewhere(next(keys), x.value, x.fn.support, spread) for name, x in sites}
    there = {name: _elsewhere(next(keys), here[name], x.fn.support, spread) for name, x in sites}
    before, found = terms({**params, **here}), set()
    for moves in _halves(row_model.num_rows):
        values = {}
        for name, site in sites:
            rank = jnp.ndim(site.value)
            mask = moves.reshape(-1, *[1] * (rank - _axis(row_model, site, rank) - 1))
            values[name] = jnp.where(mask, there[name], here[name])
        after = terms({**params, **values})
        found |= {x for x in names if _differs(before[x], after[x], ~moves)}
    return found


def _axis(row_model, site, rank):
    """Axis of the rows in a value of a site."""
    return rank + row_model.dim - site.event_dim


def _at_few_rows(row_model):
    """The model at the first rows of its arguments; ``None`` where it cannot be read there."""
    if row_model.num_rows <= FEW:
        return None
    try:
        few = _at_known_values(row_model, FEW)
    except Exception:  # the model may be written for its number of rows
        return None
    return few if few.num_rows == FEW else None


def _at_known_values(row_model, num_rows):
    """The model at its first rows, with ones in the place of arguments that are traced."""

    def first(x):
        sizes = (row_model.num_rows,), (row_model.total_rows,)
        return x[:num_rows] if hasattr(x, "shape") and x.shape[:1] in sizes else x

    known = row_model.args, row_model.kwargs, row_model.traced.data
    args, kwargs, data = jax.tree.map(_known, known)
    for name, site in row_model.visible.items():  # a support may not have what is put for the data
        shape = list(jnp.shape(site.value))
        shape[_axis(row_model, site, len(shape))] = num_rows
        like = jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(site.value))
        data = {**data, name: _somewhere(jax.random.key(0), like, site.fn.support)}
    if num_rows < row_model.num_rows:
        args, kwargs = jax.tree.map(first, (args, kwargs))
    return row_model.traced.at(args, kwargs, data).bind()


def _halves(num_rows):
    """Sets of rows: for any two rows, each is in a set that does not hold the other."""
    rows = np.arange(num_rows)
    for digit in range((num_rows - 1).bit_length()):
        bit = (rows >> digit & 1).astype(bool)
        yield from (bit, ~bit)


def _differs(before, after, where):
    if not (not_jax_tracer(before) and not_jax_tracer(after)):
        return False  # the model closes over traced values
    gap = jnp.abs(after - before) > 64 * jnp.finfo(before.dtype).eps * (1 + jnp.abs(before))
    return bool(jnp.any(where & (gap | (jnp.isnan(before) != jnp.isnan(after)))))


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
