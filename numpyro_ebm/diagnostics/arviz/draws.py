# SPDX-License-Identifier: Apache-2.0
"""Draws of a fixed model, their energies and what the kernel collected, as arrays for ArviZ."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.infer import MCMC

from numpyro_ebm._compat import run_arguments
from numpyro_ebm.diagnostics.arviz.groups import Converted
from numpyro_ebm.diagnostics.reading import check_has_run
from numpyro_ebm.errors import ModelError
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.mcmc.convergence import assess_draws, warn_of_convergence
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.model.row_trials import row_axis_of
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.program.row_axes import row_axes
from numpyro_ebm.types import Model

__all__ = ["convert_draws"]

ENERGY_BATCH = 256
"""Draws whose energies are evaluated at once."""

RENAMED = {
    "accept_prob": "acceptance_rate",
    "potential_energy": "lp",
    "num_steps": "n_steps",
    "energy": "hamiltonian_energy",
}
"""ArviZ's words for the fields of kernels; others keep their names."""

BY_ROW = {"lp": np.sum, "hamiltonian_energy": np.sum, "acceptance_rate": np.mean}
BY_ROW |= {"diverging": np.any}
"""Statistics that are brought together where there is one for every row."""

FINAL = ("step_size", "mean_swap_prob")
"""Fields of the last state that hold for all draws of a chain."""


