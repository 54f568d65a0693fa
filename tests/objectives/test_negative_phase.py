# SPDX-License-Identifier: Apache-2.0
"""The negative phase: sites that its kernel sums out, and where its latents start."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from divergence_cases import Draw, DrawState, Stay, arrays
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints
from numpyro.handlers import block
from oracles import assert_unbiased, binary_states, draws, flat

import numpyro_ebm as ebm
from numpyro_ebm.marginals.kernel_steps import draw_hidden
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.objectives.persistent_chains import Chains

# log p̃(v, s) = -v²/2 + (b·s) v + c·s for a state s in a table: v given s is N(b·s, 1).
B, C = np.array([-1.0, 0.4, 1.2]), np.array([0.3, -0.2, 0.5])
V, LABELS = np.array([-0.7, 0.2, 1.5, 0.1]), np.array([0, 2, 2, 1])
CLASSES, PAIRS = np.eye(3), binary_states(2)


def parameters(size):
    return numpyro.param("b", jnp.zeros(size)), numpyro.param("c", jnp.zeros(size))


def by_index(v, label):
    b, c = parameters(3)
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        y = numpyro.sample("y", ebm.Counting(3), obs=label)
        ebm.energy("E", 0.5 * v**2 - b[y] * v - c[y])


def along_axis(v, label):
    b, c = parameters(3)
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        y = numpyro.sample("y", ebm.Counting(3), obs=label)
        scores = v[:, None] * b + c
        ebm.energy("E", 0.5 * v**2 - jnp.take_along_axis(scores, y[:, None], -1)[:, 0])


def classifier(v, label):
    """p(v) p(label | v), the form of JEM."""
    b, c = parameters(3)
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        scores = v[:, None] * b + c
        numpyro.sample("y", dist.Categorical(logits=scores), obs=label)
        ebm.energy("E", 0.5 * v**2 - logsumexp(scores, -1))


def event_of_bits(v, label):
    b, c = parameters(2)
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        s = numpyro.sample("s", ebm.Counting(event_shape=(2,)), obs=label)
        ebm.energy("E", 0.5 * v**2 - (s @ b) * v - s @ c)


def plate_of_bits(v, label):
    b, c = parameters(2)
    with numpyro.plate("data", len(v), dim=-1):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        ebm.energy("E", 0.5 * v**2)
        with numpyro.plate("units", 2, dim=-2):
            s = numpyro.sample("s", ebm.Counting(), obs=label.T)
            ebm.energy("E_s", -(b[:, None] * v + c[:, None]) * s)


def two_sites(v, label):
    b, c = parameters(2)
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        s = numpyro.sample("s", ebm.Counting(), obs=label[:, 0])
        t = numpyro.sample("t", ebm.Counting(), obs=label[:, 1])
        ebm.energy("E", 0.5 * v**2 - (b[0] * s + b[1] * t) * v - c[0] * s - c[1] * t)


BITS = PAIRS[[0, 3, 1, 2]].astype(int)
SUMMED = {
    "indexed": (by_index, CLASSES, LABELS),
    "along an axis": (along_axis, CLASSES, LABELS),
    "a classifier": (classifier, CLASSES, LABELS),
    "bits": (event_of_bits, PAIRS, BITS),
    "bits in a plate": (plate_of_bits, PAIRS, BITS),
    "two sites": (two_sites, PAIRS, BITS),
}


def draw_v(rng_key, p, num_rows, states):
    key_s, key_v = jax.random.split(rng_key)
    shift = states @ p["b"]
    index = jax.random.categorical(key_s, states @ p["c"] + 0.5 * shift**2, shape=(num_rows,))
    return {"v": shift[index] + jax.random.normal(key_v, (num_rows,))}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] * (x != "bits")) for x in SUMMED],
)
def test_sites_that_a_kernel_sums_out_are_drawn_from_their_conditional(name):
    """With v from the model the gradient is that of the likelihood of v and label."""
    model, states, label = SUMMED[name]
    size = states.shape[1]
    params = arrays({"b": B[:size], "c": C[:size]})
    rows = states[label] if label.ndim == 1 else label

    def nll(p):
        shift = rows @ p["b"]
        log_z = logsumexp(states @ p["c"] + 0.5 * (states @ p["b"]) ** 2)
        return log_z - jnp.mean(shift * V + rows @ p["c"])

    objective = ebm.ContrastiveDivergence(partial(Draw, draw=partial(draw_v, states=states)))
    data = jnp.asarray(V), jnp.asarray(label)

    def one(key):
        return jax.grad(lambda p: objective.loss(key, p, model, None, *data))(params)

    samples = draws(one, jax.random.key(1), 4_000)
    assert_unbiased(samples, flat(jax.grad(nll)(params)), name)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_kernels_on_part_of_the_sites():
    """v ~ N(b, 1) by a chain on v alone, x ~ N(w v, 1) beside it: the likelihood's gradient."""

    def model(v, x):
        b, w = numpyro.param("b", 0.0), numpyro.param("w", 0.0)
        with numpyro.plate("data", len(v)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
            numpyro.sample("x", dist.Normal(w * v, 1.0), obs=x)
            ebm.energy("E", 0.5 * v**2 - b * v)

    x, params = np.array([0.4, -0.3, 1.0, 0.2]), arrays({"b": 0.3, "w": 0.8})

    def nll(p):
        return jnp.mean(0.5 * (V - p["b"]) ** 2 + 0.5 * (x - p["w"] * V) ** 2)

    def loss_of(kernel):
        objective = ebm.ContrastiveDivergence(kernel, 40)
        args = jnp.asarray(V), jnp.asarray(x)
        return lambda key: jax.grad(lambda p: objective.loss(key, p, model, None, *args))(params)

    integrated = lambda m: ebm.MALA(ebm.integrated(m, ["x"]), step_size=1.0)  # noqa: E731
    samples = draws(loss_of(integrated), jax.random.key(1), 2_000)
    assert_unbiased(samples, flat(jax.grad(nll)(params)), "part")
    hidden = lambda m: ebm.MALA(block(m, hide=["x"]), step_size=1.0)  # noqa: E731
    samples = draws(loss_of(hidden), jax.random.key(2), 2_000)
    assert_unbiased(samples, flat(jax.grad(nll)(params)), "hidden")  # it integrates to one
    absent = lambda m: ebm.MALA(ebm.integrated(m, ["y"]), step_size=1.0)  # noqa: E731
    with pytest.raises(ebm.ModelError, match=r"`integrated`: the model has no site\(s\) \['y'\]"):
        loss_of(absent)(jax.random.key(0))


def test_persistent_chains_keep_the_sites_that_are_drawn():
    params = arrays({"b": B, "c": C})
    objective = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=0.1), persistent=True)
    args = jnp.asarray(V), jnp.asarray(LABELS)

    @jax.jit
    def one_round(key):
        problem = objective.prepare(key, params, by_index, None, args, {})
        start = {"v": args[0], "y": args[1]}
        state = Chains(start, jnp.array(0))
        problem, state = objective.advance(key, params, problem, state)
        return state.position, objective.energy_loss(key, params, problem)

    position, loss = one_round(jax.random.key(0))
    assert position.keys() == {"v", "y"} and position["y"].dtype == args[1].dtype
    assert np.isfinite(loss) and not np.array_equal(position["v"], V)


