# SPDX-License-Identifier: Apache-2.0
r"""Cluster moves of a fixed Ising or Potts model as a NumPyro ``MCMCKernel``.

.. math:: P(b_{ij} = 1 \mid x) = [x_i = x_j]\, (1 - e^{-J_{ij}}), \qquad
    P(x_C = a \mid b) \propto \exp \sum_{i \in C} h_i(a)

Reference: Swendsen, Wang, *Nonuniversal critical dynamics in Monte Carlo simulations*, Physical
Review Letters 1987.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import init_to_uniform

from numpyro_ebm.errors import ModelError, field_or_item
from numpyro_ebm.mcmc.adaptation import running_mean
from numpyro_ebm.mcmc.discrete_form import check_discrete, discrete_form
from numpyro_ebm.mcmc.row_kernel import RowKernel
from numpyro_ebm.mcmc.start import initial_values
from numpyro_ebm.model.finite_supports import support_values
from numpyro_ebm.program.potts import Potts, read_potts
from numpyro_ebm.samplers import swendsen_wang
from numpyro_ebm.types import Model, SiteValues

__all__ = ["SwendsenWang", "SwendsenWangState"]


class SwendsenWangState(NamedTuple):
    """State of :class:`SwendsenWang`; fields can be collected as ``extra_fields``.

    - **i** - step counter, warm-up included.
    - **z** - dict of the values of the discrete sites.
    - **potential_energy** - minus the log-density of every row, (rows,).
    - **accept_prob** - acceptance probability of the last step, (rows,): 1, unless couplings are
      traced and are not what they should be.
    - **mean_accept_prob** - its mean over rows and steps since the last phase began.
    - **num_clusters** - clusters in the last step, single units among them, (rows,).
    - **rng_key** - key of the next step.
    """

    i: jax.Array
    z: SiteValues
    potential_energy: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    num_clusters: jax.Array
    rng_key: jax.Array

    __getitem__ = field_or_item


class SwendsenWang(RowKernel):
    r"""Draw whole clusters of equal values of an Ising or Potts model (Swendsen-Wang).

    .. math:: \log p(x) = \sum_i h_i(x_i) + \sum_{i < j} J_{ij}\, [x_i = x_j] + \text{const}

    .. math:: P(b_{ij} = 1 \mid x) = [x_i = x_j]\, (1 - e^{-J_{ij}}), \qquad
        P(x_C = a \mid b) \propto \exp \sum_{i \in C} h_i(a)

    Every row of the data plate is a chain of its own. Pairs of units with equal values are bound at
    random, and each cluster C of bound units draws a new value for all of them. Any graph, any
    couplings :math:`J_{ij} ≥ 0`, any fields h; units with two values may have couplings of either
    sign, for which bonds of :math:`J_{ij} < 0` hold different values. Couplings and fields are read
    off the energy, however it is written: products of spins, comparisons, one-hot codes, tables.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param init_strategy: NumPyro initialisation strategy.
    :raises ModelError: from ``init``, if the model has free parameters, continuous sites, no
        discrete ones or one with infinitely many values; if the energy is not seen to be a sum of
        terms of one unit and of pairs, the term of a pair is not a multiple of [equal values]
        beside terms of one unit, or rewards different values of units with more than two; or if it
        is not finite at the initial values.

    Runs under NumPyro's ``MCMC``, with all its chain methods, as a block of ``Gibbs``, and as the
    auxiliary chain of :class:`~numpyro_ebm.Exchange` (its steps are reversible). Prefer it to
    :class:`~numpyro_ebm.BlockGibbs` near critical points and at low temperatures, where units that
    are drawn one by one are held by their neighbours; strong fields hold clusters, and cycles of
    couplings that cannot all be satisfied (spin glasses) make them useless.

    .. note:: Where couplings are not known when the program is read (parameters that are traced by
       ``jax.jit``, as in ``Exchange``), their signs and tables cannot be looked at. What the energy
       has beside couplings and fields is then left to a Metropolis test, which keeps the law of the
       model; ``accept_prob`` falls below 1 where there is anything of this kind.

    Reference: Swendsen, Wang, *Nonuniversal critical dynamics in Monte Carlo simulations*, 1987;
    Edwards, Sokal, *Generalization of the Fortuin-Kasteleyn-Swendsen-Wang representation and Monte
    Carlo algorithm*, 1988.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def ising(num_rows=1):
    ...     with numpyro.plate("data", num_rows):
    ...         s = 2 * numpyro.sample("s", ebm.Counting(2, (6, 6))) - 1
    ...         bonds = s * jnp.roll(s, 1, -1) + s * jnp.roll(s, 1, -2)
    ...         ebm.energy("E", -0.44 * jnp.sum(bonds, (-1, -2)))
    >>> kernel = ebm.SwendsenWang(ebm.fixed(ising, {}))
    >>> mcmc = MCMC(kernel, num_warmup=10, num_samples=20, progress_bar=False)
    >>> mcmc.run(jax.random.key(0), num_rows=7, extra_fields=["num_clusters"])
    >>> mcmc.get_samples()["s"].shape, mcmc.get_extra_fields()["num_clusters"].shape
    ((20, 7, 6, 6), (20, 7))
    """

    is_reversible = True
    moves_discrete = True
    _draw_start = staticmethod(initial_values)

    def __init__(self, model: Model, *, init_strategy: Callable[..., Any] = init_to_uniform):
        self._read_forms: dict[Any, Potts] = {}
        super().__init__(model, init_strategy)

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "potential_energy", "accept_prob")

    def get_diagnostics_str(self, state: Any) -> str:
        return f"acc. prob={state.mean_accept_prob:.2f}"

    def refresh(
        self, state: Any, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> SwendsenWangState:
        row_model, log_density = self._read(self._model, model_args, model_kwargs)
        return state._replace(potential_energy=-log_density(row_model.to_rows(state.z)))

    # Internal

    def _check_energy(self, state, model_args, model_kwargs):
        if not np.all(np.isfinite(np.asarray(state.potential_energy))):
            super()._check_energy(state, model_args, model_kwargs)

    def _read(self, model, model_args, model_kwargs):
        row_model = self._read_model(model, model_args, model_kwargs)
        return row_model, check_discrete(row_model, self._name)

    def _potts(self, row_model):
        values = {name: support_values(site, self._name) for name, site in row_model.latent.items()}
        form = discrete_form(row_model, values, in_pairs=True)
        if form is None:
            raise ModelError(
                f"{self._name}: the energy of {sorted(values)} is not seen to be a sum of terms of "
                "one unit and of pairs of units: an operation mixes more of them, or is none of a "
                "polynomial (`max`, a branch, a sort, an infinite value). Use `BlockGibbs` or "
                "`DiscreteLangevin`, which take any energy."
            )
        if not form.is_known:
            return read_potts(form)
        if form.signature not in self._read_forms:
            self._read_forms = {form.signature: read_potts(form)}
        return self._read_forms[form.signature]

    def _init(self, rng_key, init_params, model_args, model_kwargs):
        key_init, rng_key = jax.random.split(rng_key)
        row_model, log_density = self._read(self._model, model_args, model_kwargs)
        self._potts(row_model)  # refuse before anything is drawn
        z = self._initial_values(key_init, row_model, init_params)
        energy = -log_density(row_model.to_rows(z))
        ones = jnp.ones_like(energy)
        clusters = jnp.zeros(energy.shape, int)
        return SwendsenWangState(jnp.array(0), z, energy, ones, jnp.ones(()), clusters, rng_key)

    def _step(self, state, model_args, model_kwargs):
        row_model, log_density = self._read(self._model, model_args, model_kwargs)
        rng_key, key_step = jax.random.split(state.rng_key)
        chains = swendsen_wang.init(row_model.to_rows(state.z), lambda _: -state.potential_energy)
        chains, info = swendsen_wang.build_kernel()(
            key_step, chains, log_density, self._potts(row_model)
        )
        mean = jnp.mean(info.acceptance_rate)
        return SwendsenWangState(
            i=state.i + 1,
            z=row_model.from_rows(chains.position),
            potential_energy=-chains.logdensity,
            accept_prob=info.acceptance_rate,
            mean_accept_prob=running_mean(state.mean_accept_prob, mean, state.i, self._num_warmup),
            num_clusters=info.num_clusters,
            rng_key=rng_key,
        )
