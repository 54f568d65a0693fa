# SPDX-License-Identifier: Apache-2.0
"""Names of the types that signatures are made of."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

__all__ = ["LogDensity", "Model", "Optimizer", "Params", "SiteValues", "Trace"]

LogDensity: TypeAlias = Callable[..., jax.Array]
"""The log-density of a position, or of one position a row, up to a constant."""

Model: TypeAlias = Callable[..., Any]
"""A NumPyro model or guide: a function with `numpyro.sample` and `numpyro.param` statements."""

Params: TypeAlias = dict[str, Any]
"""Values of parameters by site name; that of a network is a pytree."""

SiteValues: TypeAlias = dict[str, jax.Array]
"""Values of visible or latent sites by name."""

Trace: TypeAlias = Mapping[str, dict[str, Any]]
"""What `numpyro.handlers.trace` records: messages by site name."""

Optimizer: TypeAlias = Any
"""A NumPyro optimiser, or an Optax gradient transformation."""
