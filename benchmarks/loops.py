# SPDX-License-Identifier: Apache-2.0
"""Training loops as one would write them by hand in JAX, one for each objective.

`lax.scan` over a chunk of steps whose random numbers are drawn at once, one flat vector with its
Adam moments for the energy and for each other player, and losses written down for two models: a
Gaussian-Bernoulli RBM and an Ising model. What is summed out is summed in closed form (`grbm_free`)
or state by state (`grbm_states`); scores are `jax.grad`. Parameters bear the names of the library's
sites, in unconstrained coordinates.
"""

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.lax import stop_gradient
from jax.nn import log_sigmoid, sigmoid, softplus
from jax.scipy.special import logsumexp
from numpyro.distributions import biject_to

EPSILON = 1e-8
NUM_HIDDEN, GUIDE_STEPS, PARTICLES, UNROLLED, BOUND_PARTICLES = 4, 5, 2, 5, 5
STATES = np.indices([2] * NUM_HIDDEN).reshape(NUM_HIDDEN, -1).T.astype(np.float32)


class Method(NamedTuple):
    """What a loop does in a round.

    - **loss** - ``(params, players, at, kept) -> scalar``, of the energy.
    - **draw** - ``(rng_key, n, batch) -> dict``: random numbers of n rounds, beside the rows.
    - **prepare** - ``at -> at``: visible values of the round, from the rows ``at["v"]``.
    - **players** - ``(own, params, at, k) -> scalar`` for each, and the steps in a round.
    - **start** - ``v -> kept``, and **advance** - ``(params, at, kept) -> kept`` before the step.
    """

    loss: object
    draw: object = lambda rng_key, n, batch: {}
    prepare: object = lambda at: at
    players: tuple = ()
    start: object = lambda v: None
    advance: object = None


class Loop:
    """A compiled chunk of rounds, and its state.

    :param Method method: what to do.
    :param data: rows.
    :param dict params: initial parameters of the energy.
    :param list players: initial parameters of the players.
    :param level: XLA's optimisation level; its default if ``None``.
    :param int batch: rows in a batch; ``None``: all of them, in their order.
    """

    def __init__(
        self, method, data, params, players, *, level, batch, chunk, learning_rate=1e-3, betas
    ):
        self.method, self.data, self.batch, self.chunk_length = method, data, batch, chunk
        self.learning_rate, self.betas = learning_rate, betas
        self.unravel, vectors = [], []
        for values in (params, *players):
            vector, unravel = ravel_pytree(jax.tree.map(jnp.array, values))  # donated below
            vectors.append((vector, jnp.zeros_like(vector), jnp.zeros_like(vector)))
            self.unravel.append(unravel)
        kept = method.start(jnp.array(data[:batch]))
        self.state = (vectors[0], tuple(vectors[1:]), kept, jnp.array(0))
        options = {"xla_backend_optimization_level": level} if level is not None else {}
        start = time.process_time()
        chunk = jax.jit(self._chunk, donate_argnums=0, compiler_options=options)
        self.compiled = chunk.lower(self.state, jax.random.key(1)).compile()
        self.compile_seconds = time.process_time() - start

    def adam(self, player, gradient, count):
        x, first, second = player
        count, (beta, gamma) = count.astype(float), self.betas
        first = beta * first + (1 - beta) * gradient
        second = gamma * second + (1 - gamma) * gradient**2
        scale = jnp.sqrt(second / (1 - gamma**count)) + EPSILON
        return x - self.learning_rate * first / (1 - beta**count) / scale, first, second

    def step(self, state, draws):
        theta, players, kept, i = state
        rows = draws.pop("rows")
        v = self.data if rows is None else self.data[rows]
        at = self.method.prepare({**draws, "v": v})
        params = self.unravel[0](theta[0])
        others, after = {}, []
        for (loss, num), player, unravel in zip(
            self.method.players, players, self.unravel[1:], strict=True
        ):

            def one(k, player, loss=loss, num=num, unravel=unravel):
                gradient = jax.grad(lambda x: loss(unravel(x), params, at, k))(player[0])
                return self.adam(player, gradient, num * i + k + 1)

            player = one(0, player) if num == 1 else lax.fori_loop(0, num, one, player)
            others.update(unravel(player[0]))
            after.append(player)
        if self.method.advance is not None:
            kept = self.method.advance(params, at, kept)
        value, gradient = jax.value_and_grad(
            lambda x: self.method.loss(self.unravel[0](x), others, at, kept)
        )(theta[0])
        return (self.adam(theta, gradient, i + 1), tuple(after), kept, i + 1), value

    def _chunk(self, state, rng_key):
        key_rows, key_draws = jax.random.split(jax.random.fold_in(rng_key, state[3]))
        n, rows = self.chunk_length, None
        if self.batch is not None:
            rows = jax.random.randint(key_rows, (n, self.batch), 0, len(self.data))
        draws = self.method.draw(key_draws, n, self.batch or len(self.data))
        return lax.scan(self.step, state, {**draws, "rows": rows}, length=n)

    def run(self, num_chunks):
        """Losses of some chunks."""
        found = []
        for _ in range(num_chunks):
            self.state, losses = self.compiled(self.state, jax.random.key(1))
            found.append(np.asarray(losses))  # waits, as a progress bar would
        return np.concatenate(found)

    def measure(self, seconds):
        """Steps per second of processor time, over about some seconds."""
        start, steps = time.process_time(), 0
        while time.process_time() - start < seconds:
            steps += len(self.run(1))
        return steps / (time.process_time() - start)

    def gradients(self):
        """Adam's two moments of every player, as dicts by parameter name."""
        found = ({}, {})
        for unravel, player in zip(self.unravel, (self.state[0], *self.state[1]), strict=True):
            for moments, vector in zip(found, player[1:], strict=True):
                moments.update(unravel(vector))
        return found


