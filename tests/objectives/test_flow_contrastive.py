# SPDX-License-Identifier: Apache-2.0
"""Flow contrastive estimation: the game by quadrature, and every way to write a flow."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flow_cases import DATA, FLOWS, KEY, RNG, distribution, function, gaussian, train
from jax.nn import softplus
from numpyro.distributions import transforms
from numpyro.infer import SVI
from oracles import assert_unbiased, draws, jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError


def noise_contrast(data, ratio, degree=60):
    """The loss of NCE with the flow N(loc, scale) as its noise, through its draws as well."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    weights = weights / weights.sum()

    def loss(energy, flow):
        def log_q(v):
            square = ((v - flow["loc"]) / flow["scale"]) ** 2
            return -0.5 * square - jnp.log(flow["scale"]) - 0.5 * np.log(2 * np.pi)

        def G(v):
            log_p = -0.5 * energy["t"] * v**2 + energy["m"] * v
            return log_p - energy["log_normalizer"] - np.log(ratio) - log_q(v)

        at = flow["loc"] + flow["scale"] * nodes
        return jnp.mean(softplus(-G(data))) + ratio * weights @ softplus(G(at))

    return loss


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("form", "ratio", "weight"),
    [
        ("function", 1, 0.0),
        ("function", 3, 0.7),
        ("in the plate", 1, 0.7),
        ("distribution", 2, 0.0),
        pytest.param("transforms", 2, 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_energy_descends_and_the_flow_ascends(form, ratio, weight):
    """The gradient of the energy is that of NCE; the flow's, pathwise, minus it."""
    data = jnp.asarray(RNG.normal(size=5))
    energy = {"t": jnp.array(1.3), "m": jnp.array(0.4), "log_normalizer": jnp.array(0.6)}
    flow = {"loc": jnp.array(-0.3), "scale": jnp.array(1.6)}
    loss = noise_contrast(data, ratio)
    value, (of_energy, of_flow) = jax.value_and_grad(loss, (0, 1))(energy, flow)
    likelihood = lambda f: jnp.mean(  # noqa: E731
        -0.5 * ((data - f["loc"]) / f["scale"]) ** 2 - jnp.log(f["scale"])
    )
    of_likelihood = jax.grad(likelihood)(flow)
    of_flow = {k: -of_flow[k] - weight * of_likelihood[k] for k in flow}
    written, names = FLOWS[form]
    objective = ebm.FlowContrastive(written, ratio, likelihood_weight=weight)
    params = {**energy, **dict(zip(names, (flow["loc"], flow["scale"]), strict=True))}

    def one(rng_key):
        value, gradient = jax.value_and_grad(
            lambda p: objective.loss(rng_key, p, gaussian, None, data)
        )(params)
        return value, [gradient[k] for k in (*energy, *names)]

    expected = [value, *(of_energy[k] for k in energy), of_flow["loc"], of_flow["scale"]]
    assert_unbiased(draws(one, KEY, 6_000), np.array(expected), form)


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_the_energy_does_not_touch_the_flow():
    data = jnp.asarray(RNG.normal(size=5))
    objective = ebm.FlowContrastive(function, 2)
    params = {"t": 1.3, "m": 0.4, "log_normalizer": 0.6, "loc": -0.3, "flow_scale": 1.6}
    params = jax.tree.map(jnp.asarray, params)
    problem = objective.prepare(KEY, params, gaussian, None, (data,), {})
    flow = {k: params.pop(k) for k in ("loc", "flow_scale")}
    with_flow = lambda p: objective.energy_loss(KEY, {**p, **flow}, problem)  # noqa: E731
    nce = ebm.NCE(dist.Normal(flow["loc"], flow["flow_scale"]), 2)
    plain = lambda p: nce.energy_loss(KEY, p, problem)  # noqa: E731
    assert_same(jit(jax.value_and_grad(with_flow))(params), jit(jax.value_and_grad(plain))(params))
    # And the flow's loss does not touch the energy.
    (network,) = objective.networks
    of_energy = jit(jax.grad(lambda p: network.loss(KEY, p, flow, problem)))(params)
    assert_same(of_energy, jax.tree.map(jnp.zeros_like, of_energy))
    # What its likelihood weighs is taken off, with the same draws.
    likely = ebm.FlowContrastive(function, 2, likelihood_weight=0.7).networks[0]
    gain = network.loss(KEY, params, flow, problem) - likely.loss(KEY, params, flow, problem)
    assert_same(gain, 0.7 * jnp.mean(dist.Normal(-0.3, 1.6).log_prob(data)))


def assert_same(x, y):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), x, y)


