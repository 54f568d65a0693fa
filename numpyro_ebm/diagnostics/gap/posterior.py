# SPDX-License-Identifier: Apache-2.0
r"""How far a guide q(h | v) is from the posterior p(h | v; θ), row by row.

.. math:: \mathrm{KL}(q \,\|\, p) = \log\tilde p(v) - E_q\Big[\log\frac{\tilde p(v, h)}{q(h | v)}
    \Big]

log Z cancels. The second term is the ELBO; the first is exact where the latents can be summed out.
Elsewhere the importance-weighted bound of Burda et al. stands for it, which is below it in the
mean, so that the estimate of KL is too small, by less and less as the weights have a finite
variance and their number grows.

What the gap does to VaES and VaGES is the subject of :mod:`numpyro_ebm.diagnostics.gap.bias`.

Reference: Burda, Grosse, Salakhutdinov, *Importance weighted autoencoders*, ICLR 2016.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import not_jax_tracer, psis_weights
from numpyro_ebm.diagnostics.gap.bias import BiasBound, bias_bounds
from numpyro_ebm.diagnostics.gap.weights import (
    all_states,
    choose_method,
    weigh_particles,
    weigh_states,
)
from numpyro_ebm.diagnostics.reading import map_leading, read_guide, refuse_weights
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.keys import default_key
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.printed import brief
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model, Params

__all__ = ["PosteriorGap", "posterior_gap"]


class PosteriorGap(NamedTuple):
    r"""What :func:`posterior_gap` found. Arrays are by row, (rows,), but for the first two fields.

    - **value** - mean of ``kl`` over rows, in nats.
    - **standard_error** - of ``value``, from the particles alone: the rows are those given.
    - **kl** - KL(q ‖ p(h | v)) of every row, in nats.
    - **kl_error** - its standard error; 0 where it is exact.
    - **method** - ``"enumerate"``: exact, a sum over all states of h. ``"marginal"``: the exact
      log p̃(v) less the ELBO of the particles, without bias. ``"importance"``: a lower bound of KL
      in the mean, from the importance-weighted bound.
    - **elbo** - E_q[log p̃(v, h) - log q], up to log Z.
    - **log_marginal** - log p̃(v), or its importance-weighted bound.
    - **tv** - total variation of q and p(h | v), between 0 and 1; an estimate unless enumerated.
    - **tv_bound** - :math:`\sqrt{\mathrm{KL}/2}`, or 1, from ``kl``.
    - **fisher** - :math:`\tfrac12 E_q\|∇_h \log q/\tilde p\|^2` from the particles, in the sites'
      own coordinates; ``None`` unless all latent sites are continuous.
    - **fisher_error** - its standard error.
    - **ess** - effective number of the particles as weighted draws of p(h | v).
    - **pareto_k** - shape of the tail of the weights; above 0.7 neither they nor ``kl`` are to be
      trusted, however small the standard error (Vehtari et al., *Pareto smoothed importance
      sampling*, JMLR 2024). 0 where the largest weights are equal, infinite below 25 particles,
      NaN where weights tie so that no tail can be fitted, ``None`` where enumerated.
    - **vaes** - :class:`BiasBound` of VaES, the score; ``None`` if a visible site is discrete.
    - **vages** - :class:`BiasBound` of VaGES, the gradient of the score; ``None`` unless asked for.
    """

    value: jax.Array
    standard_error: jax.Array
    kl: jax.Array
    kl_error: jax.Array
    method: str
    elbo: jax.Array
    log_marginal: jax.Array
    tv: jax.Array
    tv_bound: jax.Array
    fisher: jax.Array | None
    fisher_error: jax.Array | None
    ess: jax.Array
    pareto_k: jax.Array | None
    vaes: BiasBound | None
    vages: BiasBound | None

    __repr__ = brief


@explaining
def posterior_gap(
    rng_key: jax.Array,
    model: Model,
    guide: Model,
    params: Params,
    *args: Any,
    num_particles: int = 1_000,
    max_states: int = 4_096,
    gradient: bool = False,
    **kwargs: Any,
) -> PosteriorGap:
    r"""Measure the gap between a guide and the posterior of an energy-based model.

    :param rng_key: random key.
    :param model: the model, or ``fixed(model, params)``.
    :param guide: the guide q(h | v).
    :param dict params: parameters of the guide, and of the model if they are not fixed, such as
        ``fit.params``.
    :param args: arguments of model and guide, the rows among them.
    :param int num_particles: L, draws of q for every row.
    :param int max_states: the most joint states of discrete latents, per row, that are enumerated;
        with 0 there are only the particles.
    :param bool gradient: bound the bias of VaGES as well, for the parameters of a model that is not
        fixed. Its time and memory grow with the square of the rows: give a few dozen.
    :param kwargs: keyword arguments of model and guide.
    :return: :class:`PosteriorGap`; ``.kl`` by row, ``.value`` and ``.standard_error`` in the mean.
    :raises ModelError: if there are no latent sites, no guide, no data, or parameters without a
        value; if the guide draws sites that the model does not have, or its density at its own
        draws is not finite; with ``gradient=True``, if there is nothing to differentiate in.

    Reference: see :mod:`numpyro_ebm.diagnostics.gap.posterior`.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> params = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": jnp.zeros(4), "scale": jnp.ones(2)}
    >>> params |= {"A": 0.8 * jnp.ones((2, 4)), "d": jnp.zeros(4)}  # the posterior has A = W
    >>> rows = jax.random.normal(jax.random.key(0), (50, 2))
    >>> gap = ebm.posterior_gap(
    ...     jax.random.key(1), ebm.models.grbm, ebm.models.grbm_guide, params, rows
    ... )
    >>> gap.method, round(float(gap.value), 3)
    ('enumerate', 0.016)
    >>> bool(jnp.all(gap.vaes.bias <= gap.vaes.range_bound))
    True
    """
    row_model, reader = _read(model, guide, params, args, kwargs, num_particles, gradient)
    method = choose_method(row_model, max_states)
    visible = row_model.visible_values

    def log_p(latent):
        return row_model.log_density(params, {**visible, **latent})

    def log_q(latent):
        return reader.log_density(params, visible, latent)

    def run():
        particles = reader.draw(rng_key, params, visible, num_particles)
        points = all_states(row_model) if method == "enumerate" else particles
        log_joint = map_leading(log_p, points)
        log_guide = map_leading(log_q, points)
        if method == "enumerate":
            weights = weigh_states(log_joint, log_guide, num_particles)
        else:
            exact = None
            if method == "marginal":
                exact = exact_marginal(row_model).log_density(row_model, params, visible)
            weights = weigh_particles(log_joint, log_guide, exact)
        kl = weights.log_marginal - weights.elbo
        tv = 0.5 * jnp.sum(jnp.abs(weights.q - weights.p), 0)
        tv_bound = jnp.minimum(jnp.sqrt(jnp.maximum(kl, 0.0) / 2), 1.0)
        fisher, fisher_error = _fisher(row_model, particles, log_p, log_q)
        reach = tv if method == "enumerate" else tv_bound
        vaes, vages = bias_bounds(row_model, params, points, weights.q, weights.p, reach, gradient)
        found = dict(
            value=jnp.mean(kl),
            standard_error=jnp.sqrt(jnp.sum(weights.error**2)) / row_model.num_rows,
            kl=kl,
            kl_error=weights.error,
            elbo=weights.elbo,
            log_marginal=weights.log_marginal,
            tv=tv,
            tv_bound=tv_bound,
            fisher=fisher,
            fisher_error=fisher_error,
            ess=weights.ess,
            pareto_k=None if method == "enumerate" else _pareto_shapes(log_joint - log_guide),
            vaes=vaes,
            vages=vages,
        )
        return found, log_joint - log_guide, log_guide

    found, log_w, log_guide = run_compiled(run)
    if not_jax_tracer(log_w):
        _check_finite(log_w, log_guide, method)
    return PosteriorGap(method=method, **found)


def _pareto_shapes(log_w):
    """Shape of the tail of the weights (particles, rows) of every row."""
    return jax.vmap(lambda x: psis_weights(x)[1], 1)(log_w)


def _fisher(row_model, particles, log_p, log_q):
    """Half the expected square of ∇_h log q/p̃, and its standard error, as in `PosteriorScore`."""
    if any(site.is_discrete for site in row_model.latent.values()):
        return None, None

    def of_particle(latent):
        ratio = jax.grad(lambda h: jnp.sum(log_q(h) - log_p(h)))(latent)
        total = jnp.zeros(row_model.num_rows)
        for name, x in ratio.items():
            event = tuple(range(-row_model.latent[name].event_dim, 0))
            total = total + 0.5 * row_model.sum_to_rows(jnp.sum(x**2, event))
        return total

    squares = map_leading(of_particle, particles)
    return jnp.mean(squares, 0), jnp.std(squares, 0, ddof=1) / math.sqrt(len(squares))


def _read(model, guide, params, args, kwargs, num_particles, gradient):
    """The model and the guide beside it, or what is wrong with them."""
    check_integer("posterior_gap", 2, num_particles=num_particles)
    if not isinstance(params, dict):
        raise ModelError(
            "posterior_gap: `params` must be a dict of parameter values by site name, such as "
            f"`fit.params`, got {type(params).__name__}. The model's arguments come after it."
        )
    if not callable(guide):
        raise ModelError(
            "posterior_gap: `guide` must be a NumPyro function q(h | v) with the model's "
            f"arguments, got {guide!r}."
        )
    row_model = read_model(model, args, kwargs, params)
    if not row_model.visible:
        raise ModelError(
            "posterior_gap: the model observes nothing. Pass the rows as its data, after `params`."
        )
    refuse_weights("posterior_gap", row_model)
    if not row_model.latent:
        raise ModelError("posterior_gap: the model has no latent sites, so there is no posterior.")
    missing = sorted(name for name in row_model.parameters if name not in params)
    if missing:
        raise ModelError(
            f"posterior_gap: no value for the parameter(s) {', '.join(map(repr, missing))} of the "
            "model. Give them in `params`, or pass `numpyro_ebm.fixed(model, params)`."
        )
    if gradient and not row_model.parameters:
        raise ModelError(
            "posterior_gap: gradient=True bounds the bias in the parameters, and this model has "
            "none that are free. Pass the model itself, and its parameters in `params`."
        )
    reader = read_guide("posterior_gap", guide, row_model, params)
    guide_trace = reader.trace(default_key(), params, row_model.visible_values)
    extra = sorted(
        name
        for name, site in guide_trace.items()
        if site["type"] == "sample" and not site["is_observed"] and name not in row_model.latent
    )
    if extra:
        raise ModelError(
            f"posterior_gap: the guide draws {', '.join(map(repr, extra))}, which the model does "
            "not have, so that the density of its latent sites alone is not known."
        )
    return row_model, reader


def _check_finite(log_w, log_guide, method):
    """Refuse a guide that draws where the model has no density."""
    if method == "enumerate":
        bad = np.any(np.isnan(log_w), 0) | ~np.any(np.isfinite(log_guide), 0)
    else:
        bad = np.any(~np.isfinite(log_w), 0)
    if np.any(bad):
        raise ModelError(
            f"posterior_gap: log p̃(v, h) - log q(h | v) is not finite at draws of the guide, in "
            f"{np.sum(bad)} of {len(bad)} rows, the first of them row {np.argmax(bad)}. Does the "
            "guide draw where the model has no density?"
        )
