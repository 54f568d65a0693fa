# SPDX-License-Identifier: Apache-2.0
"""Whether what a guide draws is what a site of the model is made of: its shape and its support."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro.distributions import Delta, constraints

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.distributions import scalar_support
from numpyro_ebm.language.sites import unwrap

__all__ = ["check_drawn"]


def check_drawn(site: dict[str, Any], fn: Any, value: ArrayLike) -> None:
    """Raise unless a guide draws a site on its support, and of its shape.

    Bounds that are computed from traced values are not looked at, nor those of a ``Delta``.

    :param site: the site of the guide's trace.
    :param fn: the distribution of the site in the model.
    :param value: a value of the site in the model.
    :raises ModelError: naming the site.
    """
    name, drawn = site["name"], site["fn"]
    shape = jnp.shape(value)
    if jnp.shape(site["value"]) != shape:
        raise ModelError(
            f"The guide draws '{name}' with the shape {jnp.shape(site['value'])}, and in the model "
            f"it has {shape}. Draw it in the plates and with the event dimensions that it "
            "has there."
        )
    if isinstance(unwrap(drawn), Delta) or not _supports_differ(drawn.support, fn.support):
        return
    remedy = (
        "from a `Bernoulli`, `Categorical` or another law of its values; a relaxed one is made of "
        "it by `RelaxedELBO`"
        if fn.support.is_discrete
        else "from a distribution with that support, `dist.TransformedDistribution(dist.Normal("
        "...), numpyro.distributions.biject_to(support))`, for one"
    )
    raise ModelError(
        f"The guide draws '{name}' on the support {scalar_support(drawn.support)}, and in the "
        f"model it is {scalar_support(fn.support)}: q gives mass to values that it cannot have, or "
        f"none to values that it can. Draw it {remedy}."
    )


def _supports_differ(left, right):
    """Whether two supports are known to differ."""
    if left.is_discrete != right.is_discrete:
        return True
    ours, theirs = _ends_of(left), _ends_of(right)
    if ours is not None and theirs is not None:
        pairs = list(zip(ours, theirs, strict=True))
        known = [pair for pair in pairs if all(map(not_jax_tracer, pair))]
        return not all(np.all(np.asarray(a) == np.asarray(b)) for a, b in known)
    left, right = scalar_support(left), scalar_support(right)
    return not (isinstance(left, type(right)) or isinstance(right, type(left)))


def _ends_of(support):
    """The ends of an interval, or ``None`` for what is none."""
    support = scalar_support(support)
    if support is constraints.real:
        return -np.inf, np.inf
    if support is constraints.boolean:
        return 0, 1
    lower, upper = (getattr(support, end, None) for end in ("lower_bound", "upper_bound"))
    if lower is None and upper is None:
        return None
    return -np.inf if lower is None else lower, np.inf if upper is None else upper
