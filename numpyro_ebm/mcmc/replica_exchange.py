# SPDX-License-Identifier: Apache-2.0
"""Replica exchange (parallel tempering) of a fixed energy-based model as an ``MCMCKernel``."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy.typing as npt
from numpyro.infer import init_to_uniform

from numpyro_ebm._compat import GIBBS_SITES_KWARG
from numpyro_ebm.errors import ModelError, field_or_item
from numpyro_ebm.language.temper import temper
from numpyro_ebm.mcmc.adaptation import running_mean
from numpyro_ebm.mcmc.adaptive_kernel import AdaptiveKernel
from numpyro_ebm.mcmc.replica_ladder import LadderAdaptation, LadderState, parse_ladder
from numpyro_ebm.model.plain_model import PlainModel
from numpyro_ebm.samplers import tempering
from numpyro_ebm.samplers.per_row import per_row
from numpyro_ebm.types import Model, SiteValues

__all__ = ["LadderState", "ReplicaExchange", "ReplicaExchangeState"]


class ReplicaExchangeState(NamedTuple):
    """State of :class:`ReplicaExchange`; fields can be collected as ``extra_fields``.

    What is (rows,) here is a scalar for a model without an energy statement.

    - **i** - step counter, warm-up included.
    - **z** - dict of unconstrained values of the continuous sites at β = 1.
    - **potential_energy, energy** - minus the log-density of every row at β = 1, (rows,).
    - **z_grad** - gradient of the potential energy, like ``z``.
    - **accept_prob** - acceptance probability of the last move at β = 1, (rows,).
    - **mean_accept_prob** - its mean over rows and steps since the last phase began.
    - **diverging** - rows whose last proposal at β = 1 had no density worth a float, (rows,).
    - **num_steps** - moves of a replica in a step, 1.
    - **replica_accept_prob** - mean acceptance probability over rows of every replica, (K,).
    - **swap_prob** - swap probability of every pair of neighbours in the last step, averaged over
      rows, (K - 1,), the coldest pair first.
    - **mean_swap_prob** - its mean over steps since the last phase began, (K - 1,).
    - **round_trips** - how often a replica came back to β = 1 from the hottest end, by row, since
      the last phase began, (rows,).
    - **adapt_state** - :class:`LadderState`.
    - **memory** - the replicas, and which of them have been at the hot end since they were cold.
    - **rng_key** - key of the next step.
    """

    i: jax.Array
    z: SiteValues
    potential_energy: jax.Array
    z_grad: SiteValues
    energy: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    diverging: jax.Array
    num_steps: jax.Array
    replica_accept_prob: jax.Array
    swap_prob: jax.Array
    mean_swap_prob: jax.Array
    round_trips: jax.Array
    adapt_state: LadderState
    memory: Any
    rng_key: jax.Array

    __getitem__ = field_or_item


class ReplicaExchange(AdaptiveKernel):
    r"""Replica exchange (parallel tempering) of an energy-based model.

    .. math:: p_β(z) \propto b(z)\, e^{-β E(z)}, \qquad 1 = β_1 > β_2 > … > β_K

    A step moves each replica at its own temperature, by MALA on the continuous sites or by a kernel
    that is given, then swaps neighbours,

    .. math:: α_k = \min\bigl\{1,\ e^{(β_k - β_{k+1})(E(z_k) - E(z_{k+1}))}\bigr\}

    the even pairs and the odd pairs by turns. Every row of the data plate is a ladder of its own
    and accepts and swaps on its own; all replicas of all rows share one evaluation of the model a
    step. The draws are those at β = 1. Hot replicas cross the barriers between modes, which no
    local kernel does, so that modes come out with their weights.

    The energies are tempered as :class:`~numpyro_ebm.temper` does, the base measures b are not.
    Where discrete sites are summed out, it is their sum that is raised to β,
    :math:`p_β ∝ b^{1-β} p^β` with b the sum without energies. Of an ordinary model the observed
    sites and the factors are tempered, and its priors are not.

    :param model: a model with fixed parameters, ``fixed(model, params)``; or any NumPyro model
        without an energy statement, of which it moves all latent sites in one chain.
    :param inverse_temperatures: the ladder β, decreasing from 1. By default ``num_replicas`` from 1
        to ``min_inverse_temperature``, evenly spaced in their logarithms.
    :param int num_replicas: K, if no ladder is given.
    :param float min_inverse_temperature: β_K, if no ladder is given. At this temperature MALA has
        to get across by itself. It must be positive where a base measure is flat and has no
        integral (``Lebesgue``); a proper base measure allows 0.
    :param float step_size: ε at β = 1, in squared units of the unconstrained sites, and ε/β
        elsewhere; the initial values where they are adapted.
    :param bool adapt_step_size: adapt the step size of every replica of every row in warm-up, by
        dual averaging of its acceptance.
    :param bool adapt_ladder: move the inner temperatures in warm-up so that all pairs swap equally
        often; the ends stay.
    :param float target_accept_prob: the acceptance probability of moves to adapt to.
    :param kernel: what moves the replicas in the place of MALA, a function from a model to a kernel
        that draws discrete sites: ``BlockGibbs``, ``SwendsenWang``, ``lambda model:
        DiscreteLangevin(model, step_size=0.5)``. It gets the model at the temperature of each
        replica, and adapts its own step sizes; the options of step sizes are not taken then.
    :param init_strategy: NumPyro initialisation strategy; each replica starts for itself.
    :raises ModelError: if the ladder is not decreasing from 1 within [0, 1] or has one replica,
        ``step_size`` is not positive, or missing where there is no warm-up; from ``init``, if β
        ends with 0 and a base measure has no integral, the kernel is a block of ``Gibbs``, or as
        :class:`~numpyro_ebm.MALA`.

    Look at ``mean_swap_prob`` (one rate a pair; somewhere near 0.5 to 0.8 is good, below 0.1 adds
    replicas) and ``round_trips`` of :class:`ReplicaExchangeState`: draws at β = 1 are only as
    independent as replicas make round trips. Memory and time grow with the number of replicas.

    .. note:: It cannot be a block of ``Gibbs``: its hot replicas depend on what they are
       conditioned on, and keep it when other blocks move. Discrete sites are summed out, unless a
       ``kernel`` draws them.

    Reference: Geyer, *Markov chain Monte Carlo maximum likelihood*, 1991; Syed, Bouchard-Côté,
    Deligiannidis, Doucet, *Non-reversible parallel tempering*, 2022.

    **Example**

    >>> import jax
    >>> import numpyro
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def two_modes():
    ...     with numpyro.plate("data", 50):
    ...         v = numpyro.sample("v", ebm.Lebesgue())
    ...         ebm.energy("E", 8 * (v**2 - 1) ** 2)
    >>> kernel = ebm.ReplicaExchange(ebm.fixed(two_modes, {}), num_replicas=4)
    >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=200, progress_bar=False)
    >>> mcmc.run(jax.random.key(0))
    >>> bool(abs((mcmc.get_samples()["v"] > 0).mean() - 0.5) < 0.05)
    True
    >>> mcmc.last_state.mean_swap_prob.shape
    (3,)
    """

    takes_any_model = True
    _for_discrete = "`ReplicaExchange(model, kernel=BlockGibbs)`, "

    _of_kernel: type["ReplicaExchange"]  # set where it is written, in `replicas_of_kernel`

    def __new__(cls, *args: Any, kernel: Any = None, **kwargs: Any) -> "ReplicaExchange":
        is_plain = kernel is None or cls is not ReplicaExchange
        unused = sorted({"step_size", "adapt_step_size", "target_accept_prob"} & kwargs.keys())
        if unused and not is_plain:
            raise ModelError(
                f"ReplicaExchange: {unused} belong to the steps of continuous sites. Give them to "
                "the kernel: `kernel=lambda model: DiscreteLangevin(model, step_size=0.5)`."
            )
        return object.__new__(cls if is_plain else ReplicaExchange._of_kernel)

    def __init__(
        self,
        model: Model,
        inverse_temperatures: npt.ArrayLike | None = None,
        *,
        num_replicas: int = 8,
        min_inverse_temperature: float = 0.05,
        step_size: float | None = None,
        adapt_step_size: bool = True,
        adapt_ladder: bool = True,
        target_accept_prob: float = 0.75,
        kernel: Callable[[Model], Any] | None = None,  # makes it one of `replicas_of_kernel`
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        self._ladder = parse_ladder(inverse_temperatures, num_replicas, min_inverse_temperature)
        self._adapt_ladder = adapt_ladder and len(self._ladder) > 2  # its ends stay
        super().__init__(model, step_size, init_strategy, adapt_step_size, target_accept_prob)

    def get_diagnostics_str(self, state: Any) -> str:
        rates = state.mean_swap_prob
        return (
            f"step size {jnp.median(state.adapt_state.step_size[0]):.2e}. "
            f"acc. prob={state.mean_accept_prob:.2f}. "
            f"swap rates {jnp.min(rates):.2f} to {jnp.max(rates):.2f}"
        )

    def refresh(
        self, state: Any, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ReplicaExchangeState:
        row_model, base, likelihood = self._target(model_args, model_kwargs)
        replicas, visited = state.memory
        replicas = _evaluate_replicas(replicas.position, base, likelihood)
        return state._replace(**_cached(replicas, visited, row_model))

    # Internal

    @property
    def _adaptation(self):
        return LadderAdaptation(
            self._num_warmup, self._tuner(), self._adapt_step_size, self._adapt_ladder
        )

    def _target(self, model_args, model_kwargs):
        """The row model, and the base and the tempered part of its row log-density."""
        row_model, log_density = self._read(self._model, model_args, model_kwargs)
        self._check_block(row_model, model_kwargs)
        hot = self._hot_model(row_model)
        if hot is not None:
            _, base = self._read(hot, model_args, model_kwargs)
            return row_model, per_row(base), per_row(lambda rows: log_density(rows) - base(rows))

        def terms(rows) -> tuple[Any, Any]:
            values, log_det = row_model.constrain(row_model.from_rows(rows))
            by_site = row_model.terms(values)
            energies = [x for name, x in by_site.items() if name in row_model.energies]
            others = [x for name, x in by_site.items() if name not in row_model.energies]
            return sum(others) + log_det, sum(energies)

        return row_model, per_row(lambda rows: terms(rows)[0]), per_row(lambda rows: terms(rows)[1])

    def _check_block(self, row_model, model_kwargs):
        """Raise if it is a block of ``Gibbs``, or nothing holds the replica at β = 0."""
        if GIBBS_SITES_KWARG in (model_kwargs or {}):
            raise ModelError(
                "ReplicaExchange cannot be a block of `Gibbs`: its hot replicas would keep what "
                "they were conditioned on when the other blocks move, and the law would be wrong. "
                "Run it on its own, where discrete sites are summed out; or use `MALA`, "
                "`UnderdampedLangevin` or `MCLMC` as the block."
            )
        flat = sorted(name for name, site in row_model.visible.items() if site.is_flat)
        if flat and self._ladder[-1] == 0:
            raise ModelError(
                f"ReplicaExchange: at an inverse temperature of 0 only the base measure is left, "
                f"and that of {flat} is flat and has no integral. End `inverse_temperatures` above "
                "0, or give the sites a proper base measure, `numpyro.sample(name, dist.Normal(0, "
                "10))`."
            )

    def _hot_model(self, row_model):
        """The model at β = 0; ``None`` where its terms tell the base and the rest apart."""
        if isinstance(row_model, PlainModel):
            return row_model.without_data(self._model)
        return temper(self._model, 0.0) if row_model.latent else None

    def _init(self, rng_key, init_params, model_args, model_kwargs):
        key_init, rng_key = jax.random.split(rng_key)
        row_model, base, likelihood = self._target(model_args, model_kwargs)
        num_replicas = len(self._ladder)

        def start(key):
            return row_model.to_rows(self._initial_values(key, row_model, init_params))

        positions = jax.vmap(start)(jax.random.split(key_init, num_replicas))
        replicas = _evaluate_replicas(positions, base, likelihood)
        pairs, rows = jnp.zeros(num_replicas - 1), jnp.zeros(row_model.rows_shape)
        visited = jnp.zeros((num_replicas, row_model.num_rows), bool)
        return ReplicaExchangeState(
            i=jnp.array(0),
            accept_prob=rows,
            mean_accept_prob=jnp.zeros(()),
            diverging=rows != 0,
            num_steps=jnp.array(1),
            replica_accept_prob=jnp.zeros(num_replicas),
            swap_prob=pairs,
            mean_swap_prob=pairs,
            round_trips=jnp.zeros(row_model.rows_shape, int),
            adapt_state=self._adaptation.init(
                self._ladder, self._initial_step_size(), row_model.num_rows
            ),
            rng_key=rng_key,
            **_cached(replicas, visited, row_model),
        )

    def _step(self, state, model_args, model_kwargs):
        row_model, base, likelihood = self._target(model_args, model_kwargs)
        ladder = state.adapt_state
        rng_key, key_move, key_swap = jax.random.split(state.rng_key, 3)
        replicas, visited = state.memory
        keys = jax.random.split(key_move, (len(self._ladder), row_model.num_rows))

        def move(key, replica, beta, step_size):
            return tempering.move(key, replica, base, likelihood, beta, step_size)

        # Rows inside, so that a replica of all rows is one evaluation of the plate.
        move = jax.vmap(jax.vmap(move, (0, 0, None, 0)))
        replicas, accept = move(keys, replicas, ladder.inverse_temperatures, ladder.step_size)

        def swap(key, replicas, visited):
            return tempering.swap(key, replicas, ladder.inverse_temperatures, state.i % 2, visited)

        swap = jax.vmap(swap, (0, 1, 1), (1, 1, 1, 1))
        keys = jax.random.split(key_swap, row_model.num_rows)
        replicas, visited, swap_prob, _ = swap(keys, replicas, visited)
        new_phase = (state.i == 0) | (state.i == self._num_warmup)
        shape = row_model.rows_shape
        cold_accept = jnp.reshape(accept[0], shape)
        trips = jnp.where(new_phase, 0, state.round_trips) + jnp.reshape(visited[0], shape)
        visited = visited.at[0].set(False).at[-1].set(True)
        replica_accept, swap_prob = jnp.mean(accept, 1), jnp.mean(swap_prob, 1)
        dtype = state.accept_prob.dtype
        running = partial(running_mean, i=state.i, num_warmup=self._num_warmup)
        return state._replace(
            **_cached(replicas, visited, row_model),
            i=state.i + 1,
            accept_prob=cold_accept.astype(dtype),
            mean_accept_prob=running(state.mean_accept_prob, replica_accept[0]),
            diverging=cold_accept == 0.0,
            replica_accept_prob=replica_accept.astype(dtype),
            swap_prob=swap_prob.astype(dtype),
            mean_swap_prob=running(state.mean_swap_prob, swap_prob),
            round_trips=trips.astype(state.round_trips.dtype),
            adapt_state=self._adaptation.update(state.i, ladder, accept, lambda: swap_prob),
            rng_key=rng_key,
        )


def _evaluate_replicas(positions, base, likelihood):
    """Replicas of all rows, (K, rows, ...)."""
    return jax.vmap(jax.vmap(lambda x: tempering.evaluate(x, base, likelihood)))(positions)


def _cached(replicas, visited, row_model) -> dict[str, Any]:
    """What the state holds of its replicas, by field."""
    cold = jax.tree.map(lambda x: x[0], replicas)
    gradient = jax.tree.map(lambda g, h: -g - h, cold.logprior_grad, cold.loglikelihood_grad)
    energy = -jnp.reshape(cold.logprior + cold.loglikelihood, row_model.rows_shape)
    return {
        "z": row_model.from_rows(cold.position),
        "potential_energy": energy,
        "z_grad": row_model.from_rows(gradient),
        "energy": energy,
        "memory": (replicas, visited),
    }
