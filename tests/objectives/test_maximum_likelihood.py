# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood: log Z by enumeration and quadrature, against normalised densities."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from jax.nn import softplus
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints
from numpyro.infer import SVI
from oracles import binary_states, jit

import numpyro_ebm as ebm
from numpyro_ebm.errors import QuadratureWarning

KEY = jax.random.key(0)


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


def assert_likelihood(model, params, args, expected, objective=None, rtol=1e-8):
    """Value and gradient are those of ``expected``, the closed form."""
    objective = ebm.MaximumLikelihood() if objective is None else objective
    args = arrays(args if isinstance(args, tuple) else (args,))

    def loss(params):
        return objective.loss(KEY, params, model, None, *args)

    value, gradient = jit(jax.value_and_grad(loss))(arrays(params))
    true_value, true_gradient = jit(jax.value_and_grad(expected))(arrays(params))
    np.testing.assert_allclose(value, true_value, rtol=rtol)
    for name, x in true_gradient.items():
        np.testing.assert_allclose(gradient[name], x, rtol=rtol, atol=rtol, err_msg=name)


# Closed forms: real visibles


def gaussian_nll(data):
    def nll(p):
        precision = 0.5 * (p["precision"] + p["precision"].T)
        x = jnp.asarray(data) - p["mean"]
        log_det = jnp.linalg.slogdet(precision)[1]
        square = jnp.mean(jnp.sum((x @ precision) * x, -1))
        return 0.5 * (square - log_det) + math.log(2 * math.pi)

    return nll


def grbm_log_z(p):
    """A mixture of 2^H Gaussians: log Z by enumeration of h."""
    h = binary_states(len(p["c"]))
    shift = h @ p["W"].T
    terms = h @ p["c"] + shift @ p["b"] + 0.5 * jnp.sum((shift * p["scale"]) ** 2, -1)
    return logsumexp(terms) + jnp.sum(jnp.log(p["scale"])) + math.log(2 * math.pi)


def grbm_nll(data):
    def nll(p):
        rows = jax.vmap(lambda v: oracles.grbm_log_density(p, v))(jnp.asarray(data))
        return grbm_log_z(p) - jnp.mean(rows)

    return nll


@pytest.mark.usefixtures("x64")
def test_gaussian_with_full_precision():
    system = oracles.gaussian_system()
    expected = gaussian_nll(system.data)
    objective = ebm.MaximumLikelihood(num_nodes=96)
    assert_likelihood(system.model, system.params, system.data, expected, objective)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "model", [oracles.grbm, pytest.param(oracles.grbm_plated, marks=pytest.mark.slow)]
)
def test_grbm(model):
    system = oracles.grbm_system()
    expected = grbm_nll(system.data)
    objective = ebm.MaximumLikelihood(num_nodes=96)
    assert_likelihood(model, system.params, system.data, expected, objective)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "make, density",
    [
        (oracles.gamma_system, lambda p: dist.Gamma(p["a"], p["rate"])),
        (oracles.log_normal_system, lambda p: dist.LogNormal(p["mean"], p["scale"])),
        (oracles.beta_system, lambda p: dist.Beta(p["a"], p["b"]).to_event(1)),
    ],
)
def test_other_supports_are_integrated_in_their_own_measure(make, density):
    """The density is one of v, not of its unconstrained coordinates."""
    system = make()
    data = jnp.asarray(system.data)
    assert_likelihood(
        system.model,
        system.params,
        data,
        lambda p: -jnp.mean(density(p).log_prob(data)),
        ebm.MaximumLikelihood(num_nodes=256),
        rtol=1e-6,
    )


@pytest.mark.usefixtures("x64")
def test_a_single_row_and_equal_rows_have_no_spread_to_scale_to():
    system = oracles.log_normal_system()
    for data in (np.array([1.7]), np.array([0.4, 0.4])):
        assert_likelihood(
            system.model,
            system.params,
            data,
            lambda p, v=data: -jnp.mean(dist.LogNormal(p["mean"], p["scale"]).log_prob(v)),
        )


def gumbel(data):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", v - loc + jnp.exp(loc - v))


def test_an_energy_that_overflows_far_out_has_a_finite_gradient():
    """At a hundred standard deviations exp(-v) is no float32; its weight is zero, not NaN."""
    data = np.asarray(np.random.default_rng(0).gumbel(size=20), np.float32)
    assert data.std() * 100 > 89

    def expected(p):
        return -jnp.mean(dist.Gumbel(p["loc"], 1.0).log_prob(data))

    assert_likelihood(gumbel, {"loc": 0.3}, data, expected, rtol=2e-4)


