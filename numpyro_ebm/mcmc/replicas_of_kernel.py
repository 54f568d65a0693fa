# SPDX-License-Identifier: Apache-2.0
r"""Replica exchange over another kernel: discrete sites, and whatever else it moves.

Each replica is moved by a kernel of the model at its own temperature, ``kernel(temper(model, β))``;
swaps and the ladder are those of :class:`~numpyro_ebm.ReplicaExchange`, which makes this class
where it is given a kernel.

Reference: Swendsen, Wang, *Replica Monte Carlo simulation of spin-glasses*, Physical Review Letters
1986; Hukushima, Nemoto, *Exchange Monte Carlo method and application to spin glass simulations*,
Journal of the Physical Society of Japan 1996.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy.typing as npt
from numpyro.infer import init_to_uniform

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.temper import temper
from numpyro_ebm.mcmc.adaptation import running_mean
from numpyro_ebm.mcmc.replica_exchange import ReplicaExchange, ReplicaExchangeState
from numpyro_ebm.mcmc.row_kernel import RowKernel
from numpyro_ebm.samplers import tempering
from numpyro_ebm.types import Model

__all__ = ["ReplicasOfKernel"]


class ReplicasOfKernel(ReplicaExchange):
    """:class:`~numpyro_ebm.ReplicaExchange` whose replicas are moved by a given kernel."""

    moves_discrete = True
    takes_any_model = False

    def __init__(
        self,
        model: Model,
        inverse_temperatures: npt.ArrayLike | None = None,
        *,
        kernel: Callable[[Model], RowKernel],
        num_replicas: int = 8,
        min_inverse_temperature: float = 0.05,
        adapt_ladder: bool = True,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ):
        made = kernel(model) if callable(kernel) else None
        if not isinstance(made, RowKernel) or not (made.moves_discrete and made.leaves_invariant):
            raise ModelError(
                "ReplicaExchange: `kernel` is a function from a model to a kernel of this library "
                "that draws discrete sites and leaves their law invariant, such as `BlockGibbs`, "
                "`SwendsenWang` or `lambda model: DiscreteLangevin(model, step_size=0.5)`, got "
                f"{kernel!r}. Continuous sites alone need none."
            )
        self._kernel = kernel
        super().__init__(
            model,
            inverse_temperatures,
            num_replicas=num_replicas,
            min_inverse_temperature=min_inverse_temperature,
            step_size=1.0,  # not of the replicas, whose kernels have their own
            adapt_step_size=False,
            adapt_ladder=adapt_ladder,
            init_strategy=init_strategy,
        )

    @property
    def needs_warmup(self) -> bool:
        return self._kernel(self._model).needs_warmup

    def get_diagnostics_str(self, state: Any) -> str:
        rates = state.mean_swap_prob
        return f"swap rates {jnp.min(rates):.2f} to {jnp.max(rates):.2f}"

    def init(
        self,
        rng_key: jax.Array,
        num_warmup: int,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> Any:
        if not_jax_tracer(jax.tree.leaves(rng_key)[0]):  # what the kernel itself refuses
            kernel = self._kernel(self._model).unwatched()
            kernel.init(rng_key, num_warmup, init_params, model_args, model_kwargs)
        return super().init(rng_key, num_warmup, init_params, model_args, model_kwargs)

    def refresh(
        self, state: Any, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ReplicaExchangeState:
        inner, visited = state.memory
        betas = state.adapt_state.inverse_temperatures
        inner = self._refreshed(betas, inner, model_args, model_kwargs)
        cold, _ = self._replicas(inner.z, model_args, model_kwargs)
        return state._replace(memory=(inner, visited), **self._cold(cold))

    # Internal

    def _check_energy(self, state, model_args, model_kwargs):
        pass  # the kernel has looked, and at its warm-up

    def _check_warmup(self):
        pass

    def _replica(self, beta):
        """The kernel of one replica."""
        kernel = self._kernel(temper(self._model, beta))
        kernel._num_warmup = self._num_warmup
        return kernel

    def _refreshed(self, betas, inner, model_args, model_kwargs):
        def one(beta, state):
            return self._replica(beta).refresh(state, model_args, model_kwargs)

        return jax.vmap(one)(betas, inner)

    def _replicas(self, z, model_args, model_kwargs):
        """Replicas whose arrays have the shape (K, rows, ...), and the row model."""
        row_model = self._read_model(self._model, model_args, model_kwargs)
        self._check_block(row_model, model_kwargs)

        def one(z):
            by_site = row_model.terms(z)
            energies = [x for name, x in by_site.items() if name in row_model.energies]
            others = [x for name, x in by_site.items() if name not in row_model.energies]
            zeros = jnp.zeros(row_model.num_rows)
            return tempering.Replica(
                row_model.to_rows(z), zeros + sum(others), zeros + sum(energies), None, None
            )

        return jax.vmap(one)(z), row_model

    def _cold(self, replicas):
        """What the state holds of the replica at β = 1."""
        energy = -(replicas.logprior[0] + replicas.loglikelihood[0])
        return {"potential_energy": energy, "energy": energy}

    def _init(self, rng_key, init_params, model_args, model_kwargs):
        key_init, rng_key = jax.random.split(rng_key)
        num_replicas = len(self._ladder)

        def start(key, beta):
            return self._replica(beta).init(
                key, self._num_warmup, init_params, model_args, model_kwargs
            )

        inner = jax.vmap(start)(
            jax.random.split(key_init, num_replicas), jnp.asarray(self._ladder, float)
        )
        replicas, row_model = self._replicas(inner.z, model_args, model_kwargs)
        pairs, rows = jnp.zeros(num_replicas - 1), jnp.zeros(row_model.num_rows)
        return ReplicaExchangeState(
            i=jnp.array(0),
            z={name: x[0] for name, x in inner.z.items()},
            z_grad={},
            accept_prob=rows,
            mean_accept_prob=jnp.zeros(()),
            diverging=rows != 0,
            num_steps=jnp.array(1),
            replica_accept_prob=jnp.zeros(num_replicas),
            swap_prob=pairs,
            mean_swap_prob=pairs,
            round_trips=jnp.zeros(row_model.num_rows, int),
            adapt_state=self._adaptation.init(self._ladder, 1.0, row_model.num_rows),
            memory=(inner, jnp.zeros((num_replicas, row_model.num_rows), bool)),
            rng_key=rng_key,
            **self._cold(replicas),
        )

    def _step(self, state, model_args, model_kwargs):
        ladder, (inner, visited) = state.adapt_state, state.memory
        rng_key, key_swap = jax.random.split(state.rng_key)

        def move(beta, inner, i):
            return self._replica(beta)._step(inner._replace(i=i), model_args, model_kwargs)

        inner = jax.vmap(move, (0, 0, None))(ladder.inverse_temperatures, inner, state.i)
        replicas, row_model = self._replicas(inner.z, model_args, model_kwargs)
        accept = getattr(inner, "accept_prob", jnp.ones_like(replicas.logprior))
        replicas, visited, swap_prob = self._swap(key_swap, replicas, visited, state)
        new_phase = (state.i == 0) | (state.i == self._num_warmup)
        trips = jnp.where(new_phase, 0, state.round_trips) + visited[0]
        visited = visited.at[0].set(False).at[-1].set(True)
        running = partial(running_mean, i=state.i, num_warmup=self._num_warmup)
        ladder = self._adaptation.update(state.i, ladder, accept, lambda: swap_prob)
        inner = inner._replace(z=jax.vmap(row_model.from_rows)(replicas.position))
        inner = self._refreshed(ladder.inverse_temperatures, inner, model_args, model_kwargs)
        replica_accept = jnp.mean(accept, 1)
        dtype = state.accept_prob.dtype
        return state._replace(
            i=state.i + 1,
            z={name: x[0] for name, x in inner.z.items()},
            accept_prob=accept[0].astype(dtype),
            mean_accept_prob=running(state.mean_accept_prob, replica_accept[0]),
            diverging=accept[0] == 0.0,
            replica_accept_prob=replica_accept.astype(dtype),
            swap_prob=swap_prob.astype(dtype),
            mean_swap_prob=running(state.mean_swap_prob, swap_prob),
            round_trips=trips.astype(state.round_trips.dtype),
            adapt_state=ladder,
            memory=(inner, visited),
            rng_key=rng_key,
            **self._cold(replicas),
        )

    def _swap(self, rng_key, replicas, visited, state):
        """Swap neighbours of every row; swap probabilities are means over rows, (K - 1,)."""
        betas = state.adapt_state.inverse_temperatures

        def one(key, replicas, visited):
            return tempering.swap(key, replicas, betas, state.i % 2, visited)

        keys = jax.random.split(rng_key, visited.shape[1])
        replicas, visited, swap_prob, _ = jax.vmap(one, (0, 1, 1), 1)(keys, replicas, visited)
        return replicas, visited, jnp.mean(swap_prob, 1)


ReplicaExchange._of_kernel = ReplicasOfKernel
