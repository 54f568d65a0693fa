# SPDX-License-Identifier: Apache-2.0
"""Noise contrast against its formulas: quadrature over the noise, closed forms and log Z."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from jax.nn import softplus
from jax.scipy.special import gammaln
from numpyro.distributions import constraints
from numpyro.infer import SVI
from oracles import assert_unbiased, draws, flat, jit, z_scores
from scipy.special import roots_genlaguerre

import numpyro_ebm as ebm
from numpyro_ebm.errors import FarNoiseWarning, ModelError
from numpyro_ebm.model.noise import Noise
from numpyro_ebm.model.reading import read_model

KEY = jax.random.key(3)
RNG = np.random.default_rng(4)
LOC, SCALE = np.array([0.2, -0.1, 0.3]), np.array([1.3, 1.1, 1.2])
STEP = 0.7  # of ConditionalNCE


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


def normal_grid(dim, degree):
    """Nodes (n, dim) and weights (n,) of the standard Normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(nodes, repeat=dim)))
    return grid, np.prod(list(itertools.product(weights, repeat=dim)), axis=1)


def log_normal(v, loc, scale):
    return jnp.sum(-0.5 * ((v - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * np.log(2 * np.pi), -1)


def noise_of(dim):
    return dist.Normal(LOC[:dim], SCALE[:dim]).to_event(1)


def value_and_gradient(fn):
    return lambda params: flat(jax.value_and_grad(fn)(params))


# The formulas


def log_ratio(system, p, v):
    """log p̃ - log q of one row."""
    dim = system.data.shape[1]
    return system.log_density(p, v) - log_normal(v, LOC[:dim], SCALE[:dim])


def nce(system, ratio, degree):
    dim = system.data.shape[1]
    grid, weights = normal_grid(dim, degree)
    at = LOC[:dim] + SCALE[:dim] * grid

    def loss(p):
        shift = p["log_normalizer"] + np.log(ratio)
        here = jax.vmap(lambda v: log_ratio(system, p, v))(jnp.asarray(system.data)) - shift
        there = jax.vmap(lambda v: log_ratio(system, p, v))(jnp.asarray(at)) - shift
        return jnp.mean(softplus(-here)) + ratio * weights @ softplus(there)

    return loss


def ranking(system, degree):
    """The row against one draw of the noise."""
    dim = system.data.shape[1]
    grid, weights = normal_grid(dim, degree)
    at = LOC[:dim] + SCALE[:dim] * grid

    def loss(p):
        here = jax.vmap(lambda v: log_ratio(system, p, v))(jnp.asarray(system.data))
        there = jax.vmap(lambda v: log_ratio(system, p, v))(jnp.asarray(at))
        return jnp.mean(softplus(there - here[:, None]) @ weights)

    return loss


def conditional(system, degree):
    grid, weights = normal_grid(system.data.shape[1], degree)

    def loss(p):
        row = jax.vmap(lambda v: system.log_density(p, v))

        def one(v):
            return weights @ softplus(row(v + STEP * grid) - system.log_density(p, v))

        return jnp.mean(jax.vmap(one)(jnp.asarray(system.data)))

    return loss


SYSTEMS = {
    "Exact": (ebm.Exact, oracles.gaussian_system),
    "Enumerated": (ebm.Enumerated, oracles.grbm_system),
    "bound": (
        partial(ebm.ImportanceBound, 3),
        lambda: oracles.with_learned_guide(oracles.grbm_system()),
    ),
    "bound, continuous": (
        partial(ebm.ImportanceBound, 2),
        lambda: oracles.with_learned_guide(oracles.linear_system()),
    ),
}


def make(name, marginal, dim):
    noise = noise_of(dim)
    if name.startswith("NCE"):
        return ebm.NCE(noise, int(name[-1]), marginal)
    if name.startswith("ranking"):
        return ebm.RankingNCE(noise, 1, marginal)
    return ebm.ConditionalNCE(STEP, 2, marginal)


def formula(name, system, degree):
    if name.startswith("NCE"):
        return nce(system, int(name[-1]), degree)
    return {"ranking": ranking, "conditional": conditional}[name](system, degree)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "marginal"),
    [
        slow("NCE 1", "Exact"),
        ("NCE 3", "Exact"),
        slow("NCE 1", "Enumerated"),
        ("NCE 3", "Enumerated"),
        slow("NCE 1", "bound"),
        slow("NCE 3", "bound"),  # the next test has a bound of a GRBM, too
        ("NCE 1", "bound, continuous"),
        slow("NCE 3", "bound, continuous"),
        slow("ranking", "Exact"),
        ("ranking", "Enumerated"),
        slow("conditional", "Exact"),
        ("conditional", "Enumerated"),
    ],
)
def test_value_and_gradient_are_unbiased(name, marginal):
    """All parameters at once; the guide has no part in the energy's loss."""
    make_marginal, system = SYSTEMS[marginal]
    system = system()
    dim = system.data.shape[1]
    objective = make(name, make_marginal(), dim)
    params = dict(system.params)
    if name.startswith("NCE"):
        params["log_normalizer"] = np.array(0.8)
    params, data = arrays(params), jnp.asarray(system.data)
    degree = 30 if dim == 2 else 14
    expected = np.asarray(jit(value_and_gradient(formula(name, system, degree)))(params))
    fewer = np.asarray(jit(value_and_gradient(formula(name, system, degree - 4)))(params))
    np.testing.assert_allclose(expected, fewer, atol=1e-3)  # the oracle is exact enough

    def one(rng_key):
        key_prepare, key_loss = jax.random.split(rng_key)
        problem = objective.prepare(key_prepare, params, system.model, system.guide, (data,), {})
        loss = partial(objective.energy_loss, key_loss)
        return jax.value_and_grad(lambda p: loss(p, problem))(params)

    assert_unbiased(draws(one, KEY, 4_000), expected, f"{name}, {marginal}")


