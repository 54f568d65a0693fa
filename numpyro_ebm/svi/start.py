# SPDX-License-Identifier: Apache-2.0
"""Where a run of EnergySVI starts: initial values of all parameters, and who trains which.

Model, guide, objective and the networks that the objective brings are asked for their parameters
one after the other, each at the values of those before it. What does not go together is found out
on the way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.distributions import biject_to
from numpyro.infer import SVI, Trace_ELBO

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.guides.losses import default_guide_loss
from numpyro_ebm.inputs import numbers_of
from numpyro_ebm.language.fixed import FIT_TEMPERATURE
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.objectives.base import Objective
from numpyro_ebm.objectives.plan import Plan, make_plan
from numpyro_ebm.program.compilation import compiler_options, run_compiled
from numpyro_ebm.svi.global_guide import GlobalGuide, check_supports, start_at_median
from numpyro_ebm.types import Model, Params

__all__ = ["Optimizers", "Start", "as_optimizer", "find_start", "same_bounds"]


class Optimizers(NamedTuple):
    """The optimisers of the energy, of the guide, and of each of the objective's networks."""

    energy: Any
    guide: Any
    networks: tuple[Any, ...]

    def init(
        self, of_energy: Params, of_guide: Params, of_networks: Sequence[Params]
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """Their states at the first parameters; ``None`` for a guide without parameters."""
        networks = zip(self.networks, of_networks, strict=True)
        return (
            self.energy.init(of_energy),
            self.guide.init(of_guide) if of_guide else None,
            tuple(optim.init(params) for optim, params in networks),
        )


def as_optimizer(name: str, optim: Any) -> Any:
    """An optimiser of NumPyro's, made of one of NumPyro, JAX or Optax.

    :param str name: name of the option, for the message.
    :param optim: the optimiser.
    :raises ModelError: if it is none.
    """
    try:
        return SVI(lambda: None, lambda: None, optim, Trace_ELBO()).optim
    except TypeError:
        raise ModelError(
            f"EnergySVI: `{name}` must be an optimiser of NumPyro or Optax, such as "
            f"`optax.adam(1e-3)`, got {optim!r}."
        ) from None


class Start(NamedTuple):
    """All that is found out before the first round.

    - **optim_states** - states of the energy's optimiser, which trains the parameters of the model,
      of q(θ) and of the objective itself; of that of q(h | v); and of those of the networks.
    - **rng_key** - key of the rounds.
    - **plan** - model, guide and objective, found to go together.
    - **guide_loss** - the loss of q(h | v).
    - **constraints** - the constraints of all parameters, by name.
    - **bounds** - numbers in the supports of penalised parameters, which the model may compute.
    - **posterior** - the part of the guide that draws parameters, or ``None``.
    """

    optim_states: tuple[Any, ...]
    rng_key: jax.Array
    plan: Plan
    guide_loss: Any
    constraints: dict[str, Any]
    bounds: dict[str, Any]
    posterior: GlobalGuide | None


def find_start(
    rng_key: jax.Array,
    model: Model,
    guide: Model | None,
    objective: Objective,
    guide_loss: Any,
    optimizers: Optimizers,
    init_params: Params | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Start:
    """Ask model, guide and objective for their parameters.

    :param rng_key: random key of the run.
    :param model: a NumPyro model with energy statements.
    :param guide: a NumPyro guide, or ``None``.
    :param Objective objective: the objective.
    :param guide_loss: the loss of the guide; ``None`` for the default one.
    :param Optimizers optimizers: who trains the parameters.
    :param dict init_params: values to take instead of the initial ones, by name, or ``None``.
    :param tuple args: arguments of model and guide.
    :param dict kwargs: keyword arguments of model and guide.
    :return: a :class:`Start`.
    :raises ModelError: if model, guide, objective and ``guide_loss`` do not go together.
    """
    init_params = {k: x for k, x in (init_params or {}).items() if k != FIT_TEMPERATURE}
    for name, value in init_params.items():
        for leaf in jax.tree.leaves(value):
            numbers_of("EnergySVI: `init_params`", finite=False, **{name: leaf})
    traced: Any = None

    def first_states(rng_key):
        # Traced, not run: only the initial values of parameters are ever computed.
        nonlocal traced
        key_init, rng_key = jax.random.split(rng_key)
        values, traced, undefined = _ask(
            key_init, model, guide, objective, guide_loss, init_params, args, kwargs
        )
        # Weak types become plain ones, so that nothing is compiled twice.
        values = {
            name: jax.tree.map(
                lambda x: lax.convert_element_type(x, jnp.result_type(x)),
                biject_to(traced.constraints[name]).inv(value),
            )
            for name, value in values.items()
        }
        bounds = {name: jax.tree.leaves(traced.constraints[name]) for name in traced.penalised}
        of_guide = {name: values.pop(name) for name in sorted(traced.of_guide)}
        of_networks = [{name: values.pop(name) for name in x} for x in traced.of_networks]
        return optimizers.init(values, of_guide, of_networks), rng_key, bounds, undefined

    optim_states, rng_key, bounds, undefined = run_compiled(
        first_states, rng_key, unless=(args, kwargs), options=compiler_options()
    )
    _check_defined(undefined)
    constraints = dict(traced.constraints)
    for name, leaves in bounds.items():
        tree = jax.tree.structure(constraints[name])
        constraints[name] = jax.tree.unflatten(tree, leaves)
    return Start(
        optim_states,
        rng_key,
        traced.plan,
        traced.guide_loss,
        constraints,
        bounds,
        traced.posterior,
    )


def same_bounds(left: Any, right: Any) -> bool:
    """Whether the bounds of two starts are the same concrete arrays."""
    left, tree = jax.tree.flatten(left)
    right, other = jax.tree.flatten(right)
    concrete = all(map(not_jax_tracer, [*left, *right]))
    return tree == other and concrete and all(map(jnp.array_equal, left, right))


class _Traced(NamedTuple):
    """What is found beside the values: mostly not arrays, so no output of what is traced."""

    constraints: dict
    penalised: list
    of_guide: list
    of_networks: list
    posterior: GlobalGuide | None
    plan: Plan
    guide_loss: Any


class _Parameters:
    """Values and constraints by name; those of the model, and what others add to them."""

    def __init__(self, row_model, init_params):
        self.values = {k: x for k, x in row_model.parameters.items() if k not in row_model.priors}
        self.constraints = dict(row_model.constraints)
        self.init_params = init_params

    def add(self, found, owner=None):
        """Add the new ones of ``{name: (value, constraint)}``, and return their names.

        :raises ModelError: if there is an owner, who shares none with others, and not all are new.
        """
        names = [name for name in found if name not in self.values]
        if owner is not None and len(names) < len(found):
            raise ModelError(
                f"The {owner} has parameters named {sorted(found.keys() - set(names))}, as the "
                "model or the guide does; rename them."
            )
        self.constraints.update({name: found[name][1] for name in names})
        self.values.update({name: self.init_params.get(name, found[name][0]) for name in names})
        return names


def _ask(rng_key, model, guide, objective, guide_loss, init_params, args, kwargs):
    """Initial values of all parameters, and what else is found on the way."""
    key_model, key_guide, key_check = jax.random.split(rng_key, 3)
    row_model = read_model(model, args, kwargs, init_params, rng_key=key_model)
    parameters = _Parameters(row_model, init_params)
    values = parameters.values  # grows with every `add`
    theta, posterior, of_guide, of_networks = {}, None, [], []
    if row_model.priors:
        check_supports(row_model)
        posterior = GlobalGuide.find(guide, row_model, init_params)
    if posterior is not None:
        parameters.add(posterior.start(key_guide, row_model, init_params))
        draw = posterior.draw(key_guide, values, args, kwargs)
        theta, guide = draw.params, posterior.given(draw, values)
    elif row_model.priors:
        parameters.add(start_at_median(row_model, key_model, init_params))
    if guide is not None:
        reader = Guide(guide, row_model, args, kwargs)
        found = reader.parameters(key_guide, {**values, **theta, **init_params})
        of_guide = parameters.add(found)
    plan = make_plan(key_check, objective, row_model, guide, {**values, **theta})
    problem = plan.problem(key_check, {**values, **theta}, guide, args, kwargs)
    if of_guide:
        _check_guide_loss(guide_loss, problem)
        guide_loss = default_guide_loss(problem) if guide_loss is None else guide_loss
    for i, network in enumerate(objective.networks):
        found = network.parameters(jax.random.fold_in(key_guide, i), problem)
        of_networks.append(parameters.add(found, network.name))
    own_key = jax.random.fold_in(key_model, 1)
    parameters.add(objective.own_parameters(own_key, {**values, **theta}, problem))
    unknown = sorted(init_params.keys() - {*values, *row_model.parameters})
    if unknown:
        raise ModelError(
            f"EnergySVI: `init_params` names {unknown}; the parameters are "
            f"{sorted({*values, *row_model.parameters})}."
        )
    penalised = [name for name in values if name in row_model.priors]
    found = _Traced(
        parameters.constraints, penalised, of_guide, of_networks, posterior, plan, guide_loss
    )
    return values, found, _undefined_rows(row_model)


def _undefined_rows(row_model):
    """Of each site of the row, how many rows have no density: NaN at the data and first values."""
    sites = {**row_model.parameters, **{name: x.value for name, x in row_model.sites.items()}}
    return {
        name: jnp.sum(row_model.weigh(jnp.isnan(x).astype(float)) > 0)
        for name, x in row_model.terms(sites).items()
    }


def _check_defined(undefined):
    """Raise where a density is NaN, which an objective that reads derivatives alone never sees."""
    for name, count in undefined.items():
        if not_jax_tracer(count) and int(count) > 0:  # compared on the host
            raise ModelError(
                f"EnergySVI: the density of '{name}' is NaN in {int(count)} rows of the data, at "
                "the parameters' initial values. It has to be defined on the whole support of its "
                "sites, as `jnp.log(v)` is not at v < 0: give the site the support that is meant, "
                "as in `Lebesgue(dist.constraints.positive)`, or pass `init_params`."
            )


def _check_guide_loss(guide_loss, problem):
    discrete = [name for name, site in problem.row_model.latent.items() if site.is_discrete]
    if guide_loss is None or not discrete:
        return
    if not getattr(guide_loss, "can_infer_discrete", False):
        raise ModelError(
            f"The guide loss {type(guide_loss).__name__} drops part of the gradient for "
            f"the discrete latent site(s) {discrete}. Use RelaxedELBO (Bernoulli guides) or "
            "numpyro.infer.TraceGraph_ELBO."
        )
