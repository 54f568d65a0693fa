# SPDX-License-Identifier: Apache-2.0
r"""The exchange algorithm as a NumPyro ``MCMCKernel``: posteriors of an energy's parameters.

.. math:: \log α = \log\frac{π(θ')}{π(θ)} + \log\frac{\tilde p(x; θ')}{\tilde p(x; θ)}
    + \log\frac{\tilde p(y; θ)}{\tilde p(y; θ')} + \log\frac{q(θ \mid θ')}{q(θ' \mid θ)},
    \qquad y \sim p(\cdot \mid θ')

Reference: Murray, Ghahramani, MacKay, *MCMC for doubly-intractable distributions*, UAI 2006.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import init_to_uniform
from numpyro.infer.util import constrain_fn

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.inputs import as_arrays
from numpyro_ebm.mcmc.adaptive_kernel import AdaptiveKernel
from numpyro_ebm.posteriors.exchange.auxiliary import make_auxiliary
from numpyro_ebm.posteriors.exchange.chain import (
    AuxiliaryTrace,
    ExchangeState,
    refresh_chain,
    start_chain,
    step_chain,
)
from numpyro_ebm.posteriors.exchange.start import check_start, initial_parameters
from numpyro_ebm.posteriors.exchange.target import ExchangeTarget, complete_prior
from numpyro_ebm.posteriors.exchange.warmup import ExchangeAdaptation
from numpyro_ebm.types import Model, SiteValues

__all__ = ["AuxiliaryTrace", "Exchange", "ExchangeState"]


class Exchange(AdaptiveKernel):
    r"""The exchange algorithm: the posterior of parameters whose normalizer is unknown.

    .. math:: \log α = \log\frac{π(θ')}{π(θ)} + \log\frac{\tilde p(x; θ')}{\tilde p(x; θ)}
        + \log\frac{\tilde p(y; θ)}{\tilde p(y; θ')} + \log\frac{q(θ \mid θ')}{q(θ' \mid θ)},
        \qquad y \sim p(\cdot \mid θ')

    A proposal θ' comes with one fictitious data set y of the shape and the covariates of the data,
    and Z(θ) and Z(θ') cancel. With exact draws of y the chain has the exact posterior; with y at
    the end of a Markov chain (*double Metropolis-Hastings*) it has an approximation that becomes
    exact as ``num_auxiliary_steps`` grows: ask :func:`~numpyro_ebm.auxiliary_adequacy` whether
    they are enough.

    :param model: a model whose parameters have proper priors, sample sites outside the data plate.
        ``numpyro.param`` sites are held by ``numpyro.handlers.substitute(model, data=...)``.
    :param auxiliary: what draws the fictitious data:

        - a kernel class, ``BlockGibbs``, or a function of *one* argument from a model to a kernel,
          ``lambda model: MALA(model, step_size=0.1)``; its chains start at the data and take
          ``num_auxiliary_steps`` steps. The kernel must leave the model's law invariant. What it
          adapts, it adapts over the warm-up of this one, from the step size given; with
          ``adapt_step_size=False``, or without a warm-up, that stays.
        - ``"enumerate"``: exact draws of discrete rows, by weighing all their states.
        - a function of *two* arguments ``(rng_key, params)`` that returns exact draws, a dict of
          arrays of the shapes of the data by site name; ``params`` are the parameters that this
          kernel moves.
        - by default the kernel that :func:`~numpyro_ebm.mcmc.choose_kernel` takes for the model,
          and ``BlockGibbs`` where that would enumerate; the logger
          ``numpyro_ebm.posteriors.exchange.auxiliary_chain`` at level INFO says which.
    :param int num_auxiliary_steps: steps of an auxiliary chain.
    :param str proposal: ``"random_walk"``, Gaussian in unconstrained coordinates, or
        ``"langevin"``, see the note.
    :param int num_bridges: K intermediate distributions that y crosses on its way from θ' to θ,
        along a straight line in unconstrained coordinates, by one reversible step of the auxiliary
        kernel at each: ``MALA``, ``DiscreteLangevin`` or ``BlockGibbs(model, reversible=True)``.
        They raise the acceptance of long moves.
    :param bool by_row: every row of the data plate has parameters of its own (their leading axis is
        the rows, as in a hierarchical model of several lattices), and accepts or rejects on its
        own. It is checked that no row's density depends on another's parameters; what they share
        belongs in another block of ``Gibbs``.
    :param float step_size: of the proposal, in units of its covariance's root; the initial value
        where it is adapted.
    :param bool adapt_step_size: adapt it in warm-up to the acceptance, by stochastic approximation.
    :param bool adapt_covariance: adapt the covariance of the proposal in warm-up.
    :param float target_accept_prob: the acceptance to adapt to; by default 0.44 for one parameter
        down to 0.234 for many, and 0.4 for Langevin proposals.
    :param int num_references: data sets of the Langevin proposal's surrogate; by default as many
        as make 256 rows, at most 128, or a quarter of the warm-up.
    :param int max_states: the most states of a row for ``"enumerate"``.
    :param init_strategy: NumPyro initialisation strategy of the parameters.
    :raises ModelError: if an option is out of its range; from ``init``, if no parameter has a
        prior, or one is improper or discrete, a ``param`` site has no value, the data plate
        subsamples itself, latent sites cannot be summed out, the auxiliary kernel does not fit the
        visible sites, or a density is not finite at the initial parameters.

    Discrete latent sites are summed out of the ratio, and drawn along by an auxiliary kernel.
    Runs under NumPyro's ``MCMC``, with all its chain methods, and as a block of ``Gibbs``; with
    :func:`~numpyro_ebm.given` beside ``NUTS``, which draws what does not reach the energy.

    .. note:: The **Langevin proposal** is exactly valid. In warm-up K data sets :math:`u_k` are
       drawn at :math:`\hat θ`, the mean of what a random walk has seen by then, and frozen. From
       them

       .. math:: \log\frac{Z(θ)}{Z(\hat θ)} ≈
           N \log\Big(\frac{1}{N K} \sum_{k, n} \frac{\tilde p(u_{kn}; θ)}
           {\tilde p(u_{kn}; \hat θ)}\Big)

       is a deterministic function of θ. Its gradient shapes the proposal and nothing else, and the
       ratio of proposals corrects for it, at K + 1 evaluations of the model a step. The noise of
       the fictitious data in the ratio grows with the length of a move, and holds long ones back
       whatever their direction: alone the drift is no better than a random walk, and it pays
       together with bridges, which take that noise off.

    .. note:: ``potential_energy`` would lack log Z(θ), and is not among the fields.

    Reference: Murray, Ghahramani, MacKay, *MCMC for doubly-intractable distributions*, UAI 2006;
    Liang, *A double Metropolis-Hastings sampler for spatial models with intractable normalizing
    constants*, 2010.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> import numpyro.distributions as dist
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def model(data):
    ...     precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> def normal_rows(rng_key, params):
    ...     return {"v": jax.random.normal(rng_key, (100,)) / jnp.sqrt(params["precision"])}
    >>> kernel = ebm.Exchange(model, normal_rows)
    >>> mcmc = MCMC(kernel, num_warmup=500, num_samples=2_000, progress_bar=False)
    >>> data = jax.random.normal(jax.random.key(0), (100,)) / 2.0
    >>> mcmc.run(jax.random.key(1), data)
    >>> exact = (2 + 50) / (1 + 0.5 * jnp.sum(data**2))  # mean of a Gamma
    >>> bool(abs(mcmc.get_samples()["precision"].mean() - exact) < 0.15)
    True
    """

    posterior_kind = "exchange"  # for `to_arviz`

    def __init__(
        self,
        model: Model,
        auxiliary: Literal["enumerate"] | Callable[..., Any] | None = None,
        num_auxiliary_steps: int = 100,
        *,
        proposal: Literal["random_walk", "langevin"] = "random_walk",
        num_bridges: int = 0,
        by_row: bool = False,
        step_size: float | None = None,
        adapt_step_size: bool = True,
        adapt_covariance: bool = True,
        target_accept_prob: float | None = None,
        num_references: int | None = None,
        max_states: int = 65_536,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        if proposal not in ("random_walk", "langevin"):
            raise ModelError(
                f'Exchange: `proposal` must be "random_walk" or "langevin", got {proposal!r}.'
            )
        check_integer("Exchange", 0, num_bridges=num_bridges)
        if num_references is not None:
            check_integer("Exchange", num_references=num_references)
        numbers = {"num_auxiliary_steps": num_auxiliary_steps, "max_states": max_states}
        check_integer("Exchange", **numbers)
        self._auxiliary = make_auxiliary(auxiliary, num_auxiliary_steps, max_states)
        self._is_langevin = proposal == "langevin"
        self._num_bridges = num_bridges
        self._by_row = by_row
        self._adapt_covariance = adapt_covariance
        self._num_references = num_references
        super().__init__(model, step_size, init_strategy, adapt_step_size, target_accept_prob)
        self._is_watched = False  # its chain is one of parameters, and not of rows

    @property
    def leaves_invariant(self) -> bool:
        return self._auxiliary.is_exact

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "accept_prob", "diverging", "auxiliary")

    def refresh(
        self, state: Any, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ExchangeState:
        return refresh_chain(state, self._target(model_args, model_kwargs))

    def get_constrain_fn(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Callable[..., SiteValues]:
        model_args, model_kwargs = as_arrays(model_args, model_kwargs)
        # `Gibbs` calls it without the sites of other blocks, which have placeholders here.
        model, kwargs = complete_prior(self._model, model_args, model_kwargs), model_kwargs
        return lambda z: constrain_fn(model, model_args, kwargs, z)

    def postprocess_fn(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Callable[..., SiteValues]:
        model_args, model_kwargs = as_arrays(model_args, model_kwargs)
        prior, kwargs = self._target(model_args, model_kwargs).prior, model_kwargs
        return lambda z: constrain_fn(prior, model_args, kwargs, z, return_deterministic=True)

    def get_diagnostics_str(self, state: Any) -> str:
        trace = state.auxiliary
        shown = super().get_diagnostics_str(state)
        moved = [
            f"{what} {jnp.mean(x):.2g}"
            for what, x in (("step size", trace.step_size), ("acc. prob", trace.accept_prob))
            if not jnp.any(jnp.isnan(x))
        ]
        return f"{shown} (auxiliary: {', '.join(moved)})" if moved else shown

    # Internal

    def _target(self, model_args, model_kwargs):
        return ExchangeTarget(self._model, model_args, model_kwargs, self._by_row)

    def _check_warmup(self):
        super()._check_warmup()
        least = 40 if self._num_references is None else 4 * (self._num_references + 1)
        if self._is_langevin and self._num_warmup < least:
            raise ModelError(
                f'Exchange(proposal="langevin") draws its references in a quarter of the warm-up: '
                f"`num_warmup` must be at least {least}, got {self._num_warmup}."
            )

    def _num_of_references(self, target):
        if not self._is_langevin:
            return 0
        if self._num_references is not None:
            return self._num_references
        rows = 4 if self._by_row or target.row_model.covariates else target.row_model.num_rows
        return int(np.clip(-(-256 // rows), 1, min(128, self._num_warmup // 4 - 1)))

    def _adaptation(self, target, z):
        dimension = sum(jnp.size(x) for x in z.values()) // target.num_groups
        accept, step_size = self._target_accept_prob, self._step_size
        if self._is_langevin:
            accept = 0.4 if accept is None else accept
            step_size = 1.0 if step_size is None else step_size
        else:
            accept = 0.234 + 0.206 / dimension if accept is None else accept
            step_size = 2.38 / dimension**0.5 if step_size is None else step_size
        return ExchangeAdaptation(
            self._num_warmup,
            self._num_of_references(target),
            accept,
            self._adapt_step_size,
            self._adapt_covariance,
            step_size,
        )

    def _init(self, rng_key, init_params, model_args, model_kwargs):
        key_init, rng_key = jax.random.split(rng_key)
        target = self._target(model_args, model_kwargs)
        z = initial_parameters(key_init, target, self._init_strategy, init_params)
        self._auxiliary.check(target, z, self._num_bridges, self._num_warmup)
        adaptation, num = self._adaptation(target, z), self._num_of_references(target)
        return start_chain(rng_key, z, target, adaptation, self._auxiliary, num)

    def _step(self, state, model_args, model_kwargs):
        target = self._target(model_args, model_kwargs)
        adaptation = self._adaptation(target, state.z)
        return step_chain(state, target, adaptation, self._auxiliary, self._num_bridges)

    def _check_energy(self, state, model_args, model_kwargs):
        check_start(state, self._target(model_args, model_kwargs))
