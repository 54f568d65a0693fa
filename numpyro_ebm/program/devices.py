# SPDX-License-Identifier: Apache-2.0
"""Which device holds which rows, chains or particles.

JAX partitions a program among the devices that hold its arrays (GSPMD): every device evaluates the
model at its own rows, and sums over rows are collective operations. Nothing else knows of it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.program.compilation import is_traced

__all__ = [
    "check_divides",
    "divides",
    "everywhere",
    "leading_sharding",
    "on_axis",
    "partitioned_by_compiler",
    "placed",
    "spread_draws",
]

AUTOMATIC = (
    "Make the mesh by `jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * "
    "len(shape))`, or by `jax.sharding.Mesh`."
)


def leading_sharding(
    owner: str, sharding: Mesh | NamedSharding | None, *trees: Any
) -> NamedSharding | None:
    """How the leading axis of arrays is spread over devices.

    :param str owner: whose option it is, for the message.
    :param sharding: a mesh, over all axes of which it is spread; or a sharding, whose first axis
        says it. ``None``: as in the first array that is spread over several devices.
    :param trees: arrays to look for.
    :return: the sharding, or ``None`` for a single device.
    :raises ModelError: if it is neither, or does not spread the leading axis; under a mesh with
        explicit axes.
    """
    if sharding is None:
        found = (getattr(x, "sharding", None) for x in jax.tree.leaves(trees) if _is_whole(x))
        spread = (x for x in found if isinstance(x, NamedSharding) and x.spec and x.spec[0])
        sharding = next(spread, None)
        if sharding is None:
            return None
    _check_mesh_in_use(owner)
    if isinstance(sharding, Mesh):
        return NamedSharding(_automatic(sharding), PartitionSpec(sharding.axis_names))
    if not isinstance(sharding, NamedSharding) or not sharding.spec or not sharding.spec[0]:
        raise ModelError(
            f"{owner}: `sharding` is a `jax.sharding.Mesh`, or a `NamedSharding` that spreads the "
            f"leading axis, got {sharding!r}."
        )
    return NamedSharding(_automatic(sharding.mesh), PartitionSpec(sharding.spec[0]))


def partitioned_by_compiler(owner: str, tree: Any) -> Any:
    """The same arrays, those on a mesh with explicit axes on one that the compiler partitions.

    Axes of `jax.make_mesh` are explicit: JAX then asks for the sharding of every result that it
    does not follow from those of the operands, a gather of rows for one, which a model cannot say.

    :param str owner: whose arguments they are, for the message.
    :param tree: arrays.
    :raises ModelError: if one of them is spread over such axes inside of `jit`, or under such a
        mesh, where it cannot be placed anew.
    """

    def leaf(x):
        if not isinstance(x, jax.Array):
            return x
        sharding = x.sharding if not_jax_tracer(x) else jax.typeof(x).sharding
        if not isinstance(sharding, NamedSharding) or not _has_explicit_axes(sharding.mesh):
            return x
        if any(sharding.spec) and not _is_whole(x):
            raise ModelError(
                f"{owner}: an argument is spread over explicit axes of a mesh, and JAX asks a "
                f"model for the sharding of every result then. {AUTOMATIC}"
            )
        if any(sharding.spec):
            _check_mesh_in_use(owner)
        elif is_traced() or _has_explicit_axes(jax.sharding.get_mesh()):
            return x  # on all devices, as all else there
        return jax.device_put(x, NamedSharding(_automatic(sharding.mesh), sharding.spec))

    return jax.tree.map(leaf, tree)


def _check_mesh_in_use(owner):
    """Raise where all arrays that are made, keys too, have explicit axes."""
    if not is_traced() and _has_explicit_axes(jax.sharding.get_mesh()):
        raise ModelError(
            f"{owner}: rows, chains or particles are spread over devices under a `jax.set_mesh` "
            f"with explicit axes. Leave that out; a mesh in `sharding=` is enough. {AUTOMATIC}"
        )


def _has_explicit_axes(mesh):
    return any(kind != AxisType.Auto for kind in mesh.axis_types)


def _automatic(mesh):
    if not isinstance(mesh, Mesh) or not _has_explicit_axes(mesh):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names)


def divides(sharding: NamedSharding, number: int) -> bool:
    """Whether every device gets as many of so many."""
    return number % _num_parts(sharding) == 0


def check_divides(owner: str, sharding: NamedSharding | None, **numbers: int) -> None:
    """Raise :class:`ModelError` unless every device gets as many.

    :param str owner: whose option it is, for the message.
    :param sharding: how they are spread, or ``None``.
    :param numbers: of rows, chains or particles, by name.
    """
    for name, number in numbers.items():
        if sharding is not None and not divides(sharding, number):
            raise ModelError(
                f"{owner}: {number} {name} cannot be spread evenly over {_num_parts(sharding)} "
                f"devices; take a multiple of {_num_parts(sharding)}."
            )


def _num_parts(sharding):
    axes = sharding.spec[0]
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def placed(tree: Any, sharding: NamedSharding) -> Any:
    """A pytree of arrays on the devices of a sharding, which may be those of several processes.

    :param tree: arrays that every process has, or that are spread already.
    :param sharding: where to.
    """
    return jax.tree.map(lambda x: _placed(x, sharding), tree)


def _placed(x, sharding):
    is_global = isinstance(x, jax.Array) and not x.is_fully_addressable
    if is_global or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = _placed(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    return jax.device_put(np.asarray(x), sharding)  # of an array that lies here alone, it is not


def spread_draws(draw: Any, sharding: NamedSharding) -> Any:
    """``draw(rng_key, n)`` with its draws spread over devices, where all get as many."""

    def spread(rng_key, num):
        drawn = draw(rng_key, num)
        if not divides(sharding, num):
            return drawn
        return lax.with_sharding_constraint(drawn, sharding)

    return spread


def everywhere(sharding: NamedSharding) -> NamedSharding:
    """Every device holds all."""
    return NamedSharding(sharding.mesh, PartitionSpec())


def on_axis(sharding: NamedSharding, axis: int) -> NamedSharding:
    """The same rows on another axis than the leading one."""
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * axis, sharding.spec[0]))


def _is_whole(x):
    return isinstance(x, jax.Array) and not_jax_tracer(x)
