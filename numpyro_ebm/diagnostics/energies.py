# SPDX-License-Identifier: Apache-2.0
r"""Energies of data against energies of the model's own samples.

.. math:: E(v) = -\log\tilde p(v) = -\log \int \tilde p(v, h)\, dh

If data and samples have one law, so have their energies. Data that lie higher are what the model
does not expect; samples that lie higher than data come of a sampler that has not arrived, or of a
model whose modes are too wide or too many. Equal energies do not prove equal laws.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.diagnostics.reading import map_leading, pick_marginal, read_rows
from numpyro_ebm.errors import ModelError
from numpyro_ebm.inputs import numbers_of
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.printed import brief
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model, Params

__all__ = ["EnergyGap", "energy_gap"]


class EnergyGap(NamedTuple):
    """What :func:`energy_gap` found.

    - **data** - energies of the data, (rows,), in nats, up to log Z.
    - **samples** - energies of the samples, (samples,).
    - **difference** - mean energy of the data less that of the samples: above 0 where the data are
      less probable under the model than its own samples.
    - **standard_error** - of ``difference``, if samples are independent.
    - **statistic** - the largest distance of the two empirical distribution functions
      (Kolmogorov and Smirnov).
    - **p_value** - of ``statistic``, if samples are independent, by its law for many of both.
    """

    data: np.ndarray
    samples: np.ndarray
    difference: float
    standard_error: float
    statistic: float
    p_value: float

    __repr__ = brief


@explaining
def energy_gap(
    rng_key: jax.Array,
    model: Model,
    data: Any,
    samples: Any,
    *args: Any,
    marginal: Marginal | None = None,
    guide: Model | None = None,
    guide_params: Params | None = None,
    **kwargs: Any,
) -> EnergyGap:
    """Compare the energies of data with those of samples of the model.

    :param rng_key: random key; used for the particles of a guide only.
    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param data: rows, the model's first argument: an array, or a dict of them, rows leading.
    :param samples: draws of the visible sites, as :func:`~numpyro_ebm.sample` returns them: a dict
        of arrays (draws, rows, ...), other sites in it left aside; or, with a single visible site,
        its array (samples, ...).
    :param args: further arguments of the model.
    :param marginal: how latent sites are integrated out; exactly by default. With ``ImportanceBound
        (num_particles)`` and a guide, both sides are upper bounds of energies.
    :param guide: a guide q(h | v), for such a marginal.
    :param dict guide_params: its parameters.
    :param kwargs: keyword arguments of the model and the guide.
    :return: :class:`EnergyGap`; plot it with ``ebm.plots.energies``.
    :raises ModelError: if the model has free parameters, the samples lack a visible site or have
        another shape, the marginal has no values, or the energy reads covariates and the samples
        are not of the same rows.

    The p-value and the standard error are those of independent samples: thin chains first.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> params = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": jnp.zeros(4), "scale": jnp.ones(2)}
    >>> model = ebm.fixed(ebm.models.grbm, params)
    >>> draws = ebm.sample(jax.random.key(0), model, 500)
    >>> gap = ebm.energy_gap(jax.random.key(1), model, jnp.zeros((200, 2)), draws)
    >>> gap.difference > 5 * gap.standard_error  # zeros are no draws of this model
    True
    """
    row_model = read_rows("energy_gap", model, data, args, kwargs)
    if row_model.num_rows < 2:
        raise ModelError("energy_gap compares rows, and there is only one. Pass more of the data.")
    if guide is not None and marginal is None:
        raise ModelError(
            "energy_gap: a guide is of use with a marginal that has values: pass "
            "`marginal=ImportanceBound(num_particles)` beside it."
        )
    values, is_paired = _sample_rows(row_model, samples)
    marginal, reader, params = pick_marginal("energy_gap", row_model, marginal, guide, guide_params)
    if marginal.value is None:
        raise ModelError(
            f"energy_gap compares values of log p̃(v), and {type(marginal).__name__} estimates "
            "derivatives only. Use `ImportanceBound(num_particles)` with a guide."
        )
    if not is_paired:
        check_rows_alike(
            row_model,
            "energy_gap: the samples are not of the rows of the data",
            f"Draw them for the {row_model.num_rows} rows: "
            "`numpyro_ebm.sample(rng_key, model, num_samples, None, *args)`.",
        )

    density = partial(_energies_of_rows, row_model, marginal, reader, params)
    of_data, of_samples = _of_both(rng_key, row_model, values, density)
    from scipy.stats import ks_2samp  # half a second to import

    test: Any = ks_2samp(of_data, of_samples, method="asymp")
    variance = sum(np.var(x, ddof=1) / len(x) for x in (of_data, of_samples))
    return EnergyGap(
        of_data,
        of_samples,
        float(of_data.mean() - of_samples.mean()),
        float(np.sqrt(variance)),
        float(test.statistic),
        float(test.pvalue),
    )


def _energies_of_rows(row_model, marginal, reader, params, key_and_rows):
    """Energies of rows, (rows,), up to log Z: those of v itself."""
    rng_key, rows = key_and_rows
    point = {k: row_model.sites[k].transform.inv(x) for k, x in row_model.from_rows(rows).items()}
    estimate = marginal.bind(rng_key, row_model, reader, params, point, order=1)
    _, log_det = row_model.constrain(point)
    return log_det - estimate.log_density(params, point)


def _of_both(rng_key, row_model, values, energies):
    """Energies of the data and of the samples; they have to be finite."""

    def run():
        key_data, key_samples = jax.random.split(rng_key)
        observed = row_model.to_rows(row_model.visible_values)
        groups = _grouped(values, row_model.num_rows)
        keys = jax.random.split(key_samples, len(next(iter(groups.values()))))
        return energies((key_data, observed)), map_leading(energies, (keys, groups))

    of_data, of_samples = (np.asarray(x).ravel() for x in run_compiled(run))
    of_samples = of_samples[: len(next(iter(values.values())))]
    for name, x in (("data", of_data), ("samples", of_samples)):
        if not np.all(np.isfinite(x)):
            raise ModelError(
                f"energy_gap: {np.sum(~np.isfinite(x))} energies of the {name} are not finite, the "
                f"first of them number {np.argmin(np.isfinite(x))}."
            )
    return of_data, of_samples


def _sample_rows(row_model, samples):
    """Visible values of all samples, (samples, ...), and whether they come by the data's rows."""
    if not isinstance(samples, dict):
        if len(row_model.visible) > 1:
            raise ModelError(
                f"energy_gap: the model has the visible sites {sorted(row_model.visible)}; give "
                "`samples` as a dict of their draws."
            )
        (name,) = row_model.visible
        one = jnp.shape(row_model.to_rows({name: row_model.visible[name].value})[name])[1:]
        (samples,) = numbers_of("energy_gap", samples=samples)
        if jnp.shape(samples)[1:] == one:  # without an axis of rows
            return {name: samples}, False
        samples = {name: samples}
    values, is_paired = {}, True
    for name, site in row_model.visible.items():
        if name not in samples:
            raise ModelError(f"energy_gap: the samples lack the visible site '{name}'.")
        shape, axis = jnp.shape(site.value), row_model.row_axis(name, site.value)
        found = jnp.shape(samples[name])
        if len(found) != len(shape) + 1 or any(
            found[1 + i] != n for i, n in enumerate(shape) if i != axis
        ):
            raise ModelError(
                f"energy_gap: the samples of '{name}' have shape {found}; it should be (draws, "
                f"{str(shape)[1:-1].rstrip(',')}), with any number of rows."
            )
        x = jnp.moveaxis(jnp.asarray(samples[name]), 1 + axis, 1)
        is_paired = is_paired and x.shape[1] == row_model.num_rows
        values[name] = jnp.reshape(x, (-1, *x.shape[2:]))
    return values, is_paired


def _grouped(values, num_rows):
    """Samples in groups of as many as there are rows; the last is filled up with the first."""

    def group(x):
        missing = -len(x) % num_rows
        x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])
        return jnp.reshape(x, (-1, num_rows, *x.shape[1:]))

    return {name: group(x) for name, x in values.items()}
