# SPDX-License-Identifier: Apache-2.0
"""Networks with a state: it is held, and its random keys are new in every round."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro.contrib.module import nnx_module
from numpyro.primitives import mutable

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model

KEY = jax.random.key(0)
DATA = jax.random.normal(KEY, (6, 3))


def counting(data=None, rows=1, noisy=False):
    """A state that the model reads and changes; with a random key in it, if it is noisy."""
    state = mutable("net$state", {"shift": jnp.array(0.5), "key": jax.random.key(3)})
    slope = numpyro.param("slope", jnp.ones(3))
    with numpyro.plate("data", rows if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
        on = jax.random.bernoulli(state["key"], 0.5, v.shape) if noisy else 1.0
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - (on * (v - state["shift"])) @ slope)
    state["shift"] = state["shift"] + 1.0


def test_a_state_is_read_as_it_starts():
    """Whatever the model does to it, in every evaluation."""
    slope, v = jnp.arange(1.0, 4.0), DATA + 1.0
    row_model = read_model(counting, (DATA,))
    for _ in range(2):
        found = row_model.log_density({"slope": slope}, {"v": v})
        expected = (v - 0.5) @ slope - 0.5 * jnp.sum(v**2, -1)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_state_is_held_at_its_start():
    """Whatever the model does to it: in a run, and in draws of the fixed model."""
    objective = ebm.ScoreMatching()
    svi = ebm.EnergySVI(counting, None, optax.sgd(0.5), objective)
    fit = svi.run(KEY, 30, DATA, progress_bar=False)
    np.testing.assert_allclose(fit.params["slope"], DATA.mean(0), atol=1e-3)
    row_model = read_model(counting, (DATA,), {}, fit.params)
    energy = 0.5 * jnp.sum(DATA**2, -1) - (DATA - 0.5) @ fit.params["slope"]
    np.testing.assert_allclose(row_model.log_density(fit.params, {"v": DATA}), -energy, rtol=1e-5)
    log_z = ebm.log_normalizer(KEY, ebm.fixed(counting, fit.params)).value
    slope = fit.params["slope"]
    expected = 1.5 * np.log(2 * np.pi) + 0.5 * jnp.sum(slope**2) - 0.5 * jnp.sum(slope)
    np.testing.assert_allclose(log_z, expected, atol=1e-2)


def test_keys_of_a_state_are_new_in_every_round_and_the_same_in_one():
    objective = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=0.1), 2)
    params = {"slope": jnp.arange(1.0, 4.0)}

    @jax.jit
    def one(key):
        problem = objective.prepare(key, params, counting, None, (DATA,), {"noisy": True})
        row_model = problem.row_model
        twice = [row_model.log_density(params, {"v": DATA}) for _ in range(2)]
        problem, _ = objective.advance(key, params, problem, None)
        return *twice, objective.energy_loss(key, params, problem)

    found = [one(jax.random.key(i)) for i in range(2)]
    for first, second, loss in found:
        np.testing.assert_array_equal(first, second)
        assert np.isfinite(loss)
    assert np.max(np.abs(found[0][0] - found[1][0])) > 0.1
    with pytest.raises(ebm.ModelError, match=r"one log Z.*state 'net\$state' of a network"):
        ebm.NCE(numpyro.distributions.Normal(0, 1).expand([3]).to_event(1)).loss(
            KEY, {**params, "log_normalizer": 0.0}, counting, None, DATA, noisy=True
        )


def network(make, data=None, rows=1):
    net = nnx_module("net", make())
    with numpyro.plate("data", rows if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + net(v)[..., 0])


def layers(kind):
    nnx = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    first, last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
    middle = {
        "dropout": lambda: nnx.Dropout(0.5, rngs=rngs),
        "frozen statistics": lambda: nnx.BatchNorm(8, use_running_average=True, rngs=rngs),
        "statistics of the batch": lambda: nnx.BatchNorm(8, rngs=rngs),
        "statistics of the row": lambda: nnx.LayerNorm(8, rngs=rngs),
        "spectral norm": lambda: nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs),
    }[kind]()
    return nnx.Sequential(first, jax.nn.silu, middle, last)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["dropout", "frozen statistics", "statistics of the row", "spectral norm"]
)
@pytest.mark.parametrize(
    "objective",
    [
        ebm.DenoisingScoreMatching(0.3),
        ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=0.1), 3),
    ],
)
def test_networks_with_a_state_train_and_are_sampled(kind, objective):
    model = partial(network, partial(layers, kind))
    svi = ebm.EnergySVI(model, None, optax.adam(0.01), objective)
    fit = svi.run(KEY, 20, DATA, progress_bar=False)
    assert np.all(np.isfinite(fit.losses))
    draws = ebm.sample(KEY, ebm.fixed(model, fit.params), 20, num_warmup=20)
    assert np.all(np.isfinite(draws["v"]))


def test_statistics_of_the_batch_couple_its_rows():
    model = partial(network, partial(layers, "statistics of the batch"))
    with pytest.raises(ebm.ModelError, match="'E' of a row depends on other rows"):
        read_model(model, (DATA,))


@pytest.mark.parametrize("twice, error", [(False, TypeError), (True, ebm.ModelError)])
def test_a_module_asks_for_its_parameters_before_it_declares_them(twice, error):
    """As NumPyro's modules do, and what fails after that has another reason."""

    def model(data):
        if numpyro.param("net$params", 1.0 if twice else None) is None or twice:
            numpyro.param("net$params", jnp.ones(3))
        raise TypeError("of the network")

    message = "named 'net" if twice else "of the network"
    with pytest.raises(error, match=message):
        read_model(model, (DATA,))


