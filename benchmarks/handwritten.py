# SPDX-License-Identifier: Apache-2.0
r"""VaGES-DSM on a Gaussian-Bernoulli RBM as one hand-written JAX loop: the speed baseline.

The energy is E(v, h) = ‖(v - b) / s‖² / 2 - h·c - vᵀWh, the guide q(h | v) is Bernoulli with logits
vA + d. A step noises a minibatch, takes some Adam steps on the guide by the relaxed bound (path
gradients only), then one Adam step on the model by VaGES with hard particles.

Nothing is traced from a model. Every gradient is derived by hand (`check_gradients` compares them
with autodiff). W over c, and A over d, are one matrix each, whose last row meets a visible that is
always one; vW + c is computed once a step. Random bits come from an unrolled Threefry keyed by
(seed, step), inside the scan, where they stay in the cache; cutting a run into other chunks changes
nothing. With few visibles the batch lies on the last axis, where the vector instructions run.
"""

import dataclasses
import itertools
import time
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GUIDE, PARTICLES, NOISE = range(3)  # streams of random numbers


Adam = namedtuple("Adam", "value first second")  # an array and its Adam moments
State = namedtuple("State", "guide coupling visible seed step")  # A over d, W over c, b over log s
# Seconds of tracing and compiling, then steps a second of wall clock and of processor time.
Timing = namedtuple("Timing", "trace compile wall_rate cpu_rate")


def checkerboard(seed, num_rows):
    """Draw rows u / 2 + m, with u uniform on the unit square and m in {(0, 0), (1/2, 1/2)}."""
    rng = np.random.default_rng(seed)
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 2, (num_rows, 1)) / 2
    return (rng.random((num_rows, 2)) / 2 + corners).astype(np.float32)


