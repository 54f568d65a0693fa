# SPDX-License-Identifier: Apache-2.0
"""The data plate of a model: which one it is, and sums over everything else."""

import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.explained import WHAT_A_ROW_NEEDS
from numpyro_ebm.language.sites import is_energy, obs_masked, plates_of, without_masks
from numpyro_ebm.model.reference import completed_log_prob
from numpyro_ebm.types import Trace

__all__ = ["DataPlate", "find_data_plate"]


class DataPlate:
    """The plate whose elements are the rows, and what is said of sites row by row.

    :param str plate: its name.
    :param int dim: its dimension, counted from the right.
    :param int num_rows: its rows at hand.
    :param int total_rows: its rows before any subsampling.
    :param dict subsampled: of further plates, N/B by name.
    :param obs_masked: names of the sites that NumPyro makes of one with an `obs_mask`.
    """

    def __init__(
        self,
        plate: str,
        dim: int,
        num_rows: int,
        total_rows: int,
        subsampled: dict[str, float],
        obs_masked: frozenset[str],
    ):
        self.plate, self.dim, self.num_rows, self.total_rows = plate, dim, num_rows, total_rows
        self.subsampled, self.obs_masked = subsampled, obs_masked

    def owns(self, site: dict[str, Any]) -> bool:
        """Whether a site of a trace is a sample site inside the data plate."""
        return site["type"] == "sample" and self.plate in plates_of(site)

    def site_log_densities(self, model_trace: Trace) -> dict[str, jax.Array]:
        """Log-density per row, of shape (rows,), of every site of the data plate in a trace."""
        return {
            name: self.sum_to_rows(self.site_log_prob(site))
            for name, site in model_trace.items()
            if self.owns(site)
        }

    def site_log_prob(self, site: dict[str, Any]) -> jax.Array:
        """Log-density of a traced site, without the N/B of a subsampled data plate.

        Scales and masks of rows are not part of it: see :mod:`numpyro_ebm.model.row_weights`. Where
        a site is observed in part, it is completed: see :mod:`numpyro_ebm.model.reference`.
        """
        fn, scale = site["fn"], self.scale_of_plates(site)
        if site["name"] in self.obs_masked:
            log_prob = completed_log_prob(fn, site["value"])
        else:
            log_prob = without_masks(fn, constant=is_energy(site)).log_prob(site["value"])
        return log_prob if scale == 1.0 else scale * log_prob

    def user_scale(self, site: dict[str, Any]) -> Any:
        """The scale of a traced site that the user's own `handlers.scale` gave it, if any."""
        if site["scale"] is None:
            return None
        subsampling = self.total_rows / self.num_rows * self.scale_of_plates(site)
        scale = site["scale"] / subsampling
        is_one = not_jax_tracer(scale) and bool(np.all(np.asarray(scale) == 1.0))
        return None if is_one else scale

    def is_by_row(self, x: Any) -> bool:
        """Whether what broadcasts against the log-density of a site is the same within a row."""
        row_axis = jnp.ndim(x) + self.dim
        return all(size == 1 for axis, size in enumerate(jnp.shape(x)) if axis != row_axis)

    def by_row(self, name: str, x: Any) -> jax.Array:
        """What broadcasts against the log-density of a site, as an array of shape (rows,).

        :raises ModelError: if it differs within a row, or is not for as many rows.
        """
        if not self.is_by_row(x):
            raise ModelError(
                f"`handlers.scale` or `handlers.mask` around '{name}' has the shape "
                f"{jnp.shape(x)} and differs within a row of the plate '{self.plate}'. Both are "
                "for whole rows, one value each. Multiply single terms of an energy inside of it, "
                "or temper the whole of it by `numpyro_ebm.temper`; for entries that are missing "
                "pass `obs_mask` to `numpyro.sample`."
            )
        if jnp.size(x) not in (1, self.num_rows):
            raise ModelError(
                f"`handlers.scale` or `handlers.mask` around '{name}' has {jnp.size(x)} values, "
                f"and the plate '{self.plate}' has {self.num_rows} rows. Where rows are cut into "
                "batches, pass weights and masks as arguments of the model, to be cut with them."
            )
        return jnp.broadcast_to(jnp.reshape(x, (-1,)), (self.num_rows,))

    def scale_of_plates(self, site: dict[str, Any]) -> float:
        """N/B of the subsampled plates around a site, but for the data plate."""
        return math.prod(self.subsampled.get(name, 1.0) for name in plates_of(site))

    def sum_to_rows(self, log_prob: jax.Array) -> jax.Array:
        """Sum over all plates but the data plate."""
        row_axis = jnp.ndim(log_prob) + self.dim
        return jnp.sum(log_prob, [a for a in range(jnp.ndim(log_prob)) if a != row_axis])


def find_data_plate(model_trace: Trace, outside: Collection[str] | None = ()) -> DataPlate:
    """The plate that all visible sites and all energies share.

    :param model_trace: a trace of the model.
    :param outside: names of observed sites that may be outside of it, or ``None`` for all: the
        parameters that another block of ``Gibbs`` holds, for one.
    :raises ModelError: if there is no energy, or not one such plate.
    """
    samples = [s for s in model_trace.values() if s["type"] == "sample"]
    energies = [s for s in samples if is_energy(s)]
    observed = [s for s in samples if s["is_observed"] and s["fn"].event_shape != (0,)]
    plates = frozenset().union(*map(plates_of, energies))
    inside = [s for s in observed if plates & plates_of(s)]
    if outside is None and inside:
        observed = inside
    elif outside:
        names = {s["name"] for s in inside}
        observed = [s for s in observed if s["name"] in names or s["name"] not in outside]
    if not energies:
        raise ModelError(
            "The model has no energy statement. Add `numpyro_ebm.energy(name, value)` inside its "
            "data plate; `numpyro.factor` hides that the model is unnormalised."
        )
    for site in observed + energies:
        if not site["cond_indep_stack"]:
            what = "The energy" if is_energy(site) else "The visible site"
            raise ModelError(f"{what} '{site['name']}' is outside any plate. {WHAT_A_ROW_NEEDS}")
    frame = _shared_frame(energies + observed)
    plates = {name: x["args"] for name, x in model_trace.items() if x["type"] == "plate"}
    others = {
        name: size / part
        for name, (size, part) in plates.items()
        if name != frame.name and part not in (None, size)
    }
    masked = obs_masked(model_trace)
    return DataPlate(frame.name, frame.dim, frame.size, plates[frame.name][0], others, masked)


def _shared_frame(sites):
    first, *others = ({f.name: f for f in site["cond_indep_stack"]} for site in sites)
    shared = {name: f for name, f in first.items() if all(name in frames for frames in others)}
    if len(shared) == 1:
        (frame,) = shared.values()
        return frame
    plates = frozenset().union(*map(plates_of, sites))
    found = (
        f"all sites share the plates {sorted(shared)}"
        if shared
        else f"they sit in {sorted(plates)} and share none"
    )
    raise ModelError(
        "Cannot tell the data plate: it is the one plate that all visible sites and all "
        f"energies share, but {found}. {WHAT_A_ROW_NEEDS} Data sets of different lengths are "
        "separate models."
    )
