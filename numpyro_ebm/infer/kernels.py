# SPDX-License-Identifier: Apache-2.0
r"""Langevin kernels of BlackJAX as NumPyro ``MCMCKernel`` s for energy-based models.

Every row of the data plate is a chain of its own: accepting or rejecting all rows together, as a
kernel on the whole plate does, fails once there are more than a few. Rows share one step size and
one evaluation of the model. Unobserved discrete sites are summed out exactly, as NumPyro's HMC
does, unless another block of ``numpyro.infer.Gibbs`` draws them.
"""

import copy
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.step_size import dual_averaging_adaptation
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_uniform
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key, not_jax_tracer

from numpyro_ebm.errors import ModelError
from numpyro_ebm.joint import read_fixed
from numpyro_ebm.marginal import Enumerated
from numpyro_ebm.samplers import langevin
from numpyro_ebm.samplers.rows import per_row

__all__ = ["MALA", "ULA", "LangevinState", "StepSizeState"]


class StepSizeState(NamedTuple):
    """Step size of a kernel and its adaptation.

    - **step_size** - ε in use.
    - **dual_averaging** - state of BlackJAX's dual averaging.
    """

    step_size: jax.Array
    dual_averaging: object


class LangevinState(NamedTuple):
    """State of :class:`ULA` and :class:`MALA`; fields can be collected as ``extra_fields``.

    - **i** - step counter, warm-up included.
    - **z** - dict of unconstrained values of the continuous sites.
    - **potential_energy** - minus the log-density of every row in unconstrained space, (rows,).
    - **z_grad** - gradient of the potential energy, like ``z``.
    - **accept_prob** - acceptance probability of the last step, (rows,); 1 for ULA.
    - **mean_accept_prob** - its mean over rows and steps since the last phase began.
    - **diverging** - rows whose last proposal had no density worth a float, (rows,).
    - **adapt_state** - :class:`StepSizeState`.
    - **rng_key** - key of the next step.
    """

    i: jax.Array
    z: dict
    potential_energy: jax.Array
    z_grad: dict
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    diverging: jax.Array
    adapt_state: StepSizeState
    rng_key: jax.Array