@pytest.mark.usefixtures("x64")
def test_the_loss_is_the_energys_and_its_gradient_the_guides_as_well():
    system = oracles.with_learned_guide(oracles.grbm_system())
    objective = make("NCE 1", ebm.ImportanceBound(3), 2)
    params = arrays({**system.params, "log_normalizer": np.array(0.8)})
    expected = np.asarray(jit(value_and_gradient(nce(system, 1, 30)))(params))
    other = {**params, "A": params["A"] + 0.5}

    def one(params):
        def of(rng_key):
            loss = lambda p: objective.loss(  # noqa: E731
                rng_key, p, system.model, system.guide, jnp.asarray(system.data)
            )
            value, gradient = jax.value_and_grad(loss)(params)
            own = jnp.concatenate([gradient.pop("A").ravel(), gradient.pop("d").ravel()])
            return flat((value, gradient)), own

        return of

    energy, own = jax.tree.map(np.asarray, jit(jax.vmap(one(params)))(jax.random.split(KEY, 2_000)))
    names = [name for name in sorted(params) if name not in ("A", "d")]
    gradient = jit(jax.grad(nce(system, 1, 30)))(params)
    expected = np.concatenate([expected[:1], *(np.ravel(gradient[name]) for name in names)])
    assert_unbiased(energy, expected, "energy")
    # The guide is at the posterior, where the gradient of its own loss vanishes draw by draw.
    np.testing.assert_allclose(own, 0.0, atol=1e-9)
    _, own = jit(jax.vmap(one(other)))(jax.random.split(KEY, 4))
    assert np.all(np.max(np.abs(own), -1) > 1e-3)


# The truth is where the loss is least


def gaussian_log_z(params):
    return np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(np.asarray(params["precision"]))[1]


def grbm_log_z(params):
    W, b, c, scale = (np.asarray(params[k], float) for k in ("W", "b", "c", "scale"))
    states = np.array(list(itertools.product([0, 1], repeat=W.shape[1])))
    log_weight = states @ c + states @ W.T @ b + 0.5 * np.sum((states @ W.T * scale) ** 2, -1)
    return np.log(2 * np.pi) + np.sum(np.log(scale)) + np.logaddexp.reduce(log_weight)


def gaussian_draws(num_rows):
    mean, precision = oracles.GAUSSIAN["mean"], oracles.GAUSSIAN["precision"]
    return RNG.multivariate_normal(mean, np.linalg.inv(precision), size=num_rows)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "marginal"),
    [
        ("NCE 3", "Exact"),
        slow("NCE 1", "Enumerated"),
        slow("NCE 1", "bound"),
        ("ranking", "Exact"),
        ("conditional", "Exact"),
        slow("conditional", "Enumerated"),
    ],
)
def test_the_truth_is_a_stationary_point(name, marginal):
    make_marginal, system = SYSTEMS[marginal]
    system = system()
    objective = make(name, make_marginal(), 2)
    truth = dict(system.params)
    if marginal == "Exact":
        data, log_z = gaussian_draws(40_000), gaussian_log_z(truth)
    else:
        data, log_z = oracles.grbm_draws(truth, 40_000, RNG), grbm_log_z(truth)
    if name.startswith("NCE"):
        truth["log_normalizer"] = log_z
    names = sorted(truth.keys() - {"A", "d"})
    batches = jnp.asarray(data).reshape(200, -1, 2)

    @jit
    def gradients(params):
        def one(rng_key, data):
            problem = objective.prepare(KEY, params, system.model, system.guide, (data,), {})
            loss = lambda p: objective.energy_loss(rng_key, {**params, **p}, problem)  # noqa: E731
            return flat(jax.grad(loss)({name: params[name] for name in names}))

        return jax.vmap(one)(jax.random.split(KEY, 200), batches)

    at_truth = np.asarray(gradients(arrays(truth)))
    assert_unbiased(at_truth, np.zeros(at_truth.shape[1]), f"{name}, {marginal}")
    # It is a test: somewhere else the gradient is not zero.
    first = "precision" if marginal == "Exact" else "W"
    for moved in names if name.startswith("NCE") else [first]:
        shift = 0.2 if moved == "log_normalizer" else 0.15 * np.ones(np.shape(truth[moved]))
        away = np.asarray(gradients(arrays({**truth, moved: truth[moved] + shift})))
        assert np.max(np.abs(z_scores(away, 0.0 * away[0]))) > 8, moved


# log Z and its error


def train(model, objective, data, num_steps, *, lr=0.03, seed=1, guide=None, **options):
    optim = optax.adam(optax.cosine_decay_schedule(lr, num_steps))
    svi = ebm.EnergySVI(model, guide, optim, objective)
    return svi.run(jax.random.key(seed), num_steps, data, progress_bar=False, **options)