class StayOnV(Stay):
    """Does not move, and forgets everything but v."""

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        return DrawState({"v": init_params["v"]}, rng_key)


def test_sites_without_a_known_conditional_are_refused():
    def model(v, x):
        with numpyro.plate("data", len(v)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
            x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
            ebm.energy("E", 0.5 * (v - x) ** 2 + x**4)

    objective = ebm.ContrastiveDivergence(StayOnV)
    with pytest.raises(ebm.ModelError, match=r"StayOnV moves \['v'\].*site\(s\) \['x'\].*Gibbs"):
        objective.loss(jax.random.key(0), {}, model, None, jnp.asarray(V), jnp.asarray(V))


# Where latents start


def pair(data):
    """h given v is N(v/2, 1/2)."""
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Lebesgue())
        ebm.energy("E", 0.5 * (v - h) ** 2 + 0.5 * h**2)


def far_guide(data):
    shift = numpyro.param("shift", 2.0)
    with numpyro.plate("data", len(data)):
        numpyro.sample("h", dist.Normal(0.5 * ebm.visible("v", data) + shift, 1.0))


def positive_pair(data):
    """log h given v is N(v/2, 1/2)."""
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Lebesgue(support=constraints.positive))
        ebm.energy("E", 0.5 * (v - jnp.log(h)) ** 2 + 0.5 * jnp.log(h) ** 2 + jnp.log(h))


def positive_guide(data):
    shift = numpyro.param("shift", 2.0)
    with numpyro.plate("data", len(data)):
        numpyro.sample("h", dist.LogNormal(0.5 * ebm.visible("v", data) + shift, 1.0))


def exact_guide(data):
    with numpyro.plate("data", len(data)):
        numpyro.sample("h", dist.Normal(0.5 * ebm.visible("v", data), 0.5**0.5))