class _Langevin(MCMCKernel):
    """What ULA and MALA share: NumPyro's protocol around a BlackJAX kernel."""

    sample_field = "z"

    def __init__(self, model, step_size, init_strategy):
        if step_size is not None and not step_size > 0:
            raise ModelError(
                f"{type(self).__name__}: `step_size` must be positive, got {step_size}."
            )
        self._model = model
        self._step_size = step_size
        self._init_strategy = init_strategy
        self._num_warmup = 0
        self._sample_fn = None  # looked at by `MCMC`: whether `init` has run

    @property
    def model(self):
        return self._model

    @property
    def default_fields(self):
        return ("z", "potential_energy", "accept_prob", "diverging")

    def get_diagnostics_str(self, state):
        return (
            f"step size {state.adapt_state.step_size:.2e}. acc. prob={state.mean_accept_prob:.2f}"
        )

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        self._num_warmup = num_warmup
        self._check_warmup(num_warmup)
        self._sample_fn = self._step

        def init_one(rng_key, init_params):
            return self._init(rng_key, init_params, model_args, model_kwargs)

        if not is_prng_key(rng_key):
            init_one = jax.vmap(init_one, (0, None if init_params is None else 0))
        # Compiled as a whole: operation by operation it takes seconds.
        state = jax.jit(init_one)(rng_key, init_params)
        bad = ~jnp.isfinite(state.potential_energy)
        if not_jax_tracer(bad) and np.any(bad):
            raise ModelError(
                f"{type(self).__name__}: the energy is not finite at the initial values of "
                f"{int(np.sum(bad))} of {bad.size} rows. Pass `init_params`, or an "
                "`init_strategy` such as `numpyro.infer.init_to_value(values=...)`."
            )
        return state

    def sample(self, state, model_args, model_kwargs):
        if is_prng_key(state.rng_key):
            return self._step(state, model_args, model_kwargs)
        return jax.vmap(lambda s: self._step(s, model_args, model_kwargs))(state)

    def refresh(self, state, model_args, model_kwargs):
        joint, one_row = self._target(model_args, model_kwargs)
        return self._cache(state, self._chains(joint, one_row, state.z), joint)

    def wrap_model(self, wrapper):
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        return kernel

    def get_constrain_fn(self, model_args, model_kwargs):
        joint = read_fixed(self._model, model_args, model_kwargs)
        return lambda z: joint.constrain(z)[0]

    def postprocess_fn(self, model_args, model_kwargs):
        joint = read_fixed(self._model, model_args, model_kwargs)
        if joint.latent:
            return lambda z: joint.constrain(z)[0]

        def constrain_and_replay(z):
            values, _ = joint.constrain(z)
            return {**values, **joint.deterministic({}, values)}

        return constrain_and_replay

    # Inside

    def _target(self, model_args, model_kwargs):
        joint = read_fixed(self._model, model_args, model_kwargs)
        if not joint.visible:
            raise ModelError(
                f"{type(self).__name__} moves continuous sites, and {sorted(joint.latent)} are "
                "discrete. Use `numpyro.infer.DiscreteGibbs`, or `numpyro_ebm.sample`."
            )
        marginal = None
        if joint.latent:
            marginal = Enumerated()
            try:
                marginal.check(joint, None, 1)
            except ModelError as error:
                raise ModelError(
                    f"{type(self).__name__} sums discrete sites out, and cannot here. Draw them "
                    "in a block of their own: `numpyro.infer.Gibbs([(MALA(model), "
                    f"{sorted(joint.visible)}), (DiscreteGibbs(model), {sorted(joint.latent)})])`."
                    f" ({error})"
                ) from None

        def log_density(rows):
            z = joint.from_rows(rows)
            if marginal is None:
                return joint.unconstrained_log_density({}, z, {})
            values, log_det = joint.constrain(z)
            return marginal.log_density(joint, {}, values) + log_det

        return joint, per_row(log_density)

    def _init(self, rng_key, init_params, model_args, model_kwargs):
        key_init, rng_key = jax.random.split(rng_key)
        joint, one_row = self._target(model_args, model_kwargs)
        z = self._initial_values(key_init, joint)
        if init_params is not None:
            unknown = sorted(set(init_params) - set(joint.visible) - set(joint.latent))
            if unknown:
                raise ModelError(f"`init_params` names {unknown}, which are not unobserved sites.")
            given = {k: jnp.asarray(x) for k, x in init_params.items() if k in joint.visible}
            if GIBBS_SITES_KWARG in (model_kwargs or {}):  # Gibbs hands over constrained values
                given = {k: joint.visible[k].transform.inv(x) for k, x in given.items()}
            z = {**z, **{k: x.astype(z[k].dtype) for k, x in given.items()}}
        step_size = jnp.asarray(0.1 if self._step_size is None else self._step_size, float)
        zeros = jnp.zeros(joint.num_rows)
        state = LangevinState(
            i=jnp.array(0),
            z=z,
            potential_energy=zeros,
            z_grad=z,
            accept_prob=zeros,
            mean_accept_prob=jnp.zeros(()),
            diverging=jnp.zeros(joint.num_rows, bool),
            adapt_state=StepSizeState(step_size, self._adaptation()[0](step_size)),
            rng_key=rng_key,
        )
        return self._cache(state, self._chains(joint, one_row, z), joint)

    def _initial_values(self, rng_key, joint):
        prepared = substitute(seed(joint.model, rng_key), substitute_fn=self._init_strategy)
        model_trace = trace(prepared).get_trace(*joint.args, **joint.kwargs)
        return {
            name: site.transform.inv(model_trace[name]["value"])
            for name, site in joint.visible.items()
        }

    def _chains(self, joint, one_row, z):
        return jax.vmap(lambda x: langevin.init(x, one_row))(joint.to_rows(z))

    def _cache(self, state, chains, joint):
        gradient = joint.from_rows(chains.logdensity_grad)
        return state._replace(
            z=joint.from_rows(chains.position),
            potential_energy=-chains.logdensity,
            z_grad=jax.tree.map(jnp.negative, gradient),
        )

    def _step(self, state, model_args, model_kwargs):
        joint, one_row = self._target(model_args, model_kwargs)
        rng_key, key_step = jax.random.split(state.rng_key)
        chains = self._algorithm_state(
            joint.to_rows(state.z),
            -state.potential_energy,
            joint.to_rows(jax.tree.map(jnp.negative, state.z_grad)),
        )
        keys = jax.random.split(key_step, joint.num_rows)
        kernel = jax.vmap(self._kernel, (0, 0, None, None))
        chains, info = kernel(keys, chains, one_row, state.adapt_state.step_size)
        accept_prob, diverging = self._read_info(info)
        i = state.i + 1
        since = jnp.where(state.i < self._num_warmup, i, i - self._num_warmup)
        mean = jnp.mean(accept_prob)
        state = self._cache(state, chains, joint)
        return state._replace(
            i=i,
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + (mean - state.mean_accept_prob) / since,
            diverging=diverging,
            adapt_state=self._adapt(i, state.adapt_state, mean),
            rng_key=rng_key,
        )

    def _adaptation(self):
        return dual_averaging_adaptation(0.5)

    def _adapt(self, i, adapt_state, accept_prob):
        return adapt_state