def check_log_z(objective, model, params, data, exact):
    result = objective.log_normalizer(jax.random.key(7), params, model, None, data)
    error = float(result.value) - exact(params)
    z = error / float(result.mcse)
    print(f"log Z: {float(result.value):.4f} ± {float(result.mcse):.4f}, off by {z:.2f} errors")
    assert result.method == "NCE" and result.value == params["log_normalizer"]
    assert 0 < result.mcse < 0.2 and abs(z) < 4
    assert 100 < result.ess < len(data) * objective.noise_ratio
    known = objective.log_normalizer(
        jax.random.key(7), params, model, None, data, parameters_known=True
    )
    print(f"  parameters known: ± {float(known.mcse):.4f}")
    assert known.value == result.value
    return result, known


@pytest.mark.slow
def test_log_z_of_a_gaussian():
    """Its precision has a direction that the loss does not see, the antisymmetric one."""
    data = jnp.asarray(gaussian_draws(2_000), jnp.float32)
    objective = ebm.NCE(dist.Normal(0, 1.5).expand([2]).to_event(1), 2)
    fit = train(oracles.gaussian, objective, data, 600)

    def exact(p):
        return gaussian_log_z({"precision": 0.5 * (p["precision"] + p["precision"].T)})

    result, known = check_log_z(objective, oracles.gaussian, fit.params, data, exact)
    assert 0 < known.mcse <= result.mcse


@pytest.mark.slow
def test_log_z_of_a_grbm(x64):
    model = partial(ebm.models.grbm, num_hidden=2)
    params = {**oracles.GRBM, "W": oracles.GRBM["W"][:, :2], "c": oracles.GRBM["c"][:2]}
    data = jnp.asarray(oracles.grbm_draws(params, 2_000, RNG))
    objective = ebm.NCE(dist.Normal(jnp.mean(data, 0), 1.2 * jnp.std(data, 0)).to_event(1), 3)
    fit = train(model, objective, data, 1_000)
    result, known = check_log_z(objective, model, fit.params, data, grbm_log_z)
    assert 0 < known.mcse <= result.mcse


def one_dimensional(data):
    m = numpyro.param("m", 0.0)
    t = numpyro.param("t", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * t * v**2 - m * v)


def newton_nce(data, noise, ratio, known):
    """NCE of ``one_dimensional`` is a logistic regression: t, m and log Z, by Newton's method."""

    def loss(x):
        t, m, log_z = x

        def G(v):
            log_q = log_normal(v[..., None], 0.0, 1.5)
            return -0.5 * t * v**2 + m * v - log_z - jnp.log(ratio) - log_q

        return jnp.mean(softplus(-G(data))) + jnp.mean(jnp.sum(softplus(G(noise)), 0))

    def step(x, _):
        gradient, hessian = jax.grad(loss)(x), jax.hessian(loss)(x)
        if known:
            return x - jnp.array([0.0, 0.0, gradient[2] / hessian[2, 2]]), None
        return x - jnp.linalg.solve(hessian, gradient), None

    start = jnp.array([1.6, 0.5, 0.9])
    x, _ = jax.lax.scan(step, start, length=8)
    gradient = jax.grad(loss)(x)
    return x, gradient[2:] if known else gradient


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("ratio", "known"), [slow(1, False), slow(1, True), (4, False), slow(4, True)]
)
def test_the_error_of_log_z_is_honest(ratio, known):
    """z-scores of many repeats have standard deviation 1, and a mean that falls as 1/√rows."""
    truth, repeats, rows = (1.6, 0.5), 300, 500
    objective = ebm.NCE(dist.Normal(0.0, 1.5), ratio)

    def one(rng_key):
        key_data, key_noise, key_error = jax.random.split(rng_key, 3)
        data = truth[1] / truth[0] + jax.random.normal(key_data, (rows,)) / np.sqrt(truth[0])
        noise = 1.5 * jax.random.normal(key_noise, (ratio, rows))
        x, gradient = newton_nce(data, noise, ratio, known)
        params = {"t": x[0], "m": x[1], "log_normalizer": x[2]}
        result = objective.log_normalizer(
            key_error, params, one_dimensional, None, data, parameters_known=known
        )
        exact = 0.5 * jnp.log(2 * jnp.pi / x[0]) + 0.5 * x[1] ** 2 / x[0]
        return (result.value - exact) / result.mcse, gradient

    z, gradient = jit(jax.vmap(one))(jax.random.split(jax.random.key(5), repeats))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)
    z = np.asarray(z)
    print(f"z: mean {z.mean():.3f}, standard deviation {z.std():.3f}")
    assert abs(z.mean()) < 0.35 and 0.83 < z.std() < 1.17


def wide(data):
    w = numpyro.param("w", jnp.zeros(2_001))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * v**2 * jnp.exp(jnp.sum(w)))