def random_bits(seed, step, stream, count):
    """Draw 32-bit words by Threefry-2x32-20, key (seed, step), counter (position, stream).

    The rounds are unrolled, so that XLA fuses them; JAX's own are a loop of kernels on CPU.
    """
    keys = (seed, step, seed ^ step ^ np.uint32(0x1BD11BDA))
    left = jnp.arange((count + 1) // 2, dtype=jnp.uint32) + keys[0]
    right = jnp.full_like(left, stream) + keys[1]
    for block in range(5):
        for shift in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            left = left + right
            right = left ^ (right << np.uint32(shift) | right >> np.uint32(32 - shift))
        left = left + keys[(block + 1) % 3]
        right = right + keys[(block + 2) % 3] + np.uint32(block + 1)
    return jnp.concatenate([left, right], -1)[..., :count]


def uniform(bits):
    """Map words to the midpoints of 2²³ equal cells of (0, 1)."""
    return (bits >> 9).astype(jnp.int32).astype(jnp.float32) * 2.0**-23 + 2.0**-24


def adam(player, gradient, rate, epsilon, betas):
    """Take one Adam step, the bias corrections already folded into ``rate`` and ``epsilon``."""
    first = betas[0] * player.first + (1 - betas[0]) * gradient
    second = betas[1] * player.second + (1 - betas[1]) * gradient * gradient
    return Adam(player.value - rate * first / (jnp.sqrt(second) + epsilon), first, second)


@dataclasses.dataclass(eq=False)
class Loop:
    """A training loop for one data set.

    Parameters
    ----------
    data : array, shape (num_rows, num_visible)
    num_hidden : int
    noise_scale, learning_rate : float
    batch_size, num_guide_steps, num_particles : int
        ``num_particles`` is the size of each of the two independent sets, two or more.
    sharpness : int
        The inverse of the temperature of the relaxed Bernoulli variables.
    betas, epsilon : tuple, float
    columns : bool, optional
        Keep the batch on the last axis; by default where that pays.
    compiler_options : mapping
        XLA options of this program. Vectors of 512 bits gain a sixth on the small job.
    """

    data: np.ndarray
    num_hidden: int
    noise_scale: float
    learning_rate: float
    _: dataclasses.KW_ONLY
    batch_size: int = 100
    num_guide_steps: int = 5
    num_particles: int = 2
    sharpness: int = 10
    betas: tuple = (0.9, 0.95)
    epsilon: float = 1e-8
    columns: bool | None = None
    compiler_options: tuple = (("xla_cpu_prefer_vector_width", 512),)

    def __post_init__(self):
        self.num_rows, self.num_visible = self.data.shape
        self.epoch_length = self.num_rows // self.batch_size
        self.columns = self.num_visible < 32 if self.columns is None else self.columns
        self.v, self.h = ("db", "hb") if self.columns else ("bd", "bh")
        self.rows, self.features = (1, 0) if self.columns else (0, 1)  # axes
        self.hidden_shape = (self.batch_size, self.num_hidden)[:: -1 if self.columns else 1]
        self.data = jnp.asarray(self.data.T.copy() if self.columns else self.data, jnp.float32)
        self.compiled, self.shuffled = {}, {}

    def init(self, seed, weight_scale=0.1):
        """Draw small normal couplings; everything else starts at zero."""
        shape, rng = (self.num_visible + 1, self.num_hidden), np.random.default_rng(seed)
        values = np.zeros(shape), np.zeros(shape), np.zeros((2, self.num_visible))
        values[1][:-1] = weight_scale * rng.standard_normal((self.num_visible, self.num_hidden))
        triples = ((p, 0 * p, 0 * p) for p in values)
        return State(*(Adam(*(jnp.asarray(x, jnp.float32) for x in t)) for t in triples), seed, 0)

    def parameters(self, state):
        """Return the named parameters as NumPy arrays; ``scale`` is s itself."""
        guide, coupling, visible = (np.asarray(player.value) for player in state[:3])
        values = coupling[:-1], coupling[-1], visible[0], np.exp(visible[1]), guide[:-1], guide[-1]
        return dict(zip(("W", "c", "b", "scale", "A", "d"), values, strict=True))

    def linear(self, v, matrix):
        return jnp.einsum(f"{self.v},dh->{self.h}", v, matrix)

    def outer(self, v, h):
        return jnp.einsum(f"{self.v},{self.h}->dh", v, h)

    def append(self, v, constant):
        """Add the visible that is always one (in a direction: zero)."""
        edge = jnp.full_like(lax.slice_in_dim(v, 0, 1, axis=self.features), constant)
        return jnp.concatenate([v, edge], self.features)

    def drop(self, v):
        return lax.slice_in_dim(v, 0, self.num_visible, axis=self.features)

    def guide_gradient(self, guide, fields, v, draws):
        """Differentiate along the path h = 1 / (1 + t^sharpness), t = exp(-logits) (1 - u) / u."""
        logits = self.linear(v, guide)
        odds = jnp.exp(-logits) * ((1 - draws) / draws)
        relaxed = 1 / (1 + lax.integer_pow(odds, self.sharpness))
        slope = relaxed * (1 - relaxed) * (self.sharpness / self.batch_size)
        return self.outer(v, (logits - fields) * slope)

    def particles(self, guide, v, draws):
        """Turn uniform numbers into two sets of hard draws of the hidden units."""
        bar = 1 + jnp.exp(-self.linear(v, guide))
        return jnp.split((draws * bar < 1).astype(jnp.float32), 2)

    def model_gradient(self, coupling, visible, v, noise, first, second):
        """Loss ‖z‖²/2 and the VaGES gradients of coupling and visible; v carries its constant."""
        precision = jnp.expand_dims(jnp.exp(-2 * visible[1]), self.rows)
        pull = (self.drop(v) - jnp.expand_dims(visible[0], self.rows)) * precision
        push = self.drop(jnp.einsum(f"{self.h},dh->{self.v}", first.mean(0), coupling))
        z = push - pull + noise / self.noise_scale
        # z·s(h_i), centred over the particles, is (zW)·(h_i - mean).
        direction, mean = self.append(z, 0.0), second.mean(0)
        deviation = second - mean
        slope = self.linear(direction, coupling) * deviation
        slope = jnp.sum(slope, self.features + 1, keepdims=True) / (self.num_particles - 1)
        left = jnp.concatenate([v, direction], self.rows)
        right = jnp.concatenate([jnp.sum(slope * deviation, 0), mean], self.rows)
        along = jnp.stack([jnp.sum(z * precision, self.rows), 2 * jnp.sum(z * pull, self.rows)])
        loss = jnp.vdot(z, z) / (2 * self.batch_size)
        return loss, self.outer(left, right) / self.batch_size, along / self.batch_size

    def draws(self, seed, step):
        """Yield the uniform numbers of a step's guide updates, then those of its particles."""
        for count, stream in (self.num_guide_steps, GUIDE), (2 * self.num_particles, PARTICLES):
            shape = (count, *self.hidden_shape)
            yield uniform(random_bits(seed, step, stream, np.prod(shape))).reshape(shape)

    def rates(self, count):
        """Fold Adam's bias corrections at update ``count`` into its rate and epsilon."""
        first, second = (1 - beta ** count.astype(jnp.float32) for beta in self.betas)
        return self.learning_rate * jnp.sqrt(second) / first, self.epsilon * jnp.sqrt(second)

    def step(self, players, seed, step, rows, noise, guide_rates, model_rates):
        guide, coupling, visible = players
        guide_draws, particle_draws = self.draws(seed, step)
        v = self.append(rows + self.noise_scale * noise, 1.0)
        fields = self.linear(v, coupling.value)

        def guide_step(guide, inputs):
            draws, *rates = inputs
            gradient = self.guide_gradient(guide.value, fields, v, draws)
            return adam(guide, gradient, *rates, self.betas), None

        guide, _ = lax.scan(guide_step, guide, (guide_draws, *guide_rates))
        sets = self.particles(guide.value, v, particle_draws)
        loss, *gradients = self.model_gradient(coupling.value, visible.value, v, noise, *sets)
        coupling = adam(coupling, gradients[0], *model_rates, self.betas)
        visible = adam(visible, gradients[1], *model_rates, self.betas)
        return (guide, coupling, visible), loss

    def chunk(self, players, data, order, seed, start):
        """Scan over the minibatches ``order``; what is small is prepared for all steps at once."""
        steps = start + jnp.arange(len(order), dtype=jnp.uint32)
        rows = jnp.moveaxis(data[:, order], 0, 1) if self.columns else data[order]
        noise = uniform(random_bits(seed, steps[:, None], NOISE, rows[0].size)) * 2 - 1
        noise = np.float32(np.sqrt(2)) * lax.erf_inv(noise).reshape(rows.shape)
        counts = steps[:, None] * self.num_guide_steps + 1 + jnp.arange(self.num_guide_steps)
        inputs = steps, rows, noise, self.rates(counts), self.rates(steps + 1)
        return lax.scan(lambda players, x: self.step(players, seed, *x), players, inputs)

    def order(self, seed, epoch):
        """Shuffle the rows of an epoch into minibatches (kept for the next chunk)."""
        if (seed, epoch) not in self.shuffled:
            order = np.random.default_rng((seed, epoch)).permutation(self.num_rows)
            order = order[: self.epoch_length * self.batch_size].astype(np.int32)
            self.shuffled = {(seed, epoch): order.reshape(-1, self.batch_size)}
        return self.shuffled[seed, epoch]

    def arguments(self, state, num_steps):
        epoch, start = divmod(state.step, self.epoch_length)
        epochs = range(epoch, epoch - (-(start + num_steps) // self.epoch_length))
        order = np.concatenate([self.order(state.seed, epoch) for epoch in epochs])
        order = order[start : start + num_steps]
        return state[:3], self.data, order, np.uint32(state.seed), np.uint32(state.step)

    def compile(self, state, num_steps):
        """Compile chunks of ``num_steps`` steps; return the seconds of tracing and compiling."""
        start = time.perf_counter()
        lowered = jax.jit(self.chunk, donate_argnums=0).lower(*self.arguments(state, num_steps))
        middle = time.perf_counter()
        self.compiled[num_steps] = lowered.compile(dict(self.compiler_options))
        return middle - start, time.perf_counter() - middle

    def run_chunk(self, state, num_steps):
        """Return the next state and the losses; the arrays of the old state are given up."""
        if num_steps not in self.compiled:
            self.compile(state, num_steps)
        players, losses = self.compiled[num_steps](*self.arguments(state, num_steps))
        return State(*players, state.seed, state.step + num_steps), losses

    def measure(self, num_steps=None, num_chunks=20, seed=0):
        """Time tracing, compiling and the fastest of some chunks (by default of one epoch each)."""
        num_steps, state = num_steps or self.epoch_length, self.init(seed)
        seconds, clocks = self.compile(state, num_steps), []
        for _ in range(num_chunks + 1):
            state, losses = self.run_chunk(state, num_steps)
            losses.block_until_ready()
            clocks.append((time.perf_counter(), time.process_time()))
        spans = np.diff(clocks, axis=0).min(0)
        return Timing(*seconds, *(num_steps / spans).tolist())


make = Loop


def log_likelihood(parameters, rows):
    """Exact log p(v) of each row, summing over all states of the hidden units in float64."""
    W, b, c, scale = (np.asarray(parameters[name], np.float64) for name in ("W", "b", "c", "scale"))
    states = np.array(list(itertools.product((0.0, 1.0), repeat=len(c))))
    push = states @ W.T
    log_z = np.logaddexp.reduce(states @ c + push @ b + np.sum((push * scale) ** 2, 1) / 2)
    log_z += np.sum(np.log(scale)) + len(b) / 2 * np.log(2 * np.pi)
    free = np.sum(((rows - b) / scale) ** 2, 1) / 2 - np.logaddexp(0, c + rows @ W).sum(1)
    return -free - log_z


def check_gradients(loop, state, rows, seed=0):
    """Largest relative errors of the hand-derived gradients of guide, coupling and visible."""
    rng, pairs = np.random.default_rng(seed), 2 * loop.num_particles
    noise = jnp.asarray(rng.standard_normal(rows.shape), jnp.float32)
    draws = rng.uniform(0.01, 0.99, (1 + pairs, loop.batch_size, loop.num_hidden))
    draws, v = jnp.asarray(draws, jnp.float32), rows + loop.noise_scale * noise
    guide, coupling, visible = (player.value for player in state[:3])

    def log_joint(model, v, h):
        square = jnp.sum(((v - model[1][0]) * jnp.exp(-model[1][1])) ** 2, -1) / 2
        return h @ model[0][-1] + jnp.sum((v @ model[0][:-1]) * h, -1) - square

    def bound(guide):
        logits = v @ guide[:-1] + guide[-1]
        logistic, frozen = jnp.log(draws[0] / (1 - draws[0])), lax.stop_gradient(logits)
        h = jax.nn.sigmoid((logits + logistic) * loop.sharpness)
        log_q = jnp.sum(h * frozen - jax.nn.softplus(frozen), -1)
        return jnp.mean(log_q - log_joint((coupling, visible), v, h))

    def surrogate(model, v, h):
        delta = log_joint(model, v, h) - lax.stop_gradient(log_joint(model, v, h))
        return jnp.mean(delta, 0) + jnp.var(delta, 0, ddof=1) / 2

    def along(model):
        return jax.jvp(lambda v: surrogate(model, v, second), (v,), (z,))[1].mean()

    first, second = jnp.split((draws[1:] < jax.nn.sigmoid(v @ guide[:-1] + guide[-1])) * 1.0, 2)
    score = jax.grad(lambda v: surrogate((coupling, visible), v, first).sum())(v)
    z = score + noise / loop.noise_scale
    expected = jax.grad(bound)(guide), *jax.grad(along)((coupling, visible))
    v, noise, draws = (jnp.swapaxes(x, -1, -2) if loop.columns else x for x in (v, noise, draws))
    v = loop.append(v, 1.0)
    sets = loop.particles(guide, v, draws[1:])
    found = loop.model_gradient(coupling, visible, v, noise, *sets)[1:]
    found = loop.guide_gradient(guide, loop.linear(v, coupling), v, draws[0]), *found
    return [float(abs(a - b).max() / abs(b).max()) for a, b in zip(found, expected, strict=True)]
