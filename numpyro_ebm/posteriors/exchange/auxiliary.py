# SPDX-License-Identifier: Apache-2.0
r"""Fictitious data sets of the exchange algorithm, y ~ p(· | θ), at parameters that are traced.

Exact by enumeration or by a function of the user's, approximate by a Markov chain
(:mod:`numpyro_ebm.posteriors.exchange.auxiliary_chain`).
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.finite_supports import in_all_rows, joint_states, num_joint_states
from numpyro_ebm.posteriors.exchange.auxiliary_chain import (
    AuxiliaryReport,
    AuxiliaryWarmup,
    ChainSimulator,
)
from numpyro_ebm.posteriors.exchange.target import ExchangeTarget
from numpyro_ebm.types import Params, SiteValues

__all__ = ["EnumerationSimulator", "FunctionSimulator", "make_auxiliary"]

ENUMERATE = 'Exchange(auxiliary="enumerate")'
MAX_BATCH = 4_000_000  # coordinates of states that are evaluated at the same time


def make_auxiliary(
    auxiliary: Any, num_steps: int, max_states: int
) -> "FunctionSimulator | EnumerationSimulator | ChainSimulator":
    """The simulator for the argument ``auxiliary`` of :class:`~numpyro_ebm.Exchange`.

    :raises ModelError: if there is none.
    """
    if isinstance(auxiliary, str) and auxiliary == "enumerate":
        return EnumerationSimulator(max_states)
    if auxiliary is None:
        return ChainSimulator(None, num_steps)
    if isinstance(auxiliary, type) and issubclass(auxiliary, MCMCKernel):
        return ChainSimulator(auxiliary, num_steps)
    if not isinstance(auxiliary, MCMCKernel) and callable(auxiliary):
        num = _num_required(auxiliary)
        if num in (1, 2):
            build: Any = auxiliary
            return ChainSimulator(build, num_steps) if num == 1 else FunctionSimulator(build)
    raise ModelError(
        "Exchange: `auxiliary` draws the fictitious data: a kernel class, `BlockGibbs`; a function "
        "of one argument from a model to a kernel, `lambda model: MALA(model, step_size=0.1)`; a "
        "function of two arguments to exact draws, `lambda rng_key, params: {site: values}`; or "
        f'"enumerate". Got {auxiliary!r}.'
    )


def _num_required(function):
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


class ExactSimulator:
    """Exact draws, which need no warm-up."""

    is_exact = True

    def start(
        self, rng_key: jax.Array, target: ExchangeTarget, z: SiteValues, num_warmup: int
    ) -> Any:
        return None


class FunctionSimulator(ExactSimulator):
    """Exact draws by a function of the user's, ``(rng_key, params) -> {site: values}``."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def check(
        self, target: ExchangeTarget, z: SiteValues, num_bridges: int, num_warmup: int
    ) -> None:
        _no_bridges(num_bridges, "a function of exact draws has no transitions")
        params = jax.eval_shape(target.constrain, z)
        found = jax.eval_shape(self.function, default_key(), params)
        shapes = {k: jnp.shape(x) for k, x in target.data.items()}
        if not isinstance(found, dict) or {k: x.shape for k, x in found.items()} != shapes:
            given = {k: x.shape for k, x in found.items()} if isinstance(found, dict) else found
            raise ModelError(
                "Exchange: `auxiliary(rng_key, params)` must return a fictitious data set, a dict "
                f"of arrays of the shapes {shapes}, got {given}."
            )

    def simulate(
        self,
        rng_key: jax.Array,
        target: ExchangeTarget,
        params: Params,
        values: SiteValues,
        warmup: AuxiliaryWarmup,
        keep_latent: bool = False,
    ) -> tuple[SiteValues, SiteValues, AuxiliaryReport]:
        drawn = self.function(rng_key, params)
        drawn = {k: jnp.asarray(drawn[k]).astype(jnp.asarray(x).dtype) for k, x in values.items()}
        return drawn, drawn, AuxiliaryReport(jnp.ones(()), jnp.asarray(jnp.nan), None)


class EnumerationSimulator(ExactSimulator):
    """Exact draws of finite discrete rows, from the probabilities of all their states.

    :param int max_states: the most states of a row.
    """

    def __init__(self, max_states: int):
        self.max_states = max_states

    def check(
        self, target: ExchangeTarget, z: SiteValues, num_bridges: int, num_warmup: int
    ) -> None:
        _no_bridges(num_bridges, 'exact draws by "enumerate" have no transitions')
        visible = target.row_model.visible
        for name, site in visible.items():
            if not site.is_discrete:
                raise ModelError(
                    f'Exchange: `auxiliary="enumerate"` cannot enumerate the visible site '
                    f"'{name}', which is continuous. Pass a kernel, such as "
                    "`lambda model: MALA(model, step_size=0.1)`, or a function of exact draws."
                )
        states = num_joint_states(target.row_model, visible, ENUMERATE)
        if states > self.max_states:
            raise ModelError(
                f"Exchange: a row of {sorted(visible)} has {states:.3g} states, more than "
                f"max_states={self.max_states}. Pass a kernel: `auxiliary=BlockGibbs`."
            )

    def simulate(
        self,
        rng_key: jax.Array,
        target: ExchangeTarget,
        params: Params,
        values: SiteValues,
        warmup: AuxiliaryWarmup,
        keep_latent: bool = False,
    ) -> tuple[SiteValues, SiteValues, AuxiliaryReport]:
        row_model = target.row_model
        states = joint_states(row_model, row_model.visible, ENUMERATE)
        states = {name: x.astype(jnp.result_type(values[name])) for name, x in states.items()}
        num_states = len(jax.tree.leaves(states)[0])
        coordinates = sum(x[0].size for x in states.values())
        logits = lax.map(
            lambda state: target.log_rows(params, in_all_rows(row_model, state)),
            states,
            batch_size=max(1, min(MAX_BATCH // (row_model.num_rows * coordinates), num_states)),
        )
        chosen = jax.random.categorical(rng_key, logits, axis=0)  # (rows,)
        drawn = row_model.from_rows({name: x[chosen] for name, x in states.items()})
        return drawn, drawn, AuxiliaryReport(jnp.ones(()), jnp.asarray(jnp.nan), None)


def _no_bridges(num_bridges, why):
    if num_bridges:
        raise ModelError(
            f"Exchange: `num_bridges` needs a kernel as `auxiliary`, for {why}. Leave it at 0."
        )
