# SPDX-License-Identifier: Apache-2.0
r"""Weighted sums of objectives, each on all visible sites of a model or on some of them.

.. math:: \mathcal L(θ) = \sum_i w_i \mathcal L_i(θ)

Every part is an objective as it stands, with its own marginal, noise, networks and chains, and the
same parameters. On some visible sites A it learns another law of the model: their marginal, with
all others summed out, or their conditional, with others held at the data,

.. math:: \tilde p(v_A; θ) = \sum_{v_B} \tilde p(v_A, v_B; θ), \qquad
    p(v_A \mid v_B; θ) = \tilde p(v_A, v_B; θ) / Z(θ, v_B).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.objectives.parts import Part, Term
from numpyro_ebm.types import Params

__all__ = ["WeightedSum"]

PART_STREAM = 0x9A27
"""Folded into a key, with its number, for each of the parts."""


class WeightedSum(Objective):
    r"""A sum of objectives with weights, as ``0.5 * A + B`` makes it.

    .. math:: \mathcal L(θ) = \sum_i w_i \mathcal L_i(θ)

    With ``on`` a part learns some of the visible sites: ``A.on("x")`` learns p(x), the other
    visible sites summed out, and ``A.on("y", given="x")`` learns p(y | x). For a discrete y that
    is an exact softmax, by :class:`~numpyro_ebm.PseudoLikelihood` or
    :class:`~numpyro_ebm.MaximumLikelihood`; with contrastive divergence on x beside it the sum is
    the joint energy model (JEM) of a classifier. Labels that are missing (``obs_mask=``) add
    nothing to the gradient of p(y | x); to its value by pseudo-likelihood, log K each.

    Parts with a temperature have one in common, and the others learn the model at it, too.

    A guide is fitted at the visible values of the parts that draw from it.

    :param parts: the parts, each a ``Part``.
    :raises ModelError: if there is no part, a weight is negative or not finite, two parts are one
        object with chains or networks of its own, or they learn at different temperatures; when
        used, if a part does not serve its sites, or two parts draw from the guide and one moves the
        visible values.

    Reference: Grathwohl, Wang, Jacobsen, Duvenaud, Norouzi, Swersky, *Your classifier is secretly
    an energy based model and you should treat it like one*, ICLR 2020.

    **Example**

    >>> import jax, jax.numpy as jnp, numpyro
    >>> import numpyro_ebm as ebm
    >>> def classes(data, labels):
    ...     means = numpyro.param("means", jnp.array([-1.0, 1.0]))
    ...     with numpyro.plate("data", len(data)):
    ...         x = numpyro.sample("x", ebm.Lebesgue(), obs=data)
    ...         y = numpyro.sample("y", ebm.Counting(2), obs=labels)
    ...         ebm.energy("E", 0.5 * (x - means[y]) ** 2)
    >>> likelihood = ebm.MaximumLikelihood()
    >>> objective = likelihood.on("x") + likelihood.on("y", given="x")
    >>> params = {"means": jnp.array([-1.0, 2.0])}
    >>> args = classes, None, jnp.array([-0.5, 0.3, 2.5]), jnp.array([0, 1, 1])
    >>> joint = likelihood.loss(jax.random.key(0), params, *args)
    >>> bool(jnp.isclose(objective.loss(jax.random.key(0), params, *args), joint, atol=1e-4))
    True
    """

    def __init__(self, parts: Sequence[Part]):
        super().__init__()
        if not parts:
            raise ModelError("WeightedSum: `parts` is empty. `0.5 * A + B` makes a sum.")
        kept = [x.objective for x in parts if x.objective.has_state or x.objective.networks]
        for i, objective in enumerate(kept):
            if any(objective is other for other in kept[:i]):
                raise ModelError(
                    f"Two parts of the sum are the same {type(objective).__name__}, which has "
                    "chains or networks of its own. Make one for each part, or give one part the "
                    "weights of both."
                )
        self.temperature = _common_temperature([part.objective for part in parts])
        self.parts = tuple(parts)
        self.networks = tuple(
            _network_of_part(i, network)
            for i, part in enumerate(self.parts)
            for network in part.objective.networks
        )

    @property
    def has_state(self) -> bool:
        return any(part.objective.has_state for part in self.parts)

    @property
    def keeps(self) -> bool:
        return any(part.objective.keeps for part in self.parts)

    @property
    def is_loss(self) -> bool:
        return all(part.objective.is_loss for part in self.parts)

    def has_statistics(self, state: Any) -> bool:
        each = zip(self.parts, self._states(state), strict=True)
        return any(part.objective.has_statistics(own) for part, own in each)

    def check_sites(self, row_model: RowModel) -> None:
        self.check_observed(row_model)  # the rest is for the parts to say, of their own sites

    def why_no_hessian(self, problem: Problem) -> str | None:
        reasons = [x.why_no_hessian(own) for x, _, own in self._each(None, problem)]
        return next((reason for reason in reasons if reason is not None), None)

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        each = self._each(rng_key, problem)
        losses = [objective.energy_loss(key, params, own) for objective, key, own in each]
        total: Any = sum(x.weight * loss for x, loss in zip(self.parts, losses, strict=True))
        return total

    def own_parameters(
        self, rng_key: jax.Array, params: Params, problem: Problem
    ) -> dict[str, tuple[Any, Any]]:
        found: dict[str, tuple[Any, Any]] = {}
        for objective, key, own in self._each(rng_key, problem):
            known = {**params, **{name: value for name, (value, _) in found.items()}}
            found |= objective.own_parameters(key, known, own)
        return found

    def init_state(self, rng_key: jax.Array, params: Params, problem: Problem) -> Any:
        each = self._each(rng_key, problem)
        return tuple(
            objective.init_state(key, params, own) if objective.has_state else None
            for objective, key, own in each
        )

    def advance(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any
    ) -> tuple[Problem, Any]:
        moved = [
            objective.advance(key, params, own, kept)
            for (objective, key, own), kept in zip(
                self._each(rng_key, problem), self._states(state), strict=True
            )
        ]
        problem = problem._replace(parts=tuple(own for own, _ in moved))
        return problem, tuple(kept for _, kept in moved) if self.has_state else None

    def settle(
        self, rng_key: jax.Array, before: Params, after: Params, problem: Problem, state: Any
    ) -> Any:
        each = zip(self._each(rng_key, problem), state, strict=True)
        return tuple(
            objective.settle(key, before, after, own, kept) for (objective, key, own), kept in each
        )

    def statistics(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any = None
    ) -> Any:
        each = zip(self._each(rng_key, problem), self._states(state), strict=True)
        return [
            objective.statistics(key, params, own, kept) if objective.has_statistics(kept) else None
            for (objective, key, own), kept in each
        ]

    def review(self, statistics: Any) -> None:
        for part, own in zip(self.parts, statistics, strict=True):
            if own is not None:
                part.objective.review(own)

    def review_state(self, state: Any) -> None:
        if self.has_state:
            for part, own in zip(self.parts, state, strict=True):
                part.objective.review_state(own)

    def state_of(self, objective: Objective, state: Any) -> Any:
        """The state of a run as one of the parts knows it, to ask that about its chains.

        :param Objective objective: the objective of the part.
        :param state: the state of :class:`~numpyro_ebm.EnergySVI`, ``fit.state``.
        :raises ModelError: if it is not among the parts, or there is no such state.
        """
        for part, own in zip(self.parts, state.objective_state or (), strict=False):
            if part.objective is objective:
                return state._replace(objective_state=own)
        raise ModelError(f"state_of: {objective!r} keeps nothing in this state.")

    def _states(self, state: Any) -> tuple[Any, ...]:
        """What each part kept."""
        return (None,) * len(self.parts) if state is None else state

    def _each(
        self, rng_key: jax.Array | None, problem: Problem
    ) -> Iterator[tuple[Objective, Any, Problem]]:
        """The objectives, with a key and a problem for each."""
        for i, (part, own) in enumerate(zip(self.parts, problem.parts, strict=True)):
            key = None if rng_key is None else jax.random.fold_in(rng_key, PART_STREAM + i)
            yield part.objective, key, own

    def __repr__(self):
        return f"WeightedSum({' + '.join(map(repr, self.parts))})"


def _common_temperature(objectives):
    """The one temperature at which objectives learn, or ``None`` if none of them says any."""
    said = {x.temperature for x in objectives} - {None}
    if len(said) > 1:
        raise ModelError(
            f"The parts of the sum learn one model at different temperatures, {sorted(said)}: its "
            "parameters would mean two laws. Give them one `temperature`, or scale the energy of "
            "a part in the model."
        )
    return said.pop() if said else None


def _network_of_part(i, network):
    """A network of a part, among those of the sum."""

    def parameters(rng_key, problem):
        return network.parameters(rng_key, problem.parts[i])

    def loss(rng_key, params, own, problem):
        return network.loss(rng_key, params, own, problem.parts[i])

    return network._replace(parameters=parameters, loss=loss)


Term.sum_of = WeightedSum  # what the operators make
