# SPDX-License-Identifier: Apache-2.0
"""A model as operations: traced once, and evaluated at any values of its sites and arguments.

Checks look at the operations, and evaluations repeat them. Only values of other types, such as
relaxed bits, make the model run again.
"""

import copy
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_ebm._compat import GIBBS_SITES_KWARG, ClosedJaxpr
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.explained import explained
from numpyro_ebm.language.handlers import resolve_normalizer
from numpyro_ebm.language.sites import is_energy, log_prob_of, param_sites, unwrap
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.data_plate import find_data_plate
from numpyro_ebm.model.marked_values import frozen, mark_values
from numpyro_ebm.model.obs_masks import row_observed
from numpyro_ebm.model.reference import FillUnobserved
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.row_site import RowSite, check_data, check_shape, placeholder
from numpyro_ebm.model.row_weights import RowWeights, find_weights, stand_in
from numpyro_ebm.program.marks import MarkedProgram, Operand, signature
from numpyro_ebm.types import Model, Params

__all__ = ["TracedModel", "trace_model"]

UNREAD = 0  # in the place of a random key that is not read
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
)
RESOLVED = ("fixed", "given")  # who answers for a normalizer that is a constant


def trace_model(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    params: Params | None = None,
    *,
    may_observe_outside: bool = False,
) -> "TracedModel":
    """Trace a model, without the checks of :func:`read_model`.

    :return: a :class:`TracedModel`.
    """
    inner: Any = model
    while isinstance(inner, Messenger):
        inner = inner.fn
    if getattr(inner, "posterior_kind", None):
        raise ModelError(
            f"`{type(inner).__name__}(model)` is a posterior of parameters, whose energies have "
            "become a density. Pass the model that it was made of; NumPyro's inference takes the "
            "posterior."
        )
    arguments = Arguments(args, kwargs)
    outside = None if may_observe_outside else arguments.kwargs.get(GIBBS_SITES_KWARG, {})
    return TracedModel(model, arguments, {} if params is None else params, outside)