# The GRBM


def bowl(p, v):
    return 0.5 * jnp.sum(((v - p["b"]) * jnp.exp(-p["scale"])) ** 2, -1)


def grbm_free(p, v):
    """log p̃(v) in closed form."""
    return jnp.sum(softplus(p["c"] + v @ p["W"]), -1) - bowl(p, v)


def log_joint(p, v, h):
    return jnp.sum((p["c"] + v @ p["W"]) * h, -1) - bowl(p, v)


def grbm_states(p, v):
    """log p̃(v) as a sum over all states of h.

    From 2,304 rows on, as for `maximum_likelihood`, jaxlib 0.10.2 gets it wrong on a CPU, unless
    ``XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=``.
    """
    return logsumexp(jax.vmap(lambda h: log_joint(p, v, h))(jnp.asarray(STATES)), axis=0)


def score_by(free, p, v):
    return jax.grad(lambda v: jnp.sum(free(p, v)))(v)


def dot(x, y):
    return jnp.sum(x * y, -1)


def normal(shape):
    return lambda key, n, batch: {"noise": jax.random.normal(key, (n, *shape(batch)))}


def logits(g, v):
    return v @ g["A"] + g["d"]


def log_bernoulli(h, logits):
    return jnp.sum(h * logits - softplus(logits), -1)


def relaxed_elbo(g, p, v, logistic, frozen=True):
    found = logits(g, v)
    h = sigmoid((found + logistic) / 0.1)
    return jnp.mean(
        log_bernoulli(h, stop_gradient(found) if frozen else found) - log_joint(p, v, h)
    )


GUIDE = (lambda g, p, at, k: relaxed_elbo(g, p, at["v"], at["logistic"][k]), GUIDE_STEPS)


def guide_draws(extra):
    """Logistic noise of the guide's steps, and more."""

    def draw(key, n, batch):
        keys = jax.random.split(key)
        logistic = jax.random.logistic(keys[0], (n, GUIDE_STEPS, batch, NUM_HIDDEN))
        return {"logistic": logistic, **extra(keys[1], n, batch)}

    return draw


