# SPDX-License-Identifier: Apache-2.0
r"""How far a guide q(h | v) is from the posterior p(h | v; θ), row by row.

.. math:: \mathrm{KL}(q \,\|\, p) = \log\tilde p(v) - E_q\Big[\log\frac{\tilde p(v, h)}{q(h | v)}
    \Big]

log Z cancels. The second term is the ELBO; the first is exact where the latents can be summed out.
Elsewhere the importance-weighted bound of Burda et al. stands for it, which is below it in the
mean, so that the estimate of KL is too small, by less and less as the weights have a finite
variance and their number grows.

What it means for VaES and VaGES: for :math:`f_i = ∂_{v_i} \log\tilde p(v, h)` and
:math:`\mathrm{TV} ≤ \sqrt{\mathrm{KL}/2}` the total variation,

.. math:: |E_q f_i - E_p f_i| ≤ \operatorname{range}_h(f_i)\, \mathrm{TV}, \qquad
    \|E_q f - E_p f\| ≤ 2 F\, \mathrm{TV}, \qquad F = \sup_h \|f\|

and with :math:`g_j = ∂_{θ_j} \log\tilde p` and :math:`m_{ij} = ∂_{v_i} ∂_{θ_j} \log\tilde p` the
bias of VaGES, whose mean is :math:`E_q m_{ij} + \operatorname{Cov}_q(f_i, g_j)`, is at most

.. math:: \big[\operatorname{range}(m_{ij}) + \tfrac32 \operatorname{range}(f_i)
    \operatorname{range}(g_j)\big]\, \mathrm{TV} \quad \text{and} \quad (2 M + 6 F G)\, \mathrm{TV}

(the first by taking the middles of their ranges off f and g, which no covariance notices).

Reference: Bao et al., ICML 2021 (the rates); Burda, Grosse, Salakhutdinov, *Importance weighted
autoencoders*, ICLR 2016; Vehtari, Simpson, Gelman, Yao, Gabry, *Pareto smoothed importance
sampling*, JMLR 2024; Zhang, Stephens, *A new and efficient estimation method for the generalized
Pareto distribution*, Technometrics 2009.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp
from numpyro.util import not_jax_tracer

from numpyro_ebm.diagnostics.rows import map_leading, read_guide
from numpyro_ebm.errors import ModelError
from numpyro_ebm.joint import lowest_value, read
from numpyro_ebm.marginal import Enumerated
from numpyro_ebm.marginal.enumerated import num_values_of

__all__ = ["BiasBound", "PosteriorGap", "posterior_gap"]

FEWEST_IN_TAIL = 5
"""Weights that a tail is fitted to."""

ROUNDING = 1e-6
"""Difference of weights, the largest being one, that is none."""


class BiasBound(NamedTuple):
    """The bias that a guide brings into an estimate, by row, (rows,) each.

    - **bias** - norm of the bias, in units of the score (or of its gradient in θ).
    - **range_bound** - norm of the bounds by coordinate, from the ranges of what is averaged.
    - **norm_bound** - the bound from the largest norms of what is averaged.

    Where the latents were enumerated all three are exact, and the bounds bound. Else the bias is an
    importance estimate, and ranges and norms are those over the particles, which may miss larger
    ones, times an estimate of the total variation: estimates of the bounds, and themselves none.
    """

    bias: jax.Array
    range_bound: jax.Array
    norm_bound: jax.Array


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
      trusted, however small the standard error. Minus infinity where the largest weights are
      equal, NaN below 25 particles, ``None`` where enumerated and under ``jax.jit``.
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
    pareto_k: np.ndarray | None
    vaes: BiasBound | None
    vages: BiasBound | None


def posterior_gap(
    rng_key,
    model,
    guide,
    params,
    *args,
    num_particles=1_000,
    max_states=4_096,
    gradient=False,
    **kwargs,
):
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

    Reference: see :mod:`numpyro_ebm.diagnostics.gap`.

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
    joint, reader = _read(model, guide, params, args, kwargs, num_particles, gradient)
    states = _states(joint, max_states)
    log_marginal_of = None if states is not None else _exact_marginal(joint, params)
    method = "enumerate" if states is not None else "marginal" if log_marginal_of else "importance"
    visible = joint.visible_values

    def log_p(latent):
        return joint.log_density(params, {**visible, **latent})

    def log_q(latent):
        return reader.log_density(params, visible, latent)

    @jax.jit
    def run():
        particles = reader.draw(rng_key, params, visible, num_particles)
        points = particles if states is None else states(joint)
        log_joint = map_leading(log_p, points)
        log_guide = map_leading(log_q, points)
        log_w = log_joint - log_guide
        num = len(log_w)
        if method == "enumerate":
            log_marginal = logsumexp(log_joint, 0)
            q, p = jnp.exp(log_guide), jnp.exp(log_joint - log_marginal)
            terms = jnp.where(q > 0, q * log_w, 0.0)
            elbo, error = jnp.sum(terms, 0), jnp.zeros(joint.num_rows)
            # Of draws of q, as their number grows: E_q[w]² / E_q[w²].
            ess = num_particles / jnp.sum(
                jnp.where(q > 0, p * p / q, jnp.where(p > 0, jnp.inf, 0)), 0
            )
        else:
            q, p = jnp.full_like(log_w, 1 / num), jax.nn.softmax(log_w, 0)
            elbo, influence = jnp.mean(log_w, 0), log_w
            if method == "marginal":
                log_marginal = log_marginal_of()
            else:
                log_marginal = logsumexp(log_w, 0) - math.log(num)
                influence = jnp.exp(log_w - log_marginal) - log_w
            error = jnp.std(influence, 0, ddof=1) / math.sqrt(num)
            ess = 1 / jnp.sum(p * p, 0)
        kl = log_marginal - elbo
        tv = 0.5 * jnp.sum(jnp.abs(q - p), 0)
        tv_bound = jnp.minimum(jnp.sqrt(jnp.maximum(kl, 0.0) / 2), 1.0)
        fisher = _fisher(joint, particles, log_p, log_q)
        reach = tv if method == "enumerate" else tv_bound
        vaes, vages = _bias(joint, params, points, q, p, reach, gradient)
        result = PosteriorGap(
            value=jnp.mean(kl),
            standard_error=jnp.sqrt(jnp.sum(error**2)) / joint.num_rows,
            kl=kl,
            kl_error=error,
            method=None,
            elbo=elbo,
            log_marginal=log_marginal,
            tv=tv,
            tv_bound=tv_bound,
            fisher=fisher[0],
            fisher_error=fisher[1],
            ess=ess,
            pareto_k=None,
            vaes=vaes,
            vages=vages,
        )
        return result, log_w, log_guide

    result, log_w, log_guide = run()
    pareto_k = None
    if not_jax_tracer(log_w):
        _check_finite(log_w, log_guide, method)
        pareto_k = None if method == "enumerate" else _pareto_k(np.asarray(log_w, float))
    return result._replace(method=method, pareto_k=pareto_k)


# Bias of VaES and VaGES


def _bias(joint, params, points, q, p, tv, gradient):
    """Biases and their bounds from points with weights under q and p, one pass over the points."""
    if any(site.is_discrete for site in joint.visible.values()):
        return None, None
    here = joint.unconstrain_visible()

    def score(params, latent):
        def total(u):
            return jnp.sum(joint.unconstrained_log_density(params, u, latent))

        return joint.flatten(jax.grad(total)(here))

    own = {name: params[name] for name in joint.parameters}

    def terms(latent):
        """f, and g and m where they are asked for: (rows, D), (rows, P), (rows, D P)."""
        f = score(params, latent)
        if not gradient:
            return (f,)
        g = _per_row(jax.jacrev(lambda t: joint.log_density({**params, **t}, at(latent)))(own), 1)
        m = _per_row(jax.jacrev(lambda t: score({**params, **t}, latent))(own), 2)
        return (
            f,
            g,
            jnp.reshape(m, (len(m), -1)),
            jnp.reshape(f[:, :, None] * g[:, None], m.shape[:1] + (-1,)),
        )

    def at(latent):
        return {**joint.visible_values, **latent}

    first = jax.eval_shape(terms, jax.tree.map(lambda x: x[0], points))
    blank = lambda value: [jnp.full(x.shape, value, x.dtype) for x in first]  # noqa: E731
    rows = joint.num_rows
    start = (
        blank(0.0),
        blank(0.0),
        blank(jnp.inf),
        blank(-jnp.inf),
        [jnp.zeros(rows) for _ in first],
    )

    def step(carry, point):
        latent, at_q, at_p = point
        under_q, under_p, low, high, norm = carry
        new = terms(latent)
        each = list(zip(new, range(len(new)), strict=True))
        return (
            [under_q[i] + at_q[:, None] * x for x, i in each],
            [under_p[i] + at_p[:, None] * x for x, i in each],
            [jnp.minimum(low[i], x) for x, i in each],
            [jnp.maximum(high[i], x) for x, i in each],
            [jnp.maximum(norm[i], jnp.linalg.norm(x, axis=1)) for x, i in each],
        ), None

    (under_q, under_p, low, high, norm), _ = lax.scan(step, start, (points, q, p))
    width = [b - a for a, b in zip(low, high, strict=True)]
    length = lambda x: jnp.linalg.norm(jnp.reshape(x, (rows, -1)), axis=1)  # noqa: E731
    vaes = BiasBound(length(under_q[0] - under_p[0]), length(width[0]) * tv, 2 * norm[0] * tv)
    if not gradient:
        return vaes, None

    def mean_gradient(mean):
        f, g, m, products = mean
        return m + products - jnp.reshape(f[:, :, None] * g[:, None], products.shape)

    products = jnp.reshape(width[0][:, :, None] * width[1][:, None], width[2].shape)
    return vaes, BiasBound(
        length(mean_gradient(under_q) - mean_gradient(under_p)),
        length(width[2] + 1.5 * products) * tv,
        (2 * norm[2] + 6 * norm[0] * norm[1]) * tv,
    )


def _per_row(jacobian, batch_dims):
    """Jacobians of a dict of parameters, side by side: (rows, P) or (rows, D, P)."""
    leaves = [jacobian[name] for name in sorted(jacobian)]
    parts = [jnp.reshape(x, (*jnp.shape(x)[:batch_dims], -1)) for x in leaves]
    return jnp.concatenate(parts, -1)


def _fisher(joint, particles, log_p, log_q):
    """Half the expected square of ∇_h log q/p̃, and its standard error, as in `PosteriorScore`."""
    if any(site.is_discrete for site in joint.latent.values()):
        return None, None

    def of_particle(latent):
        ratio = jax.grad(lambda h: jnp.sum(log_q(h) - log_p(h)))(latent)
        total = jnp.zeros(joint.num_rows)
        for name, x in ratio.items():
            event = tuple(range(-joint.latent[name].event_dim, 0))
            total = total + 0.5 * joint.sum_to_rows(jnp.sum(x**2, event))
        return total

    squares = map_leading(of_particle, particles)
    return jnp.mean(squares, 0), jnp.std(squares, 0, ddof=1) / math.sqrt(len(squares))


# Reading


def _read(model, guide, params, args, kwargs, num_particles, gradient):
    if not isinstance(num_particles, int) or num_particles < 2:
        raise ModelError(
            f"posterior_gap: `num_particles` must be an integer of at least 2: {num_particles!r}."
        )
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
    joint = read(model, args, kwargs, params)
    if not joint.visible:
        raise ModelError(
            "posterior_gap: the model observes nothing. Pass the rows as its data, after `params`."
        )
    if not joint.latent:
        raise ModelError("posterior_gap: the model has no latent sites, so there is no posterior.")
    missing = sorted(name for name in joint.parameters if name not in params)
    if missing:
        raise ModelError(
            f"posterior_gap: no value for the parameter(s) {', '.join(map(repr, missing))} of the "
            "model. Give them in `params`, or pass `numpyro_ebm.fixed(model, params)`."
        )
    if gradient and not joint.parameters:
        raise ModelError(
            "posterior_gap: gradient=True bounds the bias in the parameters, and this model has "
            "none that are free. Pass the model itself, and its parameters in `params`."
        )
    reader = read_guide("posterior_gap", guide, joint, params)
    guide_trace = reader.trace(jax.random.key(0), params, joint.visible_values)
    extra = sorted(
        name
        for name, site in guide_trace.items()
        if site["type"] == "sample" and not site["is_observed"] and name not in joint.latent
    )
    if extra:
        raise ModelError(
            f"posterior_gap: the guide draws {', '.join(map(repr, extra))}, which the model does "
            "not have, so that the density of its latent sites alone is not known."
        )
    return joint, reader


def _states(joint, max_states):
    """A function to all joint states of the latent sites, states leading; None if too many."""
    sizes, counts, lowest, shapes = {}, [], [], {}
    for name, site in joint.latent.items():
        if not (site.is_discrete and site.fn.has_enumerate_support):
            return None
        shapes[name] = jnp.shape(joint.to_rows({name: jnp.asarray(site.value)})[name])
        sizes[name] = math.prod(shapes[name][1:])
        counts += [num_values_of(site.fn)] * sizes[name]
        lowest += [lowest_value(site.fn.support)] * sizes[name]
    if math.prod(counts) > max_states:
        return None

    def states(joint):
        grid = np.indices(counts).reshape(len(counts), -1).T + np.asarray(lowest)
        columns = np.split(grid, np.cumsum(list(sizes.values()))[:-1], axis=1)

        def one(parts):
            rows = {
                name: jnp.broadcast_to(jnp.reshape(x, shapes[name][1:]), shapes[name])
                for name, x in zip(sizes, parts, strict=True)
            }
            return joint.from_rows(rows)

        return jax.vmap(one)([jnp.asarray(x) for x in columns])

    return states


def _exact_marginal(joint, params):
    """log p̃(v) of every row as a function of nothing; None if it has no closed form."""
    try:
        Enumerated().check(joint, None, 1)
    except ModelError:
        return None
    return lambda: Enumerated().log_density(joint, params, joint.visible_values)


def _check_finite(log_w, log_guide, method):
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


def _pareto_k(log_w):
    """Shape of the generalised Pareto law of the largest weights, of every row."""
    num = len(log_w)
    weights = np.sort(np.exp(log_w - log_w.max(0)), axis=0)
    size = math.ceil(min(0.2 * num, 3 * math.sqrt(num)))
    if size < FEWEST_IN_TAIL:
        return np.full(log_w.shape[1], np.nan)
    above = weights[-size:] - weights[-size - 1]
    return np.array([_pareto_shape(x[x > ROUNDING]) for x in above.T])


def _pareto_shape(x):
    """Fit of Zhang and Stephens (2009), with the weak prior of Vehtari et al.; ``x`` ascends."""
    num = len(x)
    if num < FEWEST_IN_TAIL or x[-1] - x[0] < ROUNDING:
        return -np.inf  # the largest weights are many and equal: no tail
    count = 30 + math.isqrt(num)
    quartile = x[int(num / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - np.sqrt(count / (np.arange(count) + 0.5))) / (3 * quartile)
    shape = np.mean(np.log1p(-b[:, None] * x), 1)
    profile = num * (np.log(-b / shape) - shape - 1)
    posterior = np.exp(profile - profile.max())
    b = np.sum(b * posterior) / np.sum(posterior)
    return (num * np.mean(np.log1p(-b * x)) + 5) / (num + 10)
