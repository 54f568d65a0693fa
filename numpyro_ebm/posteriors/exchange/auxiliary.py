# SPDX-License-Identifier: Apache-2.0
r"""Fictitious data sets of the exchange algorithm, y ~ p(· | θ), at parameters that are traced.

Exact by enumeration or by a function of the user's, approximate by a Markov chain that starts at
the data.

Reference: Liang, *A double Metropolis-Hastings sampler for spatial models with intractable
normalizing constants*, Journal of Statistical Computation and Simulation, 2010.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.infer.mcmc import MCMCKernel
from numpyro.primitives import Messenger

from numpyro_ebm._compat import GIBBS_SITES_KWARG
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.handlers import fixed, uncondition
from numpyro_ebm.language.sites import plates_of
from numpyro_ebm.model.finite_supports import in_all_rows, joint_states, num_joint_states
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.posteriors.exchange.target import ExchangeTarget
from numpyro_ebm.types import Model, Params, SiteValues

__all__ = ["ChainSimulator", "EnumerationSimulator", "FunctionSimulator", "make_auxiliary"]

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


class FunctionSimulator:
    """Exact draws by a function of the user's, ``(rng_key, params) -> {site: values}``."""

    is_exact = True

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def check(self, target: ExchangeTarget, z: SiteValues, num_bridges: int) -> None:
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
        keep_latent: bool = False,
    ) -> tuple[SiteValues, SiteValues, jax.Array]:
        drawn = self.function(rng_key, params)
        drawn = {k: jnp.asarray(drawn[k]).astype(jnp.asarray(x).dtype) for k, x in values.items()}
        return drawn, drawn, jnp.ones(())


class EnumerationSimulator:
    """Exact draws of finite discrete rows, from the probabilities of all their states.

    :param int max_states: the most states of a row.
    """

    is_exact = True

    def __init__(self, max_states: int):
        self.max_states = max_states

    def check(self, target: ExchangeTarget, z: SiteValues, num_bridges: int) -> None:
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
        keep_latent: bool = False,
    ) -> tuple[SiteValues, SiteValues, jax.Array]:
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
        return drawn, drawn, jnp.ones(())


class _HideOutside(Messenger):
    """Hide the observed sites outside the data plate, which are not part of the rows."""

    def __init__(self, fn, plate):
        self.plate = plate
        super().__init__(fn)

    def process_message(self, msg):
        if msg["type"] == "sample" and msg["is_observed"]:
            if self.plate not in plates_of(msg):
                msg["stop"] = True


class ChainSimulator:
    """A Markov chain that starts at the data and takes a number of steps.

    :param build: a function from a model to a kernel.
    :param int num_steps: its steps.
    """

    is_exact = False

    def __init__(self, build: Callable[[Model], MCMCKernel], num_steps: int):
        check_integer("Exchange", num_auxiliary_steps=num_steps)
        self.build, self.num_steps = build, num_steps

    def check(self, target: ExchangeTarget, z: SiteValues, num_bridges: int) -> None:
        free = uncondition(
            _HideOutside(target.model, target.row_model.plate), target.row_model.visible
        )
        kernel = self._kernel(fixed(free, {}))
        discrete = sorted(k for k, site in target.row_model.visible.items() if site.is_discrete)
        # NumPyro's own kernels leave the law invariant and refuse sites that they cannot move.
        if discrete and not getattr(kernel, "moves_discrete", True):
            raise ModelError(
                f"Exchange: {type(kernel).__name__} cannot draw fictitious data of {discrete}, "
                "which are discrete: it moves continuous sites. Use `BlockGibbs`, "
                '`DiscreteLangevin` or "enumerate".'
            )
        if not getattr(kernel, "leaves_invariant", True):
            raise ModelError(
                f"Exchange: {type(kernel).__name__} without a Metropolis test has not the law of "
                "the model, however many steps it takes. Use an adjusted kernel, such as `MALA`."
            )
        if num_bridges and not getattr(kernel, "is_reversible", False):
            raise ModelError(
                f"Exchange: bridges need reversible transitions, and {type(kernel).__name__} does "
                "not say that it makes them. `lambda model: BlockGibbs(model, reversible=True)`, "
                "`MALA` and `DiscreteLangevin` do; a kernel of your own says it by an attribute "
                "`is_reversible = True`."
            )

        def run(rng_key):
            params = target.constrain(z)
            return self._run(rng_key, target, params, target.data, 1)

        try:
            jax.eval_shape(run, default_key())
        except ModelError as error:
            raise ModelError(
                f"Exchange: {type(kernel).__name__} cannot draw fictitious data of "
                f"{sorted(target.data)}: {error} (Options of an auxiliary kernel are given by a "
                "function, `auxiliary=lambda model: MALA(model, step_size=0.1)`.)"
            ) from error

    def simulate(
        self,
        rng_key: jax.Array,
        target: ExchangeTarget,
        params: Params,
        values: SiteValues,
        keep_latent: bool = False,
    ) -> tuple[SiteValues, SiteValues, jax.Array]:
        *both, accept_prob = self._run(rng_key, target, params, values, self.num_steps)
        halfway, end = (
            {k: x for k, x in drawn.items() if keep_latent or k in target.row_model.visible}
            for drawn in both
        )
        return halfway, end, accept_prob

    def transition(
        self, rng_key: jax.Array, target: ExchangeTarget, params: Params, values: SiteValues
    ) -> SiteValues:
        """One step of the kernel."""
        return self._run(rng_key, target, params, values, 1)[1]

    def _kernel(self, model):
        kernel = self.build(model)
        if not isinstance(kernel, MCMCKernel):
            raise ModelError(
                f"Exchange: `auxiliary(model)` returned {kernel!r}, not a NumPyro `MCMCKernel`. (A "
                "function of exact draws takes two arguments, `(rng_key, params)`.)"
            )
        return kernel

    def _run(self, rng_key, target, params, values, num_steps):
        """Values half way and at the end, and the mean acceptance; NaN if nothing is proposed."""
        free = uncondition(
            _HideOutside(target.model, target.row_model.plate), target.row_model.visible
        )
        sites, kwargs = target.conditioned

        def auxiliary_model(params, sites, *args, **kwargs):
            # The sites that a `Gibbs` conditions come as an argument: kernels take initial values
            # for constrained ones where they see them among the keywords.
            if sites:
                kwargs = {**kwargs, GIBBS_SITES_KWARG: sites}
            return fixed(free, params)(*args, **kwargs)

        args = ({**target.constants, **params}, sites, *target.args)
        kernel = self._kernel(auxiliary_model)
        row_model = read_fixed_model(auxiliary_model, args, kwargs)
        start = {
            name: x if row_model.sites[name].is_discrete else row_model.sites[name].transform.inv(x)
            for name, x in values.items()
        }
        key_init, rng_key = jax.random.split(rng_key)
        state = kernel.init(key_init, 0, start, args, kwargs)

        def steps(state, num):
            return lax.fori_loop(0, num, lambda _, s: kernel.sample(s, args, kwargs), state)

        constrain = kernel.get_constrain_fn(args, kwargs)
        halfway = steps(state, num_steps // 2)
        end = steps(halfway, num_steps - num_steps // 2)
        drawn = [dict(constrain(getattr(s, kernel.sample_field))) for s in (halfway, end)]
        return drawn[0], drawn[1], jnp.mean(getattr(end, "mean_accept_prob", jnp.nan))


def _no_bridges(num_bridges, why):
    if num_bridges:
        raise ModelError(
            f"Exchange: `num_bridges` needs a kernel as `auxiliary`, for {why}. Leave it at 0."
        )