def test_positive_data_of_wide_spread_have_a_finite_gradient():
    data = np.asarray(np.random.default_rng(0).gamma(0.5, size=50), np.float32)
    params = {"a": np.float32(0.6), "rate": np.float32(1.3)}

    def expected(p):
        return -jnp.mean(dist.Gamma(p["a"], p["rate"]).log_prob(data))

    assert_likelihood(oracles.gamma, params, data, expected, rtol=2e-4)


def test_an_energy_without_an_integral_is_not_finite():
    """Nodes that are left out have no mass; infinite mass is not hidden."""

    def upside_down(data):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", -jnp.exp((v - loc) ** 2))

    objective, data = ebm.MaximumLikelihood(), jnp.arange(3.0)
    loss = jit(lambda p: objective.loss(KEY, p, upside_down, None, data))({"loc": 0.0})
    assert not np.isfinite(loss)


# Closed forms: discrete visibles


EDGES = [(i, i + 1) for i in range(9) if i % 3 < 2] + [(i, i + 3) for i in range(6)]
ISING = {"J": np.linspace(-0.6, 0.8, len(EDGES)), "field": np.linspace(-0.5, 0.4, 9)}


def ising_log_density(p, bits):
    """Of the last axis of bits; spins are ±1."""
    spins = 2.0 * bits - 1.0
    left, right = np.array(EDGES).T
    return spins @ p["field"] + (spins[..., left] * spins[..., right]) @ p["J"]


def ising(data):
    p = {
        "J": numpyro.param("J", jnp.zeros(len(EDGES))),
        "field": numpyro.param("field", jnp.zeros(9)),
    }
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(9,)), obs=data)
        ebm.energy("E", -ising_log_density(p, v))


def ising_plated(data):
    """The same with its units in a plate, row axis last."""
    p = {
        "J": numpyro.param("J", jnp.zeros(len(EDGES))),
        "field": numpyro.param("field", jnp.zeros(9)),
    }
    with numpyro.plate("data", len(data), dim=-1):
        with numpyro.plate("units", 9, dim=-2):
            v = numpyro.sample("v", ebm.Counting(), obs=data.T)
        ebm.energy("E", -ising_log_density(p, v.T))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("model", [ising, pytest.param(ising_plated, marks=pytest.mark.slow)])
def test_ising_by_enumeration(model):
    data = np.random.default_rng(0).integers(0, 2, size=(5, 9))
    states = np.array(list(itertools.product([0, 1], repeat=9)))

    def expected(p):
        return logsumexp(ising_log_density(p, states)) - jnp.mean(ising_log_density(p, data))

    assert_likelihood(model, ISING, data, expected, rtol=1e-10)


def potts_log_density(p, x):
    """Three units of three values, in a matrix (2 x 2) less one: fields and equal pairs."""
    pairs = [(0, 1), (1, 2), (0, 2)]
    equal = sum(p["J"][k] * (x[..., i] == x[..., j]) for k, (i, j) in enumerate(pairs))
    return equal + jnp.sum(p["field"][jnp.arange(3), x], -1)


def potts(data):
    p = {"J": numpyro.param("J", jnp.zeros(3)), "field": numpyro.param("field", jnp.zeros((3, 3)))}
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(3, (3,)), obs=data)
        ebm.energy("E", -potts_log_density(p, v))


@pytest.mark.usefixtures("x64")
def test_potts_of_three_values():
    rng = np.random.default_rng(1)
    params = {"J": np.array([0.7, -0.4, 0.2]), "field": rng.normal(size=(3, 3))}
    data = rng.integers(0, 3, size=(6, 3))
    states = np.array(list(itertools.product(range(3), repeat=3)))

    def expected(p):
        return logsumexp(potts_log_density(p, states)) - jnp.mean(potts_log_density(p, data))

    assert_likelihood(potts, params, data, expected, rtol=1e-10)


