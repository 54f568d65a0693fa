# SPDX-License-Identifier: Apache-2.0
"""Every way to write a flow."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flow_cases import DATA, FLOWS, KEY, RNG, gaussian, in_the_plate, train
from numpyro.distributions import constraints, transforms
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.noise import Noise
from numpyro_ebm.model.reading import read_model


def plane(data):
    """Two coordinates, for flows with an event dimension."""
    t = numpyro.param("t", jnp.ones(2), constraint=constraints.positive)
    m = numpyro.param("m", jnp.zeros(2))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        ebm.energy("E", jnp.sum(0.5 * t * v**2 - m * v, -1))


@pytest.mark.slow
@pytest.mark.parametrize("form", FLOWS)
def test_every_form_of_flow_trains(form):
    """The energy, log Z and the flow all end at the data."""
    data = jnp.asarray(DATA, jnp.float32)
    written, names = FLOWS[form]
    objective = ebm.FlowContrastive(written, 2, likelihood_weight=1.0)
    fit = train(gaussian, objective, data, 500, batch_size=500)
    assert set(fit.params) == {"t", "m", "log_normalizer", *names}
    loc, scale = (fit.params[name] for name in names)
    np.testing.assert_allclose(loc, data.mean(), atol=0.06)
    np.testing.assert_allclose(abs(scale), data.std(), atol=0.06)
    t, m = fit.params["t"], fit.params["m"]
    np.testing.assert_allclose(t * jnp.var(data), 1.0, atol=0.2)
    exact = 0.5 * np.log(2 * np.pi / t) + 0.5 * m**2 / t
    np.testing.assert_allclose(fit.params["log_normalizer"], exact, atol=0.1)
    trained = objective.noise_distribution(fit.params, gaussian, data)
    if form == "in the plate":
        assert trained is None  # it samples the site itself
        run = numpyro.handlers.seed(numpyro.handlers.substitute(in_the_plate, fit.params), KEY)
        drawn = numpyro.handlers.trace(run).get_trace(data)["v"]
        expected = dist.Normal(loc, scale).log_prob(data)
        np.testing.assert_allclose(drawn["fn"].log_prob(data), expected, rtol=1e-6)
        assert drawn["value"].shape == data.shape
        return
    sample = trained.sample(KEY, (4_000,))
    assert abs(sample.mean() - loc) < 0.05 and abs(sample.std() - abs(scale)) < 0.05
    by_hand = dist.Normal(loc, abs(scale)).log_prob(data)
    np.testing.assert_allclose(trained.log_prob(data), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FLOWS)
def test_every_form_of_flow_is_the_normal_of_its_parameters(form):
    """Densities, and draws, which are affine in location and scale."""
    written, names = FLOWS[form]
    rows = jnp.asarray(DATA[:5])
    flow = Noise(written, read_model(gaussian, (rows,)), "flow", trainable=True)
    found = flow.parameters(KEY)
    assert {k: float(x) for k, (x, _) in found.items()} == dict(zip(names, (1.0, 2.0), strict=True))
    z = []
    for loc, scale in ((1.0, 2.0), (-3.0, 0.7)):
        params = dict(zip(names, (jnp.array(loc), jnp.array(scale)), strict=True))
        expected = dist.Normal(loc, scale).log_prob(rows)
        np.testing.assert_allclose(flow.log_density(params, {"v": rows}), expected, rtol=1e-5)
        z.append((flow.draw(KEY, params, 2)["v"] - loc) / scale)
    assert z[0].shape == (2, 5) and len(np.unique(z[0])) == 10
    np.testing.assert_allclose(z[0], z[1], atol=1e-5)


@pytest.mark.slow
def test_constraints_of_a_distribution_are_kept():
    """Steps that would carry an unconstrained scale far below zero."""
    flow = dist.Normal(jnp.zeros(2), 0.5 * jnp.ones(2)).to_event(1)
    data = jnp.asarray(0.01 * RNG.normal(size=(50, 2)), jnp.float32)
    objective = ebm.FlowContrastive(flow, likelihood_weight=1.0, flow_optim=optax.adam(0.4))
    svi = ebm.EnergySVI(plane, None, optax.adam(0.01), objective)
    state = svi.init(KEY, data)
    start = svi.get_params(state)
    names = {"flow.base_dist.loc", "flow.base_dist.scale"}
    assert {k for k in start if k.startswith("flow")} == names
    update = jit(svi.update)
    for _ in range(5):
        state, _ = update(state, data)
        trained = objective.noise_distribution(svi.get_params(state), plane, data)
        assert np.all(trained.base_dist.scale > 0)
    assert np.all(trained.base_dist.scale < 0.2)


def test_one_array_at_two_places_keeps_both_constraints():
    """``loc`` and ``scale`` are the same object; only the scale is positive."""
    one = jnp.ones(())
    noise = Noise(dist.Normal(one, one), read_model(gaussian, (DATA,)), "flow", trainable=True)
    found = noise.parameters(KEY)
    assert found["flow.loc"][1] is constraints.real
    assert found["flow.scale"][1] is constraints.positive
    trained = noise.distribution({"flow.loc": jnp.array(-2.0)})
    assert (trained.loc, trained.scale) == (-2.0, 1.0)


def test_names_and_constraints_of_nested_distributions():
    """By attribute, so that parameters kept on disk mean the same in another process."""
    mixture = dist.MixtureSameFamily(
        dist.Categorical(probs=jnp.ones(2) / 2),
        dist.MultivariateNormal(jnp.zeros((2, 2)), scale_tril=jnp.eye(2)),
    )
    args = (jnp.zeros((3, 2)),)
    found = Noise({"v": mixture}, read_model(plane, args), "flow", trainable=True).parameters(KEY)
    kinds = {name: type(constraint) for name, (_, constraint) in found.items()}
    assert kinds == {
        "flow.v._mixing_distribution.probs": type(constraints.simplex),
        "flow.v._component_distribution.loc": type(constraints.real_vector),
        "flow.v._component_distribution.scale_tril": type(constraints.lower_cholesky),
    }


@pytest.mark.slow
def test_the_base_of_a_stack_is_not_trained():
    data = jnp.asarray(RNG.normal(size=(50, 2)), jnp.float32)
    affine = transforms.AffineTransform(jnp.zeros(2), jnp.ones(2))
    names = {"flow.transforms.0.0", "flow.transforms.0.1"}
    for written in (affine, [affine], (affine,)):
        objective = ebm.FlowContrastive(written)
        svi = ebm.EnergySVI(plane, None, optax.adam(0.1), objective)
        params = svi.get_params(svi.init(KEY, data))
        assert {k for k in params if k.startswith("flow")} == names
        trained = objective.noise_distribution(params, plane, data)
        np.testing.assert_allclose(
            trained.log_prob(data), dist.Normal().log_prob(data).sum(-1), rtol=1e-5
        )


@pytest.mark.slow
def test_a_flow_on_positive_data():
    def positive(data):
        rate = numpyro.param("rate", jnp.array(1.0), constraint=constraints.positive)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=data)
            ebm.energy("E", rate * v)

    data = jnp.asarray(RNG.exponential(0.5, size=1_000), jnp.float32)
    flow = [transforms.AffineTransform(jnp.zeros(()), jnp.ones(())), transforms.ExpTransform()]
    objective = ebm.FlowContrastive(flow, 2, likelihood_weight=1.0)
    fit = train(positive, objective, data, 300)
    np.testing.assert_allclose(fit.params["rate"] * data.mean(), 1.0, atol=0.2)
    np.testing.assert_allclose(fit.params["flow.transforms.0.0"], jnp.log(data).mean(), atol=0.15)
    np.testing.assert_allclose(fit.params["log_normalizer"], -np.log(fit.params["rate"]), atol=0.15)
    trained = objective.noise_distribution(fit.params, positive, data)
    assert np.all(trained.sample(KEY, (100,)) > 0)


@pytest.mark.slow
def test_flowjax_draws_and_evaluates_with_parameters():
    pytest.importorskip("flowjax")
    from flowjax.bijections import Affine
    from flowjax.distributions import Normal, Transformed

    flow = Transformed(Normal(jnp.zeros(2)), Affine(jnp.array([0.5, -0.8]), jnp.array([0.8, 1.3])))
    data = jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32)
    row_model = read_model(plane, (data,))
    noise = Noise(flow, row_model, "flow", trainable=True)
    params = {name: value for name, (value, _) in noise.parameters(KEY).items()}
    (loc,) = [k for k, x in params.items() if np.array_equal(x, np.array([0.5, -0.8], np.float32))]
    moved = {**params, loc: params[loc] + 1.0}
    expected = dist.Normal(np.array([1.5, 0.2]), np.array([0.8, 1.3])).log_prob(data).sum(-1)
    np.testing.assert_allclose(noise.log_density(moved, {"v": data}), expected, rtol=1e-5)
    drawn, base = noise.draw(KEY, moved, 3)["v"], noise.draw(KEY, params, 3)["v"]
    assert drawn.shape == (3, 5, 2)
    np.testing.assert_allclose(drawn, base + 1.0, rtol=1e-5, atol=1e-5)
    wrong = Transformed(Normal(jnp.zeros(3)), Affine(jnp.zeros(3), jnp.ones(3)))
    with pytest.raises(ModelError, match=r"flow has shape \(3,\).*'v' has event shape \(2,\)"):
        Noise(wrong, row_model, "flow", trainable=True).draw(KEY, {}, 1)


@pytest.mark.slow
def test_flowjax_trains():
    pytest.importorskip("flowjax")
    from flowjax.bijections import Affine, Permute
    from flowjax.distributions import Normal, Transformed

    mean, scale = np.array([0.5, -0.8]), np.array([0.8, 1.3])
    data = jnp.asarray(mean + scale * RNG.normal(size=(1_000, 2)), jnp.float32)
    base = Transformed(Normal(jnp.zeros(2)), Permute(jnp.array([1, 0])))
    flow = Transformed(base, Affine(jnp.zeros(2), jnp.ones(2)))
    objective = ebm.FlowContrastive(flow, 1, likelihood_weight=1.0)
    fit = train(plane, objective, data, 300, lr=0.05)
    trained = objective.noise_distribution(fit.params, plane, data)
    sample = trained.sample(KEY, (2_000,))
    np.testing.assert_allclose(sample.mean(0), mean, atol=0.2)
    np.testing.assert_allclose(sample.std(0), scale, atol=0.25)
    by_hand = dist.Normal(mean, scale).log_prob(data).sum(-1)
    np.testing.assert_allclose(trained.log_prob(data).mean(), by_hand.mean(), atol=0.05)
    before = flow.log_prob(data)
    assert trained.log_prob(data).mean() > before.mean() + 0.2
    np.testing.assert_allclose(fit.params["t"] * data.var(0), 1.0, atol=0.35)


@pytest.mark.slow
def test_a_flowjax_flow_of_networks_follows_a_bent_density():
    pytest.importorskip("flowjax")
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    def bent(data):
        a = numpyro.param("a", jnp.array(0.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
            x, y = v[:, 0], v[:, 1]
            ebm.energy("E", 0.5 * x**2 + 0.5 * ((y - a * x**2) / 0.5) ** 2)

    x = RNG.normal(size=1_500)
    y = 0.8 * x**2 + 0.5 * RNG.normal(size=1_500)
    data = jnp.asarray(np.stack([x, y], -1), jnp.float32)
    flow = coupling_flow(
        jax.random.key(0), base_dist=Normal(jnp.zeros(2)), flow_layers=3, nn_width=16, nn_depth=1
    )
    objective = ebm.FlowContrastive(flow, 1, likelihood_weight=1.0)
    fit = train(bent, objective, data, 1_000, lr=0.01, batch_size=250)
    assert abs(fit.params["a"] - 0.8) < 0.08
    assert abs(fit.params["log_normalizer"] - np.log(2 * np.pi * 0.5)) < 0.15
    trained = objective.noise_distribution(fit.params, bent, data)
    exact = dist.Normal().log_prob(x) + dist.Normal(0.8 * x**2, 0.5).log_prob(y)
    assert abs(trained.log_prob(data).mean() - exact.mean()) < 0.15