def convert_draws(
    posterior: Any, model: Model | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Converted:
    """Groups *posterior* and *sample_stats* of an ``MCMC`` that has run, or of a dict of draws.

    :param model: the fixed model; read off the kernel of an ``MCMC`` if ``None``.
    :param args, kwargs: arguments of the model; an ``MCMC`` brings its own.
    :return: :class:`~numpyro_ebm.diagnostics.arviz.groups.Converted`.
    """
    extra, final = {}, {}
    if isinstance(posterior, MCMC):
        _check_run(posterior, args, kwargs)
        model = posterior.sampler.model if model is None else model
        args, kwargs = run_arguments(posterior)
        draws = posterior.get_samples(group_by_chain=True)
        extra = posterior.get_extra_fields(group_by_chain=True)
        shape = jnp.shape(jax.tree.leaves(draws)[0])[:2]
        final = _final_fields(posterior.last_state, posterior.num_chains, shape)
    elif isinstance(posterior, dict):
        draws = jax.tree.map(lambda x: jnp.asarray(x)[None], posterior)
    else:
        raise ModelError(
            "to_arviz: takes an MCMC that has run, the dict of draws of `numpyro_ebm.sample`, or "
            f"what `EnergySVI.run` returned, got {type(posterior).__name__}."
        )
    if model is None:
        raise ModelError("to_arviz: give the model of the draws, `to_arviz(draws, model)`.")
    row_model = read_fixed_model(model, args, kwargs)
    dims = {name: list(site.dims) for name, site in row_model.sites.items()}
    dims |= _deterministic_dims(row_model, draws)
    dims |= {"row_energy": [row_model.plate], "row_acceptance_rate": [row_model.plate]}
    stats = {**final, **_kernel_stats(extra, row_model.num_rows)}
    if isinstance(posterior, MCMC):
        stats |= _convergence(posterior.sampler, row_model, draws, extra)
        dims |= {name: [row_model.plate] for name in ("row_r_hat", "row_frozen")}
    groups = {
        "posterior": {name: np.asarray(x) for name, x in draws.items()},
        "sample_stats": {**_energies(row_model, draws), **stats},
    }
    return Converted(groups, dims, model, row_model)


def _convergence(kernel, row_model, draws, extra):
    """R-hat of the rows, and which did not move, the same for all draws; and a warning."""
    sites = {name: x for name, x in draws.items() if name in row_model.sites}
    found = assess_draws(row_model, sites, extra, getattr(kernel, "leaves_invariant", True))
    warn_of_convergence(f"to_arviz ({type(kernel).__name__})", found)
    stats = {"row_frozen": found.frozen / found.num_chains}
    if found.r_hat is not None:
        stats["row_r_hat"] = found.r_hat
    return {
        name: np.broadcast_to(x, (found.num_chains, found.num_draws, len(x)))
        for name, x in stats.items()
    }


def _deterministic_dims(row_model, draws):
    """Dimensions of deterministic sites whose axis of rows is known from how they are made."""
    values = {name: site.value for name, site in row_model.sites.items()}
    shapes = jax.eval_shape(lambda: row_model.deterministic({}, values))
    names = sorted(shapes)

    def replay(values):
        found = row_model.deterministic({}, values)
        return [found[name] for name in names]

    axes = [row_axis_of(row_model.sites[k], values[k], row_model) for k in sorted(values)]
    dims = {}
    for name, axis in zip(names, row_axes(replay, values, axes), strict=True):
        if name in draws and isinstance(axis, int):
            rest = (f"{name}_dim_{i}" for i in range(shapes[name].ndim - 1))
            dims[name] = [
                row_model.plate if i == axis else next(rest) for i in range(shapes[name].ndim)
            ]
    return dims


def _check_run(mcmc, args, kwargs):
    check_has_run("to_arviz", mcmc)
    if args or kwargs:
        raise ModelError(
            "to_arviz: an MCMC brings the arguments of its run; give none beside it, got "
            f"{[*args, *kwargs]}."
        )


def _energies(row_model, draws):
    """Energies of all draws, by row and in sum; latent sites without draws are summed out."""
    given = {k: x for k, x in draws.items() if k in row_model.sites}
    missing = [name for name in row_model.visible if name not in given]
    if missing:
        raise ModelError(f"to_arviz: the draws lack the site(s) {missing} of the model.")
    row_model = row_model.with_latent([name for name in row_model.latent if name not in given])
    marginal = exact_marginal(row_model)

    def log_densities(values):
        u = {k: site.transform.inv(values[k]) for k, site in row_model.visible.items()}
        log_density, (_, log_det) = (
            marginal.log_density(row_model, {}, values),
            row_model.constrain(u),
        )
        return log_density, log_density + log_det

    shape = jnp.shape(next(iter(given.values())))[:2]
    flat = jax.tree.map(lambda x: jnp.reshape(x, (-1, *jnp.shape(x)[2:])), given)
    found = run_compiled(lambda x: lax.map(log_densities, x, batch_size=ENERGY_BATCH), flat)
    rows, lp = (np.asarray(x).reshape(*shape, -1) for x in found)
    return {"energy": -rows.sum(-1), "row_energy": -rows, "lp": lp.sum(-1)}


def _kernel_stats(extra, num_rows):
    """Sample statistics in ArviZ's words; those of single rows are brought together."""
    stats = {}
    for path, x in jax.tree_util.tree_leaves_with_path(dict(extra)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue
        name, x = _name(path), np.asarray(x)
        x = -x if name == "lp" else x
        by_row = x.ndim == 3 and x.shape[2] == num_rows
        if name == "hamiltonian_energy" and x.ndim == 2:  # of all rows together, as ArviZ has it
            name = "energy"
        if by_row and name == "acceptance_rate":
            stats["row_acceptance_rate"] = x
        stats[name] = BY_ROW[name](x, -1) if by_row and name in BY_ROW else x
    return stats


def _name(path):
    """``adapt_state.step_size`` -> ``step_size``, ``block_states.0.accept_prob`` with its block."""
    words = [word for key in path for word in jax.tree_util.keystr((key,), simple=True).split(".")]
    words[-1] = RENAMED.get(words[-1], words[-1])
    return "_".join(word for word in words if word != "adapt_state")


def _final_fields(state, num_chains, shape):
    """What the kernel, or the blocks of ``Gibbs``, ended with, the same for all draws."""
    blocks = {f"block_states_{i}_": s for i, s in enumerate(getattr(state, "block_states", ()))}
    found = {}
    for prefix, block in (blocks or {"": state}).items():
        for place in (block, getattr(block, "adapt_state", None)):
            for field in FINAL:
                if getattr(place, field, None) is not None:
                    x = np.asarray(getattr(place, field))
                    x = x if num_chains > 1 else x[None]
                    x = np.broadcast_to(x[:, None], (*shape, *x.shape[1:]))
                    found[prefix + field] = x
    return found
