# SPDX-License-Identifier: Apache-2.0
"""Flow contrastive estimation: the game by quadrature, and every way to write a flow."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.nn import softplus
from numpyro.distributions import constraints, transforms
from numpyro.infer import SVI
from oracles import assert_unbiased, draws, jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.noise import Noise
from numpyro_ebm.model.reading import read_model

KEY = jax.random.key(3)
RNG = np.random.default_rng(4)


def gaussian(data):
    m = numpyro.param("m", jnp.array(0.0))
    t = numpyro.param("t", jnp.array(1.0), constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * t * v**2 - m * v)


def plane(data):
    """Two coordinates, for flows with an event dimension."""
    t = numpyro.param("t", jnp.ones(2), constraint=constraints.positive)
    m = numpyro.param("m", jnp.zeros(2))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        ebm.energy("E", jnp.sum(0.5 * t * v**2 - m * v, -1))


def function():
    loc = numpyro.param("loc", jnp.array(1.0))
    scale = numpyro.param("flow_scale", jnp.array(2.0), constraint=constraints.positive)
    return dist.Normal(loc, scale)


def in_the_plate(data):
    loc = numpyro.param("loc", jnp.array(1.0))
    scale = numpyro.param("flow_scale", jnp.array(2.0), constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        numpyro.sample("v", dist.Normal(loc, scale))


def distribution():
    return dist.Normal(jnp.array(1.0), jnp.array(2.0))


def stack():
    return [transforms.AffineTransform(jnp.array(1.0), jnp.array(2.0))]


def train(model, objective, data, num_steps, *, lr=0.03, seed=1, **options):
    optim = optax.adam(optax.cosine_decay_schedule(lr, num_steps))
    svi = ebm.EnergySVI(model, None, optim, objective)
    return svi.run(jax.random.key(seed), num_steps, data, progress_bar=False, **options)


# The game


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


FLOWS = {
    "function": (function, ("loc", "flow_scale")),
    "in the plate": (in_the_plate, ("loc", "flow_scale")),
    "distribution": (distribution(), ("flow.loc", "flow.scale")),
    "transforms": (stack(), ("flow.transforms.0.0", "flow.transforms.0.1")),
}


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


# The forms of a flow

DATA = 0.3 + 0.6 * RNG.normal(size=2_000)


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


# Training


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


# What does not serve


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
        (lambda: ebm.FlowContrastive(function, likelihood_weight=-1.0), "must not be negative"),
        (
            lambda: ebm.FlowContrastive(dist.Normal(jnp.zeros(2), jnp.ones(2)).to_event(1)),
            r"event shape \(2,\), and the site \(\)",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ModelError, match=message):
        train(gaussian, make(), jnp.asarray(DATA[:10], jnp.float32), 1)


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