def test_log_normalizer_says_what_it_cannot_do():
    objective = ebm.NCE(dist.Normal(0, 1.5))
    data = jax.random.normal(KEY, (50,))
    params = {"w": jnp.zeros(2_001), "log_normalizer": jnp.array(0.9)}
    with pytest.raises(ModelError, match="2002 parameters.*`parameters_known=True`"):
        objective.log_normalizer(KEY, params, wide, None, data)
    known = objective.log_normalizer(KEY, params, wide, None, data, parameters_known=True)
    assert 0 < known.mcse < 1
    with pytest.raises(ModelError, match="lacks 'log_normalizer'"):
        objective.log_normalizer(KEY, {"w": jnp.zeros(2_001)}, wide, None, data)


# Far noise


def test_far_noise_warns_and_near_noise_does_not():
    data = jax.random.normal(KEY, (500,))
    far = ebm.NCE(dist.Normal(30.0, 0.1))
    with pytest.warns(FarNoiseWarning, match="far from the data"):
        fit = train(one_dimensional, far, data, 5)
    with pytest.warns(FarNoiseWarning, match="ConditionalNCE"):
        far.log_normalizer(KEY, fit.params, one_dimensional, None, data)
    near = ebm.NCE(dist.Normal(0.0, 1.5))
    train(one_dimensional, near, data, 5)  # warnings are errors here


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ratio", [1, 4])
def test_overlap_is_one_where_noise_and_model_are_the_same(ratio):
    data = jax.random.normal(KEY, (20_000,))
    params = {"t": jnp.array(1.0), "m": jnp.array(0.0)}
    params["log_normalizer"] = jnp.array(0.5 * np.log(2 * np.pi))
    objective = ebm.NCE(dist.Normal(0.0, 1.0), ratio)

    @jit
    def overlap(params):
        problem = objective.prepare(KEY, params, one_dimensional, None, (data,), {})
        return objective.overlap(KEY, params, problem)

    np.testing.assert_allclose(overlap(params), 1.0, rtol=1e-9)


# The ways to write a noise


def two_sites(x, y, shift=0.0):
    w = numpyro.param("w", jnp.array(0.7))
    b = numpyro.param("b", jnp.array([0.3, -0.4]))
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
        y = numpyro.sample("y", ebm.Counting(event_shape=(2,)), obs=y)
        ebm.energy("E", 0.5 * w * (x - jnp.sum(y, -1)) ** 2 - y @ b)


X, Y = RNG.normal(size=5) + 1.0, RNG.integers(0, 2, size=(5, 2))
PROBS = np.array([0.3, 0.6])


def noise_x():
    return dist.Normal(0.4, 1.6)


def noise_y():
    return dist.Bernoulli(PROBS).to_event(1)


def no_arguments():
    return {"x": noise_x(), "y": noise_y()}


def models_arguments(x, y, shift=0.0):
    return {"x": dist.Normal(0.4 + shift, 1.6), "y": noise_y()}


def samples_in_the_plate(x, y, shift=0.0):
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", noise_x())
        numpyro.sample("y", noise_y())


FORMS = {
    "dict": {"x": noise_x(), "y": noise_y()},
    "no arguments": no_arguments,
    "the model's arguments": models_arguments,
    "samples in the plate": samples_in_the_plate,
}


def two_sites_nce(p, ratio):
    """x by quadrature, y by enumeration."""
    grid, weights = normal_grid(1, 40)
    at_x = 0.4 + 1.6 * grid[:, 0]
    states = np.array(list(itertools.product([0, 1], repeat=2)))
    chance = np.prod(np.where(states == 1, PROBS, 1 - PROBS), -1)

    def G(x, y):
        log_p = -0.5 * p["w"] * (x - y.sum(-1)) ** 2 + y @ p["b"]
        log_q = log_normal(x[..., None], 0.4, 1.6)
        log_q = log_q + y @ np.log(PROBS) + (1 - y) @ np.log1p(-PROBS)
        return log_p - p["log_normalizer"] - np.log(ratio) - log_q

    noise = sum(
        c * weights @ softplus(G(at_x, np.broadcast_to(y, (len(at_x), 2))))
        for c, y in zip(chance, states, strict=True)
    )
    return jnp.mean(softplus(-G(jnp.asarray(X), Y))) + ratio * noise


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_noise_over_two_sites(form):
    """A real and a discrete site; the mean is the formula, the density the same to the last bit."""
    params = arrays({"w": 0.7, "b": np.array([0.3, -0.4]), "log_normalizer": 1.1})
    args = (jnp.asarray(X), jnp.asarray(Y))
    row_model = read_model(two_sites, args)
    points = row_model.unconstrain_visible()
    log_q = Noise(FORMS[form], row_model).log_density({}, points)
    reference = Noise(FORMS["dict"], row_model).log_density({}, points)
    np.testing.assert_array_equal(log_q, reference)
    by_hand = log_normal(X[:, None], 0.4, 1.6) + Y @ np.log(PROBS) + (1 - Y) @ np.log1p(-PROBS)
    np.testing.assert_allclose(log_q, by_hand, rtol=1e-12)
    objective = ebm.NCE(FORMS[form], 2)

    def loss(rng_key, form=form):
        problem = objective.prepare(KEY, params, two_sites, None, args, {})
        return jax.value_and_grad(lambda p: objective.energy_loss(rng_key, p, problem))(params)

    expected = jit(value_and_gradient(lambda p: two_sites_nce(p, 2)))(params)
    assert_unbiased(draws(loss, KEY, 3_000), expected, form)


