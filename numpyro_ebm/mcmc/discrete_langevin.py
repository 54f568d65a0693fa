# SPDX-License-Identifier: Apache-2.0
r"""Discrete Langevin proposals on a fixed energy-based model as a NumPyro ``MCMCKernel``.

.. math:: q_i(x_i' \mid x) \propto
    \exp\Big(\tfrac12 ∂_i \log p(x)\, (x_i' - x_i) - \frac{(x_i' - x_i)^2}{2α}\Big)

All units of a row are proposed at once from one gradient of the energy, and the row is accepted or
rejected.

Reference: Zhang, Liu, Liu, *A Langevin-like sampler for discrete distributions*, ICML 2022.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import init_to_uniform

from numpyro_ebm._compat import is_prng_key, not_jax_tracer
from numpyro_ebm.errors import ModelError, field_or_item
from numpyro_ebm.mcmc.adaptation import Adaptation, AdaptState, running_mean
from numpyro_ebm.mcmc.adaptive_kernel import AdaptiveKernel
from numpyro_ebm.mcmc.discrete_form import check_discrete, discrete_form
from numpyro_ebm.mcmc.discrete_gradient import sites_without_gradient
from numpyro_ebm.mcmc.start import initial_values
from numpyro_ebm.model.finite_supports import support_values
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.samplers import discrete_langevin
from numpyro_ebm.types import LogDensity, Model, SiteValues

__all__ = ["DiscreteLangevin", "DiscreteLangevinState"]


class DiscreteLangevinState(NamedTuple):
    """State of :class:`DiscreteLangevin`; fields can be collected as ``extra_fields``.

    - **i** - step counter, warm-up included.
    - **z** - dict of the values of the discrete sites.
    - **potential_energy** - minus the log-density of every row, (rows,).
    - **differences** - changes of the log-density to first order, (K, rows, coordinates).
    - **accept_prob** - acceptance probability of the last step, (rows,); 1 without the test.
    - **mean_accept_prob** - its mean over rows and steps since the last phase began.
    - **diverging** - rows whose last proposal had no finite density, (rows,).
    - **adapt_state** - :class:`~numpyro_ebm.mcmc.adaptation.AdaptState`.
    - **rng_key** - key of the next step.
    """

    i: jax.Array
    z: SiteValues
    potential_energy: jax.Array
    differences: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    diverging: jax.Array
    adapt_state: AdaptState
    rng_key: jax.Array

    __getitem__ = field_or_item


class DiscreteLangevin(AdaptiveKernel):
    r"""Metropolis-adjusted discrete Langevin sampling (DMALA) of the finite discrete sites.

    .. math:: q_i(x_i' \mid x) \propto
        \exp\Big(\tfrac12 ∂_i \log p(x)\, (x_i' - x_i) - \frac{(x_i' - x_i)^2}{2α}\Big)

    for all units at once, accepted or rejected row by row, so that every row is a chain with the
    right stationary law. For a binary unit it is a flip with probability
    :math:`σ(\tfrac12 Δ - 1 / 2α)`.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param float step_size: α, in squared units of the values; the initial value where it is
        adapted.
    :param bool adjusted: make the Metropolis-Hastings test. Without it (DULA) every proposal is
        taken, and the stationary law is biased: see the note.
    :param bool adapt_step_size: adapt α in warm-up by dual averaging of the acceptance of each row.
        Where units hardly interact acceptance stays above the target however large α is; it is
        kept at most at the squared range of the values (with exact differences, at 1), or at
        ``step_size`` if that is larger.
    :param float target_accept_prob: the acceptance probability to adapt to.
    :param str differences: ``"gradient"`` takes the energy's gradient, one evaluation a step, for
        binary and ordinal units; ``"exact"`` prices any change of value alike,
        :math:`1 / 2α`, for nominal units and for energies that have no gradient. It takes a
        gradient as well where the energy is a sum of products of tables of single units, as for
        :class:`~numpyro_ebm.PseudoLikelihood`, and else D (K - 1) evaluations, in batches.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: if an option is out of its range, or ``step_size`` is missing where there is
        no warm-up; from ``init``, if the model has free parameters, continuous sites, no discrete
        ones or one with infinitely many values, an energy that has no gradient in a discrete site
        (it indexes a table with it, or compares it), or one that is not finite at the initial
        values.

    Runs under NumPyro's ``MCMC``, with all its chain methods, and as a block of ``Gibbs`` beside
    :class:`~numpyro_ebm.MALA` or ``NUTS``. Prefer :class:`~numpyro_ebm.BlockGibbs` where it draws
    many units at once (``BlockGibbs(model).plan()``): its draws are exact conditionals. This kernel
    is for many units that all interact.

    .. note:: The model is evaluated at floats of integer value, and its gradient is trusted with
       the proposals only: the test makes the law exact for every energy. Without the test (DULA)
       the bias vanishes with α for quadratic energies, and not otherwise; even for independent
       bits of log-odds g the odds at a finite α are :math:`e^g (1 + e^{-g/2-1/2α}) / (1 +
       e^{g/2-1/2α})`.

    Reference: Zhang, Liu, Liu, *A Langevin-like sampler for discrete distributions*, ICML 2022.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def magnet(num_rows=200):
    ...     with numpyro.plate("data", num_rows):
    ...         s = numpyro.sample("s", ebm.Counting(2, (10,)))
    ...         ebm.energy("E", 0.1 * (jnp.sum(s, -1) - 3.0) ** 2)
    >>> kernel = ebm.DiscreteLangevin(ebm.fixed(magnet, {}))
    >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=100, progress_bar=False)
    >>> mcmc.run(jax.random.key(0))
    >>> mcmc.get_samples()["s"].shape
    (100, 200, 10)
    """

    moves_discrete = True
    _draw_start = staticmethod(initial_values)
    default_step_size = 0.2  # the paper's

    def __init__(
        self,
        model: Model,
        step_size: float | None = None,
        *,
        adjusted: bool = True,
        adapt_step_size: bool = True,
        target_accept_prob: float = 0.574,
        differences: Literal["gradient", "exact"] = "gradient",
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        if differences not in ("gradient", "exact"):
            raise ModelError(
                f'{self._name}: `differences` must be "gradient" or "exact", got {differences!r}.'
            )
        if not adjusted and step_size is None:
            raise ModelError(
                f"{self._name}: without the test (`adjusted=False`) pass a `step_size`; there is "
                "no acceptance to adapt it to."
            )
        self.leaves_invariant = self.is_reversible = adjusted
        self._differences: Literal["gradient", "exact"] = differences
        adapt_step_size = adapt_step_size and bool(adjusted)
        super().__init__(model, step_size, init_strategy, adapt_step_size, target_accept_prob)

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "potential_energy", "accept_prob", "diverging")

    def init(
        self,
        rng_key: jax.Array,
        num_warmup: int,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> Any:
        state = super().init(rng_key, num_warmup, init_params, model_args, model_kwargs)
        if self._differences == "gradient" and not_jax_tracer(state.potential_energy):
            self._check_gradient(rng_key, state, model_args, model_kwargs)
        return state

    def refresh(
        self,
        state: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> DiscreteLangevinState:
        row_model, log_density, values = self._target(model_args, model_kwargs)
        chains = self._evaluate(row_model, log_density, values, state.z)
        return self._cache(state, chains, row_model)

    # Internal

    def _check_energy(self, state, model_args, model_kwargs):
        if not np.all(np.isfinite(np.asarray(state.potential_energy))):
            super()._check_energy(state, model_args, model_kwargs)

    def _read(self, model, model_args, model_kwargs) -> tuple[RowModel, LogDensity]:
        row_model = self._read_model(model, model_args, model_kwargs)
        return row_model, check_discrete(row_model, self._name)

    def _target(self, model_args, model_kwargs):
        row_model, log_density = self._read(self._model, model_args, model_kwargs)
        values = {name: support_values(site, self._name) for name, site in row_model.latent.items()}
        return row_model, log_density, values

    @property
    def _adaptation(self):
        return Adaptation(self._num_warmup, self._tuner(), self._adapt_step_size)

    def _init(self, rng_key, init_params, model_args, model_kwargs):
        key_init, rng_key = jax.random.split(rng_key)
        row_model, log_density, values = self._target(model_args, model_kwargs)
        z = self._initial_values(key_init, row_model, init_params)
        chains = self._evaluate(row_model, log_density, values, z)
        zeros = jnp.zeros(row_model.num_rows)
        state = DiscreteLangevinState(
            i=jnp.array(0),
            z=z,
            potential_energy=-chains.logdensity,
            differences=chains.differences,
            accept_prob=zeros,
            mean_accept_prob=jnp.zeros(()),
            diverging=jnp.zeros(row_model.num_rows, bool),
            adapt_state=self._adaptation.init(
                self._initial_step_size(), row_model.num_rows, 0, False, None
            ),
            rng_key=rng_key,
        )
        return self._cache(state, chains, row_model)

    def _evaluate(self, row_model, log_density, values, z):
        rows = row_model.to_rows(z)
        if self._differences == "exact":
            form = discrete_form(row_model, values)
            return discrete_langevin.init(rows, log_density, values, "exact", form)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "error", DeprecationWarning
                )  # of JAX, for a one-hot of floats
                return discrete_langevin.init(rows, log_density, values)
        except (TypeError, DeprecationWarning) as error:
            raise self._no_gradient(sorted(row_model.latent), error) from error

    def _no_gradient(self, names, error=None):
        because = "" if error is None else f" ({error})"
        return ModelError(
            f"{self._name}: the energy has no gradient in {names}: it indexes with the values, or "
            "compares them, instead of calculating with them. Use `numpyro_ebm.BlockGibbs` or "
            "`numpyro.infer.DiscreteGibbs`, which evaluate the energy at integers, or "
            f'`{self._name}(model, differences="exact")`.{because}'
        )

    def _check_gradient(self, rng_key, state, model_args, model_kwargs):
        row_model, _, values = self._target(model_args, model_kwargs)
        z = state.z
        while not is_prng_key(rng_key):  # one of the vectorised chains will do
            rng_key, z = rng_key[0], {name: x[0] for name, x in z.items()}
        broken = sites_without_gradient(rng_key, row_model, z, values)
        if broken:
            raise self._no_gradient(broken)

    def _cache(self, state, chains, row_model):
        return state._replace(
            z=row_model.from_rows(chains.position),
            potential_energy=-chains.logdensity,
            differences=chains.differences,
        )

    def _step(self, state, model_args, model_kwargs):
        row_model, log_density, values = self._target(model_args, model_kwargs)
        rng_key, key_step = jax.random.split(state.rng_key)
        chains = discrete_langevin.DiscreteLangevinChainState(
            row_model.to_rows(state.z), -state.potential_energy, state.differences
        )
        form = discrete_form(row_model, values) if self._differences == "exact" else None
        kernel = discrete_langevin.build_kernel(self.is_reversible, self._differences)
        chains, info = kernel(
            key_step, chains, log_density, state.adapt_state.step_size, values, form
        )
        mean = jnp.mean(info.acceptance_rate)
        adapt_state = self._adaptation.update(state.i, state.adapt_state, info.acceptance_rate)
        if self._adapt_step_size:
            # Where acceptance stays above its target whatever the step, longer ones only come
            # nearer to an independence sampler, which rarely leaves states of high density.
            exact = self._differences == "exact"
            largest = max(1.0 if exact else np.ptp(x) ** 2 for x in values.values())
            largest = jnp.maximum(largest, self._initial_step_size())
            step_size = jnp.minimum(adapt_state.step_size, largest)
            adapt_state = adapt_state._replace(step_size=step_size)
        return self._cache(state, chains, row_model)._replace(
            i=state.i + 1,
            accept_prob=info.acceptance_rate,
            mean_accept_prob=running_mean(state.mean_accept_prob, mean, state.i, self._num_warmup),
            diverging=info.is_divergent,
            adapt_state=adapt_state,
            rng_key=rng_key,
        )
