# SPDX-License-Identifier: Apache-2.0
r"""The one door from NumPyro to arrays: rows, sites, supports and the row log-joint.

A model is traced once to find its data plate, its visible and latent sites and its parameters. From
then on it is a function of arrays,

.. math:: \log \tilde p(v, h; θ) = \sum_{\text{sites of the row}} \log b - \sum_{\text{energies}} E,

one value per row, free of the scale that a subsampled data plate puts on every site. Latent and
visible sites may be several and of any event shape, and may sit in further plates.

:func:`read_model` makes a :class:`RowModel` of a model, :func:`read_fixed_model` one of a model
with fixed parameters; :class:`~numpyro_ebm.guides.guide.Guide` does the same for a guide.
"""

import copy
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Delta, biject_to, constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.util import not_jax_tracer

from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.distributions import (
    Counting,
    Lebesgue,
    is_real,
    lowest_value,
)
from numpyro_ebm.language.handlers import resolve_normalizer
from numpyro_ebm.language.sites import is_energy, plates_of, unwrap
from numpyro_ebm.model import provenance
from numpyro_ebm.model.coupled_rows import check_rows
from numpyro_ebm.samplers.positions import flatten_sites, unflatten_sites

__all__ = ["RowModel", "RowSite", "placeholder", "read_model", "read_fixed_model"]

RESOLVED = ("fixed", "given")  # who answers for a normalizer that is a constant

WHAT_A_ROW_NEEDS = (
    'Write `with numpyro.plate("data", len(data)):` around the visible sites, the latent sites '
    "and the energy, with everything that is not a row in event dimensions or in further plates."
)


class RowSite(NamedTuple):
    """A sample site inside the data plate.

    - **name** - name of the site.
    - **fn** - its distribution, the base measure, as traced.
    - **value** - the observed value; a placeholder of the right shape for a latent site.
    - **dims** - names of the dimensions of ``value``: plates, then ``<name>_dim_<i>``.
    """

    name: str
    fn: object
    value: object
    dims: tuple

    @property
    def event_dim(self):
        return self.fn.event_dim

    @property
    def is_discrete(self):
        return bool(self.fn.support.is_discrete)

    @property
    def is_real(self):
        return is_real(self.fn.support)

    @property
    def is_flat(self):
        """Whether the base measure is constant, so that only energies can shape the site."""
        return isinstance(unwrap(self.fn), Lebesgue | Counting)

    @property
    def is_unconstrained(self):
        """Whether the site's own coordinates are used: it is discrete, or real already."""
        return self.is_discrete or self.is_real

    @property
    def transform(self):
        """T in v = T(u); the identity for a discrete site, which has no other coordinates."""
        return biject_to(constraints.real if self.is_discrete else self.fn.support)


