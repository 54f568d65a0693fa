# SPDX-License-Identifier: Apache-2.0
"""Parts of kernels on continuous sites, and what these refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from kernel_cases import KERNELS, init, make, noised_mixture, run, skewed
from numpyro import handlers
from numpyro.infer import DiscreteGibbs, Gibbs

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.adaptation import (
    Adaptation,
    acceptance_tuner,
    energy_error_tuner,
    search_tuner,
)
from numpyro_ebm.samplers.per_row import per_row


def test_per_row_takes_arguments_that_rows_share():
    rows = per_row(lambda x, beta: -beta * jnp.sum(x**2, -1))
    x = jnp.arange(6.0).reshape(3, 2)
    value, gradient = jax.vmap(jax.value_and_grad(rows), (0, None))(x, 0.5)
    np.testing.assert_allclose(value, -0.5 * jnp.sum(x**2, -1))
    np.testing.assert_allclose(gradient, -x)
    thrice = jax.vmap(jax.grad(lambda x: 3.0 * rows(x, 0.5)))(x)
    np.testing.assert_allclose(thrice, -3 * x)
    many = jax.vmap(jax.vmap(rows, (0, None)), (None, 0))(x, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(many[1], 2 * many[0])
    with pytest.raises(ValueError, match="must not vary by row"):
        jax.vmap(rows)(x, jnp.ones(3))


def test_warm_up_windows():
    adaptation = Adaptation(200, acceptance_tuner(0.5), True, adapt_mass_matrix=True)
    state = adaptation.init(0.1, 30, 2, True, None)
    rng = np.random.default_rng(0)
    sd, shift = np.array([0.1, 3.0]), 100.0 * np.arange(30)[:, None]
    accept = jnp.full(30, 0.5)
    update = jax.jit(lambda i, s, x: adaptation.update(i, s, accept, lambda: x))
    for i in range(210):
        rows = jnp.asarray(shift + sd * rng.normal(size=(30, 2)), jnp.float32)
        if i == 200:
            last = state
        state = update(i, state, rows)
    np.testing.assert_allclose(state.inverse_mass_matrix, sd**2, rtol=0.15)
    jax.tree.map(np.testing.assert_array_equal, state, last)  # warm-up is over


def test_the_energy_error_tuner_finds_its_root():
    tuner = energy_error_tuner()
    rng = np.random.default_rng(0)
    state = tuner.init(jnp.asarray(0.1))
    update = jax.jit(tuner.update)
    for _ in range(300):  # the error is one at ε = 2
        state = update(state, (tuner.current(state) / 2.0) ** 6 * rng.chisquare(20) / 20)
    assert abs(tuner.final(state) / 2.0 - 1) < 0.05


@pytest.mark.parametrize("start", [1e-2, 3e2])
def test_the_search_finds_the_step_of_a_random_walk(start):
    """On N(0, 1) steps of scale ε are accepted with probability (2/π) arctan(2/ε)."""
    tuner, target, unit, rng = search_tuner(0.234), 0.234, 100.0, np.random.default_rng(3)
    best = 2 / np.tan(np.pi / 2 * target)
    state = jax.vmap(tuner.init)(jnp.full(400, start))
    noise, uniform = rng.normal(size=(1_000, 400)), rng.uniform(size=(1_000, 400))

    def step(carry, at):
        x, state = carry
        i, noise, uniform = at
        scale = jnp.where(i < 500, 1.0, unit)  # from the middle on steps are in another unit
        state = jax.tree.map(
            lambda a, b: jnp.where(i == 500, a, b), state.times(jnp.asarray(1 / unit)), state
        )
        y = x + tuner.current(state) * scale * noise
        accept = jnp.exp(jnp.minimum((x**2 - y**2) / 2, 0.0))
        return (jnp.where(uniform < accept, y, x), jax.vmap(tuner.update)(state, accept)), None

    at = np.arange(1_000), noise, uniform
    (_, state), _ = jax.lax.scan(step, (jnp.zeros(400), state), at)
    final, current = unit * np.asarray(tuner.final(state)), unit * np.asarray(tuner.current(state))
    accepted = 2 / np.pi * np.arctan(2 / final)
    assert abs(accepted.mean() - target) < 4 * accepted.std() / 20 + 0.004  # and what it forgot
    assert abs(np.median(final) / best - 1) < 0.05
    assert np.log(final).std() < 0.7 * np.log(current).std()  # an average of them


def bits():
    with numpyro.plate("data", 1):
        h = numpyro.sample("h", ebm.Counting(2, (3,)))
        ebm.energy("E", -jnp.sum(h, -1))


def holes(num_rows=8):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        ebm.energy("bowl", 0.5 * jnp.sum(v**2, -1))
        ebm.energy("hole", jnp.where(jnp.arange(num_rows) == 5, jnp.inf, 0.0) + v[:, 0])


def cusp():
    with numpyro.plate("data", 1):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        ebm.energy("E", jnp.sqrt(jnp.sum(v**2, -1)))


def scalar():
    with numpyro.plate("data", 1):
        v = numpyro.sample("v", ebm.Lebesgue())
        ebm.energy("E", 0.5 * v**2)


@pytest.mark.parametrize("name", KERNELS)
def test_bad_models(name, grbm):
    with pytest.raises(
        ebm.ModelError, match=r"'h'.*discrete.*DiscreteLangevin.*BlockGibbs.*DiscreteGibbs"
    ):
        init(make(name, ebm.fixed(bits, {})))
    with pytest.raises(ebm.ModelError, match=r"'W', 'b', 'c', 'scale'.*fixed"):
        init(make(name, grbm.model))
    with pytest.raises(ebm.ModelError, match=r"not finite.*1 of 8 rows \(rows 5.*'hole'.*init_par"):
        if name == "ReplicaExchange":  # its replicas are 3 x 8 rows, told about at β = 1
            init(make(name, ebm.fixed(holes, {})))
        else:
            init(make(name, ebm.fixed(holes, {})))
    with pytest.raises(ebm.ModelError, match=r"gradient in \['v'\] is not"):
        init(make(name, ebm.fixed(cusp, {})), params={"v": jnp.zeros((1, 2))})
    with pytest.raises(ebm.ModelError, match=r"init_params.*'x'"):
        init(make(name, ebm.fixed(skewed, {})), params={"x": jnp.zeros(1)})


MODEL = ebm.fixed(skewed, {})


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ebm.UnderdampedLangevin(MODEL, step_size=-1.0), "step_size.*positive"),
        (lambda: ebm.UnderdampedLangevin(MODEL, friction=0.0), "friction.*positive"),
        (lambda: ebm.UnderdampedLangevin(MODEL, target_accept_prob=1.0), "target_accept_prob"),
        (
            lambda: init(ebm.UnderdampedLangevin(MODEL), 0),
            "UnderdampedLangevin.*pass a `step_size`",
        ),
        (lambda: ebm.MCLMC(MODEL, 0.0), "step_size.*positive"),
        (lambda: ebm.MCLMC(MODEL, trajectory_length=0.0), "trajectory_length.*positive"),
        (lambda: ebm.MCLMC(MODEL, target_energy_variance=-1), "target_energy_variance.*positive"),
        (lambda: ebm.MCLMC(MODEL, max_num_steps=0), "max_num_steps.*positive"),
        (lambda: init(ebm.MCLMC(ebm.fixed(scalar, {}))), "single coordinate.*MALA"),
        (lambda: ebm.ReplicaExchange(MODEL, step_size=0.0), "step_size.*positive"),
        (lambda: ebm.ReplicaExchange(MODEL, [1.0]), "two or more"),
        (lambda: ebm.ReplicaExchange(MODEL, [0.9, 0.1]), "decrease from 1"),
        (lambda: ebm.ReplicaExchange(MODEL, [1.0, 0.1, 0.5]), "decrease from 1"),
        (lambda: ebm.ReplicaExchange(MODEL, [1.0, -0.1]), "at 0"),
        (lambda: ebm.ReplicaExchange(MODEL, num_replicas=1), "num_replicas.*2"),
        (lambda: ebm.ReplicaExchange(MODEL, min_inverse_temperature=0.0), "inverse_temperatures"),
        (lambda: init(ebm.ReplicaExchange(MODEL, [1.0, 0.0])), r"\['g', 'v'\] is flat"),
        (lambda: init(ebm.ReplicaExchange(MODEL), 0), "ReplicaExchange.*pass a `step_size`"),
        (lambda: ebm.AnnealedLangevin(MODEL), "either `noise_scales` or"),
        (lambda: ebm.AnnealedLangevin(MODEL, [1.0]), "noise_argument.*noise_scale"),
        (lambda: ebm.AnnealedLangevin(MODEL, [0.1, 1.0], noise_scale=0.1), "decreasing"),
        (lambda: ebm.AnnealedLangevin(MODEL, [1.0, 0.0], noise_scale=0.1), "positive and finite"),
        (lambda: ebm.AnnealedLangevin(MODEL, [1.0], noise_scale=-0.1), "noise_scale.*positive"),
        (lambda: ebm.AnnealedLangevin(MODEL, inverse_temperatures=[1.0]), "pass a `step_size`"),
        (
            lambda: ebm.AnnealedLangevin(MODEL, inverse_temperatures=[1.0, 0.1], step_size=1.0),
            "increasing",
        ),
        (
            lambda: ebm.AnnealedLangevin(
                MODEL, inverse_temperatures=[0.5, 2.0], step_size=1.0, noise_scale=0.1
            ),
            "end `inverse_temperatures` with 1",
        ),
        (
            lambda: ebm.AnnealedLangevin(
                MODEL, inverse_temperatures=[1.0], step_size=1.0, noise_argument="sigma"
            ),
            "goes with `noise_scales`",
        ),
        (
            lambda: init(
                ebm.AnnealedLangevin(ebm.fixed(noised_mixture, {}), [1.0], noise_argument="sigma"),
                sigma=1.0,
            ),
            "leave it to the kernel",
        ),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ebm.ModelError, match=message):
        build()


@pytest.mark.slow
def test_replica_exchange_is_no_block_of_gibbs(grbm):
    model = ebm.fixed(grbm.model, grbm.params)
    kernel = Gibbs([(ebm.ReplicaExchange(model), ["v"]), (DiscreteGibbs(model), ["h"])])
    with pytest.raises(ebm.ModelError, match="cannot be a block of `Gibbs`"):
        run(kernel, 5, 5)
    clamped = handlers.condition(model, {"h": jnp.ones((1, 3), int)})
    _, draws = run(ebm.ReplicaExchange(clamped), 5, 5)  # conditioned once and for all it may be
    assert draws["v"].shape == (1, 5, 1, 2)


def test_the_variance_of_a_window_is_that_within_rows_shrunk_by_all_draws():
    """Rows that lie apart are no spread; their draws count together against the five of Stan."""
    x = np.random.default_rng(5).normal(size=(4, 3, 2)) * np.array([2.0, 0.3])
    x = x + np.array([[0.0], [10.0], [-40.0]])
    adaptation = Adaptation(8, acceptance_tuner(0.8), False, True)
    state = adaptation.init(0.1, 3, 2, True, None)
    for draws in x:
        state = adaptation._gather(state, jnp.asarray(draws))
    expected = (12 * x.var(0, ddof=1).mean(0) + 5e-3) / (12 + 5)
    found = adaptation._end_window(state).inverse_mass_matrix
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_trajectories_are_as_long_at_the_typical_step_of_uneven_rows():
    """L over the geometric mean of the rows' steps: 1 of 0.1 and 1.6 is 0.4."""
    kernel = ebm.MCLMC(ebm.fixed(skewed, {}), step_size=0.1, trajectory_length=2.0)
    state = kernel.init(jax.random.key(5), 0, None, (), {"num_rows": 2})
    uneven = state.adapt_state._replace(step_size=jnp.array([0.1, 1.6]))

    def num_steps(i):
        at = state._replace(i=i, adapt_state=uneven)
        return kernel.sample(at, (), {"num_rows": 2}).num_steps

    found = np.asarray(jax.jit(lambda: jax.lax.map(num_steps, jnp.arange(60)))())
    assert abs(found.mean() - 2.0 / 0.4) < 0.6