# The objectives: each is a function of log p̃(v), and returns a `Method`


def maximum_likelihood(free, num_nodes=48, reach=100.0):
    limit = math.asinh(reach)
    t = np.linspace(-limit, limit, num_nodes)
    index = np.indices([num_nodes] * 2).reshape(2, -1).T
    step = 2 * limit / (num_nodes - 1)
    nodes = jnp.asarray(np.sinh(t)[index], float)
    log_weights = jnp.asarray(np.log(step * np.cosh(t))[index].sum(-1), float)

    def loss(p, _, at, kept):
        spread = jnp.std(at["v"], 0)
        log_density = free(p, jnp.mean(at["v"], 0) + spread * nodes)
        log_normalizer = logsumexp(log_density + log_weights) + jnp.sum(jnp.log(spread))
        return log_normalizer - jnp.mean(free(p, at["v"]))

    return Method(loss)


def gibbs(p, v, at):
    h = (at["uniform"] < sigmoid(p["c"] + v @ p["W"])).astype(float)
    scale = jnp.exp(p["scale"])
    return p["b"] + scale**2 * (h @ p["W"].T) + scale * at["noise"]


def gibbs_draws(key, n, batch):
    keys = jax.random.split(key)
    uniform = jax.random.uniform(keys[0], (n, batch, NUM_HIDDEN))
    return {"uniform": uniform, "noise": jax.random.normal(keys[1], (n, batch, 2))}


def contrastive_divergence(free, persistent=False):
    def advance(p, at, kept):
        return gibbs(p, kept if persistent else at["v"], at)

    def loss(p, _, at, kept):
        return jnp.mean(free(p, kept) - free(p, at["v"]))

    return Method(loss, gibbs_draws, start=lambda v: v, advance=advance)


def score_matching(free):
    def loss(p, _, at, kept):
        score, derivative = jax.linearize(lambda v: score_by(free, p, v), at["v"])
        axes = [jnp.zeros_like(score).at[:, d].set(1.0) for d in range(2)]
        trace = sum(derivative(e)[:, d] for d, e in enumerate(axes))
        return jnp.mean(0.5 * dot(score, score) + trace)

    return Method(loss)


def signs(count):
    def draw(key, n, batch):
        return {"signs": jax.random.rademacher(key, (n, count, batch, 2), float)}

    return draw


def sliced_score_matching(free):
    def loss(p, _, at, kept):
        e = at["signs"][0]
        score, along = jax.jvp(lambda v: score_by(free, p, v), (at["v"],), (e,))
        return jnp.mean(0.5 * dot(score, score) + dot(e, along))

    return Method(loss, signs(1))


def denoising(free, noise_scale=0.05):
    def loss(p, _, at, kept):
        offset = at["noise"] / noise_scale
        score = score_by(free, p, at["v"] + noise_scale * at["noise"])
        control = dot(score_by(free, p, at["v"]), offset)
        control = control + 0.5 * (dot(offset, offset) - 2 / noise_scale**2)
        return jnp.mean(0.5 * jnp.sum((score + offset) ** 2, -1) - control)

    return Method(loss, normal(lambda batch: (batch, 2)))


def multiscale_denoising(free, noise_scale=0.05, low=0.05, high=0.5):
    def draw(key, n, batch):
        keys = jax.random.split(key, 3)
        order = jnp.argsort(jax.random.uniform(keys[0], (n, batch)), -1)
        fraction = (order + jax.random.uniform(keys[1], (n, batch))) / batch
        level = (low + (high - low) * fraction)[..., None]
        return {"level": level, "noise": jax.random.normal(keys[2], (n, batch, 2))}

    def loss(p, _, at, kept):
        level, offset = at["level"], at["noise"] / noise_scale**2
        score = score_by(free, p, at["v"] + level * at["noise"]) / level
        control = dot(score_by(free, p, at["v"]) / level, offset)
        control = control + 0.5 * (dot(offset, offset) - 2 / noise_scale**4)
        return jnp.mean(0.5 * jnp.sum((score + offset) ** 2, -1) - control)

    return Method(loss, draw)


