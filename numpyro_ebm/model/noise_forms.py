# SPDX-License-Identifier: Apache-2.0
"""The forms in which a noise may be written, and the parameters in it by name."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.distributions import is_real, scalar_support
from numpyro_ebm.model.row_model import RowModel

__all__ = [
    "FORMS",
    "check_noise",
    "is_float_array",
    "is_flow",
    "named_leaves",
    "serves_support",
    "transformed_normal",
    "with_arguments",
]

FORMS = (
    "a NumPyro distribution over the visible site, a dict of distributions by site name, or a "
    "NumPyro function that returns one of them or samples the visible sites in the data plate"
)


def is_flow(x: Any) -> bool:
    """A distribution of another library, such as flowjax: a pytree with a density and draws."""
    return all(hasattr(x, name) for name in ("sample", "log_prob", "shape"))


def check_noise(owner: str, **options: Any) -> None:
    """Raise :class:`ModelError` unless options are of one of the forms of a noise."""
    for name, x in options.items():
        known = Transform | list | tuple | dict | dist.Distribution
        if not (callable(x) or is_flow(x) or isinstance(x, known)):
            raise ModelError(f"{owner}: `{name}` must be {FORMS}; got {x!r}.")


def transformed_normal(transforms: Any, row_model: RowModel) -> dist.Distribution:
    """A standard Normal through a stack of transforms, for the one real visible site."""
    transforms = [transforms] if isinstance(transforms, Transform) else list(transforms)
    if len(row_model.visible) != 1 or not all(isinstance(t, Transform) for t in transforms):
        raise ModelError(f"The noise must be {FORMS}; a list has to hold NumPyro transforms.")
    (site,) = row_model.visible.values()
    shape = site.fn.event_shape
    # The base is the reference that the transforms move: numbers, which are not parameters.
    base = dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))
    return dist.TransformedDistribution(base, transforms)


def with_arguments(function: Callable[..., Any], row_model: RowModel) -> Callable[[], Any]:
    """The function with the model's arguments, or with none if it takes none."""

    def with_all():
        return function(*row_model.args, **row_model.kwargs)

    try:
        signature = inspect.signature(function)
    except ValueError:
        return with_all
    ways = (with_all, row_model.args, row_model.kwargs), (function, (), {})
    for way, args, kwargs in ways:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            continue
        return way
    raise ModelError(
        f"The noise function {function!r} can be called neither with the model's arguments nor "
        "with none."
    )


def named_leaves(noise: Any, name: str) -> dict[int, tuple[str, Any]]:
    """Name and constraint of every array by its identity.

    The names are attributes, ``flow.base_dist.scale``, and not positions in the tree, because the
    order in which NumPyro flattens its distributions differs from process to process.
    """
    found = {}

    def visit(x, path, constraint=constraints.real):
        if isinstance(x, dict):
            for key, value in x.items():
                visit(value, f"{path}.{key}")
        elif isinstance(x, list | tuple):
            for i, value in enumerate(x):
                visit(value, f"{path}.{i}")
        elif isinstance(x, dist.Distribution):
            for field in x.gather_pytree_data_fields():
                known = x.arg_constraints.get(field, constraints.real)
                visit(x.__dict__.get(field), f"{path}.{field}", known)
        elif is_float_array(x):
            found[id(x)] = path, constraint
        else:
            for i, value in enumerate(jax.tree.leaves(x)):
                found[id(value)] = f"{path}.{i}", constraints.real

    visit(noise, name)
    return found


def is_float_array(x: Any) -> bool:
    """Whether something is an array that can be trained."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def serves_support(support: Any, other: Any, everywhere: bool) -> bool:
    """Whether values of a support are those of a visible site, as far as its bounds are known.

    :param support: of a noise.
    :param other: of the site.
    :param bool everywhere: whether the noise has to cover it. Of continuous sites that are real or
        have bounds a part will do otherwise; of others nobody knows.
    """
    if bool(support.is_discrete) != bool(other.is_discrete):
        return False
    low, high, other_low, other_high = bounds = [*_bounds(support), *_bounds(other)]
    known = all(not_jax_tracer(x) for x in bounds)
    if is_real(support) == is_real(other) and (
        not known or (np.allclose(low, other_low) and np.allclose(high, other_high))
    ):
        return True
    if everywhere or other.is_discrete:
        return False
    is_bounded = known and np.any(np.isfinite([other_low, other_high]))
    within = is_bounded and np.all(low >= other_low) and np.all(high <= other_high)
    return is_real(other) or bool(within)


def _bounds(support):
    support = scalar_support(support)
    if isinstance(support, type(constraints.boolean)):
        return 0, 1
    return getattr(support, "lower_bound", -np.inf), getattr(support, "upper_bound", np.inf)
