# SPDX-License-Identifier: Apache-2.0
r"""Weights of rows: `handlers.scale` and `handlers.mask` around what is in the data plate.

.. math:: \mathcal L(θ) = \frac1N \sum_{n=1}^N w_n \mathcal L_n(θ), \qquad
    \log p(v_{1:N}) = \sum_n w_n \log p(v_n; θ)

with :math:`w_n` the scale of a row, and 0 where it is masked; N counts all rows of the plate, as
the scaled likelihood of a NumPyro model does, divided by N. A weight multiplies what a row counts,
with its normalizer: it never tempers the energy. The row log-joint knows nothing of it.

A row is weighted as a whole: all its sites, energies among them, are under the same handlers.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.sites import is_energy, masks_of
from numpyro_ebm.model.data_plate import DataPlate
from numpyro_ebm.model.row_site import RowSite, placeholder
from numpyro_ebm.program.constants import keep_known
from numpyro_ebm.program.marks import MarkedProgram
from numpyro_ebm.types import Params, Trace

__all__ = ["RowWeights", "find_weights", "stand_in"]

HANDLERS = {"row_scale": "scale", "row_mask": "mask"}


def find_weights(data_plate: DataPlate, model_trace: Trace) -> dict[str, dict[str, jax.Array]]:
    """Scales and masks of the rows by site, each of shape (rows,); empty where there are none.

    :param DataPlate data_plate: the data plate.
    :param model_trace: a trace of the model.
    :return: dict of ``"row_scale"`` and ``"row_mask"``.
    :raises ModelError: if they are not around all sites of the plate, or differ within a row.
    """
    sites = {name: site for name, site in model_trace.items() if data_plate.owns(site)}
    energies = [site for site in sites.values() if is_energy(site)]
    is_off = all(False in _constants(site) for site in energies)
    scales, masks = {}, {}
    whole = {  # of rows of which nothing is observed
        name: masks_of(site["fn"]) for name, site in sites.items() if site["infer"].get("obs_mask")
    }
    for name, site in sites.items():
        scale = data_plate.user_scale(site)
        if scale is not None:
            scales[name] = data_plate.by_row(name, scale)
        found = [x for others in whole.values() for x in others]
        if name not in {*data_plate.obs_masked, *whole}:
            found += [x for x in masks_of(site["fn"]) if not isinstance(x, bool)]
        if (is_off or is_energy(site)) and False in _constants(site):
            found.append(np.array(False))
        if found:
            rows = [data_plate.by_row(name, x) for x in found]
            masks[name] = jnp.all(jnp.stack(rows), 0)
    weights = {"row_scale": scales, "row_mask": masks}
    for what, by_site in weights.items():
        others = sorted(sites.keys() - by_site.keys())
        if by_site and others:
            joined = what == "row_mask" and {*others} <= data_plate.obs_masked
            raise _joined(others) if joined else _differ(what, sorted(by_site), others)
    return weights


def _constants(site):
    return [x for x in masks_of(site["fn"]) if isinstance(x, bool)]


class RowWeights:
    """The weights of the rows of a traced model.

    :param MarkedProgram program: a program with the results of :func:`find_weights`.
    :param found: their shapes.
    :param params: names of the parameters and latent sites of the model.
    :raises ModelError: if sites of a row are weighted differently, or weights are no data.
    """

    def __init__(self, program: MarkedProgram, found: dict[str, Any], params: Collection[str]):
        self._program = program
        self._names = {what: sorted(by_site) for what, by_site in found.items() if by_site}
        self._is_one = {what: program.is_one_value(what) for what in self._names}
        for what in self._names:
            read = sorted(program.marks_read(what) & {*params})
            if read:
                raise ModelError(
                    f"`handlers.{HANDLERS[what]}` around the rows depends on {read}, and weights "
                    "of rows are data. Multiply the energy itself, or `numpyro_ebm.temper` it."
                )

    def at(self, args: tuple[Any, ...], replaced: Params) -> jax.Array | None:
        """Weights of the rows, of shape (rows,), 0 where one is masked; ``None`` without any.

        :param tuple args: arguments of the program, the random key first.
        :param dict replaced: values of sites, by name.
        """
        found = {}
        for what, names in self._names.items():
            reads_key, *_ = self._program.reads(what, replaced)
            key, *others = args
            with keep_known():
                key = key if reads_key else default_key()
            with keep_known(key, others, replaced, self._program.constants):
                by_site = self._program(what, (key, *others), replaced)
            found[what] = by_site[names[0]]
            if not self._is_one[what] and not _are_known_equal(list(by_site.values())):
                raise _differ(what, names, [])
        scale, mask = found.get("row_scale"), found.get("row_mask")
        if scale is not None:
            _check_scale(scale)
        if mask is None:
            return scale
        with keep_known(scale, mask):
            return jnp.where(mask, jnp.ones((), float) if scale is None else scale, 0.0)


def _are_known_equal(arrays):
    if not all(map(not_jax_tracer, arrays)):
        return False
    return all(np.array_equal(x, arrays[0]) for x in arrays)


def _differ(what, some, others):
    handler = HANDLERS[what]
    than = f"not around {others}" if others else "with different values"
    return ModelError(
        f"`handlers.{handler}` is around the site(s) {some} of a row, {than}. It weights a row as "
        "a whole, its log-likelihood or loss: put all that is in the data plate, energies as "
        f"well, under one `numpyro.handlers.{handler}`. What tempers an energy is "
        "`numpyro_ebm.temper`; a single term is weighted inside of its energy."
    )


def _joined(names):
    return ModelError(
        f"A mask of rows goes with no `obs_mask` of elements, as of {names}: NumPyro makes one of "
        "both, and rows cannot be told from elements. Leave these rows out of the data, or say in "
        "`obs_mask` that nothing of them is observed."
    )


def _check_scale(scale):
    if not not_jax_tracer(scale):
        return
    known = np.asarray(scale, float)
    if not (np.all(np.isfinite(known)) and np.all(known >= 0)):
        raise ModelError(
            "`handlers.scale` around the rows has to be finite and not negative: it is how often "
            f"a row counts. Its values go from {known.min():.3g} to {known.max():.3g}."
        )


def stand_in(site: RowSite, dim: int, weights: jax.Array) -> Any:
    """The values of a visible site, with those of a row that counts where a row does not.

    What does not count is evaluated all the same, and so has to be no NaN and on the support.

    :param RowSite site: the site.
    :param int dim: dimension of the data plate.
    :param weights: of the rows, (rows,); those of weight 0 do not.
    """
    value = site.value
    axis = jnp.ndim(value) + dim - site.event_dim
    with keep_known(value, weights):
        counts = weights > 0
        supported: Any = placeholder({"type": "sample", "value": None, "fn": site.fn})
        first = jnp.take(value, jnp.argmax(counts), axis)
        nothing = jnp.take(jnp.broadcast_to(supported, jnp.shape(value)), 0, axis)
        first = jnp.where(jnp.any(counts), first, nothing.astype(first.dtype))
        counts = jnp.reshape(counts, (-1,) + (1,) * (jnp.ndim(value) - axis - 1))
        return jnp.where(counts, value, jnp.expand_dims(first, axis))