@pytest.mark.usefixtures("x64")
def test_a_flow_equal_to_the_model_is_where_the_game_rests():
    """Data, model and flow are N(0.5, 0.8²): no gradient of either player is left in the mean."""
    data = 0.5 + 0.8 * RNG.normal(size=(200, 100))
    t, m = 1 / 0.8**2, 0.5 / 0.8**2
    log_z = 0.5 * np.log(2 * np.pi / t) + 0.5 * m**2 / t
    truth = {"t": t, "m": m, "log_normalizer": log_z, "loc": 0.5, "flow_scale": 0.8}
    objective = ebm.FlowContrastive(function, 2)

    @jit
    def gradients(params):
        def one(rng_key, data):
            loss = lambda p: objective.loss(rng_key, p, gaussian, None, data)  # noqa: E731
            gradient = jax.grad(loss)(params)
            return jnp.stack([gradient[k] for k in truth])

        return jax.vmap(one)(jax.random.split(KEY, 200), jnp.asarray(data))

    at_truth = np.asarray(gradients(jax.tree.map(jnp.asarray, truth)))
    assert_unbiased(at_truth, np.zeros(5), "equilibrium")
    away = np.asarray(gradients(jax.tree.map(jnp.asarray, {**truth, "loc": 0.9})))
    assert away[:, 3].mean() > 8 * away[:, 3].std() / np.sqrt(200)  # back towards the data


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit():
    data = jnp.asarray(DATA[:200], jnp.float32)

    objective = ebm.FlowContrastive(function, flow_optim=optax.adam(0.02), num_flow_steps=2)
    svi = ebm.EnergySVI(gaussian, None, optax.adam(0.03), objective)
    options = dict(batch_size=50, progress_bar=False)
    whole = svi.run(KEY, 12, data, **options)
    first = svi.run(KEY, 5, data, **options)
    rest = svi.run(KEY, 7, data, init_state=first.state, **options)
    for name, value in whole.params.items():
        np.testing.assert_array_equal(rest.params[name], value)
    losses = np.concatenate([first.losses, rest.losses])
    np.testing.assert_array_equal(losses, whole.losses)
    assert first.params["loc"] != whole.params["loc"]


@pytest.mark.usefixtures("x64")
def test_the_flow_has_an_optimiser_and_steps_of_its_own():
    data = jnp.asarray(DATA[:200])

    def params_after(rounds, **options):
        objective = ebm.FlowContrastive(function, **options)
        svi = ebm.EnergySVI(gaussian, None, optax.adam(0.05), objective)
        state = svi.init(KEY, data)
        update = jit(svi.update)
        for _ in range(rounds):
            state, _ = update(state, data)
        return svi.get_params(state)

    still = params_after(2, flow_optim=optax.sgd(0.0))
    assert (still["loc"], still["flow_scale"]) == (1.0, pytest.approx(2.0, abs=1e-12))
    assert still["t"] != 1.0
    # Adam's steps are as long as its learning rate at first, so that their number shows.
    three = params_after(1, flow_optim=optax.adam(1e-3), num_flow_steps=3)
    np.testing.assert_allclose(abs(three["loc"] - 1.0), 3e-3, rtol=0.1)
    # Without one of its own it has a copy of the energy's.
    copy = params_after(1)
    np.testing.assert_allclose(abs(copy["loc"] - 1.0), 0.05, rtol=0.1)