def vages(g, p, v, uniform):
    """The score from one half of the particles, and the surrogate log-density of the other."""
    h = (uniform < sigmoid(logits(g, v))).astype(float)
    first, second = h[:PARTICLES], h[PARTICLES:]
    score = jax.grad(lambda v: jnp.sum(log_joint(p, v, first)) / PARTICLES)(v)

    def surrogate(p, v):
        values = log_joint(p, v, second)
        delta = values - stop_gradient(values)
        return jnp.mean(delta, 0) + 0.5 * jnp.var(delta, 0, ddof=1)

    return score, surrogate


def along(log_density, p, v, direction):
    return jax.jvp(lambda v: log_density(p, v), (v,), (direction,))[1]


def uniforms(count):
    def draw(key, n, batch):
        return {"uniform": jax.random.uniform(key, (n, count, batch, NUM_HIDDEN))}

    return draw


def noise_and_uniforms(count):
    def draw(key, n, batch):
        keys = jax.random.split(key)
        noise = normal(lambda batch: (batch, 2))(keys[0], n, batch)
        return {**noise, **uniforms(count)(keys[1], n, batch)}

    return draw


def noised(noise_scale):
    def prepare(at):
        return {**at, "clean": at["v"], "v": at["v"] + noise_scale * at["noise"]}

    return prepare


def vages_denoising(_, noise_scale=0.05):
    def loss(p, g, at, kept):
        offset = at["noise"] / noise_scale
        score, surrogate = vages(g, stop_gradient(p), at["v"], at["uniform"])
        z = score + offset
        inner = along(surrogate, p, at["v"], z) + dot(z, offset)
        _, clean = vages(g, stop_gradient(p), at["clean"], at["uniform"])
        control = along(clean, p, at["clean"], offset)
        control = control + 0.5 * (dot(offset, offset) - 2 / noise_scale**2)
        return jnp.mean(inner - 0.5 * stop_gradient(inner) - control)

    draw = guide_draws(noise_and_uniforms(2 * PARTICLES))
    return Method(loss, draw, noised(noise_scale), (GUIDE,))


def bilevel_denoising(_, noise_scale=0.05):
    def ratios(p, g, v, at):
        """log p̃(v, h)/q(h | v): with one particle for the score, and with the guide following."""

        def unroll(p):
            def step(g, logistic):
                gradient = jax.grad(relaxed_elbo)(g, p, v, logistic, frozen=False)
                return jax.tree.map(jnp.subtract, g, gradient), None

            return lax.scan(step, g, at["steps"])[0]

        reached = unroll(p)
        fixed = stop_gradient(reached)
        first, second = (at["uniform"] < sigmoid(logits(fixed, v))).astype(float)

        def ratio(p, g, v, h):
            return log_joint(p, v, h) - log_bernoulli(h, logits(g, v))

        score = jax.grad(lambda v: jnp.sum(ratio(stop_gradient(p), fixed, v, first)))(v)
        return score, lambda p, v: ratio(p, reached, v, second)

    def loss(p, g, at, kept):
        offset = at["noise"] / noise_scale
        score, log_density = ratios(p, g, at["v"], at)
        z = score + offset
        inner = along(log_density, p, at["v"], z) + dot(z, offset)
        _, clean = ratios(p, g, at["clean"], at)
        control = along(clean, p, at["clean"], offset)
        control = control + 0.5 * (dot(offset, offset) - 2 / noise_scale**2)
        return jnp.mean(inner - 0.5 * stop_gradient(inner) - control)

    def draw(key, n, batch):
        keys = jax.random.split(key)
        steps = jax.random.logistic(keys[0], (n, UNROLLED, batch, NUM_HIDDEN))
        return {"steps": steps, **noise_and_uniforms(2)(keys[1], n, batch)}

    return Method(loss, guide_draws(draw), noised(noise_scale), (GUIDE,))


