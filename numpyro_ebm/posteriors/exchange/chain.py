# SPDX-License-Identifier: Apache-2.0
"""The chain of :class:`~numpyro_ebm.Exchange`: its state, how it starts, and what a step does.

Pure functions of an :class:`~numpyro_ebm.posteriors.exchange.target.ExchangeTarget`. Here NumPyro's
dicts of parameters, the fictitious data sets and the warm-up meet
:mod:`numpyro_ebm.samplers.exchange`, which only takes densities of arrays.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm.errors import field_or_item
from numpyro_ebm.mcmc.adaptation import running_mean
from numpyro_ebm.posteriors.exchange.auxiliary_chain import AuxiliaryWarmup
from numpyro_ebm.posteriors.exchange.target import ExchangeTarget
from numpyro_ebm.posteriors.exchange.warmup import ExchangeAdaptation, ExchangeAdaptState
from numpyro_ebm.samplers import exchange
from numpyro_ebm.types import SiteValues

__all__ = ["AuxiliaryTrace", "ExchangeState", "refresh_chain", "start_chain", "step_chain"]


class AuxiliaryTrace(NamedTuple):
    """The auxiliary chain of a step at its start (the data), half way and at its end.

    If every row accepts on its own, the rows are the last axis of log-densities and ratios, and
    lead in the proposal.

    - **proposal** - θ', unconstrained, (dimension,).
    - **log_density** - log p̃(y; θ') a row, (3,).
    - **log_ratio** - log p̃(y; θ') - log p̃(y; θ), which enters the acceptance with a minus, (3,).
    - **accept_prob** - mean acceptance of the auxiliary chain; NaN if its kernel reports none.
    - **step_size** - median of its step sizes; NaN if its kernel has none.
    - **recoil** - how far y moved from half way to the end along what sets the data apart from
      their mean, in units of its square: 0 on average for a chain that has forgotten the data.
    - **movement** - mean square of its move from half way to the end.
    - **distance** - mean square of y - x, over unconstrained coordinates.
    - **spread** - mean square of y less the fictitious data of the step before.
    """

    proposal: jax.Array
    log_density: jax.Array
    log_ratio: jax.Array
    accept_prob: jax.Array
    step_size: jax.Array
    recoil: jax.Array
    movement: jax.Array
    distance: jax.Array
    spread: jax.Array


class ExchangeState(NamedTuple):
    """State of :class:`~numpyro_ebm.Exchange`; fields can be collected as ``extra_fields``.

    With ``by_row`` the arrays that are scalars otherwise have the shape (rows,).

    - **i** - step counter, warm-up included.
    - **z** - dict of unconstrained values of the parameters.
    - **log_prior** - log π(θ) in these coordinates.
    - **log_density** - log p̃(x; θ) of the data, without log Z(θ).
    - **gradient** - of the approximate log-posterior, (groups, dimension); zero for a random walk.
    - **accept_prob** - acceptance probability of the last step.
    - **mean_accept_prob** - its mean over the steps since the last phase began.
    - **diverging** - whether the last ratio was not a number, and so rejected.
    - **auxiliary** - :class:`AuxiliaryTrace` of the last step.
    - **fictitious** - the fictitious data of the last step, unconstrained, (rows, coordinates).
    - **adapt_state** - :class:`~numpyro_ebm.posteriors.exchange.warmup.ExchangeAdaptState`.
    - **auxiliary_adapt_state** - what the auxiliary kernel adapts; ``None`` if nothing.
    - **rng_key** - key of the next step.
    """

    i: jax.Array
    z: SiteValues
    log_prior: jax.Array
    log_density: jax.Array
    gradient: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    diverging: jax.Array
    auxiliary: AuxiliaryTrace
    fictitious: jax.Array
    adapt_state: ExchangeAdaptState
    auxiliary_adapt_state: Any
    rng_key: jax.Array

    @property
    def potential_energy(self) -> jax.Array:
        """Minus the log-density of parameters and data, without log Z(θ)."""
        return -self.log_prior - self.log_density

    __getitem__ = field_or_item


def start_chain(
    rng_key: jax.Array,
    z: SiteValues,
    target: ExchangeTarget,
    adaptation: ExchangeAdaptation,
    auxiliary: Any,
    num_references: int,
) -> ExchangeState:
    """The first state of a chain.

    :param dict z: unconstrained values of the parameters.
    :param ExchangeTarget target: the posterior.
    :param ExchangeAdaptation adaptation: of its proposal.
    :param auxiliary: what draws the fictitious data.
    :param int num_references: data sets that warm-up is to draw, 0 for a random walk.
    """
    position = target.flatten(z)
    references, baselines = None, None
    if num_references:  # to be drawn in warm-up
        rows = target.log_rows(target.constrain(z), target.data)
        references, baselines = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_references, *jnp.shape(x))), (target.data, rows)
        )
    adapt_state = adaptation.init(position, references, baselines)
    _, functions = _functions(target, z, adapt_state)
    chain = exchange.init(position, target.data, **functions)
    per_group = jnp.zeros_like(_per_group(target, chain.logprior))
    state = ExchangeState(
        i=jnp.array(0),
        z=z,
        log_prior=per_group,
        log_density=per_group,
        gradient=chain.gradient,
        accept_prob=per_group,
        mean_accept_prob=per_group,
        diverging=per_group > 0,
        auxiliary=AuxiliaryTrace(
            position if target.by_row else position[0],
            jnp.zeros((3, *per_group.shape), per_group.dtype),
            jnp.zeros((3, *per_group.shape), per_group.dtype),
            *([jnp.zeros((), per_group.dtype)] * 2),
            *([per_group] * 4),
        ),
        fictitious=target.coordinates(target.data),
        adapt_state=adapt_state,
        auxiliary_adapt_state=auxiliary.start(rng_key, target, z, adaptation.num_warmup),
        rng_key=rng_key,
    )
    return _cache(target, state, chain)


def refresh_chain(state: ExchangeState, target: ExchangeTarget) -> ExchangeState:
    """The state with its densities recomputed, after the conditioning of the model changed."""
    _, functions = _functions(target, state.z, state.adapt_state)
    chain = exchange.init(target.flatten(state.z), target.data, **functions)
    return _cache(target, state, chain)


def step_chain(
    state: ExchangeState,
    target: ExchangeTarget,
    adaptation: ExchangeAdaptation,
    auxiliary: Any,
    num_bridges: int,
) -> ExchangeState:
    """One step of a chain.

    :param ExchangeState state: where it is.
    :param ExchangeTarget target: the posterior.
    :param ExchangeAdaptation adaptation: of its proposal.
    :param auxiliary: what draws the fictitious data, of
        :mod:`numpyro_ebm.posteriors.exchange.auxiliary`.
    :param int num_bridges: distributions that these cross on their way back.
    """
    adapt_state = state.adapt_state
    unflatten, functions = _functions(target, state.z, adapt_state)
    position = target.flatten(state.z)
    rng_key, key_step = jax.random.split(state.rng_key)
    is_paused = adaptation.at(state.i, "is_paused")
    warmup = AuxiliaryWarmup(adaptation.num_warmup, state.i, state.auxiliary_adapt_state)

    def simulate(rng_key, position):
        position = jnp.where(is_paused, adapt_state.reference, position)
        params = target.constrain(unflatten(position))
        keep_latent = num_bridges > 0  # the chain continues from its latent sites
        return auxiliary.simulate(rng_key, target, params, target.data, warmup, keep_latent)

    def transition(rng_key, position, data):
        params = target.constrain(unflatten(position))
        return auxiliary.transition(rng_key, target, params, data, warmup)

    groups = (target.num_groups,)
    chain = exchange.ExchangeChainState(
        position,
        jnp.reshape(state.log_prior, groups),
        jnp.reshape(state.log_density, groups),
        state.gradient,
    )
    chain, info = exchange.build_kernel(num_bridges)(
        key_step,
        chain,
        target.data,
        simulate_fn=simulate,
        step_size=jnp.where(is_paused, 0.0, adapt_state.step_size),
        scale=adapt_state.scale,
        transition_fn=transition,
        **functions,
    )
    if adapt_state.references is not None:
        drawn = {name: info.fictitious[name] for name in target.data}
        params = target.constrain(unflatten(adapt_state.reference))
        rows = target.log_rows(params, drawn)
        adapt_state = adaptation.store_reference(state.i, adapt_state, drawn, rows)
    adapt_state = adaptation.update(
        state.i, adapt_state, info.acceptance_rate, lambda: chain.position
    )
    accept_prob = _per_group(target, info.acceptance_rate)
    report = info.simulation
    x, halfway, end = map(target.coordinates, (target.data, info.halfway, info.fictitious))
    apart = x - jnp.mean(x, 0 if len(x) > 1 else None)
    scale = jnp.maximum(target.group_mean(apart**2), jnp.finfo(x.dtype).tiny)
    return _cache(target, state, chain)._replace(
        i=state.i + 1,
        accept_prob=accept_prob,
        mean_accept_prob=running_mean(
            state.mean_accept_prob, accept_prob, state.i, adaptation.num_warmup
        ),
        diverging=_per_group(target, info.is_divergent),
        auxiliary=AuxiliaryTrace(
            info.proposal if target.by_row else info.proposal[0],
            _per_group(target, info.log_densities) * target.num_groups / target.row_model.num_rows,
            _per_group(target, info.log_ratios),
            jnp.asarray(report.accept_prob, accept_prob.dtype),
            jnp.asarray(report.step_size, accept_prob.dtype),
            _per_group(target, target.group_mean(apart * (end - halfway)) / scale),
            _per_group(target, target.group_mean((end - halfway) ** 2)),
            _per_group(target, target.group_mean((end - x) ** 2)),
            _per_group(target, target.group_mean((end - state.fictitious) ** 2)),
        ),
        fictitious=end,
        adapt_state=adapt_state,
        auxiliary_adapt_state=report.adapt_state,
        rng_key=rng_key,
    )


def _functions(target, like, adapt_state):
    """Functions of flat positions: unflatten, and the arguments of `samplers.exchange`."""

    def unflatten(position):
        return target.unflatten(position, like)

    functions = {
        "logprior_fn": lambda position: target.log_prior(unflatten(position)),
        "logdensity_fn": lambda position, x: target.log_density(unflatten(position), x),
    }
    if adapt_state.references is not None:

        def total(position):
            z = unflatten(position)
            surrogate = target.log_posterior(z, adapt_state.references, adapt_state.baselines)
            return jnp.sum(surrogate)

        functions["gradient_fn"] = lambda position: jnp.where(
            adapt_state.has_gradient, jax.grad(total)(position), 0.0
        )
    return unflatten, functions


def _per_group(target, x):
    """A scalar where there is one group: groups are the last axis."""
    return x if target.by_row else x[..., 0]


def _cache(target, state, chain):
    return state._replace(
        z=target.unflatten(chain.position, state.z),
        log_prior=_per_group(target, chain.logprior),
        log_density=_per_group(target, chain.logdensity),
        gradient=chain.gradient,
    )
