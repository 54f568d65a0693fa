# SPDX-License-Identifier: Apache-2.0
r"""Fictitious data at the end of a Markov chain that starts at the data, and its warm-up.

A kernel is adapted over the warm-up of the exchange chain: every auxiliary chain goes on with the
step sizes that the one before has found, and after the warm-up they stay.

Reference: Liang, *A double Metropolis-Hastings sampler for spatial models with intractable
normalizing constants*, Journal of Statistical Computation and Simulation, 2010.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.infer.mcmc import MCMCKernel
from numpyro.primitives import Messenger

from numpyro_ebm._compat import GIBBS_SITES_KWARG
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.fixed import fixed
from numpyro_ebm.language.handlers import uncondition
from numpyro_ebm.language.sites import plates_of
from numpyro_ebm.mcmc.block_gibbs import BlockGibbs
from numpyro_ebm.mcmc.kernel_choice import kernel_for_rows
from numpyro_ebm.mcmc.sampling import name_of_kernel
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.posteriors.exchange.target import ExchangeTarget
from numpyro_ebm.types import Model, Params, SiteValues

__all__ = ["AuxiliaryReport", "AuxiliaryWarmup", "ChainSimulator"]

logger = logging.getLogger(__name__)


class AuxiliaryWarmup(NamedTuple):
    """How far the warm-up is.

    - **num_warmup** - steps of the exchange chain in it, an integer.
    - **i** - index of the present one.
    - **adapt_state** - what the auxiliary kernel adapts, as it left it; ``None`` if nothing.
    """

    num_warmup: int
    i: jax.Array
    adapt_state: Any


class AuxiliaryReport(NamedTuple):
    """What a simulation tells beside its data.

    - **accept_prob** - mean acceptance of the auxiliary chain; NaN if nothing is proposed.
    - **step_size** - the median of its step sizes; NaN if there are none.
    - **adapt_state** - what its kernel adapts; ``None`` if nothing.
    """

    accept_prob: jax.Array
    step_size: jax.Array
    adapt_state: Any


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

    :param build: a function from a model to a kernel; ``None`` for the one that
        :func:`~numpyro_ebm.mcmc.choose_kernel` takes.
    :param int num_steps: its steps.
    """

    is_exact = False

    def __init__(self, build: Callable[[Model], MCMCKernel] | None, num_steps: int):
        check_integer("Exchange", num_auxiliary_steps=num_steps)
        self.build, self.num_steps = build, num_steps

    def check(
        self, target: ExchangeTarget, z: SiteValues, num_bridges: int, num_warmup: int
    ) -> None:
        kernel, *_ = self._built(target, target.constrain(z))
        if self.build is None:
            logger.info("Exchange: %s draws the fictitious data", name_of_kernel(kernel))
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

        try:
            jax.eval_shape(
                lambda key: self._run(key, target, target.constrain(z), target.data, 1, num_warmup),
                default_key(),
            )
        except ModelError as error:
            raise ModelError(
                f"Exchange: {type(kernel).__name__} cannot draw fictitious data of "
                f"{sorted(target.data)}: {error} (Options of an auxiliary kernel are given by a "
                "function, `auxiliary=lambda model: MALA(model, step_size=0.1)`.)"
            ) from error

    def start(
        self, rng_key: jax.Array, target: ExchangeTarget, z: SiteValues, num_warmup: int
    ) -> Any:
        """What the kernel adapts, before it has; ``None`` if nothing."""
        args = (target, target.constrain(z), target.data)
        return _adapted(self._begin(rng_key, *args, self.num_steps * num_warmup)[1])

    def simulate(
        self,
        rng_key: jax.Array,
        target: ExchangeTarget,
        params: Params,
        values: SiteValues,
        warmup: AuxiliaryWarmup,
        keep_latent: bool = False,
    ) -> tuple[SiteValues, SiteValues, AuxiliaryReport]:
        *both, report = self._run(
            rng_key, target, params, values, self.num_steps, warmup.num_warmup, warmup
        )
        halfway, end = (
            {k: x for k, x in drawn.items() if keep_latent or k in target.row_model.visible}
            for drawn in both
        )
        return halfway, end, report

    def transition(
        self,
        rng_key: jax.Array,
        target: ExchangeTarget,
        params: Params,
        values: SiteValues,
        warmup: AuxiliaryWarmup,
    ) -> SiteValues:
        """One step of the kernel, which adapts nothing."""
        num_warmup = warmup.num_warmup
        warmup = warmup._replace(i=jnp.asarray(num_warmup))
        return self._run(rng_key, target, params, values, 1, num_warmup, warmup)[1]

    def _kernel(self, model, args, kwargs):
        if self.build is None:
            kernel = kernel_for_rows(model, read_fixed_model(model, args, kwargs))
            # Of its own order, latent sites first: they have no start of their own.
            return BlockGibbs(model) if isinstance(kernel, BlockGibbs | None) else kernel
        kernel = self.build(model)
        if not isinstance(kernel, MCMCKernel):
            raise ModelError(
                f"Exchange: `auxiliary(model)` returned {kernel!r}, not a NumPyro `MCMCKernel`. (A "
                "function of exact draws takes two arguments, `(rng_key, params)`.)"
            )
        return kernel

    def _built(self, target, params):
        """The kernel, its model and the arguments of that."""
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
        return self._kernel(auxiliary_model, args, kwargs), auxiliary_model, args, kwargs

    def _begin(self, rng_key, target, params, values, num_warmup):
        """The kernel, its state at the data, and the arguments of its model."""
        kernel, model, args, kwargs = self._built(target, params)
        row_model = read_fixed_model(model, args, kwargs)
        start = {
            name: x if row_model.sites[name].is_discrete else row_model.sites[name].transform.inv(x)
            for name, x in values.items()
        }
        return kernel, kernel.init(rng_key, num_warmup, start, args, kwargs), args, kwargs

    def _run(self, rng_key, target, params, values, num_steps, num_warmup, warmup=None):
        """Values half way and at the end, and the report."""
        key_init, _ = jax.random.split(rng_key)
        kernel, state, args, kwargs = self._begin(
            key_init, target, params, values, self.num_steps * num_warmup
        )
        if warmup is not None:  # after it, a chain begins where adaptation has ended
            i = jnp.minimum(warmup.i, num_warmup) * self.num_steps
            state = _resumed(state, i, warmup.adapt_state)

        def steps(state, num):
            return lax.fori_loop(0, num, lambda _, s: kernel.sample(s, args, kwargs), state)

        constrain = kernel.get_constrain_fn(args, kwargs)
        halfway = steps(state, num_steps // 2)
        end = steps(halfway, num_steps - num_steps // 2)
        drawn = [dict(constrain(getattr(s, kernel.sample_field))) for s in (halfway, end)]
        adapted = _adapted(end)
        report = AuxiliaryReport(
            jnp.mean(getattr(end, "mean_accept_prob", jnp.nan)), _step_size(adapted), adapted
        )
        return drawn[0], drawn[1], report


def _adapted(state):
    """What the state of a kernel, or of the blocks of a ``Gibbs``, holds of its warm-up."""
    if hasattr(state, "block_states"):
        return tuple(map(_adapted, state.block_states))
    return getattr(state, "adapt_state", None)


def _resumed(state, i, adapted):
    """The state of a kernel with what :func:`_adapted` has taken, at step i."""
    if hasattr(state, "block_states"):
        pairs = zip(state.block_states, adapted, strict=True)
        return state._replace(block_states=tuple(_resumed(s, i, x) for s, x in pairs))
    if adapted is None:
        return state
    return state._replace(i=i.astype(jnp.result_type(state.i)), adapt_state=adapted)


def _step_size(adapted):
    """The median of the step sizes in what a kernel, or the first block that has any, adapts."""
    if type(adapted) is tuple:
        found = [_step_size(x) for x in adapted if x is not None]
        return found[0] if found else jnp.asarray(jnp.nan)
    return jnp.median(jnp.asarray(getattr(adapted, "step_size", jnp.nan)))
