# SPDX-License-Identifier: Apache-2.0
"""Runs and fits of energy-based models as ArviZ data, without an invented likelihood.

``arviz.from_numpyro`` files every observed site under ``log_likelihood`` and ``observed_data``, and
so the energies: ``arviz.loo`` then compares unnormalised numbers. Here energies are sample
statistics, and there is a log-likelihood only where log Z is known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from numpyro.infer import MCMC
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm.diagnostics.arviz.draws import convert_draws
from numpyro_ebm.diagnostics.arviz.fits import convert_fit
from numpyro_ebm.diagnostics.arviz.groups import Likelihood, to_data
from numpyro_ebm.diagnostics.arviz.labels import label
from numpyro_ebm.diagnostics.arviz.likelihood import (
    log_likelihood_of_rows,
)
from numpyro_ebm.diagnostics.arviz.posteriors import is_of_parameters, posterior_to_arviz
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model

__all__ = ["to_arviz"]


@explaining
def to_arviz(
    posterior: Any,
    model: Model | None = None,
    *args: Any,
    log_normalizer: Any = None,
    log_likelihood: Any = None,
    observed: Any = None,
    fantasies: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Convert a run, draws or a fit to what the installed ArviZ's own ``from_numpyro`` returns.

    :param posterior: an ``MCMC`` that has run on a fixed energy-based model; the dict of draws that
        :func:`~numpyro_ebm.sample` returned; the fit that ``EnergySVI.run`` returned; or an
        ``MCMC`` over parameters, by :class:`~numpyro_ebm.normalized`,
        :class:`~numpyro_ebm.generalized`, an exchange kernel or of an ordinary model: it takes no
        further arguments, and has a log-likelihood only if it is ``normalized`` or ordinary.
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
    :param dict dims: names in the place of those of plates and sites: by array, one for each
        dimension after chains and draws, ``{"v": ["flower", "measure"]}``.
    :param dict coords: labels along a dimension, by its name, ``{"measure": ["length", "width"]}``,
        in the groups where it has so many.
    :param kwargs: keyword arguments of the model, for draws and fits.
    :return: ``arviz.InferenceData`` (ArviZ before 1) or ``xarray.DataTree`` (ArviZ 1), with groups

        - *posterior*: the draws, with dimensions named after plates and sites, those of
          deterministic sites where it is known which axis is that of the rows. ArviZ 1 has dots for
          the "/" of ``scope`` in names. For a fit by
          persistent contrastive divergence: the visible sites of its chains in the rounds that
          are remembered (every fourth), one chain a row; for any other fit: its parameters, as
          one draw. Draws by ``generalized(..., learning_rate="calibrate")`` are adjusted to the
          width of their estimator (:meth:`~numpyro_ebm.generalized.adjust`);
        - *posterior_raw*: those draws as they were, to which *sample_stats* belong;
        - *sample_stats*: ``energy`` (the sum over rows of E minus the log base measure, in nats; a
          free energy where discrete sites were summed out) and ``row_energy`` (the same by row),
          ``lp`` (the log-density in unconstrained coordinates, up to log Z), and what the kernel
          collected: ``acceptance_rate``, ``row_acceptance_rate``,
          ``diverging`` (any row), ``hamiltonian_energy``, ... and ``extra_fields`` such as
          ``swap_prob``; ``step_size`` (by row for kernels on rows) and ``mean_swap_prob`` are those
          at the end of the run; ``row_frozen``, the share of the chains of a row that did not move,
          and ``row_r_hat``. Where these are bad, it warns :class:`~numpyro_ebm.ConvergenceWarning`.
          What ``arviz.bfmi`` and ``plot_energy`` read is ``energy``: under NumPyro's HMC and NUTS
          it is the Hamiltonian if the run collected it (``extra_fields=("energy",)``), otherwise
          that of the positions, and so the ratio tells how far it moves from draw to draw;
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
        that cannot be summed out, a shape is wrong, or ``dims`` and ``coords`` do not fit.

    .. note:: With fixed parameters the log-likelihood of a row is one number, the same at every
       draw, and its sum over rows is their log score: an honest one for rows that were not trained
       on. No draw depends on a row, so ``arviz.loo`` has nothing to leave out. The error of log Z
       is the same for all rows: for the sum over n rows it is n times ``log_normalizer_mcse``.

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
    if isinstance(posterior, MCMC) and is_of_parameters(posterior):
        data = posterior_to_arviz(posterior, (model, *args, *kwargs), observed, fantasies)
    else:
        known = log_normalizer, log_likelihood, observed, fantasies
        data = _energies_to_arviz(posterior, model, args, kwargs, *known)
    if dims or coords:
        label(data, dims or {}, coords or {})
    return data


def _energies_to_arviz(
    posterior, model, args, kwargs, log_normalizer, log_likelihood, observed, fantasies
):
    """What there is to tell of draws of an energy-based model, or of a fit."""
    if isinstance(posterior, SVIRunResult):
        converted = convert_fit(posterior, model, args, kwargs)
    else:
        converted = convert_draws(posterior, model, args, kwargs)
    groups, dims = dict(converted.groups), dict(converted.dims)
    seen = _read_observed(converted, observed, args, kwargs)
    if seen is not None:
        groups["observed_data"] = {k: np.asarray(s.value) for k, s in seen.visible.items()}
        dims |= {name: list(site.dims) for name, site in seen.visible.items()}
    visible = set() if seen is None else set(seen.visible)
    if fantasies is not None:
        groups["posterior_predictive"] = _visible_draws(fantasies, visible or None)
    elif observed is not None and converted.row_model is not None:
        predictive = {name: x for name, x in groups["posterior"].items() if name in visible}
        if predictive:
            groups["posterior_predictive"] = predictive
    likelihood = None
    if log_normalizer is not None or log_likelihood is not None:
        shape = np.shape(next(iter(groups["posterior"].values())))[:2]
        values, plate, attrs = log_likelihood_of_rows(seen, log_normalizer, log_likelihood)
        name = "_".join(sorted(visible))
        likelihood = Likelihood(name, np.broadcast_to(values, (*shape, len(values))), plate, attrs)
    return to_data(groups, dims, likelihood)


def _read_observed(converted, observed, args, kwargs):
    """The model at the rows that are to be shown as observed; ``None`` if there are none."""
    model, row_model = converted.model, converted.row_model
    args, kwargs = (args, kwargs) if row_model is None else (row_model.args, row_model.kwargs)
    if observed is not None:
        if model is None:
            raise ModelError("to_arviz: `observed` needs the model, `to_arviz(fit, model, ...)`.")
        if row_model is not None and row_model.observed:
            raise ModelError(
                f"to_arviz: the run itself observed {sorted(row_model.observed)}; drop `observed`."
            )
        try:
            return read_model(model, (observed, *args[1:]), kwargs)
        except (TypeError, ValueError) as error:
            if row_model is None or np.shape(observed)[:1] == (row_model.num_rows,):
                raise
            raise ModelError(
                f"to_arviz: the model cannot be read at `observed`, of shape {np.shape(observed)}, "
                "beside the other arguments of the run. Covariates belong to the rows of the run: "
                "give `observed` as many, or convert draws with the arguments of those rows, "
                f"`to_arviz(draws, model, observed, covariates)`. ({error})"
            ) from error
    if row_model is not None:
        return read_model(model, args, kwargs) if row_model.observed else None
    if model is None:
        return None
    seen = read_model(model, args, kwargs)
    return seen if seen.visible else None


def _visible_draws(fantasies, visible):
    """Draws of the visible sites, chains leading; of all sites if it is not known which are."""
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