def log_standard_normal(v):
    return -0.5 * dot(v, v) - math.log(2 * math.pi)


def logistic_loss(at_data, at_noise):
    return jnp.mean(softplus(-at_data)) + jnp.mean(softplus(at_noise))


def nce(free):
    def loss(p, _, at, kept):
        def contrast(v):
            return free(p, v) - log_standard_normal(v) - p["log_normalizer"]

        return logistic_loss(contrast(at["v"]), contrast(at["noise"]))

    return Method(loss, normal(lambda batch: (batch, 2)))


def variational_nce(_):
    def loss(p, g, at, kept):
        def contrast(v, uniform):
            found = logits(g, v)
            h = (uniform < sigmoid(found)).astype(float)
            bound = logsumexp(log_joint(p, v, h) - log_bernoulli(h, found), axis=0)
            bound = bound - math.log(BOUND_PARTICLES)
            return bound - log_standard_normal(v) - p["log_normalizer"]

        first, second = at["uniform"][:BOUND_PARTICLES], at["uniform"][BOUND_PARTICLES:]
        return logistic_loss(contrast(at["v"], first), contrast(at["noise"], second))

    return Method(loss, guide_draws(noise_and_uniforms(2 * BOUND_PARTICLES)), players=(GUIDE,))


def ranking_nce(free, noise_ratio=10):
    def loss(p, _, at, kept):
        ratio = lambda v: free(p, v) - log_standard_normal(v)  # noqa: E731
        at_data, at_noise = ratio(at["v"]), ratio(at["noise"])
        everyone = jnp.concatenate([at_data[None], at_noise])
        return jnp.mean(logsumexp(everyone, 0) - at_data)

    return Method(loss, normal(lambda batch: (noise_ratio, batch, 2)))


def conditional_nce(free, noise_scale=0.3):
    def loss(p, _, at, kept):
        return jnp.mean(softplus(free(p, at["v"] + noise_scale * at["noise"]) - free(p, at["v"])))

    return Method(loss, normal(lambda batch: (batch, 2)))


def flow_contrastive(free, likelihood_weight=0.1):
    """The flow is NumPyro's distribution, as in the library's program: it is not the loop's."""

    def flow(f):
        scale_tril = biject_to(dist.constraints.lower_cholesky)(f["flow_scale"])
        return dist.MultivariateNormal(f["flow_loc"], scale_tril=scale_tril)

    def flow_draw(f, noise):
        return f["flow_loc"] + noise @ flow(f).scale_tril.T

    def flow_log_density(f, v):
        return flow(f).log_prob(v)

    def both(p, f, at, noise):
        def contrast(v):
            return free(p, v) - flow_log_density(f, v) - p["log_normalizer"]

        return logistic_loss(contrast(at["v"]), contrast(flow_draw(f, noise)))

    def flow_loss(f, p, at, k):
        likelihood = jnp.mean(flow_log_density(f, at["v"]))
        return -both(p, f, at, at["noise"][0]) - likelihood_weight * likelihood

    def loss(p, f, at, kept):
        return both(p, f, at, at["noise"][1])

    return Method(loss, normal(lambda batch: (2, batch, 2)), players=((flow_loss, 1),))


def gram(v):
    """Inverse-square bandwidth times square distances of all pairs, and off-diagonal weights."""
    n = len(v)
    square = jnp.sum((v[:, None] - v) ** 2, -1)
    return square, (1 - jnp.eye(n)) / (n * (n - 1))


def scale_of(square, bandwidth):
    if bandwidth != "median":
        return 1 / bandwidth**2
    return 1 / jnp.median(jnp.sqrt(square[jnp.triu_indices(len(square), 1)])) ** 2


