# SPDX-License-Identifier: Apache-2.0
r"""The one door from NumPyro to arrays.

A model is run once, and not even run but traced, to find its data plate, its visible and latent
sites, its parameters, and the operations by which it comes to

.. math:: \log \tilde p(v, h; θ) = \sum_{\text{sites of the row}} \log b - \sum_{\text{energies}} E.

Those operations serve from then on, at any values of the sites: whoever checks the model looks at
them, and whoever evaluates it repeats them.

:func:`read_model` makes a :class:`~numpyro_ebm.model.row_model.RowModel` of a model,
:func:`read_fixed_model` one of a model with fixed parameters;
:class:`~numpyro_ebm.guides.guide.Guide` does the same for a guide.
"""

import operator

import jax
import jax.numpy as jnp
from numpyro.distributions import constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_ebm._compat import GIBBS_SITES_KWARG, Tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.handlers import resolve_normalizer
from numpyro_ebm.language.sites import is_energy, unwrap
from numpyro_ebm.model import provenance
from numpyro_ebm.model.coupled_rows import check_rows
from numpyro_ebm.model.data_plate import find_data_plate
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.row_site import RowSite, check_data, placeholder
from numpyro_ebm.program.marks import MarkedProgram, marked, signature

__all__ = ["Reading", "bind_fixed", "read_fixed_model", "read_model", "trace_model"]

UNREAD = 0  # in the place of a random key that is not read
RESOLVED = ("fixed", "given")  # who answers for a normalizer that is a constant


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
    :return: a :class:`~numpyro_ebm.model.row_model.RowModel`.
    :raises ModelError: if there is no data plate or more than one, no energy, or an energy that
        does not depend on the visible sites; the message names the site and what to write instead.
    """
    reading = trace_model(model, args, kwargs, params, may_observe_outside=may_observe_outside)
    row_model = reading.bind(rng_key)
    provenance.check_model(row_model, reading)
    check_rows(row_model, reading)
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
    :return: a :class:`~numpyro_ebm.model.row_model.RowModel`.
    :raises ModelError: if the model has free parameters, or nothing to sample.
    """
    reading = trace_model(model, args, kwargs)
    row_model = bind_fixed(reading, rng_key)
    check_rows(row_model, reading)
    return row_model


def bind_fixed(reading, rng_key=None):
    """What :func:`read_fixed_model` returns, of a model that it has read before."""
    row_model = reading.bind(rng_key)
    if row_model.parameters or not row_model.is_fixed:
        free = ", ".join(map(repr, row_model.parameters)) or "none, but nobody said so"
        raise ModelError(
            f"The normalizer of the energies {row_model.energies} is not resolved (free "
            f"parameters: {free}). Hold the parameters fixed: `numpyro_ebm.fixed(model, params)`."
        )
    if not row_model.latent:
        raise ModelError("The model has no unobserved site inside its data plate to sample.")
    sites, row_model.observed, row_model.visible = row_model.latent, row_model.visible, {}
    return row_model.with_latent(
        [k for k, site in sites.items() if site.is_discrete or k in row_model.integrated]
    )


def trace_model(model, args=(), kwargs=None, params=None, *, may_observe_outside=False):
    """Trace a model, without the checks of :func:`read_model`.

    :return: a :class:`Reading`.
    """
    kwargs = {} if kwargs is None else kwargs
    params = {} if params is None else params
    outside = None if may_observe_outside else kwargs.get(GIBBS_SITES_KWARG, {})
    return Reading(model, args, kwargs, params, outside)