class MALA(_Langevin):
    r"""Metropolis-adjusted Langevin algorithm on the continuous sites of an energy-based model.

    .. math:: z' = z - ε ∇U(z) + \sqrt{2ε}\, ξ

    accepted or rejected row by row, so that every row is a chain with the right stationary law.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param float step_size: ε, in squared units of the unconstrained sites; the initial value where
        it is adapted.
    :param bool adapt_step_size: adapt ε in warm-up by dual averaging of the rows' mean acceptance.
    :param float target_accept_prob: the acceptance probability to adapt to; 0.574 is optimal for
        MALA in many dimensions.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: if ``step_size`` is not positive, or is missing where there is no warm-up;
        from ``init``, if the model has free parameters, no continuous site to move, discrete sites
        that cannot be summed out, or an energy that is not finite at the initial values.

    Runs under NumPyro's ``MCMC``, with all its chain methods, and as a block of ``Gibbs`` beside
    ``DiscreteGibbs``.

    Reference: Roberts, Tweedie 1996; Roberts, Rosenthal, *Optimal scaling of discrete
    approximations to Langevin diffusions*, 1998. The kernel is BlackJAX's.

    **Example**

    >>> import jax
    >>> import numpyro
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def gaussian():
    ...     with numpyro.plate("data", 500):
    ...         v = numpyro.sample("v", ebm.Lebesgue())
    ...         ebm.energy("E", 0.5 * (v - 1) ** 2)
    >>> mcmc = MCMC(
    ...     ebm.MALA(ebm.fixed(gaussian, {})), num_warmup=200, num_samples=100, progress_bar=False
    ... )
    >>> mcmc.run(jax.random.key(0))
    >>> bool(abs(mcmc.get_samples()["v"].mean() - 1) < 0.1)
    True
    """

    _algorithm_state = blackjax.mcmc.mala.MALAState

    def __init__(
        self,
        model,
        step_size=None,
        *,
        adapt_step_size=True,
        target_accept_prob=0.574,
        init_strategy=init_to_uniform,
    ):
        if not 0 < target_accept_prob < 1:
            raise ModelError(
                f"MALA: `target_accept_prob` must be between 0 and 1, got {target_accept_prob}."
            )
        self._adapt_step_size = adapt_step_size
        self._target_accept_prob = target_accept_prob
        self._kernel = blackjax.mala.build_kernel()
        super().__init__(model, step_size, init_strategy)

    def _check_warmup(self, num_warmup):
        if self._step_size is None and not (self._adapt_step_size and num_warmup > 0):
            raise ModelError(
                "MALA: without warm-up adaptation (`num_warmup` > 0 and `adapt_step_size=True`) "
                "pass a `step_size`."
            )

    def _read_info(self, info):
        return info.acceptance_rate, info.acceptance_rate == 0.0

    def _adaptation(self):
        return dual_averaging_adaptation(self._target_accept_prob)

    def _adapt(self, i, adapt_state, accept_prob):
        if not self._adapt_step_size:
            return adapt_state
        _, update, final = self._adaptation()
        new = update(adapt_state.dual_averaging, accept_prob)
        step_size = jnp.where(i < self._num_warmup, jnp.exp(new.log_step_size), final(new))
        return jax.tree.map(
            lambda x, y: jnp.where(i <= self._num_warmup, x, y),
            StepSizeState(step_size.astype(adapt_state.step_size.dtype), new),
            adapt_state,
        )


class ULA(_Langevin):
    r"""Unadjusted Langevin algorithm on the continuous sites of an energy-based model.

    .. math:: z' = z - ε ∇U(z) + \sqrt{2ε}\, ξ

    Every step is taken, so that its stationary law is off by O(ε): for a Gaussian of variance 1 the
    variance of the draws is 1/(1 - ε/2). It is stochastic gradient Langevin dynamics with the full
    gradient.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param float step_size: ε, in squared units of the unconstrained sites. There is no acceptance
        probability to adapt it to.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: as :class:`MALA`.

    Reference: Roberts, Tweedie 1996. The integrator is BlackJAX's.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> model = ebm.fixed(
    ...     ebm.models.grbm,
    ...     {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": jnp.zeros(4), "scale": jnp.ones(2)},
    ... )
    >>> kernel = ebm.ULA(model, step_size=0.01)
    """

    _algorithm_state = langevin.ULAState

    def __init__(self, model, step_size, *, init_strategy=init_to_uniform):
        if step_size is None:
            raise ModelError("ULA: pass a `step_size`; there is nothing to adapt it to.")
        self._kernel = langevin.build_kernel()
        super().__init__(model, step_size, init_strategy)

    def _check_warmup(self, num_warmup):
        pass

    def _read_info(self, info):
        return jnp.ones(info.is_divergent.shape), info.is_divergent
