# SPDX-License-Identifier: Apache-2.0
"""Runs of energy-based models as ArviZ data, without an invented likelihood.

``arviz.from_numpyro`` files every observed site under ``log_likelihood`` and ``observed_data``, and
so the energies: ``arviz.loo`` then compares unnormalised numbers. Here energies are sample
statistics.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.infer import MCMC

from numpyro_ebm.errors import ModelError
from numpyro_ebm.joint import read_fixed
from numpyro_ebm.marginal import Enumerated

__all__ = ["to_arviz"]

ENERGY_BATCH = 256
"""Draws whose energies are evaluated at once."""


def to_arviz(posterior, model=None, *args, **kwargs):
    r"""Convert a run to what the installed ArviZ's own ``from_numpyro`` returns.

    :param posterior: an ``MCMC`` that has run on a fixed energy-based model, or the dict of draws
        that :func:`~numpyro_ebm.sample` returned.
    :param model: the model of the draws, ``fixed(model, params)``; read off the kernel for
        ``MCMC``.
    :param args: arguments of the model, for a dict of draws.
    :param kwargs: keyword arguments of the model, for a dict of draws.
    :return: ``arviz.InferenceData`` (ArviZ before 1) or ``xarray.DataTree`` (ArviZ 1), with groups

        - *posterior*: the draws, with dimensions named after plates and sites;
        - *sample_stats*: ``energy`` (the sum over rows of E minus the log base measure, in nats; a
          free energy where discrete sites were summed out) and ``row_energy`` (the same by row),
          and what the kernel collected: ``lp``, ``acceptance_rate``, ``row_acceptance_rate``,
          ``diverging`` (any row), ``step_size``, ...;
        - *observed_data*: visible sites that were observed in the run, if any.

        There is no *log_likelihood*: without log Z an energy is not one.
    :raises ModelError: if draws come without their model, the run has not been run, or arguments
        are given beside a run.

    **Example**

    >>> import jax.numpy as jnp
    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> params = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": jnp.zeros(4), "scale": jnp.ones(2)}
    >>> model = ebm.fixed(ebm.models.grbm, params)
    >>> draws = ebm.sample(jax.random.key(0), model, 50)
    >>> idata = ebm.to_arviz(draws, model)
    >>> dict(idata["posterior"]["v"].sizes)
    {'chain': 1, 'draw': 50, 'data': 1, 'v_dim_0': 2}
    """
    extra = {}
    if isinstance(posterior, MCMC):
        if posterior.last_state is None:
            raise ModelError("to_arviz: this MCMC has not been run.")
        if args or kwargs:
            raise ModelError(
                "to_arviz: an MCMC brings the arguments of its run; give none beside it, got "
                f"{[*args, *kwargs]}."
            )
        model = posterior.sampler.model if model is None else model
        args, kwargs = posterior._args, posterior._kwargs
        draws = posterior.get_samples(group_by_chain=True)
        extra = posterior.get_extra_fields(group_by_chain=True)
    else:
        draws = jax.tree.map(lambda x: jnp.asarray(x)[None], dict(posterior))
    if model is None:
        raise ModelError("to_arviz: give the model of the draws, `to_arviz(draws, model)`.")
    joint = read_fixed(model, args, kwargs)
    dims = {name: list(site.dims) for name, site in joint.sites.items()}
    dims |= {"row_energy": [joint.plate], "row_acceptance_rate": [joint.plate]}
    groups = {
        "posterior": {name: np.asarray(x) for name, x in draws.items()},
        "sample_stats": {**_energies(joint, draws), **_kernel_stats(extra, joint.num_rows)},
    }
    if joint.observed:
        groups["observed_data"] = {k: np.asarray(site.value) for k, site in joint.observed.items()}
    return _from_dict(groups, dims)


def _energies(joint, draws):
    given = {k: x for k, x in draws.items() if k in joint.sites}
    missing = [name for name in joint.visible if name not in given]
    if missing:
        raise ModelError(f"to_arviz: the draws lack the site(s) {missing} of the model.")
    summed_out = {name: site for name, site in joint.latent.items() if name not in given}
    joint.latent = summed_out

    def negative_log_density(values):
        if summed_out:
            return -Enumerated().log_density(joint, {}, values)
        return -joint.log_density({}, values)

    shape = jnp.shape(next(iter(given.values())))[:2]
    flat = jax.tree.map(lambda x: jnp.reshape(x, (-1, *jnp.shape(x)[2:])), given)
    rows = jax.jit(lambda x: lax.map(negative_log_density, x, batch_size=ENERGY_BATCH))(flat)
    rows = np.asarray(rows).reshape(*shape, -1)
    return {"energy": rows.sum(-1), "row_energy": rows}


def _kernel_stats(extra, num_rows):
    """Sample statistics in ArviZ's words; those of single rows are brought together."""
    rename = {
        "accept_prob": "acceptance_rate",
        "potential_energy": "lp",
        "num_steps": "n_steps",
        "adapt_state.step_size": "step_size",
        "energy": "hamiltonian_energy",
    }
    stats = {}
    for field, x in extra.items():
        if not hasattr(x, "shape"):
            continue
        name, x = rename.get(field, field.replace(".", "_")), np.asarray(x)
        x = -x if name == "lp" else x
        by_row = x.ndim == 3 and x.shape[2] == num_rows
        if by_row and name == "acceptance_rate":
            stats["row_acceptance_rate"] = x
        reduce = {"lp": np.sum, "acceptance_rate": np.mean, "diverging": np.any}.get(name)
        stats[name] = reduce(x, -1) if by_row and reduce else x
    return stats


def _from_dict(groups, dims):
    import arviz as az

    dims = {k: v for k, v in dims.items() if any(k in group for group in groups.values())}
    if int(az.__version__.split(".")[0]) < 1:
        return az.from_dict(**groups, dims=dims)
    return az.from_dict(groups, dims=dims)
