# SPDX-License-Identifier: Apache-2.0
"""Chains that are not one a row of the batch: their number, buffers, starts, chains of rows."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from divergence_cases import BITS, KEY, RBM, Draw, Stay, arrays, draw_grbm, rbm, rbm_plated
from numpyro.distributions import constraints
from oracles import assert_unbiased, draws, flat, jit
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm_log_normalizer
from numpyro_ebm.objectives.chain_starts import spread_of_rows, visible_log_density
from numpyro_ebm.objectives.plan import BatchRows


def rounds(objective, model, params, data, keys, guide=None):
    """The state at the start and after every round at fixed parameters, and their chains."""
    problem = objective.prepare(KEY, params, model, guide, (jnp.asarray(data),), {})

    def one(key, state):
        problem_of_round, state = objective.advance(key, params, problem, state)
        return problem_of_round.noise, state

    one, first = jit(one), jit(lambda: objective.init_state(KEY, params, problem))
    states, moved = [first()], []
    for key in keys:
        chains, state = one(key, states[-1])
        states.append(state)
        moved.append(chains)
    return states, moved


class Step(Stay):
    """Adds one to all values."""

    def sample(self, state, model_args, model_kwargs):
        return state._replace(z={name: x + 1.0 for name, x in state.z.items()})


def still(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * v**2)


def still_scaled(data):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def rates(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=data)
        ebm.energy("E", v)


def levels(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(4), obs=data)
        ebm.energy("E", 0.1 * v)


def shares(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", dist.Dirichlet(jnp.ones(2)), obs=data)
        ebm.energy("E", v[:, 0])


def test_a_round_moves_so_many_chains_of_the_buffer():
    objective = ebm.ContrastiveDivergence(Step, persistent=True, num_chains=5, buffer=12)
    keys = jax.random.split(KEY, 6)
    states, moved = rounds(objective, still, {}, jnp.zeros(3), keys)
    positions = np.stack([x.position["v"] for x in states])
    np.testing.assert_array_equal(positions[0], 0.0)  # none has moved yet
    steps = np.diff(positions, axis=0)
    assert set(np.unique(steps)) == {0.0, 1.0} and np.all(steps.sum(1) == 5)
    assert len(np.unique(steps, axis=0)) > 1  # not the same ones every time
    for before, step, negative in zip(positions, steps, moved, strict=False):
        chains = np.sort(negative.position["v"])
        np.testing.assert_array_equal(chains, np.sort(before[step == 1]) + 1)
    assert int(states[-1].history.spacing) == round(4 * 12 / 5)


def test_chains_beyond_the_rows_have_noise_of_their_own():
    """They go through the model as many at a time as the batch has rows."""
    kernel = partial(ebm.MALA, step_size=0.5)
    objective = ebm.ContrastiveDivergence(kernel, persistent=True, num_chains=5)
    _, (moved,) = rounds(objective, still, {}, jnp.zeros(2), [KEY])
    assert len(np.unique(moved.position["v"])) == 5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_chains", [2, 7])
def test_any_number_of_chains_has_the_gradient_of_the_likelihood(num_chains):
    """Also with weights of the rows, which are none of the chains."""
    system = oracles.grbm_system(num_rows=4)
    weights = jnp.array([1.0, 0.25, 2.0, 0.5])

    def model(data):
        with numpyro.handlers.scale(scale=weights):
            return system.model(data)

    params, data = arrays(system.params), jnp.asarray(system.data)
    draw = partial(Draw, draw=draw_grbm)
    objective = ebm.ContrastiveDivergence(draw, persistent=True, num_chains=num_chains)

    def one(key):
        problem = objective.prepare(KEY, params, model, None, (data,), {})
        keys = jax.random.split(key, 3)
        chains = objective.init_state(keys[0], params, problem)
        problem, _ = objective.advance(keys[1], params, problem, chains)
        return jax.grad(lambda p: objective.energy_loss(keys[2], p, problem))(params)

    def nll(p):
        rows = jax.vmap(lambda v: system.log_density(p, v))(data)
        return jnp.mean(weights * (grbm_log_normalizer(p) - rows))

    assert_unbiased(draws(one, KEY, 3_000), flat(jax.grad(nll)(params)), "pool")


def start_of(initial, model, params, data, num=1_000):
    objective = ebm.ContrastiveDivergence(
        Stay, persistent=True, num_chains=num, initial=initial, history=None
    )
    (state,), _ = rounds(objective, model, params, data, [])
    return np.asarray(state.position["v"], float)


def interval(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,), constraints.interval(1.0, 3.0)), obs=data)
        ebm.energy("E", jnp.sum(v, -1))


def test_chains_begin_at_noise_at_a_gaussian_or_at_the_data():
    rng = np.random.default_rng(0)
    bits = start_of("uniform", rbm, RBM, BITS)
    assert bits.shape == (1_000, 4) and np.all(np.abs(bits.mean(0) - 0.5) < 4.5 / 2 / 1_000**0.5)
    assert start_of("uniform", rbm_plated, RBM, BITS).shape == (1_000, 4)
    biased = start_of(dist.Bernoulli(0.9).expand([4]).to_event(1), rbm, RBM, BITS)
    assert np.all(np.abs(biased.mean(0) - 0.9) < 4.5 * 0.3 / 1_000**0.5)
    data = jnp.asarray(rng.uniform(1.5, 2.0, size=(9, 2)), jnp.float32)
    u = start_of("uniform", interval, {}, data)
    v = 1 + 2 / (1 + np.exp(-u))
    assert np.all(np.abs(v.mean(0) - 2.0) < 4.5 / 3**0.5 / 1_000**0.5) and v.std() > 0.5
    u, logits = start_of("gaussian", interval, {}, data), np.log((data - 1) / (3 - data))
    np.testing.assert_allclose(u.mean(0), logits.mean(0), atol=4.5 * logits.std(0).max() / 31)
    np.testing.assert_allclose(u.std(0), logits.std(0), rtol=4.5 / 2_000**0.5)
    part = start_of(dist.Uniform(3.0, 4.0), still, {}, jnp.zeros(3))  # of the real line
    assert np.all((part >= 3.0) & (part <= 4.0)) and np.ptp(part) > 0.9
    part = start_of(dist.Uniform(1.2, 1.4).expand([2]).to_event(1), interval, {}, data)
    assert np.all(np.abs(1 + 2 / (1 + np.exp(-part)) - 1.3) < 0.1001)
    rows = start_of("data", still, {}, jnp.arange(3.0), num=7)
    np.testing.assert_array_equal(rows, [0, 1, 2, 0, 1, 2, 0])


def weighed(data, weights):
    with numpyro.handlers.scale(scale=weights), numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((3,), constraints.positive), obs=data)
        ebm.energy("E", jnp.sum(v, -1))


def test_a_fitted_gaussian_has_the_moments_of_the_weighted_rows():
    """In unconstrained coordinates; of one that is constant the deviation is one."""
    data = np.array([[1.0, 0.2, 3.0], [2.0, 1.5, 3.0], [0.5, 4.0, 3.0], [9.0, 9.0, 9.0]])
    weights = np.array([1.0, 3.0, 0.5, 0.0])  # the last row does not count
    args = jnp.asarray(data), jnp.asarray(weights)
    problem = ebm.ContrastiveDivergence(Stay).prepare(KEY, {}, weighed, None, args, {})
    u = np.log(data)
    mean = np.average(u, 0, weights)
    std = np.sqrt(np.average((u - mean) ** 2, 0, weights))
    std[2] = 1.0
    np.testing.assert_allclose(spread_of_rows(problem)["v"], np.tile(std, (4, 1)), rtol=1e-5)
    points = np.random.default_rng(3).normal(size=(6, 3)).astype(np.float32)
    found = visible_log_density("gaussian", {}, problem, {"v": jnp.asarray(points)})
    np.testing.assert_allclose(found, stats.norm.logpdf(points, mean, std).sum(-1), rtol=1e-5)


def three_to_six(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", dist.DiscreteUniform(3, 6), obs=data)
        ebm.energy("E", 0.1 * v)


def test_uniform_starts_are_at_all_values_alike():
    problem = ebm.ContrastiveDivergence(Stay).prepare(
        *(KEY, {}, three_to_six, None, (jnp.array([4, 5]),), {})
    )
    points = {"v": jnp.array([3, 4, 5, 6, 6])}
    found = visible_log_density("uniform", {}, problem, points)
    np.testing.assert_allclose(found, -np.log(4.0), rtol=1e-6)


@pytest.mark.parametrize("loc, adjusted", [(50.0, False), (0.0, True)])
def test_resets_go_to_where_chains_begin(loc, adjusted):
    """A share of them, and where that is the law of the model a test accepts all of it."""
    objective = ebm.ContrastiveDivergence(
        *(Stay,),
        **{"persistent": True, "reset_probability": 0.3, "adjusted_resets": adjusted},
        initial=dist.Normal(loc, 1.0),
    )
    states, _ = rounds(objective, still, {}, jnp.zeros(1_000), [jax.random.key(3)])
    before, after = (np.asarray(x.position["v"]) for x in states)
    assert np.all(np.abs(before - loc) < 10)
    share = np.mean(before != after)
    assert abs(share - 0.3) < 4.5 * (0.21 / 1_000) ** 0.5


def test_a_penalty_of_energies():
    """α times the mean squared energies of rows and of chains, here at the rows too."""
    data = jnp.array([1.0, 2.0])

    def model(data):
        offset = numpyro.param("offset", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", dist.Normal(0, 1), obs=data)
            ebm.energy("E", offset + v)

    def loss(penalty):
        objective = ebm.ContrastiveDivergence(Stay, energy_penalty=penalty)
        of = lambda p: objective.loss(KEY, p, model, None, data)  # noqa: E731
        return jax.value_and_grad(of)({"offset": jnp.array(0.5)})

    value, gradient = loss(0.1)
    energies = 0.5 + np.asarray(data)
    np.testing.assert_allclose(value, 0.1 * 2 * np.mean(energies**2), rtol=1e-6)
    np.testing.assert_allclose(gradient["offset"], 0.1 * 4 * np.mean(energies), rtol=1e-6)


def near(x, data):
    w = numpyro.param("w", jnp.array(0.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 5e5 * (v - x) ** 2 + w * v)


@pytest.mark.parametrize(
    "num_steps, batch_size", [(3, 5), pytest.param(1, None, marks=pytest.mark.slow)]
)
def test_every_row_has_a_chain_of_its_own_which_meets_its_own_covariates(num_steps, batch_size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=20), jnp.float32)
    objective = ebm.ContrastiveDivergence(
        ebm.BlockGibbs, persistent=True, initial=dist.Normal(50.0, 1.0)
    )
    svi = ebm.EnergySVI(near, None, optax.sgd(1e-8), objective)
    fit = svi.run(KEY, num_steps, x, jnp.zeros(20), batch_size=batch_size, progress_bar=False)
    chains = fit.state.objective_state
    begun, v = np.asarray(chains.begun), np.asarray(chains.position["v"])
    assert begun.sum() == num_steps * (batch_size or 20)
    np.testing.assert_allclose(v[begun], x[begun], atol=0.01)
    with pytest.raises(ebm.ModelError, match="nothing is remembered.*a row of the data"):
        svi.loss.chain_diagnostics(fit.state)


def test_a_chain_of_a_row_begins_when_the_row_is_first_in_a_batch():
    data = jnp.arange(1.0, 21.0)
    objective = ebm.ContrastiveDivergence(Step, persistent=True)

    def after(state, rows):
        args = jnp.zeros(5), data[jnp.array(rows)]
        problem = objective.prepare(KEY, {"w": 0.0}, near, None, args, {})
        problem = problem._replace(rows=BatchRows(jnp.array(rows), 20))
        if state is None:
            state = objective.init_state(KEY, {"w": 0.0}, problem)
        problem, state = objective.advance(KEY, {"w": 0.0}, problem, state)
        np.testing.assert_array_equal(
            problem.noise.position["v"], state.position["v"][jnp.array(rows)]
        )
        return state

    state = after(None, [7, 0, 3, 19, 4])
    state = after(state, [1, 7, 2, 19, 5])
    steps = np.zeros(20)
    steps[[7, 0, 3, 19, 4, 1, 2, 5]], steps[[7, 19]] = 1, 2
    moved = steps > 0
    np.testing.assert_array_equal(state.begun, moved)
    np.testing.assert_array_equal(state.position["v"][moved], (data + steps)[moved])


def grouped(x, group, data):
    w, s = numpyro.param("w", jnp.zeros(3)), numpyro.param("s", jnp.array(0.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * jnp.exp(s) * (v - w[group] * x) ** 2)


@pytest.mark.slow
def test_conditional_chains_learn_a_regression():
    """Least squares in each group, and the residual variance, from 200 rows and a group index."""
    rng = np.random.default_rng(1)
    x, group = rng.normal(size=200), np.arange(200) % 3
    y = np.array([1.0, -2.0, 0.5])[group] * x + 0.5 * rng.normal(size=200)
    slopes = [np.sum((x * y)[group == g]) / np.sum((x**2)[group == g]) for g in range(3)]
    log_precision = -np.log(np.mean((y - np.asarray(slopes)[group] * x) ** 2))
    objective = ebm.ContrastiveDivergence(
        partial(ebm.MALA, step_size=0.1), 3, persistent=True, initial="gaussian"
    )
    optim = optax.adam(optax.exponential_decay(0.05, 400, 0.3))
    svi = ebm.EnergySVI(grouped, None, optim, objective)
    args = jnp.asarray(x), jnp.asarray(group), jnp.asarray(y)
    fit = svi.run(KEY, 2_500, *args, batch_size=50, progress_bar=False)
    np.testing.assert_allclose(fit.params["w"], slopes, atol=0.05)
    np.testing.assert_allclose(fit.params["s"], log_precision, atol=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_chains": 3}, "without `persistent=True`.*`num_chains`"),
        ({"buffer": 3}, "without `persistent=True`.*`buffer`"),
        ({"persistent": True, "num_chains": 5, "buffer": 3}, "5 are more than the 3"),
        ({"persistent": True, "num_chains": 0}, "`num_chains` must be a positive integer"),
        ({"persistent": True, "initial": "noise"}, '`initial` must be "data", "gaussian"'),
        ({"persistent": True, "history": "all"}, "`history` must be 'light' or 'full'"),
        ({"energy_penalty": -1.0}, "`energy_penalty` must be positive"),
        ({"weighted": True}, "without `persistent=True`.*`weighted`"),
        ({"persistent": True, "weighted": True}, "begin at a distribution whose density"),
        ({"persistent": True, "adjusted_resets": True}, "wants a `reset_probability`"),
        (
            {"persistent": True, "adjusted_resets": True, "reset_probability": 1.0},
            "tested against the density",
        ),
        (
            {"persistent": True, "weighted": True, "initial": "gaussian", "buffer": 9},
            "drop `buffer` and `reset_probability`",
        ),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ebm.ModelError, match=message):
        ebm.ContrastiveDivergence(ebm.BlockGibbs, **options)


@pytest.mark.parametrize(
    "options, num_rows",
    [
        ({"num_chains": 3, "buffer": 3}, 9),
        ({"buffer": 3}, 3),
        ({"reset_probability": 1.0}, 1),
        ({"reset_probability": 1e-9, "adjusted_resets": True, "initial": "gaussian"}, 1),
        ({"kl_weight": 1e-9, "kl_step_size": 1e-9, "num_chains": 2}, 1),
        ({"kl_weight": 1.0, "kl_step_size": 1.0, "persistent": False}, 1),
        ({"weighted": True, "initial": "gaussian", "num_chains": 1}, 1),
    ],
)
def test_options_go_together_up_to_their_ends(options, num_rows):
    nothing = {name: {} for name in ("covariates", "priors", "latent", "visible")}
    objective = ebm.ContrastiveDivergence(Stay, **{"persistent": True, **options})
    objective._options.check_model(SimpleNamespace(num_rows=num_rows, **nothing))
    assert objective._options.num_moving(SimpleNamespace(num_rows=5)) == options.get(
        "num_chains", 5
    )


@pytest.mark.parametrize(
    "model, args, options, message",
    [
        (rbm, (BITS,), {"initial": "gaussian"}, r"\['v'\] are discrete"),
        (
            *(rbm, (BITS,)),
            {"initial": "uniform", "reset_probability": 1.0, "adjusted_resets": True},
            r"\['h'\] summed out exactly",
        ),
        (still, (jnp.zeros(3),), {"initial": "uniform"}, "bounded or finite.*'v'"),
        (still, (jnp.zeros(3),), {"buffer": 2}, "as the batch has rows, 3.*the 2 of `buffer`"),
        (rbm, (BITS,), {"energy_penalty": 0.1}, r"latent site\(s\) \['h'\]"),
        (
            *(still, (jnp.zeros(3),)),
            *({"initial": dist.Uniform(), "weighted": True, "num_chains": 64}, "and everywhere"),
        ),
        (levels, (jnp.arange(3),), {"initial": dist.Bernoulli(0.5)}, "where the data do"),
        (rates, (jnp.ones(3),), {"initial": dist.Normal(0, 1)}, "where the data do\\."),
        (rates, (jnp.ones(3),), {"initial": dist.Uniform(-0.5, 1)}, "where the data do\\."),
        (
            shares,
            (jnp.full((3, 2), 0.5),),
            {"initial": dist.Normal(0, 1).expand([2]).to_event(1)},
            "where",
        ),
        (
            rbm,
            (BITS,),
            {"initial": dist.Categorical(logits=jnp.zeros(3)).expand([4]).to_event(1)},
            "where",
        ),
        (near, (jnp.arange(3.0), jnp.zeros(3)), {"num_chains": 4}, "drop `num_chains`"),
        (near, (jnp.arange(3.0), jnp.zeros(3)), {"buffer": 4}, "drop `buffer`"),
    ],
)
def test_models_that_options_do_not_go_with(model, args, options, message):
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True, **options)
    svi = ebm.EnergySVI(model, None, optax.sgd(0.1), objective)
    with pytest.raises(ebm.ModelError, match=message):
        svi.run(KEY, 1, *map(jnp.asarray, args), progress_bar=False)


def draw_rows(rng_key, params, num_rows):
    return {"v": jax.random.normal(rng_key, (num_rows, 3_072))}


@pytest.mark.parametrize("kernel, is_stuck", [(Stay, True), (partial(Draw, draw=draw_rows), False)])
def test_a_light_history_of_many_coordinates(kernel, is_stuck):
    """128 chains of 3,072 coordinates: under a MB, and stuck chains are still seen."""
    data = jax.random.normal(KEY, (128, 3_072))

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((3_072,)), obs=data)
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1))

    objective = ebm.ContrastiveDivergence(kernel, persistent=True)
    problem = objective.prepare(KEY, {}, model, None, (data,), {})
    chains = objective.init_state(KEY, {}, problem)
    assert sum(x.nbytes for x in jax.tree.leaves(chains.history)) < 1e6
    advance = jit(lambda key, chains: objective.advance(key, {}, problem, chains)[1])
    for key in jax.random.split(KEY, 24):
        chains = advance(key, chains)
    r_hat = chains.history.r_hat(chains.num_rounds)["projections"]
    assert r_hat.shape == (16,) and np.all(r_hat > 3 if is_stuck else r_hat < 2)


RESUMED = {
    "a buffer": (
        still_scaled,
        {"num_chains": 6, "buffer": 9, "reset_probability": 0.3, "initial": dist.Normal(0.0, 2.0)},
    ),
    "weights": (still_scaled, {"num_chains": 64, "weighted": True, "initial": "gaussian"}),
    "rows": (grouped, {"initial": "gaussian", "energy_penalty": 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_runs_resume_from_a_file_bit_for_bit(name, tmp_path):
    model, options = RESUMED[name]
    rng = np.random.default_rng(0)
    args = jnp.asarray(rng.normal(size=20), jnp.float32), jnp.arange(20) % 3
    args = (*args, args[0] + 0.5) if model is grouped else args[:1]
    kernel = partial(ebm.MALA, step_size=0.2)
    objective = ebm.ContrastiveDivergence(kernel, 2, persistent=True, **options)
    svi = ebm.EnergySVI(model, None, optax.adam(0.01), objective)
    run = partial(svi.run, batch_size=5, progress_bar=False)
    whole, first = run(KEY, 13, *args), run(KEY, 6, *args)
    ebm.save(tmp_path / "fit", first)
    second = run(KEY, 7, *args, init_state=ebm.load(tmp_path / "fit").state)
    for x, y in zip(jax.tree.leaves(whole.state), jax.tree.leaves(second.state), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)
    losses = np.concatenate([first.losses, second.losses])
    np.testing.assert_array_equal(losses, whole.losses)
    args = tuple(jnp.concatenate([x, x[:5]]) for x in args)
    if name == "rows":
        with pytest.raises(ebm.ModelError, match="holds 20 persistent chains.*should be 25"):
            run(KEY, 1, *args, init_state=first.state)