def stein(free, bandwidth=0.1):
    def loss(p, _, at, kept):
        v = at["v"]
        score = score_by(free, p, v)
        square, pair = gram(v)
        scale = scale_of(square, bandwidth)
        k = pair * jnp.exp(-0.5 * scale * square)
        own, other = dot(score, v), score @ v.T
        gradients = scale * (own[:, None] + own - other - other.T)
        return jnp.sum(k * (score @ score.T + gradients + scale * (2 - scale * square)))

    return Method(loss)


def vages_stein(_, bandwidth=0.1):
    def loss(p, g, at, kept):
        v = at["v"]
        score, surrogate = vages(g, stop_gradient(p), v, at["uniform"])
        square, pair = gram(v)
        scale = scale_of(square, bandwidth)
        k = pair * jnp.exp(-0.5 * scale * square)
        pull = scale * (jnp.sum(k, 1)[:, None] * v - k @ v)
        total = jnp.sum(along(surrogate, p, v, k @ score + pull))
        rest = jnp.sum(score * pull) + jnp.sum(k * scale * (2 - scale * square))
        return stop_gradient(rest - total) + 2 * total

    return Method(loss, guide_draws(uniforms(2 * PARTICLES)), players=(GUIDE,))


def energy_discrepancy(free, noise_scale=0.3, num_samples=16):
    def loss(p, _, at, kept):
        moved = at["v"] + noise_scale * (at["noise"][0] + at["noise"][1:])
        ratios = free(p, moved) - free(p, at["v"])
        ratios = jnp.concatenate([jnp.zeros_like(ratios[:1]), ratios])
        return jnp.mean(logsumexp(ratios, 0)) - math.log(num_samples)

    return Method(loss, normal(lambda batch: (num_samples + 1, batch, 2)))


def fisher(free):
    def network(c, v):
        x = v
        for i in range(2):
            x = jax.nn.elu(x @ c[f"critic_weights_{i}"] + c[f"critic_bias_{i}"])
        return x @ c["critic_weights_2"] + c["critic_slope"] * v + c["critic_bias_2"]

    def divergence(p, c, v, e):
        def scores(v):
            score = score_by(free, p, v)
            return c["critic_score_weight"] * score + network(c, v), score

        (f, score), (moved, _) = jax.jvp(scores, (v,), (e,))
        return jnp.mean(dot(score, f) + dot(e, moved) - 0.5 * dot(f, f))

    def critic_loss(c, p, at, k):
        return -divergence(p, c, at["v"], at["signs"][0])

    def loss(p, c, at, kept):
        return divergence(p, c, at["v"], at["signs"][1])

    return Method(loss, signs(2), players=((critic_loss, 1),))


# The Ising model: bits x, signs s = 2x - 1, log p̃ = Σ_{i<j} J_ij s_i s_j

NUM_SITES = 16
PAIRS = np.triu_indices(NUM_SITES, 1)


def couplings(p):
    return jnp.zeros((NUM_SITES, NUM_SITES)).at[PAIRS].set(p["J"])


def log_odds_closed(p, x):
    """log p̃ of the row minus that of each neighbour, by the local fields."""
    s, upper = 2.0 * x - 1.0, couplings(p)
    return 2.0 * s * (s @ (upper + upper.T))


def log_odds_neighbours(p, x):
    """The same by evaluating log p̃ at all neighbours."""

    def log_density(x):
        s = 2.0 * x - 1.0
        return jnp.sum((s @ couplings(p)) * s, -1)

    flip = jnp.eye(NUM_SITES, dtype=x.dtype)
    neighbours = jax.vmap(lambda e: log_density(x + e * (1 - 2 * x)))(flip)
    return (log_density(x) - neighbours).T


def pseudo_likelihood(log_odds):
    return Method(lambda p, _, at, kept: -jnp.mean(jnp.sum(log_sigmoid(log_odds(p, at["v"])), -1)))


def ratio_matching(log_odds):
    return Method(lambda p, _, at, kept: jnp.mean(jnp.sum(sigmoid(-log_odds(p, at["v"])) ** 2, -1)))