def test_the_value_is_a_difference_of_free_energies_where_the_guide_is_exact():
    """-v²/4 of h given v, N(v/2, 1/2): at any particle, of the chains and of the rows."""
    data, weights = jnp.array([0.3, -1.0, 2.0]), jnp.array([1.0, 3.0, 0.5])
    initial = dist.Normal(4.0, 1.0)
    objective = ebm.ContrastiveDivergence(Stay, 1, ebm.VaGES(2), initial=initial)
    model = numpyro.handlers.scale(pair, scale=weights)

    @jax.jit
    def one(key):
        problem = objective.prepare(key, {}, model, exact_guide, (data,), {})
        problem, _ = objective.advance(key, {}, problem, None)
        return problem.noise.position["v"], objective.energy_loss(key, {}, problem)

    v, loss = one(jax.random.key(2))
    assert np.all(v > 1)
    np.testing.assert_allclose(loss, np.mean(weights * (data**2 - v**2) / 4), rtol=1e-5)


def test_latents_of_chains_are_in_their_coordinates():
    """Weights follow log p̃(v, h) at the h > 0 of its logarithm; its Jacobian stays as it is."""

    def model(data):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue(support=constraints.positive))
            ebm.energy("E", 0.5 * v**2 + h + a * v * h)

    objective = ebm.ContrastiveDivergence(
        *(Stay, 1, ebm.VaGES(2)), persistent=True, weighted=True, initial="gaussian"
    )
    params = [{"a": jnp.array(a), "shift": jnp.array(2.0)} for a in (0.3, 0.7)]
    v, u = jnp.array([0.5, -1.0, 2.0]), jnp.array([0.1, 1.0, -2.0])
    state = Chains({"v": v, "h": u}, jnp.array(0), log_weights=jnp.arange(3.0))

    @jax.jit
    def settled(key):
        args = model, positive_guide, (jnp.array([1.0, 2.0]),), {}
        problem = objective.prepare(key, params[0], *args)
        return objective.settle(key, *params, problem, state).log_weights

    found = settled(jax.random.key(2))
    np.testing.assert_allclose(found, np.arange(3.0) - 0.4 * v * np.exp(u), rtol=1e-5)


STARTS = {
    "refined": ebm.VaGES(2, refine=ebm.LangevinRefinement(60, 0.3, adjusted=True)),
    "weighted": ebm.VaGES(400, importance_weighted=True),
    "a bound": ebm.ImportanceBound(400),
    "unrolled": ebm.Unrolled(num_steps=40, step_size=0.3),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "refined")) for x in STARTS]
)
@pytest.mark.parametrize(
    "model, guide",
    [(pair, far_guide), pytest.param(positive_pair, positive_guide, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("persistent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_chains_start_where_the_positive_phase_has_its_latents(name, model, guide, persistent):
    """The guide is two standard deviations off; what follows it in the marginal mends that."""
    data = jnp.linspace(-1.0, 1.0, 2_000)
    objective = ebm.ContrastiveDivergence(Stay, 1, STARTS[name], persistent=persistent)
    params = {"shift": jnp.array(2.0)}

    @jax.jit
    def start(key):
        problem = objective.prepare(key, params, model, guide, (data,), {})
        if persistent:
            return objective.init_state(key, params, problem).position["h"]
        return objective.advance(key, params, problem, None)[0].noise.position["h"]

    error = np.asarray(start(jax.random.key(0)) - 0.5 * data)
    assert abs(np.mean(error)) < 4 * np.std(error) / np.sqrt(len(data)) + 0.02


def beside(data):
    """A positive site whose law reads another; no energy does."""
    with numpyro.plate("data", len(data["v"])):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data["v"])
        numpyro.sample("x", dist.LogNormal(v, 0.5), obs=data["x"])
        ebm.energy("E", 0.5 * v**2)


def test_sites_that_a_kernel_does_not_see_are_drawn_in_their_coordinates():
    """Given the others, where the chains are: the logarithm of x is normal around v."""
    data = {"v": jnp.zeros(4_000), "x": jnp.ones(4_000)}
    row_model = read_model(beside, (data,), {})
    position = {"v": jnp.linspace(-1.0, 1.0, 4_000)}
    u = draw_hidden(jax.random.key(5), row_model, {}, position, ["x"])["x"]
    gap = np.asarray(u - position["v"])
    assert abs(gap.mean()) < 4.5 * 0.5 / np.sqrt(4_000)
    np.testing.assert_allclose(gap.std(), 0.5, rtol=4.5 / np.sqrt(8_000))
