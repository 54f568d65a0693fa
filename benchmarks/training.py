# SPDX-License-Identifier: Apache-2.0
"""Steps per second of `EnergySVI.run` beside hand-written JAX loops for the same algorithm.

VaGES-DSM on a Gaussian-Bernoulli RBM (L = 2, K = 5, batch 100), at the size of the checkerboard and
at 560 x 400. Three programs, in turn, on one core:

- *library*: `EnergySVI.run`, with its progress bar, on a NumPyro model and guide;
- *plain loop*: the same algorithm in JAX with automatic differentiation, `lax.scan`, random numbers
  drawn a chunk at a time, and one flat vector with its Adam moments for each player;
- *by hand*: `handwritten.py`, where gradients are derived by hand for this one model, rounds of the
  random generator are unrolled and the batch is laid out along the vector instructions. It shows
  what a program for a single model can reach.

    taskset -c 0 python benchmarks/training.py
    taskset -c 0 python benchmarks/training.py --first-calls 7

The second command times first calls alone: from data in memory to the end of 100 steps, parameters
and state set up, in a process of its own each; medians of processor time, and of ratios.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import time

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import handwritten
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm, grbm_guide

LEVELS = {"plain loop, default compiler": None, "plain loop, level 1": 1}
BATCH, PARTICLES, GUIDE_STEPS, BETAS, EPSILON = 100, 2, 5, (0.9, 0.95), 1e-8


class PlainLoop:
    """The algorithm written down for this model, and differentiated by JAX."""

    def __init__(self, data, num_hidden, noise_scale, learning_rate, chunk, level):
        self.data, self.num_hidden, self.chunk_length = data, num_hidden, chunk
        self.noise_scale, self.learning_rate = noise_scale, learning_rate
        num_visible = data.shape[1]
        W = 0.1 * jax.random.normal(jax.random.key(0), (num_visible, num_hidden))
        zeros = jnp.zeros
        theta, self.unravel = ravel_pytree(
            {"W": W, "b": zeros(num_visible), "c": zeros(num_hidden), "log_s": zeros(num_visible)}
        )
        phi, self.unravel_guide = ravel_pytree({"A": zeros(W.shape), "d": zeros(num_hidden)})
        zero = lambda x: (x, jnp.zeros_like(x), jnp.zeros_like(x))  # noqa: E731
        self.state = (zero(theta), zero(phi), jnp.array(0))
        options = {"xla_backend_optimization_level": level} if level is not None else {}
        self.chunk = jax.jit(self._chunk, donate_argnums=0, compiler_options=options)

    def log_joint(self, theta, v, h):
        p = self.unravel(theta)
        square = 0.5 * jnp.sum(((v - p["b"]) * jnp.exp(-p["log_s"])) ** 2, -1)
        return h @ p["c"] + jnp.sum((v @ p["W"]) * h, -1) - square

    def logits(self, phi, v):
        p = self.unravel_guide(phi)
        return v @ p["A"] + p["d"]

    def adam(self, player, gradient, count):
        x, first, second = player
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        scale = jnp.sqrt(second / (1 - BETAS[1] ** count)) + EPSILON
        return x - self.learning_rate * first / (1 - BETAS[0] ** count) / scale, first, second

    def step(self, state, draws):
        theta, phi, i = state
        rows, noise, logistic, uniform = draws
        v = self.data[rows] + self.noise_scale * noise

        def guide_loss(x, logistic):
            logits = self.logits(x, v)
            h, frozen = jax.nn.sigmoid((logits + logistic) / 0.1), lax.stop_gradient(logits)
            log_q = jnp.sum(h * frozen - jax.nn.softplus(frozen), -1)
            return jnp.mean(log_q - self.log_joint(theta[0], v, h))

        def guide_step(k, phi):
            gradient = jax.grad(guide_loss)(phi[0], logistic[k])
            return self.adam(phi, gradient, (GUIDE_STEPS * i + k + 1).astype(float))

        phi = lax.fori_loop(0, GUIDE_STEPS, guide_step, phi)
        h = (uniform < jax.nn.sigmoid(self.logits(phi[0], v))).astype(float)
        first, second = h[:PARTICLES], h[PARTICLES:]
        score = jax.grad(lambda v: jnp.sum(self.log_joint(theta[0], v, first)) / PARTICLES)(v)
        z = score + noise / self.noise_scale

        def loss(x):
            def surrogate(v):
                log_joint = self.log_joint(x, v, second)
                delta = log_joint - lax.stop_gradient(log_joint)
                return jnp.mean(delta, 0) + 0.5 * jnp.var(delta, 0, ddof=1)

            along = jax.jvp(surrogate, (v,), (z,))[1] + jnp.sum(z * noise, -1) / self.noise_scale
            return jnp.mean(along - 0.5 * lax.stop_gradient(along))

        value, gradient = jax.value_and_grad(loss)(theta[0])
        return (self.adam(theta, gradient, (i + 1).astype(float)), phi, i + 1), value

    def _chunk(self, state, rng_key):
        keys = jax.random.split(jax.random.fold_in(rng_key, state[2]), 4)
        n, num_visible = self.chunk_length, self.data.shape[1]
        rows = jax.random.randint(keys[0], (n, BATCH), 0, len(self.data))
        noise = jax.random.normal(keys[1], (n, BATCH, num_visible))
        logistic = jax.random.logistic(keys[2], (n, GUIDE_STEPS, BATCH, self.num_hidden))
        uniform = jax.random.uniform(keys[3], (n, 2 * PARTICLES, BATCH, self.num_hidden))
        return lax.scan(self.step, state, (rows, noise, logistic, uniform))

    def measure(self, num_steps):
        start = time.perf_counter()
        compiled = self.chunk.lower(self.state, jax.random.key(1)).compile()
        compile_seconds = time.perf_counter() - start
        state, losses = compiled(self.state, jax.random.key(1))
        losses.block_until_ready()
        start = time.perf_counter()
        for _ in range(max(1, num_steps // self.chunk_length)):
            state, losses = compiled(state, jax.random.key(1))
            losses.block_until_ready()
        taken = max(1, num_steps // self.chunk_length) * self.chunk_length
        self.state = state
        return taken / (time.perf_counter() - start), compile_seconds


def library(data, num_hidden, noise_scale, learning_rate, variance_reduction, warm=True):
    """A warm `EnergySVI` and what it took to get there."""
    adam = optax.adam(learning_rate, b1=BETAS[0], b2=BETAS[1], eps=EPSILON)
    objective = ebm.DenoisingScoreMatching(
        noise_scale, ebm.VaGES(PARTICLES), variance_reduction=variance_reduction
    )
    sizes = {"num_visible": data.shape[1], "num_hidden": num_hidden}
    svi = ebm.EnergySVI(
        grbm, grbm_guide, adam, objective, guide_optim=adam, num_guide_steps=GUIDE_STEPS, **sizes
    )
    start = time.perf_counter()
    fit = svi.run(jax.random.key(0), 100, data, batch_size=BATCH, progress_bar=False)
    compile_seconds = time.perf_counter() - start

    def measure(num_steps):
        nonlocal fit
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # the bar is drawn, but not shown
            fit = svi.run(
                jax.random.key(0), num_steps, data, batch_size=BATCH, init_state=fit.state
            )
        return num_steps / (time.perf_counter() - start)

    if warm:
        measure(num_steps=2_000 if num_hidden < 100 else 10)  # let the chunks find their length
    return measure, compile_seconds


def compare(name, data, num_hidden, noise_scale, learning_rate, num_steps, chunk, rounds):
    settings = (data, num_hidden, noise_scale, learning_rate)
    contestants, seconds = {}, {}
    for label, reduction in (("library", False), ("library, variance reduction", True)):
        contestants[label], seconds[label] = library(*settings, reduction)
    for label, level in LEVELS.items():
        loop = PlainLoop(jnp.asarray(data), *settings[1:], chunk, level)
        seconds[label] = loop.measure(chunk)[1]
        contestants[label] = lambda n, loop=loop: loop.measure(n)[0]
    by_hand = handwritten.make(np.asarray(data), num_hidden, noise_scale, learning_rate)
    seconds["by hand"] = sum(by_hand.measure(num_chunks=1)[:2])
    contestants["by hand"] = lambda n: by_hand.measure(num_chunks=3).wall_rate
    rates = {label: [] for label in contestants}
    for _ in range(rounds):  # in turn, so that a drift of the machine meets all of them
        for label, measure in contestants.items():
            rates[label].append(measure(num_steps))
    print(f"\n{name}: median of {rounds} rounds")
    print(f"{'':<32}{'steps/s':>10}{'library ratio':>16}{'start-up, s':>14}")
    for label, values in rates.items():
        ratio = np.median(np.array(rates["library"]) / np.array(values))
        print(f"{label:<32}{np.median(values):>10.0f}{ratio:>16.2f}{seconds[label]:>14.1f}")


FIRST_CALLS = ("library", "library, variance reduction", *LEVELS)


def first_call(label):
    """Processor seconds from the checkerboard to the end of 100 steps of one contestant."""
    data = jax.block_until_ready(ebm.datasets.checkerboard(jax.random.key(0), 50_000))
    start = time.process_time()
    if label in LEVELS:
        loop = PlainLoop(data, 4, 0.05, 1e-3, 100, LEVELS[label])
        jax.block_until_ready(loop.chunk(loop.state, jax.random.key(1)))
    else:
        library(data, 4, 0.05, 1e-3, "reduction" in label, warm=False)
    return time.process_time() - start


def compare_first_calls(rounds):
    command = [sys.executable, __file__, "--first-call-of"]
    taken = []
    for _ in range(rounds):
        runs = [subprocess.check_output([*command, label]) for label in FIRST_CALLS]
        taken.append([float(out) for out in runs])
    taken = np.array(taken)
    names = [label.split(", ")[1] for label in LEVELS]
    print(f"{'checkerboard, first call':<32}{'s':>6}" + "".join(f"{x:>20}" for x in names))
    for label, column in zip(FIRST_CALLS, taken.T, strict=True):
        ratios = np.median(column[:, None] / taken[:, -len(LEVELS) :], 0)
        print(f"{label:<32}{np.median(column):>6.1f}" + "".join(f"{x:>20.2f}" for x in ratios))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-calls", type=int, default=0, help="time first calls, so often")
    parser.add_argument("--first-call-of", choices=FIRST_CALLS, help="time one, in this process")
    options = parser.parse_args()
    if options.first_call_of:
        sys.exit(print(first_call(options.first_call_of)))
    if options.first_calls:
        sys.exit(compare_first_calls(options.first_calls))
    rounds = options.rounds
    toy = ebm.datasets.checkerboard(jax.random.key(0), 50_000)
    compare("checkerboard, 2 x 4", toy, 4, 0.05, 1e-3, 20_000, 1_000, rounds)
    faces = jax.random.normal(jax.random.key(0), (1_400, 560))
    compare("560 x 400, random data", faces, 400, 0.3, 2e-4, 60, 20, rounds)
