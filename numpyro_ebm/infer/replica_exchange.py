# SPDX-License-Identifier: Apache-2.0
"""Replica exchange (parallel tempering) of a fixed energy-based model as an ``MCMCKernel``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.staged_adaptation import build_schedule
from numpyro.handlers import trace
from numpyro.infer import init_to_uniform
from numpyro.infer.gibbs import GIBBS_SITES_KWARG

from numpyro_ebm.errors import ModelError
from numpyro_ebm.handlers import temper
from numpyro_ebm.infer.adaptation import acceptance_tuner
from numpyro_ebm.infer.kernels import RowKernel
from numpyro_ebm.samplers import tempering
from numpyro_ebm.samplers.rows import per_row

__all__ = ["LadderState", "ReplicaExchange", "ReplicaExchangeState"]


class LadderState(NamedTuple):
    """What :class:`ReplicaExchange` adapts in warm-up.

    - **step_size** - ε of every replica, (K,).
    - **inverse_temperatures** - β of every replica, (K,), the first is 1.
    - **tuner** - states of BlackJAX's dual averaging, (K,).
    - **rejection, count** - summed 1 - α of every pair in the present window, and its steps.
    """

    step_size: jax.Array
    inverse_temperatures: jax.Array
    tuner: object
    rejection: jax.Array
    count: jax.Array


class ReplicaExchangeState(NamedTuple):
    """State of :class:`ReplicaExchange`; fields can be collected as ``extra_fields``.

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
    z: dict
    potential_energy: jax.Array
    z_grad: dict
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
    memory: object
    rng_key: jax.Array