@pytest.mark.usefixtures("x64")
def test_a_noise_function_is_called_with_the_models_arguments():
    args, kwargs = (jnp.asarray(X), jnp.asarray(Y)), {"shift": 0.5}
    row_model = read_model(two_sites, args, kwargs)
    log_q = Noise(models_arguments, row_model).log_density({}, row_model.unconstrain_visible())
    moved = {"x": dist.Normal(0.9, 1.6), "y": noise_y()}
    expected = Noise(moved, row_model).log_density({}, row_model.unconstrain_visible())
    np.testing.assert_array_equal(log_q, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["distribution", "dict", "function", "plate"])
def test_one_site_in_every_form(form):
    """Distributions and functions that return them draw alike, given the same key."""

    def plate(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("v", noise_of(2))

    forms = {
        "distribution": noise_of(2),
        "dict": {"v": noise_of(2)},
        "function": lambda: noise_of(2),
        "plate": plate,
    }
    system = oracles.gaussian_system()
    row_model = read_model(system.model, (jnp.asarray(system.data),))
    noise, reference = Noise(forms[form], row_model), Noise(noise_of(2), row_model)
    points = row_model.unconstrain_visible()
    np.testing.assert_array_equal(noise.log_density({}, points), reference.log_density({}, points))
    drawn = noise.draw(KEY, {}, 3_000)["v"]
    assert drawn.shape == (3_000, 4, 2)
    if form == "plate":
        samples = np.concatenate([drawn[:, 0], drawn[:, 0] ** 2], -1)
        moments = np.concatenate([LOC[:2], LOC[:2] ** 2 + SCALE[:2] ** 2])
        assert_unbiased(samples, moments, form)
        assert np.all(np.abs(np.corrcoef(drawn[:, 0, 0], drawn[:, 1, 0])[0, 1]) < 0.08)
    else:
        np.testing.assert_array_equal(drawn, reference.draw(KEY, {}, 3_000)["v"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["distribution", "plate"])
def test_positive_support(form):
    """Written in v itself, without a Jacobian: Gauss-Laguerre for Gamma noise."""
    system = oracles.gamma_system()
    shape, rate, ratio = 2.2, 0.9, 2
    nodes, weights = roots_genlaguerre(60, shape - 1)
    nodes, weights = nodes / rate, weights / weights.sum()

    def expected(p):
        def G(v):
            log_p = (p["a"] - 1) * jnp.log(v) - p["rate"] * v
            log_q = shape * np.log(rate) - gammaln(shape) + (shape - 1) * jnp.log(v) - rate * v
            return log_p - log_q - p["log_normalizer"] - np.log(ratio)

        data = jnp.mean(softplus(-G(jnp.asarray(system.data))))
        return data + ratio * weights @ softplus(G(nodes))

    def plate(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("v", dist.Gamma(shape, rate))

    noise = dist.Gamma(shape, rate) if form == "distribution" else plate
    params = arrays({**system.params, "log_normalizer": np.array(-0.4)})
    data = jnp.asarray(system.data)
    objective = ebm.NCE(noise, ratio)

    def one(rng_key):
        loss = lambda p: objective.loss(rng_key, p, system.model, None, data)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    assert_unbiased(draws(one, KEY, 6_000), jit(value_and_gradient(expected))(params), form)


def bits(data):
    b = numpyro.param("b", jnp.zeros(3))
    J = numpyro.param("J", jnp.array(0.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
        ebm.energy("E", -v @ b - J * v[:, 0] * v[:, 1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["NCE", "ranking"])
def test_discrete_visible_sites(name):
    states = np.array(list(itertools.product([0, 1], repeat=3)))
    probs = np.array([0.3, 0.5, 0.8])
    log_q = states @ np.log(probs) + (1 - states) @ np.log1p(-probs)
    params = arrays({"b": np.array([0.4, -0.3, 0.9]), "J": 0.8, "log_normalizer": 1.9})
    if name == "ranking":
        del params["log_normalizer"]
    rows = np.array([1, 6, 6, 3])

    def expected(p):
        at = states @ p["b"] + p["J"] * states[:, 0] * states[:, 1] - log_q
        if name == "ranking":
            return jnp.mean(softplus(at - at[rows][:, None]) @ np.exp(log_q))
        at = at - p["log_normalizer"]
        return jnp.mean(softplus(-at[rows])) + np.exp(log_q) @ softplus(at)

    noise = dist.Bernoulli(probs).to_event(1)
    objective = ebm.NCE(noise) if name == "NCE" else ebm.RankingNCE(noise, 1)
    data = jnp.asarray(states[rows])

    def one(rng_key):
        loss = lambda p: objective.loss(rng_key, p, bits, None, data)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    assert_unbiased(draws(one, KEY, 4_000), jit(value_and_gradient(expected))(params), name)


# Noise with parameters


def fitted_noise():
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("noise_scale", 2.0, constraint=constraints.positive)
    return dist.Normal(loc, scale)


def test_a_noise_with_parameters_is_fitted_by_maximum_likelihood():
    data = 3.0 + 0.5 * jax.random.normal(KEY, (2_000,))
    objective = ebm.NCE(fitted_noise)
    fit = train(one_dimensional, objective, data, 800, lr=0.05, init_params={"m": 9.0, "t": 3.0})
    np.testing.assert_allclose(fit.params["loc"], jnp.mean(data), atol=1e-3)
    np.testing.assert_allclose(fit.params["noise_scale"], jnp.std(data), atol=1e-3)
    trained = objective.noise_distribution(fit.params, one_dimensional, data)
    assert (trained.loc, trained.scale) == (fit.params["loc"], fit.params["noise_scale"])


@pytest.mark.slow
def test_the_noise_has_an_optimiser_and_steps_of_its_own():
    data = 3.0 + 0.5 * jax.random.normal(KEY, (100,))
    still = ebm.NCE(fitted_noise, noise_optim=optax.sgd(0.0))
    fit = train(one_dimensional, still, data, 3, init_params={"m": 9.0, "t": 3.0})
    assert (fit.params["loc"], fit.params["noise_scale"]) == (0.0, pytest.approx(2.0))
    steps = [
        train(
            one_dimensional,
            ebm.NCE(fitted_noise, noise_optim=optax.sgd(0.1), num_noise_steps=num),
            data,
            rounds,
            init_params={"m": 9.0, "t": 3.0},
        ).params
        for num, rounds in [(3, 1), (1, 3)]
    ]
    np.testing.assert_allclose(steps[0]["loc"], steps[1]["loc"], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_the_noise_is_that_of_its_likelihood_and_of_nothing_else():
    data = 1.0 + RNG.normal(size=6)
    objective = ebm.NCE(fitted_noise, 2)
    params = arrays({"t": 1.2, "m": 0.3, "log_normalizer": 0.8, "loc": 0.5, "noise_scale": 1.4})
    loss = lambda p: objective.loss(KEY, p, one_dimensional, None, jnp.asarray(data))  # noqa: E731
    value, gradient = jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(gradient["loc"], -np.mean(data - 0.5) / 1.4**2, rtol=1e-9)
    np.testing.assert_allclose(
        gradient["noise_scale"], np.mean(1 / 1.4 - (data - 0.5) ** 2 / 1.4**3), rtol=1e-9
    )
    fixed = ebm.NCE(dist.Normal(0.5, 1.4), 2)
    energy = {k: params[k] for k in ("t", "m", "log_normalizer")}
    loss = lambda p: fixed.loss(KEY, p, one_dimensional, None, jnp.asarray(data))  # noqa: E731
    expected, of_energy = jit(jax.value_and_grad(loss))(energy)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for name in energy:
        np.testing.assert_allclose(gradient[name], of_energy[name], rtol=1e-9)


# Covariates


def regression(x, data):
    """The normaliser of a row depends on its x."""
    w = numpyro.param("w", jnp.array(0.5))
    with numpyro.plate("data", len(x)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * jnp.exp(w * x) * v**2 - x * v)


def test_covariates_want_another_objective():
    x, data = jnp.linspace(-1, 1, 8), jnp.arange(8.0)
    with pytest.raises(ModelError, match="log Z of its own. Use RankingNCE"):
        train_with = ebm.EnergySVI(regression, None, optax.adam(0.1), ebm.NCE(dist.Normal(0, 1)))
        train_with.run(KEY, 1, x, data, progress_bar=False)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["ranking", "conditional"])
def test_covariates(name):
    x, data = RNG.normal(size=4), RNG.normal(size=4)
    grid, weights = normal_grid(1, 40)
    objective = (
        ebm.RankingNCE(dist.Normal(0.1, 1.5), 1)
        if name == "ranking"
        else ebm.ConditionalNCE(STEP, 2)
    )

    def expected(p):
        def at(v):  # (..., rows)
            return -0.5 * jnp.exp(p["w"] * x) * v**2 + x * v

        if name == "ranking":
            log_q = lambda v: log_normal(v[..., None], 0.1, 1.5)  # noqa: E731
            draw = 0.1 + 1.5 * grid
            there, here = at(draw) - log_q(draw), at(data) - log_q(data)
        else:
            there, here = at(data + STEP * grid), at(data)
        return jnp.mean(weights @ softplus(there - here))

    params = {"w": jnp.array(0.5)}

    def one(rng_key):
        loss = lambda p: objective.loss(  # noqa: E731
            rng_key, p, regression, None, jnp.asarray(x), jnp.asarray(data)
        )
        return jax.value_and_grad(loss)(params)

    assert_unbiased(draws(one, KEY, 4_000), jit(value_and_gradient(expected))(params), name)


# What does not go together


def void(_):
    return None


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (dist.Normal(0, 1), r"event shape \(\), and the site \(2,\)"),
        (dist.Gamma(2.0, 1.0).expand([2]).to_event(1), "noise has to live where the data do"),
        (dist.Bernoulli(0.5).expand([2]).to_event(1), "noise has to live where the data do"),
        ({"w": dist.Normal(0, 1).expand([2]).to_event(1)}, "no distribution for .* 'v'"),
        ({"v": 3.0}, "noise of the visible site 'v' must be a NumPyro distribution"),
        (3.0, "must be a NumPyro distribution"),
        ("normal", "must be a NumPyro distribution"),
        ([3.0], "a list has to hold NumPyro transforms"),
        (lambda: None, "neither returns a distribution nor samples the visible site 'v'"),
        (lambda: 3.0, "noise of the visible site 'v' must be a NumPyro distribution"),
        (lambda a, b, c: dist.Normal(0, 1), "can be called neither with the model's arguments nor"),
        (
            lambda: void(numpyro.sample("v", dist.Normal(0, 1).expand([2]).to_event(1))),
            "outside the data plate 'data'",
        ),
    ],
)
def test_noise_that_does_not_fit(noise, message):
    system = oracles.gaussian_system()
    params = arrays({**system.params, "log_normalizer": 1.0})
    with pytest.raises(ModelError, match=message):
        ebm.NCE(noise).loss(KEY, params, system.model, None, jnp.asarray(system.data))
    del params["log_normalizer"]
    with pytest.raises(ModelError, match=message):
        ebm.RankingNCE(noise).loss(KEY, params, system.model, None, jnp.asarray(system.data))


def of_site(fn, values):
    def model(data):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", fn, obs=data)
            ebm.energy("E", a * v)

    return model, jnp.asarray(values), {"a": jnp.array(1.0), "log_normalizer": jnp.array(0.0)}


UNIT = ebm.Lebesgue(support=constraints.unit_interval)
POSITIVE = ebm.Lebesgue(support=constraints.positive)


@pytest.mark.parametrize(
    ("site", "values", "noise"),
    [
        (UNIT, [0.2, 0.9], dist.Gamma(2.0, 1.0)),
        (POSITIVE, [0.2, 0.9], dist.Beta(2.0, 1.0)),
        (POSITIVE, [0.2, 0.9], dist.Normal(0.0, 1.0)),
        (ebm.Counting(3), [0, 2], dist.Bernoulli(0.5)),
        (ebm.Counting(3), [0, 2], dist.Poisson(1.0)),
        (ebm.Counting(), [0, 1], dist.Categorical(jnp.ones(3) / 3)),
    ],
)
def test_noise_on_another_support(site, values, noise):
    model, data, params = of_site(site, values)
    with pytest.raises(ModelError, match="noise has to live where the data do, and everywhere"):
        ebm.NCE(noise).loss(KEY, params, model, None, data)


@pytest.mark.parametrize(
    ("site", "values", "noise"),
    [
        (UNIT, [0.2, 0.9], dist.Beta(2.0, 1.0)),
        (UNIT, [0.2, 0.9], dist.Uniform(0.0, 1.0)),
        (POSITIVE, [0.2, 0.9], dist.LogNormal(0.0, 1.0)),
        (POSITIVE, [0.2, 0.9], dist.HalfNormal(1.0)),
        (ebm.Counting(3), [0, 2], dist.Categorical(jnp.ones(3) / 3)),
        (ebm.Counting(3), [0, 2], dist.Binomial(2, 0.4)),
        (ebm.Counting(), [0, 1], dist.Bernoulli(0.5)),
    ],
)
def test_noise_on_the_same_support_under_another_name(site, values, noise):
    model, data, params = of_site(site, values)
    row_model = read_model(model, (data,), {}, params)
    noise = Noise(noise, row_model)
    assert np.all(np.isfinite(noise.log_density({}, row_model.unconstrain_visible())))
    assert np.all(np.isfinite(noise.draw(KEY, {}, 20)["v"]))


def test_two_sites_want_a_dict():
    params = arrays({"w": 0.7, "b": np.array([0.3, -0.4]), "log_normalizer": 1.1})
    with pytest.raises(ModelError, match=r"visible sites \['x', 'y'\]: give the noise as a dict"):
        ebm.NCE(dist.Normal(0, 1)).loss(KEY, params, two_sites, None, X, Y)


def test_one_row_not_many():
    data = jnp.arange(4.0)
    params = {"t": jnp.array(1.0), "m": jnp.array(0.0), "log_normalizer": jnp.array(0.0)}
    with pytest.raises(ModelError, match=r"draws 'v' with shape \(4, 4\)"):
        ebm.NCE(dist.Normal(jnp.zeros(4), 1)).loss(KEY, params, one_dimensional, None, data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ebm.NCE(dist.Normal(0, 1), 0), "NCE: `noise_ratio` must be a positive integer"),
        (lambda: ebm.NCE(dist.Normal(0, 1), 1.5), "`noise_ratio`.*got 1.5"),
        (lambda: ebm.RankingNCE(dist.Normal(0, 1), 0), "RankingNCE: `noise_ratio`"),
        (lambda: ebm.ConditionalNCE(0.5, 0), "ConditionalNCE: `noise_ratio`"),
        (lambda: ebm.ConditionalNCE(0.0), "`noise_scale` must be positive, got 0.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ModelError, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            ebm.NCE(noise_of(2), marginal=ebm.VaGES(2)),
            r"VaGES estimates derivatives only. Use `Exact\(\)`, `Enumerated\(\)` or `Importance",
        ),
        (
            ebm.RankingNCE(noise_of(2), marginal=ebm.VaGES(2)),
            r"VaGES has none that are exact. Use `Exact\(\)`.*`Enumerated\(\)`",
        ),
        (
            ebm.RankingNCE(noise_of(2), marginal=ebm.ImportanceBound(2)),
            "ImportanceBound has none that are exact",
        ),
        (ebm.ConditionalNCE(0.5, marginal=ebm.VaGES(2)), "VaGES has none that are exact"),
    ],
)
def test_the_marginal_has_to_have_values(objective, message):
    system = oracles.with_learned_guide(oracles.grbm_system())
    params = arrays({**system.params, "log_normalizer": 1.0})
    with pytest.raises(ModelError, match=message):
        objective.loss(KEY, params, system.model, system.guide, jnp.asarray(system.data))


def test_what_the_others_do_not_do():
    data = jnp.asarray(np.eye(3, dtype=int))
    params = {"b": jnp.zeros(3), "J": jnp.array(0.0)}
    with pytest.raises(ModelError, match="the visible site 'v' is discrete"):
        ebm.ConditionalNCE(0.5).loss(KEY, params, bits, None, data)
    params = {"t": jnp.array(1.0), "m": jnp.array(0.0)}
    with pytest.raises(ModelError, match="'loc', 'noise_scale'.*trains no noise.*use NCE"):
        ebm.RankingNCE(fitted_noise).loss(KEY, params, one_dimensional, None, jnp.arange(3.0))


def unobserved(data=None):
    with numpyro.plate("data", 1):
        v = numpyro.sample("v", ebm.Lebesgue())
        ebm.energy("E", 0.5 * v**2)


@pytest.mark.parametrize(
    "objective", [ebm.NCE(dist.Normal(0, 1)), ebm.RankingNCE(dist.Normal(0, 1))]
)
def test_something_has_to_be_observed(objective):
    with pytest.raises(ModelError, match="no observed site"):
        objective.loss(KEY, {"log_normalizer": jnp.array(0.0)}, unobserved)


# Training, here and with NumPyro's SVI


def with_own_log_z(data):
    numpyro.param("log_normalizer", 0.0)
    one_dimensional(data)


def test_numpyros_svi():
    data = 0.3 + 0.8 * jax.random.normal(KEY, (2_000,))
    objective = ebm.NCE(dist.Normal(0.0, 1.5), 2)
    optim = numpyro.optim.Adam(0.02)
    with pytest.raises(ModelError, match="'log_normalizer' of its own.*`numpyro_ebm.EnergySVI`"):
        SVI(one_dimensional, None, optim, objective).run(KEY, 1, data, progress_bar=False)
    svi = SVI(with_own_log_z, None, optim, objective)
    fit = svi.run(KEY, 1_000, data, progress_bar=False).params
    np.testing.assert_allclose(fit["t"], 1 / 0.8**2, rtol=0.15)
    exact = 0.5 * np.log(2 * np.pi / fit["t"]) + 0.5 * fit["m"] ** 2 / fit["t"]
    np.testing.assert_allclose(fit["log_normalizer"], exact, atol=0.06)
    # EnergySVI starts a declared log Z where the model says.
    svi = ebm.EnergySVI(with_own_log_z, None, optim, objective)
    assert svi.get_params(svi.init(KEY, data))["log_normalizer"] == 0.0


@pytest.mark.usefixtures("x64")
def test_log_z_starts_at_its_importance_estimate():
    data = jax.random.normal(KEY, (20_000,))
    svi = ebm.EnergySVI(one_dimensional, None, optax.adam(0.1), ebm.NCE(dist.Normal(0.0, 1.5)))
    start = svi.get_params(svi.init(KEY, data))["log_normalizer"]
    np.testing.assert_allclose(start, 0.5 * np.log(2 * np.pi), atol=0.03)
    given = svi.get_params(svi.init(KEY, data, init_params={"log_normalizer": 0.3}))
    assert given["log_normalizer"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "objective",
    [
        ebm.RankingNCE(dist.Normal(0.0, 1.5), 5),
        ebm.ConditionalNCE(0.8, 3),
    ],
    ids=["ranking", "conditional"],
)
@pytest.mark.slow
def test_the_others_train(objective):
    data = 0.3 + 0.8 * jax.random.normal(KEY, (2_000,))
    fit = train(one_dimensional, objective, data, 300, batch_size=500)
    assert set(fit.params) == {"m", "t"}
    np.testing.assert_allclose(fit.params["t"] * jnp.var(data), 1, rtol=0.15)
    np.testing.assert_allclose(fit.params["m"] / fit.params["t"], jnp.mean(data), atol=0.08)


@pytest.mark.slow
def test_variational_nce_trains():
    """With a guide that is learned beside it, log Z is still right: the bound is nearly tight."""
    data = jnp.asarray(oracles.grbm_draws(oracles.GRBM, 2_000, RNG), jnp.float32)
    noise = dist.Normal(jnp.mean(data, 0), 1.2 * jnp.std(data, 0)).to_event(1)
    objective = ebm.NCE(noise, 2, ebm.ImportanceBound(5))
    model = partial(oracles.grbm, num_visible=2)
    fit = train(model, objective, data, 2_000, guide=oracles.learned_grbm_guide)
    assert abs(fit.params["log_normalizer"] - grbm_log_z(fit.params)) < 0.15
    np.testing.assert_allclose(fit.params["A"], fit.params["W"], atol=0.3)


def test_repr():
    text = repr(ebm.RankingNCE(dist.Normal(0, 1), 4))
    assert text.startswith("RankingNCE(") and "noise_ratio=4" in text and "marginal=None" in text