class RowModel:
    """A NumPyro model read as arrays. Made by :func:`read_model`.

    - **plate, num_rows, dim** - the data plate: its name, the rows at hand, its dimension.
    - **visible, latent** - dicts of :class:`RowSite`.
    - **observed** - sites that :func:`read_fixed_model` set aside, because they are observed.
    - **parameters** - values of the `param` sites, and of latent sites outside the data plate, by
      name (their values in this trace).
    - **constraints** - constraints of the `param` sites by name.
    - **priors** - distributions of the parameters that are sample sites, by name.
    - **energies** - names of the energy sites.
    - **covariates** - arguments other than the visible values, and parameters, that give every row
      an energy (and so a normalizer) of its own.
    """

    def __init__(self, model, args, kwargs, model_trace, frame):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.plate, self.dim, self.num_rows = frame
        size, subsample_size = model_trace[self.plate]["args"]
        self._scale = size / (subsample_size or size)
        self.total_rows = size
        self.plates = {k: s["value"] for k, s in model_trace.items() if s["type"] == "plate"}
        self.visible, self.latent, self.observed, self.parameters = {}, {}, {}, {}
        self.constraints, self.priors, self.energies = {}, {}, []
        self.is_fixed = True  # whether the model itself answers for its normalizer
        self.arguments = {}  # which argument is the value of which visible site; see `provenance`
        self._remembered = {}  # see `remember`
        self.integrated = set()  # real sites that kernels integrate out; see the handler
        self.unconditioned = (
            set()
        )  # sites whose observation was taken away; see `handlers.uncondition`
        self.covariates = []  # arguments with a value for every row that energies read
        for name, site in model_trace.items():
            if site["type"] == "param":
                self.parameters[name] = site["value"]
                self.constraints[name] = site["kwargs"].get("constraint", constraints.real)
            elif site["type"] == "mutable":
                raise ModelError(
                    f"The mutable site '{name}' (state of a network, such as batch normalisation) "
                    "couples the rows of a batch; use a network without mutable state."
                )
            elif site["type"] != "sample":
                continue
            elif is_energy(site):
                self.energies.append(name)
                self.is_fixed = self.is_fixed and unwrap(site["fn"]).handled_by in RESOLVED
            elif self.plate not in plates_of(site):
                if not site["is_observed"]:
                    self.priors[name] = site["fn"]
                    self.parameters[name] = site["value"]
            elif site["fn"].event_shape != (0,):  # not a `numpyro.factor`
                kind = self.visible if site["is_observed"] else self.latent
                if site["infer"].get("integrated"):
                    self.integrated.add(name)
                if site["infer"].get("was_observed"):
                    self.unconditioned.add(name)
                value = site["value"]
                if kind is self.visible:
                    value = _checked_value(site)
                kind[name] = RowSite(name, site["fn"], value, _dims(site))

    def log_density(self, params, values):
        """Row log-joint log p̃ at given parameters and site values.

        :param dict params: parameter values by name.
        :param dict values: values of visible and latent sites by name; observed sites that are not
            named keep their observed value.
        :return: array of shape (rows,).
        """
        return sum(self.terms({**params, **values}).values())

    def terms(self, data):
        """The terms of :meth:`log_density` by site, each of shape (rows,)."""
        return self.site_log_densities(self.trace_at(data))

    def trace_at(self, data):
        """The model's trace at given parameters and site values."""
        return trace(self.substituted(data)).get_trace(*self.args, **self.kwargs)

    def substituted(self, data):
        """The model at given parameters and site values, its energies allowed to evaluate."""
        return resolve_normalizer(substitute(self.model, data={**self.plates, **data}))

    def site_log_densities(self, model_trace):
        """Log-density per row, of shape (rows,), of every site of the data plate in a trace."""
        return {
            name: self.sum_to_rows(self.scaled_log_prob(site))
            for name, site in model_trace.items()
            if self.owns(site)
        }

    def owns(self, site):
        """Whether a site of a trace is a sample site inside the data plate."""
        return site["type"] == "sample" and self.plate in plates_of(site)

    def scaled_log_prob(self, site):
        """Log-density of a traced site, without the N/B of a subsampled data plate."""
        log_prob, scale = site["fn"].log_prob(site["value"]), self.user_scale(site)
        return log_prob if scale is None else scale * log_prob

    def user_scale(self, site):
        """The scale of a traced site that the user's own `handlers.scale` gave it, if any."""
        scale = 1.0 if site["scale"] is None else site["scale"] / self._scale
        is_one = not_jax_tracer(scale) and bool(np.all(np.asarray(scale) == 1.0))
        return None if is_one else scale

    def sum_to_rows(self, log_prob):
        """Sum over all plates but the data plate."""
        row_axis = jnp.ndim(log_prob) + self.dim
        return jnp.sum(log_prob, [a for a in range(jnp.ndim(log_prob)) if a != row_axis])

    def deterministic(self, params, values):
        """Values of the model's `deterministic` sites at given parameters and site values."""
        model_trace = self.trace_at({**params, **values})
        return {k: s["value"] for k, s in model_trace.items() if s["type"] == "deterministic"}

    @property
    def sites(self):
        """All visible and latent sites."""
        return {**self.visible, **self.latent}

    def with_latent(self, names):
        """The same model with these sites as latent ones, and all others as visible ones."""
        row_model = copy.copy(self)
        row_model.latent = {k: site for k, site in self.sites.items() if k in names}
        row_model.visible = {k: site for k, site in self.sites.items() if k not in names}
        return row_model

    def remember(self, question, find):
        """What ``find()`` returns, found once for a question about these latent sites."""
        key = repr(question), tuple(self.latent)
        if key not in self._remembered:
            self._remembered[key] = find()
        return self._remembered[key]

    def row_axis(self, name, unconstrained):
        """Axis of the rows in an unconstrained value of a visible or latent site."""
        site = self.sites[name]
        event_dim = site.transform.domain.event_dim
        extra = site.event_dim - site.transform.codomain.event_dim
        return jnp.ndim(unconstrained) + self.dim - event_dim - extra

    def to_rows(self, unconstrained):
        """Move the rows of unconstrained values to the leading axis."""
        return {k: jnp.moveaxis(x, self.row_axis(k, x), 0) for k, x in unconstrained.items()}

    def from_rows(self, rows):
        """Undo :meth:`to_rows`."""
        return {k: jnp.moveaxis(x, 0, self.row_axis(k, x)) for k, x in rows.items()}

    def flatten(self, unconstrained):
        """All coordinates of a row in one vector, (rows, dimension), sites sorted by name."""
        rows = self.to_rows(unconstrained)  # gradients and compiled functions sort dicts as well
        return flatten_sites(rows, sorted(rows))[0]

    def unflatten(self, flat, like=None):
        """Undo :meth:`flatten` for the visible sites.

        :param dict like: what has the shapes and types of the result, if not the observed values.
        """
        like = self.unconstrain_visible if like is None else lambda like=like: like
        like = jax.eval_shape(lambda: self.to_rows(like()))
        rows = unflatten_sites(flat, like, sorted(like))
        return self.from_rows({name: x.astype(like[name].dtype) for name, x in rows.items()})

    @property
    def sizes(self):
        """Coordinates of every visible site in a row, in the order of :meth:`flatten`."""
        shapes = jax.eval_shape(self.unconstrain_visible)
        return {name: math.prod(shapes[name].shape) // self.num_rows for name in sorted(shapes)}

    def rows_like(self, per_row, name, unconstrained):
        """Reshape an array of shape (rows,) to broadcast against an unconstrained visible value."""
        axis = self.row_axis(name, unconstrained)
        return jnp.reshape(per_row, (-1,) + (1,) * (jnp.ndim(unconstrained) - axis - 1))

    def row_dot(self, x, y):
        """Inner products per row of two dicts of unconstrained visible values, of shape (rows,)."""
        total = jnp.zeros(self.num_rows)
        for name in x:
            product = jnp.broadcast_to(x[name] * y[name], jnp.shape(x[name]))
            axis = self.row_axis(name, product)
            others = [a for a in range(jnp.ndim(product)) if a != axis]
            total = total + jnp.sum(product, others)
        return total

    # Unconstrained coordinates of the visible sites: v = T(u).

    @property
    def visible_values(self):
        """Observed values of the visible sites."""
        return {name: site.value for name, site in self.visible.items()}

    def unconstrain_visible(self):
        """Observed visible values in unconstrained coordinates, u = T⁻¹(v)."""
        return {
            name: site.value if site.is_unconstrained else site.transform.inv(site.value)
            for name, site in self.visible.items()
        }

    def constrain(self, unconstrained):
        """Map unconstrained coordinates to site values.

        :param dict unconstrained: unconstrained values by site name.
        :return: dict of values on the sites' supports, and log |dT/du| of shape (rows,).
        """
        values, log_det = {}, 0.0
        for name, u in unconstrained.items():
            site = self.sites[name]
            if site.is_unconstrained:
                values[name] = u
                continue
            transform = site.transform
            values[name] = transform(u)
            jacobian = transform.log_abs_det_jacobian(u, values[name])
            extra = jnp.ndim(jacobian) - (jnp.ndim(values[name]) - site.event_dim)
            jacobian = jnp.sum(jacobian, tuple(range(-extra, 0))) if extra else jacobian
            log_det = log_det + self.sum_to_rows(jacobian)
        return values, log_det

    def unconstrained_log_density(self, params, unconstrained, values):
        """Row log-density of ``unconstrained`` sites, log-Jacobian included, given ``values``."""
        constrained, log_det = self.constrain(unconstrained)
        return self.log_density(params, {**constrained, **values}) + log_det


def read_model(
    model, args=(), kwargs=None, params=None, *, rng_key=None, may_observe_outside=False
):
    """Read a NumPyro model with energy statements.

    :param model: the model.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :param dict params: parameter values by name; missing ones take their initial values.
    :param rng_key: key for initial values and subsampled plates.
    :param bool may_observe_outside: accept observed sites outside the data plate: likelihoods of
        their own, and parameters that are conditioned. They are no part of the rows.
    :return: a :class:`RowModel`.
    :raises ModelError: if there is no data plate or more than one, no energy, or an energy that
        does not depend on the visible sites; the message names the site and what to write instead.
    """
    kwargs = {} if kwargs is None else kwargs
    params = {} if params is None else params
    row_model = _traced(model, args, kwargs, params, rng_key, may_observe_outside)
    provenance.check_model(row_model, model, args, kwargs)
    check_rows(row_model, partial(_traced, model, outside=True), params)
    return row_model


def read_fixed_model(model, args=(), kwargs=None, *, rng_key=None):
    """Read a model with fixed parameters as the density of its unobserved sites.

    In the joint that is returned the *visible* sites are the unobserved continuous ones, and the
    *latent* sites the unobserved discrete ones and those that are to be
    :class:`~numpyro_ebm.language.handlers.integrated`; observed sites keep their values.

    :param model: a model whose normalizer is resolved, ``fixed(model, params)``.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :param rng_key: key for the placeholders of unobserved sites.
    :return: a :class:`RowModel`.
    :raises ModelError: if the model has free parameters, or nothing to sample.
    """
    kwargs = {} if kwargs is None else kwargs
    row_model = _traced(model, args, kwargs, {}, rng_key)
    if row_model.parameters or not row_model.is_fixed:
        free = ", ".join(map(repr, row_model.parameters)) or "none, but nobody said so"
        raise ModelError(
            f"The normalizer of the energies {row_model.energies} is not resolved (free "
            f"parameters: {free}). Hold the parameters fixed: `numpyro_ebm.fixed(model, params)`."
        )
    if not row_model.latent:
        raise ModelError("The model has no unobserved site inside its data plate to sample.")
    sites, row_model.observed, row_model.visible = row_model.latent, row_model.visible, {}
    row_model = row_model.with_latent(
        [k for k, site in sites.items() if site.is_discrete or k in row_model.integrated]
    )
    check_rows(row_model, partial(_traced, model, outside=True), {})
    return row_model


def _traced(model, args, kwargs, params, rng_key=None, outside=False):
    rng_key = jax.random.key(0) if rng_key is None else rng_key
    prepared = substitute(substitute(seed(model, rng_key), data=params), substitute_fn=placeholder)
    model_trace = trace(resolve_normalizer(prepared)).get_trace(*args, **kwargs)
    outside = None if outside else kwargs.get(GIBBS_SITES_KWARG, {})
    return RowModel(model, args, kwargs, model_trace, _data_plate(model_trace, outside))


def _data_plate(model_trace, outside=()):
    """The plate that all visible sites and all energies share.

    :param outside: names of observed sites that may be outside of it, or ``None`` for all: the
        parameters that another block of ``Gibbs`` holds, for one.
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
    shared = None
    for site in energies + observed:
        frames = {frame.name: frame for frame in site["cond_indep_stack"]}
        shared = frames if shared is None else {k: f for k, f in shared.items() if k in frames}
    if len(shared) != 1:
        plates = frozenset().union(*map(plates_of, observed + energies))
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
    (frame,) = shared.values()
    return frame


def placeholder(site):
    """A value on the support for a site that has none, so that a model can be traced."""
    if site["type"] != "sample" or site["value"] is not None or isinstance(site["fn"], Delta):
        return None
    fn = site["fn"]
    if fn.support.is_discrete:
        return jnp.full(fn.shape(), lowest_value(fn.support), dtype=jnp.result_type(int))
    transform = biject_to(fn.support)
    return transform(jnp.zeros(transform.inverse_shape(fn.shape())))


def _checked_value(site):
    value, name = site["value"], site["name"]
    if not_jax_tracer(value) and np.isnan(np.asarray(value)).any():
        raise ModelError(
            f"The data of the visible site '{name}' contain NaN. Drop those rows, or impute them "
            "before training: nothing is masked in silence."
        )
    if not site["fn"].support.is_discrete:
        value = jnp.asarray(value, dtype=jnp.result_type(value, float))
    expected = site["fn"].shape()
    if jnp.shape(value) != expected:
        raise ModelError(
            f"The data of the visible site '{name}' have shape {jnp.shape(value)}, but its plates "
            f"and event shape ask for {expected}."
        )
    _check_support(name, site["fn"], value)
    return value


def _check_support(name, fn, value):
    """Spins of -1 and 1 on `Counting(2)`, or a zero under a logarithm, would mislead silently."""
    if not not_jax_tracer(value) or is_real(fn.support):
        return
    with jax.ensure_compile_time_eval():
        inside = np.asarray(fn.support(value))
    if not np.all(inside):
        raise ModelError(
            f"The data of the visible site '{name}' leave its support, {fn.support}, in "
            f"{np.size(inside) - np.sum(inside)} of {np.size(inside)} places. Recode them (spins "
            "of -1 and 1 as 0 and 1, for instance), or declare another base measure."
        )


def _dims(site):
    """Names of the dimensions of a site's value."""
    num_batch = len(site["fn"].batch_shape)
    plates = {num_batch + frame.dim: frame.name for frame in site["cond_indep_stack"]}
    free = iter(range(len(site["fn"].shape())))
    return tuple(
        plates[i] if i in plates else f"{site['name']}_dim_{next(free)}"
        for i in range(len(site["fn"].shape()))
    )