class ReplicaExchange(RowKernel):
    r"""Replica exchange (parallel tempering) on the continuous sites of an energy-based model.

    .. math:: p_β(z) \propto b(z)\, e^{-β E(z)}, \qquad 1 = β_1 > β_2 > … > β_K

    A step moves each replica by MALA at its own temperature, then swaps neighbours,

    .. math:: α_k = \min\bigl\{1,\ e^{(β_k - β_{k+1})(E(z_k) - E(z_{k+1}))}\bigr\}

    the even pairs and the odd pairs by turns. Every row of the data plate is a ladder of its own
    and accepts and swaps on its own; all replicas of all rows share one evaluation of the model a
    step. The draws are those at β = 1. Hot replicas cross the barriers between modes, which no
    local kernel does, so that modes come out with their weights.

    The energies are tempered as :class:`~numpyro_ebm.temper` does, the base measures b are not.
    Where discrete sites are summed out, it is their sum that is raised to β,
    :math:`p_β ∝ b^{1-β} p^β` with b the sum without energies.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param inverse_temperatures: the ladder β, decreasing from 1. By default ``num_replicas`` from 1
        to ``min_inverse_temperature``, evenly spaced in their logarithms.
    :param int num_replicas: K, if no ladder is given.
    :param float min_inverse_temperature: β_K, if no ladder is given. At this temperature MALA has
        to get across by itself. It must be positive where a base measure is flat and has no
        integral (``Lebesgue``); a proper base measure allows 0.
    :param float step_size: ε at β = 1, in squared units of the unconstrained sites, and ε/β
        elsewhere; the initial values where they are adapted.
    :param bool adapt_step_size: adapt the step size of every replica in warm-up by dual averaging
        of the rows' mean acceptance.
    :param bool adapt_ladder: move the inner temperatures in warm-up so that all pairs swap equally
        often; the ends stay.
    :param float target_accept_prob: the acceptance probability of moves to adapt to.
    :param init_strategy: NumPyro initialisation strategy; each replica starts for itself.
    :raises ModelError: if the ladder is not decreasing from 1 within [0, 1] or has one replica,
        ``step_size`` is not positive, or missing where there is no warm-up; from ``init``, if β
        ends with 0 and a base measure has no integral, the kernel is a block of ``Gibbs``, or as
        :class:`~numpyro_ebm.MALA`.

    Look at ``mean_swap_prob`` (one rate a pair; somewhere near 0.5 to 0.8 is good, below 0.1 adds
    replicas) and ``round_trips`` of :class:`ReplicaExchangeState`: draws at β = 1 are only as
    independent as replicas make round trips. Memory and time grow with the number of replicas.

    .. note:: It cannot be a block of ``Gibbs``: its hot replicas depend on what they are
       conditioned on, and keep it when other blocks move. Discrete sites are summed out.

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

    def __init__(
        self,
        model,
        inverse_temperatures=None,
        *,
        num_replicas=8,
        min_inverse_temperature=0.05,
        step_size=None,
        adapt_step_size=True,
        adapt_ladder=True,
        target_accept_prob=0.574,
        init_strategy=init_to_uniform,
    ):
        if step_size is not None and not step_size > 0:
            raise ModelError(f"ReplicaExchange: `step_size` must be positive, got {step_size}.")
        if not 0 < target_accept_prob < 1:
            raise ModelError(
                "ReplicaExchange: `target_accept_prob` must be between 0 and 1, got "
                f"{target_accept_prob}."
            )
        if inverse_temperatures is None:
            if not (isinstance(num_replicas, int) and num_replicas > 1):
                raise ModelError(
                    f"ReplicaExchange: `num_replicas` must be 2 at least, got {num_replicas!r}."
                )
            if not 0 < min_inverse_temperature < 1:
                raise ModelError(
                    "ReplicaExchange: `min_inverse_temperature` must be between 0 and 1, got "
                    f"{min_inverse_temperature}; give `inverse_temperatures` to end with 0."
                )
            inverse_temperatures = np.geomspace(1.0, min_inverse_temperature, num_replicas)
        ladder = np.asarray(inverse_temperatures, float)
        if (
            ladder.ndim != 1
            or len(ladder) < 2
            or ladder[0] != 1
            or not np.all(np.diff(ladder) < 0)
            or not ladder[-1] >= 0
        ):
            raise ModelError(
                "ReplicaExchange: `inverse_temperatures` must be two or more numbers that decrease "
                f"from 1 and stay above or at 0, got {ladder.tolist()}."
            )
        self._ladder = ladder
        self._step_size = step_size
        self._adapt_step_size = adapt_step_size
        self._adapt_ladder = adapt_ladder and len(ladder) > 2
        self._tuner = acceptance_tuner(target_accept_prob)
        super().__init__(model, init_strategy)

    def get_diagnostics_str(self, state):
        rates = state.mean_swap_prob
        return (
            f"step size {state.adapt_state.step_size[0]:.2e}. "
            f"acc. prob={state.mean_accept_prob:.2f}. "
            f"swap rates {jnp.min(rates):.2f} to {jnp.max(rates):.2f}"
        )

    def refresh(self, state, model_args, model_kwargs):
        joint, base, likelihood = self._target(model_args, model_kwargs)
        replicas, visited = state.memory
        replicas = _evaluate(replicas.position, base, likelihood)
        return self._cache(state, replicas, visited, joint)

    # Inside

    def _check_warmup(self, num_warmup):
        if self._step_size is None and not (self._adapt_step_size and num_warmup > 0):
            raise ModelError(
                "ReplicaExchange: without warm-up adaptation (`num_warmup` > 0 and "
                "`adapt_step_size=True`) pass a `step_size`."
            )

    def _target(self, model_args, model_kwargs):
        """The joint, and the base and the tempered part of its row log-density."""
        if GIBBS_SITES_KWARG in (model_kwargs or {}):
            raise ModelError(
                "ReplicaExchange cannot be a block of `Gibbs`: its hot replicas would keep what "
                "they were conditioned on when the other blocks move, and the law would be wrong. "
                "Run it on its own, where discrete sites are summed out; or use `MALA`, "
                "`UnderdampedLangevin` or `MCLMC` as the block."
            )
        joint, log_density = self._read(self._model, model_args, model_kwargs)
        flat = sorted(name for name, site in joint.visible.items() if site.is_flat)
        if flat and self._ladder[-1] == 0:
            raise ModelError(
                f"ReplicaExchange: at an inverse temperature of 0 only the base measure is left, "
                f"and that of {flat} is flat and has no integral. End `inverse_temperatures` above "
                "0, or give the sites a proper base measure, `numpyro.sample(name, dist.Normal(0, "
                "10))`."
            )
        if joint.latent:
            _, base = self._read(temper(self._model, 0.0), model_args, model_kwargs)
            return joint, per_row(base), per_row(lambda rows: log_density(rows) - base(rows))

        def terms(rows):
            values, log_det = joint.constrain(joint.from_rows(rows))
            model_trace = trace(joint.substituted(values)).get_trace(*joint.args, **joint.kwargs)
            by_site = joint.site_log_densities(model_trace)
            energies = [x for name, x in by_site.items() if name in joint.energies]
            others = [x for name, x in by_site.items() if name not in joint.energies]
            return sum(others) + log_det, sum(energies)

        return joint, per_row(lambda rows: terms(rows)[0]), per_row(lambda rows: terms(rows)[1])

    def _init(self, rng_key, init_params, model_args, model_kwargs):
        key_init, rng_key = jax.random.split(rng_key)
        joint, base, likelihood = self._target(model_args, model_kwargs)
        ladder = jnp.asarray(self._ladder, float)

        def start(key):
            return joint.to_rows(self._initial_values(key, joint, init_params, model_kwargs))

        positions = jax.vmap(start)(jax.random.split(key_init, len(ladder)))
        replicas = _evaluate(positions, base, likelihood)
        step_size = 0.1 if self._step_size is None else self._step_size
        step_sizes = step_size / jnp.maximum(ladder, self._ladder[self._ladder > 0].min())
        pairs, rows = jnp.zeros(len(ladder) - 1), jnp.zeros(joint.num_rows)
        visited = jnp.zeros((len(ladder), joint.num_rows), bool)
        state = ReplicaExchangeState(
            i=jnp.array(0),
            z=None,
            potential_energy=None,
            z_grad=None,
            energy=None,
            accept_prob=rows,
            mean_accept_prob=jnp.zeros(()),
            diverging=jnp.zeros(joint.num_rows, bool),
            num_steps=jnp.array(1),
            replica_accept_prob=jnp.zeros(len(ladder)),
            swap_prob=pairs,
            mean_swap_prob=pairs,
            round_trips=jnp.zeros(joint.num_rows, int),
            adapt_state=LadderState(
                step_sizes, ladder, jax.vmap(self._tuner.init)(step_sizes), pairs, jnp.zeros(())
            ),
            memory=None,
            rng_key=rng_key,
        )
        return self._cache(state, replicas, visited, joint)

    def _cache(self, state, replicas, visited, joint):
        cold = jax.tree.map(lambda x: x[0], replicas)
        gradient = jax.tree.map(lambda g, h: -g - h, cold.logprior_grad, cold.loglikelihood_grad)
        energy = -cold.logprior - cold.loglikelihood
        return state._replace(
            z=joint.from_rows(cold.position),
            potential_energy=energy,
            z_grad=joint.from_rows(gradient),
            energy=energy,
            memory=(replicas, visited),
        )

    def _step(self, state, model_args, model_kwargs):
        joint, base, likelihood = self._target(model_args, model_kwargs)
        ladder = state.adapt_state
        num_replicas = len(self._ladder)
        rng_key, key_move, key_swap = jax.random.split(state.rng_key, 3)
        replicas, visited = state.memory
        keys = jax.random.split(key_move, (num_replicas, joint.num_rows))

        def move(key, replica, beta, step_size):
            return tempering.move(key, replica, base, likelihood, beta, step_size)

        # Rows inside, so that a replica of all rows is one evaluation of the plate.
        move = jax.vmap(jax.vmap(move, (0, 0, None, None)))
        replicas, accept = move(keys, replicas, ladder.inverse_temperatures, ladder.step_size)

        def swap(key, replicas, visited):
            return tempering.swap(key, replicas, ladder.inverse_temperatures, state.i % 2, visited)

        swap = jax.vmap(swap, (0, 1, 1), (1, 1, 1, 1))
        keys = jax.random.split(key_swap, joint.num_rows)
        replicas, visited, swap_prob, _ = swap(keys, replicas, visited)
        new_phase = (state.i == 0) | (state.i == self._num_warmup)
        since = jnp.where(state.i < self._num_warmup, state.i, state.i - self._num_warmup) + 1
        trips = jnp.where(new_phase, 0, state.round_trips) + visited[0]
        visited = visited.at[0].set(False).at[-1].set(True)
        replica_accept, swap_prob = jnp.mean(accept, 1), jnp.mean(swap_prob, 1)
        dtype = state.accept_prob.dtype

        def running(mean, x):
            return (mean + (x - mean) / since).astype(dtype)

        return self._cache(state, replicas, visited, joint)._replace(
            i=state.i + 1,
            accept_prob=accept[0].astype(dtype),
            mean_accept_prob=running(state.mean_accept_prob, replica_accept[0]),
            diverging=accept[0] == 0.0,
            replica_accept_prob=replica_accept.astype(dtype),
            swap_prob=swap_prob.astype(dtype),
            mean_swap_prob=running(state.mean_swap_prob, swap_prob),
            round_trips=trips.astype(state.round_trips.dtype),
            adapt_state=self._adapt(state.i, ladder, replica_accept, swap_prob),
            rng_key=rng_key,
        )

    def _adapt(self, i, state, accept, swap_prob):
        num_warmup = self._num_warmup
        if num_warmup == 0 or not (self._adapt_step_size or self._adapt_ladder):
            return state
        new = jax.lax.cond(
            i < num_warmup, lambda: self._adapted(i, state, accept, swap_prob), lambda: state
        )
        return new

    def _adapted(self, i, state, accept, swap_prob):
        new = state
        if self._adapt_step_size:
            tuner = jax.vmap(self._tuner.update)(state.tuner, accept)
            is_last = i == self._num_warmup - 1
            final, current = (
                jax.vmap(self._tuner.final)(tuner),
                jax.vmap(self._tuner.current)(tuner),
            )
            new = new._replace(step_size=jnp.where(is_last, final, current), tuner=tuner)
        if self._adapt_ladder:
            with jax.ensure_compile_time_eval():  # BlackJAX makes arrays of it
                schedule = np.asarray(build_schedule(self._num_warmup), bool)
            in_window, ends = (jnp.asarray(x)[i] for x in schedule.T)
            new = new._replace(
                rejection=state.rejection + in_window * (1 - swap_prob),
                count=state.count + in_window,
            )
            moved = self._end_window(new)
            new = jax.tree.map(lambda a, b: jnp.where(ends, a, b), moved, new)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), new, state)

    def _end_window(self, state):
        old = state.inverse_temperatures
        rejection = state.rejection / jnp.maximum(state.count, 1)
        ladder = tempering.equal_rejection_ladder(old, rejection)
        state = state._replace(
            inverse_temperatures=ladder,
            rejection=jnp.zeros_like(state.rejection),
            count=jnp.zeros_like(state.count),
        )
        if not self._adapt_step_size:
            return state
        step_size = jnp.exp(jnp.interp(-ladder, -old, jnp.log(state.step_size)))
        return state._replace(step_size=step_size, tuner=jax.vmap(self._tuner.init)(step_size))


def _evaluate(positions, base, likelihood):
    """Replicas of all rows, (K, rows, ...)."""

    def evaluate(x):
        return tempering.evaluate(x, base, likelihood)

    return jax.vmap(jax.vmap(evaluate))(positions)
