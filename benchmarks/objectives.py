# SPDX-License-Identifier: Apache-2.0
"""Steps per second of `EnergySVI.run` beside a hand-written JAX loop, for every objective.

A Gaussian-Bernoulli RBM of two visible and four hidden units on the checkerboard, an Ising model
with all 120 couplings for the discrete objectives; batches of 100, Adam. First both programs run at
fixed parameters on the same rows, where their losses and gradients have to agree; then they take
turns on one core. Its processor time is counted, since others may want it too, and what a call of
`run` costs whatever its length is left out and printed beside. The loop (`loops.py`) sums the
hidden units in closed form; a second one sums what the library's model sums, 16 states of h or 16
neighbours, one by one.

    taskset -c 0 python benchmarks/objectives.py --methods DSM "CD-1"
"""

import argparse
import contextlib
import io
import os
import time
import warnings
from functools import partial
from typing import NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import loops
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import training
from jax.flatten_util import ravel_pytree

import numpyro_ebm as ebm
from numpyro_ebm.errors import FarNoiseWarning, QuadratureWarning
from numpyro_ebm.models import grbm, grbm_guide

BATCH, BETAS, CHUNK, LEARNING_RATE = 100, (0.9, 0.95), 1_000, 1e-3
CHECK_STEPS, CHECK_BETA = 2_000, 0.999
NOISE = dist.Normal(0, 1).expand([2]).to_event(1)


def flow():
    """A Gaussian with full covariance."""
    loc = numpyro.param("flow_loc", jnp.zeros(2))
    scale = numpyro.param("flow_scale", jnp.eye(2), constraint=dist.constraints.lower_cholesky)
    return dist.MultivariateNormal(loc, scale_tril=scale)


def ising(data):
    """All couplings between 16 bits."""
    J = numpyro.param("J", jnp.zeros(len(loops.PAIRS[0])))
    upper = jnp.zeros((loops.NUM_SITES, loops.NUM_SITES)).at[loops.PAIRS].set(J)
    with numpyro.plate("data", len(data)):
        x = numpyro.sample("x", ebm.Counting(event_shape=(loops.NUM_SITES,)), obs=data)
        s = 2.0 * x - 1.0
        ebm.energy("E", -jnp.sum((s @ upper) * s, -1))


def ising_rows(num_rows):
    """Exact draws at couplings of the size 0.2."""
    states = np.indices([2] * loops.NUM_SITES).reshape(loops.NUM_SITES, -1).T
    J = 0.2 * jax.random.normal(jax.random.key(5), (len(loops.PAIRS[0]),))
    density = jax.nn.softmax(loops.log_odds_closed({"J": J}, states).sum(-1) / 4.0)
    chosen = jax.random.choice(jax.random.key(6), len(states), (num_rows,), p=density)
    return jnp.asarray(states)[chosen]


class Method(NamedTuple):
    """An objective of the library, and the method of `loops.py` for the same algorithm.

    - **explicit** - what stands for ``closed``, the closed form, in the second loop, if there is
      one.
    """

    objective: object
    loop: object
    guide: object = None
    model: object = grbm
    closed: object = loops.grbm_free
    explicit: object = loops.grbm_states


DSM, KSD = partial(ebm.DenoisingScoreMatching, 0.05), ebm.KernelSteinDiscrepancy
guided = partial(Method, guide=grbm_guide, explicit=None)
discrete = partial(
    Method, model=ising, closed=loops.log_odds_closed, explicit=loops.log_odds_neighbours
)
METHODS = {
    "ML": Method(lambda: ebm.MaximumLikelihood(num_nodes=48), loops.maximum_likelihood),
    "CD-1": Method(lambda: ebm.ContrastiveDivergence(ebm.BlockGibbs), loops.contrastive_divergence),
    "PCD-1": Method(
        lambda: ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True),
        partial(loops.contrastive_divergence, persistent=True),
    ),
    "SM": Method(ebm.ScoreMatching, loops.score_matching),
    "SSM": Method(ebm.SlicedScoreMatching, loops.sliced_score_matching),
    "DSM": Method(DSM, loops.denoising),
    "MDSM": Method(
        lambda: ebm.MultiscaleDenoisingScoreMatching(
            0.05, min_noise_scale=0.05, max_noise_scale=0.5
        ),
        loops.multiscale_denoising,
    ),
    "VaGES-DSM": guided(lambda: DSM(ebm.VaGES(2)), loops.vages_denoising),
    "VaGES-DSM, no control": guided(lambda: DSM(ebm.VaGES(2), variance_reduction=False), None),
    "BiDSM": guided(lambda: DSM(ebm.Unrolled(5)), loops.bilevel_denoising),
    "NCE": Method(lambda: ebm.NCE(NOISE, init_log_normalizer=0.0), loops.nce),
    "VNCE": guided(
        lambda: ebm.NCE(NOISE, 1, ebm.ImportanceBound(5), init_log_normalizer=0.0),
        loops.variational_nce,
    ),
    "RankingNCE": Method(lambda: ebm.RankingNCE(NOISE, noise_ratio=10), loops.ranking_nce),
    "ConditionalNCE": Method(lambda: ebm.ConditionalNCE(0.3), loops.conditional_nce),
    "FCE": Method(lambda: ebm.FlowContrastive(flow, likelihood_weight=0.1), loops.flow_contrastive),
    "KSD": Method(lambda: KSD(bandwidth=0.1), loops.stein),
    "KSD, median": Method(KSD, partial(loops.stein, bandwidth="median")),
    "VaGES-KSD": guided(lambda: KSD(ebm.VaGES(2), bandwidth=0.1), loops.vages_stein),
    "EnergyDiscrepancy": Method(
        lambda: ebm.EnergyDiscrepancy(0.3, num_samples=16), loops.energy_discrepancy
    ),
    "Fisher": Method(ebm.FisherDivergence, loops.fisher),
    "PseudoLikelihood": discrete(ebm.PseudoLikelihood, loops.pseudo_likelihood),
    "RatioMatching": discrete(ebm.RatioMatching, loops.ratio_matching),
}