class TracedModel:
    """The operations of a model, and what its sites are.

    It holds no value that was computed: it may be made inside of a function that is being traced,
    and used outside, and at other arrays of the same shapes.

    :param model: the model.
    :param Arguments arguments: its arguments.
    :param dict data: values of sites by name.
    :param outside: as in :func:`~numpyro_ebm.model.data_plate.find_data_plate`.
    """

    def __init__(
        self, model: Model, arguments: Arguments, data: Params, outside: Collection[str] | None
    ):
        data = dict(data)  # a caller may change its own
        self.model, self.arguments, self.data, self._outside = model, arguments, data, outside
        self._arrays, self._needs_values = arguments.arrays, None
        self._others = {}  # programs for values of other types
        rng_key = jax.eval_shape(lambda: default_key())
        try:
            self._program = MarkedProgram(self._run, rng_key, data, self._arrays)
        except NEEDS_VALUES as error:  # the model calculates with arguments in Python
            self._arrays, self._needs_values = {}, error
            self._program = MarkedProgram(self._run, rng_key, data, {})
        own = self._with_role("param", "prior", "latent")
        self._row_weights = RowWeights(self._program, self._weights, own)

    def _run(self, rng_key, data, arrays):
        here = self.arguments.with_arrays(arrays)
        prepared = substitute(seed(explained(self.model), rng_key), data=data)
        prepared = FillUnobserved(substitute(prepared, substitute_fn=placeholder))
        prepared = resolve_normalizer(prepared)
        marks = mark_values()
        with marks:
            sites = trace(prepared).get_trace(*here.args, **here.kwargs)
        values, self._has_loops = marks.values, marks.has_loops
        self._names = frozenset(values)
        self.data_plate = find_data_plate(sites, self._outside)
        self._find_roles(sites)
        rows = {
            name: RowSite.of(sites[name])._replace(value=values[name])
            for name in self._with_role("visible", "latent")
        }
        visible = {name: rows[name] for name in self.observed}
        for site in visible.values():
            check_shape(site)
        self._thaw_visible, visible = frozen(visible)
        plates = {name: values[name] for name in self._with_role("plate", "mutable")}
        self._thaw_plates, plates = frozen(plates)
        self._thaw, found = frozen(
            rows,
            {name: values[name] for name in self._with_role("param", "prior")},
            {name: constraint for name, (_, constraint) in param_sites(sites).items()},
            {name: sites[name]["fn"] for name in self._with_role("prior")},
        )
        self._weights = find_weights(self.data_plate, sites)
        self.row_observed = row_observed(self.data_plate, sites)
        parts = {"visible": visible, "plates": plates, "found": found}
        return {**parts, **self._weights, **self._results(sites)}

    def _find_roles(self, sites):
        self._roles = {name: _role(site, self.data_plate) for name, site in sites.items()}
        rows = self._with_role("visible", "latent")
        self.energies, self.observed = self._with_role("energy"), self._with_role("visible")
        self.given = {k for k in self.observed if sites[k]["infer"].get("given")}
        self.unconditioned = {k for k in rows if sites[k]["infer"].get("was_observed")}
        self.integrated = {k for k in rows if sites[k]["infer"].get("integrated")}
        self.states = self._with_role("mutable")
        self.is_fixed = all(unwrap(sites[k]["fn"]).handled_by in RESOLVED for k in self.energies)
        self.subsampled_priors = {  # by name, and in which plate
            name: frame.name
            for name in self._with_role("prior")
            for frame in sites[name]["cond_indep_stack"]
            if frame.size != sites[frame.name]["args"][0]
        }

    @property
    def has_priors(self) -> bool:
        """Whether parameters have priors."""
        return bool(self._with_role("prior"))

    def _with_role(self, *roles):
        return [name for name, role in self._roles.items() if role in roles]

    def _results(self, model_trace):
        deterministic = {
            name: site["value"]
            for name, site in model_trace.items()
            if site["type"] == "deterministic"
        }
        outside = {
            name: log_prob_of(site)
            for name, site in model_trace.items()
            if site["type"] == "sample" and not self.data_plate.owns(site) and not is_energy(site)
        }
        results = {
            "terms": self.data_plate.site_log_densities(model_trace),
            "prior": outside,
            "deterministic": deterministic,
        }
        # The order of the sites, which a pytree does not keep: sums are rounded in it.
        self._order = {what: list(found) for what, found in results.items()}
        return results

    def bind(self, rng_key: jax.Array | None = None, params: Params | None = None) -> RowModel:
        """The model at the values that its sites have.

        :param rng_key: key for initial values and subsampled plates; the default key if
            ``None``.
        :param dict params: values of its parameters by name, where they are not its own; other
            names are ignored.
        :return: a :class:`~numpyro_ebm.model.row_model.RowModel`.
        :raises ModelError: if the data cannot be the values of the visible sites.
        """
        rng_key = default_key() if rng_key is None else rng_key
        own = self._with_role("param", "prior")
        params = {k: x for k, x in (params or {}).items() if k in own}
        if params and (self._has_loops or not self._program.takes(params)):
            return self.at(self.arguments.args, self.arguments.kwargs, params).bind(rng_key)
        weights = self.row_weights(rng_key, params)
        self.check_data(rng_key, params)
        sites, own, constraints, priors = self._thaw(self._find("found", rng_key, params))
        (plates,) = self._thaw_plates(self._find("plates", rng_key, params, known=True))
        with jax.ensure_compile_time_eval():
            plates |= {name: jax.tree.map(jnp.asarray, plates[name]) for name in self.states}
        sites |= {name: self._counting(sites[name], weights) for name in self.observed}
        row_model = RowModel(self, sites, plates, {**own, **params}, constraints, priors)
        row_model.row_weights = weights
        return row_model

    def row_weights(self, rng_key: jax.Array, params: Params) -> jax.Array | None:
        """How often the rows count, of shape (rows,), or ``None`` for once."""
        return self._row_weights.at((rng_key, self.data, self._arrays), params)

    def check_data(self, rng_key: jax.Array, params: Params) -> None:
        """Raise if the data cannot be the values of the visible sites, as far as they are known."""
        weights = self.row_weights(rng_key, params)
        with jax.ensure_compile_time_eval():  # bounds that the model makes are known under `jit`
            sites = self.visible(rng_key, params)
        for site in sites.values():
            check_data(self._counting(site, weights))

    def data_are_possible(self) -> jax.Array:
        """Whether :meth:`check_data` would find nothing wrong with the values, which are traced."""
        rng_key = default_key()
        weights, looks = self.row_weights(rng_key, {}), []
        for site in self.visible(rng_key, {}).values():
            value = self._counting(site, weights).value
            looks += [jnp.all(jnp.isfinite(value)), jnp.all(site.fn.support(value))]
        return jnp.all(jnp.stack(looks))

    def _counting(self, site, weights):
        """A visible site, with values of other rows in the place of those that do not count."""
        if weights is None:
            return site
        return site._replace(value=stand_in(site, self.data_plate.dim, weights))

    def visible(self, rng_key: jax.Array, params: Params) -> dict[str, RowSite]:
        """The observed sites of the data plate at their values, by name."""
        (sites,) = self._thaw_visible(self._find("visible", rng_key, params))
        return sites

    def priors_at(self, params: Params) -> dict[str, Any]:
        """Distributions of the parameters that have one, at values of all parameters."""
        *_, priors = self._thaw(self._find("found", default_key(), params))
        return priors

    def _find(self, what, rng_key, data, **options):
        return self._program(what, (rng_key, self.data, self._arrays), data, **options)

    def check_arguments(self) -> None:
        """Raise if the model calculates with the values of its arguments in Python."""
        if self._needs_values is not None:
            raise self._needs_values

    @property
    def has_convolutions(self) -> bool:
        """Whether there are convolutions among the operations of the model."""
        return self._program.has_convolutions

    @property
    def takes_arrays(self) -> bool:
        """Whether the model can be evaluated at other arrays: not if it reads them in Python."""
        return self._needs_values is None

    def with_arrays(self, arrays: dict[str, Any]) -> "TracedModel":
        """The same model at other arrays of the same shapes and types, by label of the argument."""
        other = copy.copy(self)
        other.arguments = self.arguments.with_arrays(arrays)
        other._arrays = other.arguments.arrays
        return other

    def rebound(
        self, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "TracedModel | None":
        """The same model at other arguments, not traced again; ``None`` where it has to be."""
        arguments = Arguments(args, kwargs)
        if model is not self.model:
            return None
        if arguments.are(self.arguments):
            return self
        if self._needs_values is not None or not arguments.are_like(self.arguments):
            return None
        return self.with_arrays(arguments.arrays)

    def at(self, args: tuple[Any, ...], kwargs: dict[str, Any], data: Params) -> "TracedModel":
        """The same model, traced at other arguments and values of sites."""
        return TracedModel(
            self.model, Arguments(args, kwargs), {**self.data, **data}, self._outside
        )

    def evaluate(self, what: str, data: Params) -> dict[str, jax.Array]:
        """What the model comes to at given values of its sites.

        :param str what: ``"terms"``, log-densities per row by site of the data plate; ``"prior"``,
            log-densities by site outside of it; or ``"deterministic"``, the values of
            `deterministic` sites.
        :param dict data: values of all sites, by name; other names are ignored.
        """
        program, args, given = self._ready(what, data)
        found = program(what, args, given)
        return {name: found[name] for name in self._order[what]}

    def operations(self, what: str, data: Params) -> tuple[ClosedJaxpr, list[Operand], list[str]]:
        """The operations of :meth:`evaluate`, without running them.

        :return: a jaxpr, what its arguments are, and the names of its results.
        """
        program, (*others, arrays), given = self._ready(what, data)
        operands = []
        for part in (*others, arrays, given):
            for path, x in jax.tree_util.tree_leaves_with_path(part):
                name = path[0].key if path else ""  # of the random key
                role = "array" if part is arrays else self._roles.get(name)
                operands.append(Operand(role, name, x))
        return program.part(what, given), operands, sorted(self._order[what])

    def _ready(self, what, data):
        """A program that comes to this at these values, its arguments, and values to replace."""
        data = {name: x for name, x in data.items() if name in self._names}
        if self._program_serves(what, data):
            return self._program, (UNREAD, self.data, self._arrays), data
        key = signature(data)
        if key not in self._others:
            self._others[key] = MarkedProgram(self._rerun, data, self._arrays)
        return self._others[key], (data, self._arrays), {}

    def _program_serves(self, what, data):
        """Whether the first program does: all it reads is given, in the types that it knows."""
        if self._has_loops or not data.keys() >= set(self._with_role("latent", "prior")):
            return False
        if not self._program.takes(data):
            return False
        num_arrays = len(jax.tree.leaves(self._arrays))
        read = self._program.reads(what, data)  # the key, given values, and arrays
        return not any(read[: len(read) - num_arrays])

    def _rerun(self, data, arrays):
        here = self.arguments.with_arrays(arrays)
        prepared = resolve_normalizer(substitute(explained(self.model), data=data))
        return self._results(trace(prepared).get_trace(*here.args, **here.kwargs))


def _role(site, data_plate):
    """What a site of a trace is to a row model, or ``None``."""
    if site["type"] in ("param", "plate", "mutable"):
        return site["type"]
    if site["type"] != "sample":
        return None
    if is_energy(site):
        return "energy"
    if not data_plate.owns(site):
        return None if site["is_observed"] else "prior"
    if site["fn"].event_shape == (0,):  # a `numpyro.factor`
        return None
    return "visible" if site["is_observed"] else "latent"
