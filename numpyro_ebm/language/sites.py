# SPDX-License-Identifier: Apache-2.0
"""What the sites of a trace are: energies or not, in which plates, of which distribution.

A plate, a mask or a scale wraps the distribution of a site before an outer handler sees it, so that
none of these questions is answered by the class of ``site["fn"]``.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import ExpandedDistribution, MaskedDistribution, constraints

from numpyro_ebm._compat import mask_of
from numpyro_ebm.language.distributions import Unnormalized
from numpyro_ebm.types import Trace

__all__ = [
    "is_energy",
    "layers",
    "log_prob_of",
    "masks_of",
    "obs_masked",
    "param_sites",
    "plates_of",
    "unwrap",
    "without_masks",
]


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


def masks_of(fn: Any) -> list[Any]:
    """The masks of `handlers.mask` around a distribution: booleans, or arrays of them."""
    masks = []
    while isinstance(fn, MaskedDistribution | ExpandedDistribution):
        masks += [mask_of(fn)] if isinstance(fn, MaskedDistribution) else []
        fn = fn.base_dist
    return masks


def without_masks(fn: Any, *, constant: bool = False) -> Any:
    """A distribution without the arrays of `handlers.mask`.

    :param fn: a distribution.
    :param bool constant: whether `mask=False` goes as well: on a site it makes a flat measure.
    """
    if not isinstance(fn, MaskedDistribution | ExpandedDistribution):
        return fn
    base = without_masks(fn.base_dist, constant=constant)
    if isinstance(fn, MaskedDistribution):
        is_constant = isinstance(mask_of(fn), bool)
        return base.mask(mask_of(fn)) if is_constant and not constant else base
    return fn if base is fn.base_dist else base.expand(fn.batch_shape)


def is_energy(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is an energy statement."""
    return site["type"] == "sample" and isinstance(unwrap(site["fn"]), Unnormalized)


def plates_of(site: dict[str, Any]) -> frozenset[str]:
    """Names of the plates around a site."""
    return frozenset(frame.name for frame in site.get("cond_indep_stack", ()))


def obs_masked(sites: Trace) -> frozenset[str]:
    """Names of the two sites that NumPyro makes of each site with an `obs_mask`."""
    halves = ("observed", "unobserved")
    pairs = [
        [f"{name}_{half}" for half in halves]
        for name, site in sites.items()
        if site["type"] == "deterministic"
    ]
    found = [pair for pair in pairs if all(x in sites for x in pair)]
    return frozenset(name for pair in found for name in pair if masks_of(sites[name]["fn"]))


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