def trainer(method, learning_rate=LEARNING_RATE, betas=BETAS):
    # One vector, as in the loop.
    adam = optax.flatten(optax.adam(learning_rate, b1=betas[0], b2=betas[1], eps=loops.EPSILON))
    num_guide_steps = loops.GUIDE_STEPS if method.guide is not None else 1
    return ebm.EnergySVI(
        method.model,
        method.guide,
        adam,
        method.objective(),
        guide_optim=None if method.guide is None else adam,
        num_guide_steps=num_guide_steps,
    )


def values(svi, state):
    """Unconstrained parameters of the energy, and those of each other player."""
    players = [svi.optim.get_params(state.optim_state)]
    if state.guide_optim_state is not None:
        players.append(svi.guide_optim.get_params(state.guide_optim_state))
    for optim, of_player in zip(svi.network_optims, state.network_optim_states, strict=True):
        players.append(optim.get_params(of_player))
    return players[0], [found for found in players[1:] if found]


def gradients(state):
    """Adam's two moments of every player and its steps, as dicts by parameter name."""
    found = ({}, {}, {})
    states = [state.optim_state, state.guide_optim_state, *state.network_optim_states]
    for one in states:
        if one is not None:
            params, optax_state = one[1]
            _, unravel = ravel_pytree(params)
            for moments, which in zip(found, ("mu", "nu"), strict=False):
                moments.update(unravel(optax.tree_utils.tree_get(optax_state, which)))
            count = int(optax.tree_utils.tree_get(optax_state, "count"))
            found[2].update(dict.fromkeys(params, count))
    return found


def check(name, method, rows):
    """The largest deviation of losses and mean gradients, in standard errors or 1e-4 of them."""
    betas = (CHECK_BETA, CHECK_BETA)
    svi = trainer(method, 0.0, betas)
    state = svi.init(jax.random.key(0), rows)
    key, point = jax.random.key(7), {}
    for parameter, value in sorted(svi.get_params(state).items()):
        key, at = jax.random.split(key)
        move = 0.6 * jax.random.normal(at, jnp.shape(value))
        if parameter in ("scale", "flow_scale"):
            move = 0.2 * jnp.tril(jnp.abs(move)) if move.ndim == 2 else 0.2 * move
        elif parameter.startswith("critic_weights"):
            move = 0.3 * move
        point[parameter] = value + move
    fit = svi.run(jax.random.key(1), CHECK_STEPS, rows, init_params=point, progress_bar=False)
    params, players = values(svi, fit.state)
    ours = [np.asarray(fit.losses), *gradients(fit.state)]
    found = []
    for form in filter(None, (method.closed, method.explicit)):
        loop = loops.Loop(
            method.loop(form),
            rows,
            params,
            players,
            level=1,
            batch=None,
            chunk=CHECK_STEPS,
            learning_rate=0.0,
            betas=betas,
        )
        theirs = [loop.run(1), *loop.gradients()]
        found.append(deviation(ours, theirs, 3.0 if name == "PCD-1" else 1.0))
    return max(found)


def deviation(ours, theirs, inflation):
    """Of a mean loss, and of gradients averaged by Adam; inflated where rounds are correlated."""
    n, beta = CHECK_STEPS, CHECK_BETA
    error = np.sqrt((ours[0].var() + theirs[0].var()) / n)
    size = max(abs(ours[0].mean()), ours[0].std())
    found = [abs(ours[0].mean() - theirs[0].mean()) / (inflation * error + 1e-4 * size)]
    if ours[1].keys() != theirs[1].keys():
        raise SystemExit(f"parameters {sorted(ours[1])} and {sorted(theirs[1])}")
    for parameter, n in ours[3].items():
        # The variance of the exponential average of n independent numbers, in that of one.
        share = (1 - beta) / (1 + beta) * (1 - beta ** (2 * n)) / (1 - beta**n) ** 2
        first = [np.asarray(x[1][parameter]) / (1 - beta**n) for x in (ours, theirs)]
        second = [np.asarray(x[2][parameter]) / (1 - beta**n) for x in (ours, theirs)]
        variance = sum(np.maximum(b - a**2, 0) for a, b in zip(first, second, strict=True))
        size = np.sqrt(np.max(second[0]))
        allowed = inflation * np.sqrt(share * variance) + 3e-4 * size + 1e-7
        found.append(np.max(np.abs(first[0] - first[1]) / allowed))
    return max(found)