@pytest.mark.slow
def test_the_paper_weight_moves_a_near_flow_to_the_data():
    """Without its likelihood, from a start that overlaps with the data."""
    data = jnp.asarray(DATA, jnp.float32)
    objective = ebm.FlowContrastive(function, 2)
    fit = train(gaussian, objective, data, 800, init_params={"loc": 0.6, "flow_scale": 1.0})
    np.testing.assert_allclose(fit.params["loc"], data.mean(), atol=0.1)
    np.testing.assert_allclose(fit.params["flow_scale"], data.std(), atol=0.1)


@pytest.mark.parametrize("flow", [function, distribution()])
def test_numpyros_svi_has_no_place_for_a_flow(flow):
    svi = SVI(gaussian, None, numpyro.optim.Adam(0.1), ebm.FlowContrastive(flow))
    with pytest.raises(ModelError, match="of its own.*`numpyro_ebm.EnergySVI`"):
        svi.run(KEY, 1, jnp.asarray(DATA[:10], jnp.float32), progress_bar=False)


def bits(data):
    b = numpyro.param("b", jnp.array(0.5))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(), obs=data)
        ebm.energy("E", -b * v)


def bernoulli():
    return dist.Bernoulli(logits=numpyro.param("a", jnp.array(0.3)))


def bernoulli_in_the_plate(data):
    a = numpyro.param("a", jnp.array(0.3))
    with numpyro.plate("data", len(data)):
        numpyro.sample("v", dist.Bernoulli(logits=a))


@pytest.mark.parametrize("flow", [bernoulli, bernoulli_in_the_plate])
def test_draws_have_to_be_differentiable(flow):
    data = jnp.asarray(DATA[:10] > 0, int)
    with pytest.raises(ModelError, match=r"flow's draws \('v', .*\) are not differentiable"):
        train(bits, ebm.FlowContrastive(flow), data, 1)


@pytest.mark.parametrize(
    "flow",
    [
        lambda: dist.Normal(0.0, 1.0),
        dist.Normal(0.0, 1.0),
        [transforms.AffineTransform(0.0, 2.0)],
    ],
)
def test_a_flow_needs_parameters(flow):
    with pytest.raises(ModelError, match="flow has no parameters to train"):
        train(gaussian, ebm.FlowContrastive(flow), jnp.asarray(DATA[:10], jnp.float32), 1)


def clash():
    return dist.Normal(numpyro.param("m", 0.0), 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ebm.FlowContrastive(clash), r"flow has parameters named \['m'\]"),
        (lambda: ebm.FlowContrastive(3.0), "must be a NumPyro distribution"),
        (lambda: ebm.FlowContrastive([3.0]), "a list has to hold NumPyro transforms"),
        (lambda: ebm.FlowContrastive(function, 0), "`noise_ratio` must be a positive integer"),
        (lambda: ebm.FlowContrastive(function, num_flow_steps=0), "`num_flow_steps` must be"),
        (lambda: ebm.FlowContrastive(function, likelihood_weight=-1.0), "not negative, got -1.0"),
        (
            lambda: ebm.FlowContrastive(dist.Normal(jnp.zeros(2), jnp.ones(2)).to_event(1)),
            r"event shape \(2,\), and the site \(\)",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ModelError, match=message):
        train(gaussian, make(), jnp.asarray(DATA[:10], jnp.float32), 1)


@pytest.mark.slow
def test_a_likelihood_that_is_not_asked_for_is_not_in_the_loss():
    """At the last row the log-density of the flow is minus infinity."""

    def model(data):
        slope = numpyro.param("slope", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", slope * jnp.abs(v))

    def flow():
        positive = dist.constraints.positive
        return dist.Normal(0.0, numpyro.param("scale", 1.0, constraint=positive))

    params = {"slope": 1.0, "scale": 1.0, "log_normalizer": 0.0}
    loss = ebm.FlowContrastive(flow, likelihood_weight=0.0).loss
    assert jnp.isfinite(loss(jax.random.key(0), params, model, None, jnp.array([0.1, 3e19])))
