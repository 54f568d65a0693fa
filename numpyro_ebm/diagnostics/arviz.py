# SPDX-License-Identifier: Apache-2.0
"""Runs and fits of energy-based models as ArviZ data, without an invented likelihood.

``arviz.from_numpyro`` files every observed site under ``log_likelihood`` and ``observed_data``, and
so the energies: ``arviz.loo`` then compares unnormalised numbers. Here energies are sample
statistics, and there is a log-likelihood only where log Z is known.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.infer import MCMC
from numpyro.infer.svi import SVIRunResult
from scipy.stats import norm

from numpyro_ebm.diagnostics.posteriors import kind_of_posterior, posterior_to_arviz
from numpyro_ebm.diagnostics.rows import pick_marginal
from numpyro_ebm.errors import ModelError
from numpyro_ebm.handlers import fixed
from numpyro_ebm.joint import read, read_fixed
from numpyro_ebm.marginal import Enumerated
from numpyro_ebm.normalizer import LogNormalizer
from numpyro_ebm.objectives.contrastive_divergence import Chains, remembered_rounds

__all__ = ["to_arviz"]

ENERGY_BATCH = 256
"""Draws whose energies are evaluated at once."""

ROUNDING = 1e-6
"""Standard deviation, in nats, of log-likelihoods over draws on which they do not depend."""

FEWEST_DRAWS, ENOUGH_DRAWS = 30, 100
"""Draws that Pareto smoothing needs, and draws of a log-likelihood where there are not as many."""


def to_arviz(
    posterior,
    model=None,
    *args,
    log_normalizer=None,
    log_likelihood=None,
    observed=None,
    fantasies=None,
    **kwargs,
):
    r"""Convert a run, draws or a fit to what the installed ArviZ's own ``from_numpyro`` returns.

    :param posterior: an ``MCMC`` that has run on a fixed energy-based model; the dict of draws that
        :func:`~numpyro_ebm.sample` returned; the fit that ``EnergySVI.run`` returned; or an
        ``MCMC`` over parameters, by :class:`~numpyro_ebm.normalized`,
        :class:`~numpyro_ebm.generalized` or an exchange kernel: it takes no further arguments, and
        has a log-likelihood only if it is ``normalized``.
    :param model: the model of the draws, ``fixed(model, params)``; read off the kernel for
        ``MCMC``. For a fit, the model that was trained.
    :param args: arguments of the model, for draws and fits.
    :param log_normalizer: log Z, if it is known: what :func:`~numpyro_ebm.log_normalizer` returned,
        a number, or an array (rows,). Needs observed rows, and latent sites that can be summed out.
    :param log_likelihood: instead, the log-likelihood of every observed row: an array (rows,), or
        what ``ebm.log_likelihood(..., with_error=True)`` returned.
    :param observed: rows, the model's first argument, of which to show the data and the
        log-likelihood where the run itself did not observe any.
    :param fantasies: draws of the visible sites, as :func:`~numpyro_ebm.sample` returns them, for
        the group *posterior_predictive*.
    :param kwargs: keyword arguments of the model, for draws and fits.
    :return: ``arviz.InferenceData`` (ArviZ before 1) or ``xarray.DataTree`` (ArviZ 1), with groups

        - *posterior*: the draws, with dimensions named after plates and sites. For a fit by
          persistent contrastive divergence: the visible sites of its chains in the rounds that
          are remembered (every fourth), one chain a row; for any other fit: its parameters, as
          one draw;
        - *sample_stats*: ``energy`` (the sum over rows of E minus the log base measure, in nats; a
          free energy where discrete sites were summed out) and ``row_energy`` (the same by row),
          and what the kernel collected: ``lp``, ``acceptance_rate``, ``row_acceptance_rate``,
          ``diverging`` (any row), ``hamiltonian_energy``, ... and ``extra_fields`` such as
          ``swap_prob``; ``step_size`` and ``mean_swap_prob`` are those at the end of the run;
        - *posterior_predictive*: the fantasies, or with ``observed`` the run's own draws of the
          sites that are observed there;
        - *observed_data*: visible sites that were observed in the run, or in ``observed``;
        - *log_likelihood*: only if log Z is known, with ``log_normalizer``,
          ``log_normalizer_mcse`` (NaN for a plain number), ``log_normalizer_method`` and
          ``log_normalizer_bias`` in its attributes;
        - *constant_data* (fits with persistent chains): the parameters;
        - *training* (fits): ``loss`` by ``step``.
    :raises ModelError: if draws come without their model, the run has not been run, arguments are
        given beside a run, a log-likelihood is asked for without observed rows or with latent sites
        that cannot be summed out, or a shape is wrong.

    .. note:: With fixed parameters the log-likelihood of a row is one number, the same at every
       draw. ArviZ's Pareto smoothing cannot do with equal weights, so it is spread over the draws
       by a rounding error, with standard deviation 1e-6 nats and mean 0 (over 100 draws, if the
       posterior has fewer than 30). ``arviz.loo`` then returns the log score of the rows, with no
       effective parameters: it is an honest score of rows that were not trained on, and refits
       nothing. The error of log Z is the same for all rows: for the sum over n rows it is n times
       ``log_normalizer_mcse``.

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

    Log-likelihoods of held-out rows, with log Z:

    >>> log_z = ebm.log_normalizer(jax.random.key(1), model)
    >>> idata = ebm.to_arviz(draws, model, log_normalizer=log_z, observed=jnp.zeros((5, 2)))
    >>> dict(idata["log_likelihood"]["v"].sizes)
    {'chain': 1, 'draw': 50, 'data': 5}
    """
    if isinstance(posterior, MCMC) and kind_of_posterior(posterior.sampler):
        return posterior_to_arviz(posterior, (model, *args, *kwargs), observed, fantasies)
    if isinstance(posterior, SVIRunResult):
        groups, dims, model, joint = _of_fit(posterior, model, args, kwargs)
    else:
        groups, dims, model, joint = _of_draws(posterior, model, args, kwargs)
    run_args, run_kwargs = (args, kwargs) if joint is None else (joint.args, joint.kwargs)
    seen = None
    if observed is not None:
        if model is None:
            raise ModelError("to_arviz: `observed` needs the model, `to_arviz(fit, model, ...)`.")
        if joint is not None and joint.observed:
            raise ModelError(
                f"to_arviz: the run itself observed {sorted(joint.observed)}; drop `observed`."
            )
        seen = read(model, (observed, *run_args[1:]), run_kwargs)
    elif joint is not None and joint.observed:
        seen = read(model, run_args, run_kwargs)
    elif joint is None and model is not None:
        seen = read(model, run_args, run_kwargs)
        seen = seen if seen.visible else None
    if seen is not None:
        groups["observed_data"] = {k: np.asarray(s.value) for k, s in seen.visible.items()}
        dims |= {name: list(site.dims) for name, site in seen.visible.items()}
    predictive = _fantasies(fantasies, groups["posterior"], seen, joint, observed is not None)
    if predictive:
        groups["posterior_predictive"] = predictive
    attrs = None
    if log_normalizer is not None or log_likelihood is not None:
        shape = np.shape(next(iter(groups["posterior"].values())))[:2]
        values, attrs = _log_likelihood(seen, log_normalizer, log_likelihood)
        name = "_".join(sorted(seen.visible))
        groups["log_likelihood"] = {name: _over_draws(values, shape)}
    return _from_dict(groups, dims, seen, attrs)


# Draws


def _of_draws(posterior, model, args, kwargs):
    extra, final, shape = {}, {}, None
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
    joint = read_fixed(model, args, kwargs)
    dims = {name: list(site.dims) for name, site in joint.sites.items()}
    dims |= {"row_energy": [joint.plate], "row_acceptance_rate": [joint.plate]}
    stats = {**final, **_kernel_stats(extra, joint.num_rows)}
    groups = {
        "posterior": {name: np.asarray(x) for name, x in draws.items()},
        "sample_stats": {**_energies(joint, draws), **stats},
    }
    return groups, dims, model, joint


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


def _kernel_stats(extra, num_rows):
    """Sample statistics in ArviZ's words; those of single rows are brought together."""
    stats = {}
    for path, x in jax.tree_util.tree_leaves_with_path(dict(extra)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue
        name, x = _name(path), np.asarray(x)
        x = -x if name == "lp" else x
        by_row = x.ndim == 3 and x.shape[2] == num_rows
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


# Fits


def _of_fit(fit, model, args, kwargs):
    chains = getattr(fit.state, "objective_state", None)
    params = {name: np.asarray(x) for name, x in fit.params.items()}
    groups, dims = {"training": {"loss": np.asarray(fit.losses)}}, {}
    if model is not None:
        model = fixed(model, fit.params)
    elif args or kwargs:
        raise ModelError("to_arviz: arguments of the model need the model, `to_arviz(fit, model)`.")
    rounds = remembered_rounds(chains) if isinstance(chains, Chains) else ()
    if not len(rounds):
        groups["posterior"] = {name: x[None, None] for name, x in params.items()}
        return groups, dims, model, None
    history = np.swapaxes(rounds, 0, 1)  # one chain a row
    draws = {"visible": history[..., :-1]}
    if model is not None:
        joint = read(model, args, kwargs)
        if not joint.visible:
            raise ModelError(
                "to_arviz: to name the coordinates of the chains the model needs its data: "
                "`to_arviz(fit, model, data)`."
            )
        draws = _sites_of_chains(joint, history[..., :-1])
        dims |= {name: [d for d in joint.visible[name].dims if d != joint.plate] for name in draws}
    groups["posterior"] = draws
    groups["sample_stats"] = {"energy": history[..., -1]}
    groups["constant_data"] = params
    return groups, dims, model, None


def _sites_of_chains(joint, flat):
    """Site values of the coordinates of rows, (chains, draws, coordinates)."""
    like = jax.eval_shape(lambda: joint.to_rows(joint.unconstrain_visible()))
    start, draws = 0, {}
    for name in sorted(like):
        shape = like[name].shape[1:]
        stop = start + int(np.prod(shape))
        if stop > flat.shape[-1]:
            break
        u = np.reshape(flat[..., start:stop], (*flat.shape[:2], *shape))
        site = joint.visible[name]
        v = np.asarray(u if site.is_unconstrained else site.transform(jnp.asarray(u)))
        v = v.astype(jnp.asarray(site.value).dtype)
        draws[name] = np.expand_dims(v, 2 + site.dims.index(joint.plate))  # a plate of one row
        start = stop
    if start != flat.shape[-1] or set(draws) != set(like):
        raise ModelError(
            f"to_arviz: the chains have {flat.shape[-1]} coordinates, and a row of this model has "
            f"{sum(int(np.prod(x.shape[1:])) for x in like.values())}. Is it the model of the fit?"
        )
    return draws


# What was observed


def _fantasies(fantasies, posterior, seen, joint, is_given):
    """Draws of the visible sites, chains leading."""
    visible = None if seen is None else set(seen.visible)
    if fantasies is None:
        if not is_given or joint is None:
            return {}
        return {name: x for name, x in posterior.items() if name in visible}
    if not isinstance(fantasies, dict):
        raise ModelError(
            "to_arviz: `fantasies` must be a dict of draws by site, as `numpyro_ebm.sample` "
            f"returns it, got {type(fantasies).__name__}."
        )
    found = {
        k: np.asarray(x)[None] for k, x in fantasies.items() if visible is None or k in visible
    }
    if not found:
        raise ModelError(
            f"to_arviz: `fantasies` has none of the visible sites {sorted(visible or ())}, it has "
            f"{sorted(fantasies)}."
        )
    return found


def _log_likelihood(seen, log_z, given):
    """Log-likelihood of every observed row, (rows,), and what there is to know of its log Z."""
    if seen is None:
        raise ModelError(
            "to_arviz: a log-likelihood is one of observed rows, and there are none. Pass "
            "`observed=rows` (or the model's data, for a fit)."
        )
    rows = seen.num_rows
    if given is not None:
        if log_z is not None:
            raise ModelError("to_arviz: give `log_normalizer` or `log_likelihood`, not both.")
        value = np.asarray(getattr(given, "value", given), float)
        log_z = getattr(given, "log_normalizer", None)
        if value.shape != (rows,):
            raise ModelError(
                f"to_arviz: `log_likelihood` has shape {value.shape}, and {rows} rows are observed."
            )
    if not isinstance(log_z, LogNormalizer):
        log_z = LogNormalizer(np.nan if log_z is None else log_z, np.nan, np.nan, "given")
    if given is None:
        shape = np.shape(log_z.value)
        if shape not in ((), (rows,)):
            raise ModelError(
                f"to_arviz: `log_normalizer` has shape {shape}; it is a number, or one for each of "
                f"the {rows} observed rows."
            )
        if seen.covariates and shape == () and rows > 1:
            raise ModelError(
                "to_arviz: the energy reads an argument that differs from row to row, so every row "
                "has a log Z of its own, and one number was given for all of them."
            )
        try:
            marginal, _, _ = pick_marginal("to_arviz", seen, None, None, None)
        except ModelError as error:
            raise ModelError(
                "to_arviz: the latent sites cannot be summed out. Pass `log_likelihood="
                "numpyro_ebm.log_likelihood(rng_key, model, ..., log_normalizer=log_z, "
                f"with_error=True)` instead of `log_normalizer`. ({error})"
            ) from None

        @jax.jit
        def log_density():
            u = seen.unconstrain_visible()
            _, log_det = seen.constrain(u)
            bound = marginal.bind(jax.random.key(0), seen, None, {}, u, order=1)
            return bound.log_density({}, u) - log_det

        value = np.asarray(log_density(), float) - np.asarray(log_z.value, float)
    plain = lambda x: np.asarray(x, float).tolist()  # noqa: E731
    attrs = {
        "log_normalizer": plain(log_z.value),
        "log_normalizer_mcse": plain(log_z.mcse),
        "log_normalizer_method": log_z.method,
        "log_normalizer_bias": log_z.bias,
    }
    return value, attrs


def _over_draws(values, shape):
    """(rows,) -> (chains, draws, rows), apart by a rounding error that is the same for all rows."""
    if np.prod(shape) < FEWEST_DRAWS:
        shape = (1, ENOUGH_DRAWS)
    num = int(np.prod(shape))
    quantiles = norm.ppf((np.arange(num) + 0.5) / num)
    order = np.random.default_rng(0).permutation(num)
    return values + ROUNDING * np.reshape(quantiles[order], (*shape, 1))


def _from_dict(groups, dims, seen, attrs):
    import arviz as az
    import xarray as xr

    training = groups.pop("training", None)
    likelihood = groups.pop("log_likelihood", None)
    dims = {k: v for k, v in dims.items() if any(k in group for group in groups.values())}
    convert = _converter(az)
    idata = convert(groups, dims)
    added = {}
    if likelihood is not None:
        # By itself, because there the name of the site is the name of its rows' log-likelihoods.
        rows = convert({"log_likelihood": likelihood}, dict.fromkeys(likelihood, [seen.plate]))
        added["log_likelihood"] = rows["log_likelihood"]
        added["log_likelihood"].attrs.update(attrs)
    if training is not None:
        added["training"] = xr.Dataset({"loss": ("step", training["loss"])})
    for name, group in added.items():
        if hasattr(idata, "add_groups"):
            idata.add_groups({name: group}, warn_on_custom_groups=False)
        elif isinstance(group, xr.Dataset):
            idata[name] = xr.DataTree(group)
        else:
            idata[name] = group
    return idata


def _converter(az):
    def convert(groups, dims):
        with warnings.catch_warnings():
            # A guess at transposed axes, wrong for the many persistent chains of a fit.
            warnings.filterwarnings("ignore", "More chains|Found chain dimension", UserWarning)
            if int(az.__version__.split(".")[0]) < 1:
                return az.from_dict(**groups, dims=dims)
            return az.from_dict(groups, dims=dims)

    return convert