def held_by_linen():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.SpectralNorm(linen.Dense(8), n_steps=5)(x, update_stats=True)
            return linen.Dense(1)(jax.nn.silu(x))

    net = Net()
    start = net.init(KEY, DATA)
    params, state = start["params"], {"batch_stats": start["batch_stats"]}

    def declare():
        own = numpyro.param("net", params)
        return lambda v: net.apply({"params": own, **state}, v, mutable=["batch_stats"])[0]

    return declare


def held_by_equinox():
    eqx = pytest.importorskip("equinox")
    from numpyro.contrib.module import eqx_module

    class Net(eqx.Module):
        first: eqx.nn.SpectralNorm
        last: eqx.nn.Linear

        def __call__(self, x, state):
            x, _ = self.first(x, state)
            return self.last(jax.nn.silu(x))

    def make():
        keys = jax.random.split(KEY, 3)
        first = eqx.nn.Linear(3, 8, key=keys[0])
        first = eqx.nn.SpectralNorm(first, "weight", num_power_iterations=5, key=keys[1])
        return Net(first, eqx.nn.Linear(8, 1, key=keys[2]))

    made, state = eqx.nn.make_with_state(make)()

    def declare():
        net, own = eqx_module("net", made), jax.tree.map(lambda x: x, state)  # used once
        return jax.vmap(lambda row: net(row, own))

    return declare


@pytest.mark.slow
@pytest.mark.parametrize("hold", [held_by_linen, held_by_equinox])
def test_a_state_that_the_model_closes_over_is_held(hold):
    declare = hold()

    def model(data=None, rows=1):
        net = declare()
        with numpyro.plate("data", rows if data is None else len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + net(v)[..., 0])

    svi = ebm.EnergySVI(model, None, optax.adam(0.01), ebm.DenoisingScoreMatching(0.3))
    fit = svi.run(KEY, 3, DATA, progress_bar=False)
    assert np.all(np.isfinite(fit.losses))
    energies = [read_model(model, (DATA,), {}, fit.params) for _ in range(2)]
    found = [x.log_density(fit.params, {"v": DATA}) for x in energies]
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_spectral_norms_are_projected_between_rounds():
    """The recipe of the docs: an Optax transformation, for the networks of any framework."""

    def inside(w):
        return w / jnp.maximum(1.0, jnp.linalg.norm(w, 2)) if w.ndim == 2 else w

    projection = optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, w: inside(w + u) - w, updates, params)
    )
    model = partial(network, partial(layers, "statistics of the row"))
    optim = optax.chain(optax.adam(0.3), projection)
    objective = ebm.ContrastiveDivergence(partial(ebm.ULA, step_size=0.05), 2, persistent=True)
    fit = ebm.EnergySVI(model, None, optim, objective).run(KEY, 20, DATA, progress_bar=False)
    norms = [jnp.linalg.norm(w, 2) for w in jax.tree.leaves(fit.params) if jnp.ndim(w) == 2]
    assert len(norms) == 2
    np.testing.assert_allclose(norms, 1.0, atol=1e-4)


def test_a_state_without_a_start_is_refused():
    linen = pytest.importorskip("flax.linen")
    from numpyro.contrib.module import flax_module

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=True)(linen.Dense(1)(x))

    def model(data):
        net = flax_module("net", Net(), input_shape=(2, 3), mutable=["batch_stats"])
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
            ebm.energy("E", net(v)[..., 0])

    with pytest.raises(ebm.ModelError, match=r"state 'net\$state' of a network.*nnx_module"):
        read_model(model, (DATA,))
