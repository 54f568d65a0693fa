# SPDX-License-Identifier: Apache-2.0
"""What all objectives share: NumPyro's loss protocol, over rows and their marginals."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from numpyro_ebm.errors import ModelError
from numpyro_ebm.guides.losses import default_guide_loss, row_guide_loss
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.temper import temper
from numpyro_ebm.marginals import Marginal, list_exact
from numpyro_ebm.marginals.base import Estimate
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.parts import Term
from numpyro_ebm.objectives.plan import Problem, make_plan
from numpyro_ebm.program.derivatives import once_differentiable
from numpyro_ebm.signatures import Checked, explaining
from numpyro_ebm.types import Model, Optimizer, Params, SiteValues

__all__ = ["AuxiliaryNetwork", "Objective", "Problem"]


class AuxiliaryNetwork(NamedTuple):
    """A network that an objective brings, trained beside the energy on a loss of its own.

    - **name** - what it is called in messages.
    - **parameters** - ``(rng_key, problem) -> {name: (value, constraint)}``: its parameters.
    - **loss** - ``(rng_key, params, network_params, problem) -> scalar``, to be minimised in
      ``network_params``; ``params`` holds all other parameters.
    - **optim** - its optimiser; a copy of the energy's if ``None``.
    - **num_steps** - its steps in each round, before the energy's.
    """

    name: str
    parameters: Callable[..., dict[str, tuple[Any, Any]]]
    loss: Callable[..., jax.Array]
    optim: Optimizer | None = None
    num_steps: int = 1


class Objective(Checked, Term, ABC):
    """Base class of the objectives; each is a loss in NumPyro's sense.

    ``objective.loss(rng_key, params, model, guide, *args, **kwargs)`` returns an estimate of the
    objective, a mean over rows; its gradient in the model's parameters is the estimator of the
    objective's gradient, and its gradient in the parameters of the guide, and of the objective's
    own networks, that of their own losses, whose values are not part of the loss. So an objective
    serves as the ``loss`` of :class:`numpyro.infer.SVI` as well as of
    :class:`~numpyro_ebm.EnergySVI`.

    :param marginal: how latent sites are integrated out; if ``None``, by the exact marginal that
        covers the model (:func:`~numpyro_ebm.marginals.exact_marginal`), where there is one.
    """

    can_infer_discrete = True  # read by NumPyro's SVI
    order = 2  # derivatives of log p̃ that the gradient takes
    needs = "derivatives"  # of the marginal: its "derivatives", a "bound", or its "value"
    has_state = False  # whether something is kept from round to round, which `SVI` cannot
    is_loss = True  # whether its value is the function whose gradient it gives
    is_scoring_rule = False  # whether minus its loss of a row is a proper score of the model there
    temperature: float | None = None  # at which it learns a model; `None` where it does not say
    networks = ()  # networks with losses of their own, each a `AuxiliaryNetwork`

    def __init__(self, marginal: Marginal | None = None):
        if marginal is not None and not isinstance(marginal, Marginal):
            raise ModelError(
                f"{type(self).__name__}: `marginal` must be a marginal such as `VaGES()` or "
                f"`Enumerated()`, got {marginal!r}."
            )
        self.marginal = marginal

    def own_arguments(self, rng_key: jax.Array, row_model: RowModel) -> dict[str, Any]:
        """Keyword arguments that the objective gives to model and guide, such as noise levels."""
        return {}

    def perturb(
        self, rng_key: jax.Array, row_model: RowModel
    ) -> tuple[SiteValues, Any, jax.Array | None]:
        """Where the model is evaluated: ``(unconstrained, noise, row_weights)`` of a `Problem`."""
        return row_model.unconstrain_visible(), None, None

    @abstractmethod
    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        """Value and gradient (in the energy's parameters) of the objective, a mean over rows."""

    def own_parameters(
        self, rng_key: jax.Array, params: Params, problem: Problem
    ) -> dict[str, tuple[Any, Any]]:
        """Parameters of the objective that its own loss trains, ``{name: (value, constraint)}``."""
        return {}

    def init_state(self, rng_key: jax.Array, params: Params, problem: Problem) -> Any:
        """What the objective keeps from round to round, at the start; a pytree or ``None``."""
        return None

    def advance(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any
    ) -> tuple[Problem, Any]:
        """What happens before the energy's step: ``(problem, state)`` of this round."""
        return problem, state

    def learned(self, model: Model) -> Model:
        """The model that it learns: at its temperature, if that is not one."""
        if self.temperature is None or self.temperature == 1:
            return model
        return temper(model, 1 / self.temperature)

    @property
    def keeps(self) -> bool:
        """Whether it, or its marginal, keeps something from round to round."""
        return self.has_state or (self.marginal is not None and self.marginal.has_state)

    def settle(
        self, rng_key: jax.Array, before: Params, after: Params, problem: Problem, state: Any
    ) -> Any:
        """What the objective keeps, after the step of the energy took parameters to others."""
        return state

    def has_statistics(self, state: Any) -> bool:
        """Whether there is anything to :meth:`review`, with what it kept from round to round."""
        return type(self).statistics is not Objective.statistics

    def statistics(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any = None
    ) -> Any:
        """What :meth:`review` wants to know at the end of a run; a pytree of arrays."""
        return None

    def review_state(self, state: Any) -> None:
        """Warn if what the objective kept says at the end of a run that it did not work."""
        return None

    def review(self, statistics: Any) -> None:
        """Warn of what the statistics of a run's result show to be wrong."""
        return None

    def prepare(
        self,
        rng_key: jax.Array,
        params: Params,
        model: Model,
        guide: Model | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Problem:
        """Read the model and the guide, check that this objective serves, and place the batch.

        :return: a :class:`Problem`.
        :raises ModelError: if the model, the guide and the objective do not go together.
        """
        key_read, key_perturb = jax.random.split(rng_key)
        row_model = read_model(model, args, kwargs, params, rng_key=key_read)
        plan = make_plan(key_read, self, row_model, guide, params)
        return plan.place(key_perturb, row_model, guide, params)

    def check_marginal(self, marginal: Marginal) -> None:
        """Raise unless the marginal offers what this objective needs of it."""
        name = type(self).__name__
        if self.needs == "value" and marginal.value != "exact":
            raise ModelError(
                f"{name} compares values of log p̃(v), and {type(marginal).__name__} has none that "
                f"are exact. Use {list_exact()} where it covers the latent sites (`marginal=None` "
                "finds it); for others use NCE with `ImportanceBound()`, or "
                "DenoisingScoreMatching or ContrastiveDivergence with `VaGES()`."
            )
        if self.needs == "bound" and marginal.value is None:
            raise ModelError(
                f"{name} needs values of log p̃(v) or a bound on them, and "
                f"{type(marginal).__name__} estimates derivatives only. Use {list_exact()}, or "
                "`ImportanceBound()`."
            )

    def why_no_hessian(self, problem: Problem) -> str | None:
        """Why second derivatives of the loss are not those of the objective: a clause, or None."""
        marginal = problem.marginal
        if not self.is_loss:
            return "its gradient is not that of its value"
        if marginal.value == "exact" or marginal.value == self.needs == "bound":
            return None
        return f"{type(marginal).__name__} estimates its first derivatives from particles"

    def check_observed(self, row_model: RowModel) -> None:
        """Raise unless there is something to learn from, and it has coordinates."""
        if not row_model.visible:
            raise ModelError(
                f"{type(self).__name__}: the model has no observed site, so there is nothing to "
                "learn from. Pass the data, and give it as `obs=` to the visible sites."
            )
        row_model.unconstrain_visible()  # which data on the boundary of a support do not have

    def check_sites(self, row_model: RowModel) -> None:
        """Raise unless the objective is defined for the visible sites of the model."""
        name = type(self).__name__
        self.check_observed(row_model)
        for site in row_model.visible.values():
            if site.is_discrete:
                raise ModelError(
                    f"{name} takes derivatives in the visible values, and the visible site "
                    f"'{site.name}' is discrete. Use PseudoLikelihood, RatioMatching, NCE, "
                    "EnergyDiscrepancy or ContrastiveDivergence."
                )

    def estimate(self, rng_key: jax.Array, params: Params, problem: Problem) -> Estimate:
        """The marginal of the problem, bound at its visible values."""
        return problem.marginal.bind(
            rng_key,
            problem.row_model,
            problem.guide,
            params,
            problem.unconstrained,
            order=self.order,
        )

    @explaining
    def loss(
        self,
        rng_key: jax.Array,
        param_map: Params,
        model: Model,
        guide: Model | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """The objective and, through its gradient, its estimator.

        :param rng_key: random key.
        :param dict param_map: values of the parameters of the model, the guide, and the objective's
            own if it has any, by site name.
        :param model: a NumPyro model with energy statements.
        :param guide: a NumPyro guide q(h | v); ``None`` where no latent site needs one.
        :param args: arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :return: scalar loss in the units of the objective, a mean over rows. With an exact marginal
            all its derivatives are right; else the second ones raise.
        :raises ModelError: if the model, the guide and the objective do not go together, or the
            objective has parameters or a state that the caller does not bring.
        """
        if not isinstance(self, Objective):  # called by NumPyro's `SVI`, on a class
            raise ModelError(
                "`loss` must be an objective such as `ScoreMatching()`, and got a class of them."
            )
        if self.keeps:
            raise ModelError(
                f"{self!r} keeps a state from round to round, for which a loss of parameters alone "
                "(as `numpyro.infer.SVI` wants) has no place. Train with `numpyro_ebm.EnergySVI`."
            )
        key_prepare, key_energy, key_guide = jax.random.split(rng_key, 3)
        model = self.learned(model)
        problem = self.prepare(key_prepare, param_map, model, guide, args, kwargs)
        _check_parameters(problem.row_model, param_map)
        own, of_networks = self._check_own_parameters(problem, param_map)
        energy = {k: v for k, v in param_map.items() if k in {*problem.row_model.parameters, *own}}
        other = {k: v for k, v in param_map.items() if k not in energy}
        constants = {**stop_gradient(param_map)}
        problem, _ = self.advance(jax.random.fold_in(key_energy, 1), constants, problem, None)
        loss = self.energy_loss(key_energy, {**constants, **energy}, problem)
        why_not = self.why_no_hessian(problem)
        if why_not is not None:
            loss = once_differentiable(
                loss,
                f"{type(self).__name__} has no second derivatives: {why_not}. Use an exact "
                f"marginal ({list_exact()}) and an objective that is a loss, or a method of first "
                "order.",
            )
        for i, (network, names) in enumerate(zip(self.networks, of_networks, strict=True)):
            network_params = {name: other.pop(name) for name in names}
            key_network = jax.random.fold_in(key_guide, i)
            extra = network.loss(key_network, constants, network_params, problem)
            loss = loss + (extra - stop_gradient(extra))
        if other and guide is not None and problem.row_model.latent:
            guide_loss = default_guide_loss(problem)
            fixed = {k: v for k, v in constants.items() if k in problem.row_model.parameters}
            extra = row_guide_loss(guide_loss, key_guide, fixed, other, problem, guide)
            loss = loss + (extra - stop_gradient(extra))
        return loss

    def _check_own_parameters(self, problem, param_map):
        """Names of the objective's own parameters, and of those of each network."""
        key = default_key()
        shapes = jax.eval_shape(
            lambda: jax.tree.map(
                jnp.asarray,
                {k: v[0] for k, v in self.own_parameters(key, param_map, problem).items()},
            )
        )
        of_networks = [list(network.parameters(key, problem)) for network in self.networks]
        missing = [name for name in [*shapes, *sum(of_networks, [])] if name not in param_map]
        if missing:
            raise ModelError(
                f"{type(self).__name__} has the parameter(s) {', '.join(map(repr, missing))} of "
                "its own, and they have no value: `numpyro.infer.SVI` knows the parameters of "
                "model and guide only. Train with `numpyro_ebm.EnergySVI`, or give their values "
                "among the parameters."
            )
        return list(shapes), of_networks

    def __repr__(self):
        hidden = ("_", "networks", "order", "parts")
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith(hidden))
        return f"{type(self).__name__}({options})"


def _check_parameters(row_model, param_map):
    missing = [name for name in row_model.parameters if name not in param_map]
    priors = [name for name in missing if name in row_model.priors]
    if priors:
        raise ModelError(
            f"The parameter(s) {', '.join(map(repr, priors))} have a prior and no value: an "
            "objective is a loss at given parameter values. Train with `numpyro_ebm.EnergySVI`, "
            "which adds the prior (penalised estimates, or a variational posterior where the guide "
            "draws the parameters); or give their values among the parameters, or declare them "
            "with `numpyro.param`."
        )
    if missing:
        raise ModelError(f"No value for the parameter(s) {', '.join(map(repr, missing))}.")
