# SPDX-License-Identifier: Apache-2.0
"""What the sites of a trace are: energies or not, in which plates, of which distribution.

A plate, a mask or a scale wraps the distribution of a site before an outer handler sees it, so that
none of these questions is answered by the class of ``site["fn"]``.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import constraints

from numpyro_ebm.language.distributions import Unnormalized
from numpyro_ebm.types import Trace

__all__ = ["is_energy", "layers", "log_prob_of", "param_sites", "plates_of", "unwrap"]


def layers(fn: Any) -> Iterator[Any]:
    """A distribution and, one after the other, the distributions that it wraps."""
    yield fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        yield fn


def unwrap(fn: Any) -> Any:
    """The innermost distribution: without masks, expansions, event dimensions and transforms."""
    *_, innermost = layers(fn)
    return innermost


def is_energy(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is an energy statement."""
    return site["type"] == "sample" and isinstance(unwrap(site["fn"]), Unnormalized)


def plates_of(site: dict[str, Any]) -> frozenset[str]:
    """Names of the plates around a site."""
    return frozenset(frame.name for frame in site.get("cond_indep_stack", ()))


def param_sites(sites: Trace) -> dict[str, tuple[Any, Any]]:
    """Values and constraints of the `param` sites of a trace, by name."""
    return {
        name: (site["value"], site["kwargs"].get("constraint", constraints.real))
        for name, site in sites.items()
        if site["type"] == "param"
    }


def log_prob_of(site: dict[str, Any]) -> jax.Array:
    """Log-density of a site of a trace in all its elements, as NumPyro's ELBOs take it."""
    if site["intermediates"]:  # a flow that is not inverted
        log_prob = site["fn"].log_prob(site["value"], site["intermediates"])
    else:
        log_prob = site["fn"].log_prob(site["value"])
    scale = 1.0 if site["scale"] is None else site["scale"]
    return jnp.sum(scale * log_prob)