class Reading:
    """The operations of a model, and what its sites are.

    It holds no value of a site that was computed: it may be made inside of a function that is being
    traced, and used outside.

    :param model: the model.
    :param tuple args: its arguments.
    :param dict kwargs: its keyword arguments.
    :param dict data: values of sites by name.
    :param outside: as in :func:`~numpyro_ebm.model.data_plate.find_data_plate`.
    """

    def __init__(self, model, args, kwargs, data, outside):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.data, self._outside = data, outside
        self._others = {}  # programs for values of other types
        self._program = MarkedProgram(self._run, jax.eval_shape(lambda: jax.random.key(0)), data)
        known = jax.tree.leaves((args, kwargs, data, self._program.constants))
        self._is_known = not any(isinstance(x, Tracer) for x in known)

    def _run(self, rng_key, data):
        prepared = substitute(seed(self.model, rng_key), data=data)
        prepared = resolve_normalizer(substitute(prepared, substitute_fn=placeholder))
        with _mark_values() as marks:
            model_trace = trace(prepared).get_trace(*self.args, **self.kwargs)
        self.data_plate = find_data_plate(model_trace, self._outside)
        self._names, self._has_loops = frozenset(marks.values), marks.has_loops
        self.observed, self._free = set(), set()
        self.unconditioned, self.integrated = set(), set()
        self.energies, self.is_fixed = [], True
        sites, priors, params, bounds = {}, {}, {}, {}
        for name, site in model_trace.items():
            if site["type"] == "param":
                params[name] = marks.values[name]
                bounds[name] = site["kwargs"].get("constraint", constraints.real)
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
            elif not self.data_plate.owns(site):
                if not site["is_observed"]:
                    self._free.add(name)
                    priors[name], params[name] = site["fn"], marks.values[name]
            elif name in self._names:  # not a `numpyro.factor`
                sites[name] = RowSite.of(site)._replace(value=marks.values[name])
                (self.observed if site["is_observed"] else self._free).add(name)
                if site["infer"].get("was_observed"):
                    self.unconditioned.add(name)
                if site["infer"].get("integrated"):
                    self.integrated.add(name)
        plates = {k: marks.values[k] for k, s in model_trace.items() if s["type"] == "plate"}
        visible = {k: x for k, x in sites.items() if k in self.observed}
        self._thaw_visible, visible = _frozen(visible)
        self._thaw, others = _frozen(sites, plates, params, bounds, priors)
        return {"visible": visible, "found": others, **self._results(model_trace)}

    def _results(self, model_trace):
        deterministic = {
            name: site["value"]
            for name, site in model_trace.items()
            if site["type"] == "deterministic"
        }
        terms = self.data_plate.site_log_densities(model_trace)
        # The order of the sites, which a pytree does not keep: sums are rounded in it.
        self._order = {"terms": list(terms), "deterministic": list(deterministic)}
        return {"terms": terms, "deterministic": deterministic}

    def bind(self, rng_key=None):
        """The model at the values that its sites have.

        :param rng_key: key for initial values and subsampled plates; ``jax.random.key(0)`` if
            ``None``.
        :return: a :class:`~numpyro_ebm.model.row_model.RowModel`.
        :raises ModelError: if the data cannot be the values of the visible sites.
        """
        rng_key = jax.random.key(0) if rng_key is None else rng_key
        for site in self.visible(rng_key).values():
            check_data(site)
        found = self._program("found", (rng_key, self.data), {})
        return RowModel(self, *self._thaw(found))

    def is_of(self, model, args, kwargs):
        """Whether this model was read at the very same arguments, none of them traced."""
        if model is not self.model or not self._is_known:
            return False
        mine, structure = jax.tree.flatten((self.args, self.kwargs))
        leaves, other = jax.tree.flatten((args, {} if kwargs is None else kwargs))
        return structure == other and all(map(operator.is_, mine, leaves))

    def visible(self, rng_key):
        """The observed sites of the data plate at their values, by name."""
        (sites,) = self._thaw_visible(self._program("visible", (rng_key, self.data), {}))
        return sites

    def at(self, args, kwargs, data):
        """The same model, traced at other arguments and values of sites."""
        return Reading(self.model, args, kwargs, {**self.data, **data}, self._outside)

    def evaluate(self, what, data):
        """What the model comes to at given values of its sites.

        :param str what: ``"terms"``, log-densities per row by site of the data plate, or
            ``"deterministic"``, the values of `deterministic` sites.
        :param dict data: values of all sites, by name; other names are ignored.
        """
        data = {name: x for name, x in data.items() if name in self._names}
        if self._program_serves(what, data):
            found = self._program(what, (UNREAD, self.data), data)
        else:
            key = signature(data)
            if key not in self._others:
                self._others[key] = MarkedProgram(self._rerun, data)
            found = self._others[key](what, (data,), {})
        return {name: found[name] for name in self._order[what]}

    def _program_serves(self, what, data):
        """Whether the first program does: all it reads is given, in the types that it knows."""
        if self._has_loops or not self._free <= data.keys() or not self._program.takes(data):
            return False
        return not any(self._program.reads(what, data))

    def _rerun(self, data):
        prepared = resolve_normalizer(substitute(self.model, data=data))
        return self._results(trace(prepared).get_trace(*self.args, **self.kwargs))


class _mark_values(Messenger):
    """Mark the values of all sites of a model that is being traced, and remember them."""

    def __enter__(self):
        self.values, self.has_loops = {}, False
        super().__enter__()
        return self

    def postprocess_message(self, msg):
        if msg["type"] == "control_flow":
            self.has_loops = True  # its sites have their values already, inside of it
        if msg["type"] == "sample" and (is_energy(msg) or msg["fn"].event_shape == (0,)):
            return  # an energy, or a `numpyro.factor`
        if msg["type"] in ("sample", "param", "plate", "deterministic"):
            if msg["type"] == "sample" and msg["is_observed"] and not msg["fn"].support.is_discrete:
                msg["value"] = _floating(msg["value"])
            self.values[msg["name"]] = msg["value"]
            msg["value"] = marked(msg["name"], msg["value"])


def _floating(x):
    if isinstance(x, Tracer):
        return jnp.asarray(x, jnp.result_type(x, float))
    with jax.ensure_compile_time_eval():  # data stay known, for who checks them
        return jnp.asarray(x, jnp.result_type(x, float))


def _frozen(*dicts):
    """Dicts of pytrees in two parts: a function of their tracers that puts others there, and these.

    The order of the dicts is kept, in which sites are drawn and summed; a pytree would sort them.
    """
    names = [list(x) for x in dicts]
    leaves, structure = jax.tree.flatten([list(x.values()) for x in dicts])
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tracer)]
    arrays = [leaves[i] for i in places]
    known = {i: x for i, x in enumerate(leaves) if i not in places}

    def thaw(arrays):
        found = {**known, **dict(zip(places, arrays, strict=True))}
        values = structure.unflatten([found[i] for i in range(len(found))])
        return [dict(zip(*pair, strict=True)) for pair in zip(names, values, strict=True)]

    return thaw, arrays