def shifted_count(data):
    """A proper base measure whose lowest value is 2."""
    rate = numpyro.param("rate", jnp.array(0.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", dist.DiscreteUniform(2, 5), obs=data)
        ebm.energy("E", -rate * v)


@pytest.mark.usefixtures("x64")
def test_a_base_measure_of_its_own_counts():
    data, values = np.array([2, 5, 3]), np.arange(2, 6)

    def expected(p):
        return logsumexp(p["rate"] * values) - p["rate"] * np.mean(data)

    assert_likelihood(shifted_count, {"rate": 0.3}, data, expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_binary_rbm_sums_its_latents_out():
    def rbm(data):
        W = numpyro.param("W", jnp.zeros((3, 2)))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
            h = numpyro.sample("h", ebm.Counting(event_shape=(2,)))
            ebm.energy("E", -jnp.sum((v @ W) * h, -1))

    data = np.array([[0, 1, 1], [1, 1, 0]])

    def free(p, v):
        return jnp.sum(softplus(v @ p["W"]), -1)

    def expected(p):
        return logsumexp(free(p, binary_states(3))) - jnp.mean(free(p, data))

    W = np.random.default_rng(0).normal(size=(3, 2))
    assert_likelihood(rbm, {"W": W}, data, expected, ebm.MaximumLikelihood(ebm.Enumerated()))


# Closed forms: several sites, covariates, subsampled rows


def mixed(real, bits, order=("s", "v")):
    """A real site and a binary one, coupled, in either order."""
    mean, tilt = numpyro.param("mean", jnp.array(0.0)), numpyro.param("tilt", jnp.array(0.0))
    precision = numpyro.param("precision", jnp.array(1.0))
    with numpyro.plate("data", len(real)):
        x = {}
        for name in order:
            fn, obs = {"v": (ebm.Lebesgue(), real), "s": (ebm.Counting(), bits)}[name]
            x[name] = numpyro.sample(name, fn, obs=obs)
        square = (x["v"] - mean * x["s"]) ** 2
        ebm.energy("E", 0.5 * precision * square - tilt * x["s"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", [("s", "v"), ("v", "s")])
def test_one_real_and_one_binary_site(order):
    rng = np.random.default_rng(0)
    real, bits = rng.normal(size=6), rng.integers(0, 2, size=6)
    params = {"mean": 1.4, "tilt": -0.6, "precision": 2.0}

    def expected(p):
        log_z = softplus(p["tilt"]) + 0.5 * jnp.log(2 * jnp.pi / p["precision"])
        square = (real - p["mean"] * bits) ** 2
        return log_z + jnp.mean(0.5 * p["precision"] * square - p["tilt"] * bits)

    def model(real, bits):
        return mixed(real, bits, order)

    assert_likelihood(model, params, (real, bits), expected)


@pytest.mark.usefixtures("x64")
def test_covariates_give_every_row_a_normalizer_of_its_own():
    def regression(x, data):
        w = numpyro.param("w", jnp.array(0.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * jnp.exp(w * x) * (v - w * x) ** 2)

    x, data = np.random.default_rng(0).normal(size=(2, 7))

    def expected(p):
        return -jnp.mean(dist.Normal(p["w"] * x, jnp.exp(-0.5 * p["w"] * x)).log_prob(data))

    assert_likelihood(regression, {"w": 0.7}, (x, data), expected)


@pytest.mark.usefixtures("x64")
def test_a_subsampled_plate_counts_its_own_rows():
    whole = np.random.default_rng(0).normal(size=20)

    def model(data):
        precision = numpyro.param("precision", jnp.array(1.0))
        with numpyro.plate("data", 20, subsample_size=5):
            batch = numpyro.subsample(data, event_dim=0)
            v = numpyro.sample("v", ebm.Lebesgue(), obs=batch)
            ebm.energy("E", 0.5 * precision * v**2)

    objective, params = ebm.MaximumLikelihood(), {"precision": jnp.array(2.5)}
    problem = objective.prepare(KEY, params, model, None, (jnp.asarray(whole),), {})
    rows = np.asarray(problem.row_model.visible_values["v"])
    assert rows.shape == (5,) and np.isin(rows, whole).all()
    expected = -np.mean(dist.Normal(0, 2.5**-0.5).log_prob(rows))
    loss = jit(lambda p: objective.energy_loss(KEY, p, problem))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-8)


# Accuracy, and what is said of it


def precision_model(data):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


@pytest.mark.usefixtures("x64")
def test_the_error_falls_exponentially_in_the_number_of_nodes():
    """Twice the nodes, more than one and a half times the digits; at 128 nothing is left."""
    data = jnp.array([-1.0, 1.0])
    exact = 0.5 * math.log(2 * math.pi) + 0.5

    def error(num_nodes):
        objective = ebm.MaximumLikelihood(num_nodes=num_nodes)
        loss = jit(lambda p: objective.loss(KEY, p, precision_model, None, data))
        return abs(float(loss({"precision": 1.0})) - exact)

    errors = np.array([error(num) for num in (8, 16, 32, 64, 128)])
    print(errors)
    assert errors[0] > 1e-2 and errors[-1] < 1e-13
    assert np.all(errors[1:4] < errors[:3] ** 1.5)


def reviewed(model, data, **params):
    """What is said at the end of a run with this result."""
    objective = ebm.MaximumLikelihood()

    @jit
    def statistics(params):
        problem = objective.prepare(KEY, params, model, None, (jnp.asarray(data),), {})
        return objective.statistics(KEY, params, problem)

    objective.review(statistics(params))


DATA = np.random.default_rng(0).normal(size=200)


@pytest.mark.parametrize(
    "precision, which", [(1e6, "half of them"), (1e-6, "inner half of their reach")]
)
def test_an_energy_of_another_width_than_the_data_warns(precision, which):
    """Too narrow for the spacing of the nodes, or mass beyond their reach."""
    with pytest.warns(QuadratureWarning, match=rf"log Z is .* {which}. Raise `num_nodes`"):
        reviewed(precision_model, DATA, precision=precision)


def test_a_run_ends_with_the_warning():
    svi = ebm.EnergySVI(precision_model, None, optax.sgd(0.0), ebm.MaximumLikelihood(num_nodes=16))
    with pytest.warns(QuadratureWarning, match="`num_nodes` \\(now 16\\)"):
        svi.run(KEY, 1, DATA, init_params={"precision": jnp.array(1e3)}, progress_bar=False)


@pytest.mark.parametrize("precision", [0.01, 1.0, 25.0])
def test_no_warning_where_the_nodes_suffice(precision):
    reviewed(precision_model, DATA, precision=precision)


def test_no_warning_for_sums_over_states():
    data = np.random.default_rng(0).integers(0, 2, size=(4, 9))
    reviewed(ising, data)


# Errors


def test_more_than_two_real_coordinates_are_told_where_to_go():
    system = oracles.linear_system()
    message = "at most 2 real coordinates.*'v'.*have 3.*ContrastiveDivergence, NCE or a score"

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
            ebm.energy("E", jnp.sum(v**2, -1))

    with pytest.raises(ebm.ModelError, match=message):
        ebm.MaximumLikelihood().loss(KEY, {}, model, None, jnp.asarray(system.data))


@pytest.mark.parametrize(
    "num_units, max_states, ok", [(21, 1_048_576, False), (9, 511, False), (9, 512, True)]
)
def test_too_many_states_are_told_where_to_go(num_units, max_states, ok):
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(event_shape=(num_units,)), obs=data)
            ebm.energy("E", jnp.sum(v, -1))

    data = jnp.zeros((2, num_units), int)
    objective = ebm.MaximumLikelihood(max_states=max_states)
    if ok:
        assert np.isfinite(objective.loss(KEY, {}, model, None, data))
        return
    message = f"more than max_states={max_states}. Use PseudoLikelihood, RatioMatching, NCE"
    with pytest.raises(ebm.ModelError, match=message):
        objective.loss(KEY, {}, model, None, data)


def test_infinitely_many_values_raise():
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", dist.Poisson(2.0), obs=data)
            ebm.energy("E", 0.1 * v)

    with pytest.raises(ebm.ModelError, match="MaximumLikelihood: .*'v'.* has infinitely many"):
        ebm.MaximumLikelihood().loss(KEY, {}, model, None, jnp.array([1, 2]))


@pytest.mark.parametrize("marginal", [ebm.VaGES(), ebm.ImportanceBound()])
def test_marginals_without_exact_values_are_told_where_to_go(marginal):
    system = oracles.grbm_system()
    message = rf"{type(marginal).__name__} has none that are exact.*Enumerated\(\).*NCE"
    with pytest.raises(ebm.ModelError, match=message):
        ebm.MaximumLikelihood(marginal).loss(
            KEY, arrays(system.params), system.model, system.guide, jnp.asarray(system.data)
        )


def test_without_data_there_is_nothing_to_learn():
    with pytest.raises(ebm.ModelError, match="MaximumLikelihood: .*no observed site"):
        ebm.MaximumLikelihood().loss(KEY, {}, oracles.gaussian, None)


@pytest.mark.parametrize("num_nodes", [3, 10.0, "many"])
def test_the_number_of_nodes_is_checked(num_nodes):
    with pytest.raises(ebm.ModelError, match="integer of at least 4"):
        ebm.MaximumLikelihood(num_nodes=num_nodes)


# Learning


@pytest.mark.parametrize("ours", [True, False])
def test_recovers_a_gaussian(ours):
    """The maximum is the sample mean and covariance."""
    truth = np.linalg.inv(oracles.GAUSSIAN["precision"])
    data = np.random.default_rng(0).multivariate_normal(oracles.GAUSSIAN["mean"], truth, 300)
    data = jnp.asarray(data, jnp.float32)
    objective = ebm.MaximumLikelihood(num_nodes=32)
    optim = optax.adam(optax.exponential_decay(0.1, 50, 0.3))
    if ours:
        svi = ebm.EnergySVI(oracles.gaussian, None, optim, objective)
    else:
        svi = SVI(oracles.gaussian, lambda data: None, optim, objective)
    fit = svi.run(KEY, 200, data, progress_bar=False)
    precision = 0.5 * (fit.params["precision"] + fit.params["precision"].T)
    np.testing.assert_allclose(fit.params["mean"], data.mean(0), atol=2e-3)
    np.testing.assert_allclose(jnp.linalg.inv(precision), jnp.cov(data.T, ddof=0), atol=5e-3)
    assert fit.losses[-1] < fit.losses[0]


def test_an_energy_that_is_no_number_among_the_data_is_not_hidden():
    def broken(data):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", a * v**2 + jnp.where(jnp.abs(v) < 0.1, jnp.nan, 0.0))

    loss = ebm.MaximumLikelihood().loss(
        jax.random.key(0), {"a": 1.0}, broken, None, jnp.array([-1.0, 1.0])
    )
    assert np.isnan(loss)


def test_energy_svi_learns_a_discrete_model():
    """A pair of spins: E[s₀ s₁] = tanh J; 200 rows in a plate that the four states do not fill."""

    def pair(data):
        coupling = numpyro.param("J", 0.0)
        with numpyro.plate("data", len(data)):
            x = numpyro.sample("x", ebm.Counting(event_shape=(2,)), obs=data)
            s = 2 * x - 1
            ebm.energy("E", -coupling * s[:, 0] * s[:, 1])

    data = jnp.array([[0, 0], [1, 1], [1, 1], [0, 1]] * 50)
    svi = ebm.EnergySVI(pair, None, numpyro.optim.Adam(0.05), ebm.MaximumLikelihood())
    fit = svi.run(jax.random.key(0), 300, data, progress_bar=False)
    assert abs(fit.params["J"] - np.arctanh(0.5)) < 1e-3


def test_derivatives_of_every_order(x64):
    """log Z of the Gaussian is -½ log p and a constant: 1/(2p²), and -1/p³, by quadrature."""

    def gaussian(data):
        p = numpyro.param("p", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * p * v**2)

    data = jnp.array([-1.0, 3.0])

    def loss(p, data=data):
        return ebm.MaximumLikelihood().loss(jax.random.key(0), {"p": p}, gaussian, None, data)

    for wrap in (lambda f: f, jax.jit):
        slope = jax.grad(wrap(loss))
        np.testing.assert_allclose(slope(2.0), 2.5 - 0.25, rtol=1e-6)
        np.testing.assert_allclose(wrap(jax.grad(slope))(2.0), 0.125, rtol=1e-6)
        np.testing.assert_allclose(wrap(jax.jacfwd(jax.grad(slope)))(2.0), -0.125, rtol=1e-6)
    many = jax.vmap(jax.grad(loss))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(many, [2.0, 2.25], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss, 1)(2.0, data), data, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e5])
def test_equal_rows_have_no_spread_but_for_rounding(value):
    def gaussian(data):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - loc) ** 2)

    data = jnp.full(3, value)
    loss = ebm.MaximumLikelihood().loss(KEY, {"loc": value}, gaussian, None, data)
    np.testing.assert_allclose(loss, 0.5 * np.log(2 * np.pi), atol=1e-3)