def library(method, rows):
    """A warm `EnergySVI` as a function from seconds to steps per second, and its parameters."""
    svi = trainer(method)
    start = time.process_time()
    fit = svi.run(jax.random.key(0), 100, rows, batch_size=BATCH, progress_bar=False)
    compile_seconds = time.process_time() - start
    params = values(svi, fit.state)
    rate = 1_000.0

    def run(num_steps):
        nonlocal fit
        with contextlib.redirect_stderr(io.StringIO()):  # the bar is drawn, but not shown
            start = time.process_time()
            fit = svi.run(
                jax.random.key(0), num_steps, rows, batch_size=BATCH, init_state=fit.state
            )
            return time.process_time() - start

    def measure(seconds):
        nonlocal rate
        num_steps = max(1_024, round(rate * seconds / 1_024) * 1_024)
        rate = num_steps / (run(num_steps) - fixed)
        return rate

    run(1)
    fixed = min(run(1) for _ in range(3))
    for _ in range(3):  # let the chunks find their length, and the rate be known
        measure(0.5)
    return measure, compile_seconds, params, fixed


def plain(method, form, rows, params, level):
    loop = loops.Loop(
        method.loop(form), rows, *params, level=level, batch=BATCH, chunk=CHUNK, betas=BETAS
    )
    return loop.measure, loop.compile_seconds


def plain_vages(rows, level):
    """The loop of `training.py`, which has no control variate."""
    loop = training.PlainLoop(rows, loops.NUM_HIDDEN, 0.05, LEARNING_RATE, CHUNK, level)
    start = time.process_time()
    compiled = loop.chunk.lower(loop.state, jax.random.key(1)).compile()
    compile_seconds = time.process_time() - start

    def measure(seconds):
        start, steps = time.process_time(), 0
        while time.process_time() - start < seconds:
            loop.state, losses = compiled(loop.state, jax.random.key(1))
            steps += len(np.asarray(losses))
        return steps / (time.process_time() - start)

    return measure, compile_seconds


def compare(name, rows, rounds, seconds, is_checked):
    """One row of the table."""
    method = METHODS[name]
    deviates = "-"
    if is_checked and method.loop is not None:
        deviates = f"{check(name, method, rows[:BATCH]):.1f}"
    ours, compile_ours, params, fixed = library(method, rows)
    contestants = {"library": ours}
    compiled = {}
    for label, level in (("level 1", 1), ("default", None)):
        if method.loop is None:
            contestants[label], compiled[label] = plain_vages(rows, level)
        else:
            contestants[label], compiled[label] = plain(method, method.closed, rows, params, level)
    if method.explicit is not None:
        contestants["explicit"], _ = plain(method, method.explicit, rows, params, 1)
    rates = {label: [] for label in contestants}
    for _ in range(rounds):  # in turn, so that a drift of the machine meets all of them
        for label, measure in contestants.items():
            rates[label].append(measure(seconds))
    best = {label: max(found) for label, found in rates.items()}
    which = max(("level 1", "default"), key=best.get)
    explicit = ""
    if "explicit" in best:
        explicit = f"{best['explicit']:>10,.0f}{best['library'] / best['explicit']:>7.2f}"
    print(
        f"{name:<22}{best['library']:>10,.0f}{best[which]:>10,.0f} {which:<8}"
        f"{best['library'] / best[which]:>6.2f}{explicit or ' ' * 17}"
        f"{compile_ours:>8.1f}{compiled[which]:>7.1f}{fixed:>8.2f}{deviates:>7}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7, help="of each measurement")
    parser.add_argument("--no-check", action="store_true")
    arguments = parser.parse_args()
    for category in (FarNoiseWarning, QuadratureWarning):  # the models are hardly trained
        warnings.simplefilter("ignore", category)
    data = {grbm: ebm.datasets.checkerboard(jax.random.key(0), 50_000)}
    if any(METHODS[name].model is ising for name in arguments.methods):
        data[ising] = ising_rows(50_000)
    print(
        f"Best of {arguments.rounds} rounds, steps/s; loops at the better of two compiler levels, "
        "`explicit` at level 1.\nSeconds: start-up of the library (first 100 steps) and of the "
        "loop, and what a call of `run` for one step takes.\nDeviation of the two programs in "
        "standard errors.\n"
    )
    print(
        f"{'objective':<22}{'library':>10}{'loop':>10} {'level':<8}{'ratio':>6}"
        f"{'explicit':>10}{'ratio':>7}{'start':>8}{'loop':>7}{'run':>8}{'check':>7}"
    )
    for name in arguments.methods:
        compare(
            name,
            data[METHODS[name].model],
            arguments.rounds,
            arguments.seconds,
            not arguments.no_check,
        )
