# SPDX-License-Identifier: Apache-2.0
"""Sums of objectives: weights, parts on some sites, and what parts keep and bring.

The oracle is a mixture of Gaussians whose classes are a visible site: p(x), p(y | x) and p(x | y)
are known, and so is their sum, with labels that are missing too.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.infer import SVI
from numpyro.infer.util import log_density

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")

ML, PL, SM = ebm.MaximumLikelihood, ebm.PseudoLikelihood, ebm.ScoreMatching
PARAMS = {
    "mean": np.array([-1.0, 0.4, 2.0]),
    "logit": np.array([0.3, -0.2, 0.5]),
    "scale": np.array([0.7, 1.1, 0.9]),
}
X = np.array([-1.3, 0.2, 0.9, 2.2, -0.4, 1.7])
Y = np.array([0, 1, 2, 2, 1, 1])
KNOWN = np.array([True, False, True, True, False, True])


def classes(x, y, known=None):
    mean = numpyro.param("mean", jnp.array([-0.5, 0.0, 0.5]))
    logit = numpyro.param("logit", jnp.zeros(3))
    scale = numpyro.param("scale", jnp.ones(3), constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
        y = numpyro.sample("y", ebm.Counting(3), obs=y, obs_mask=known)
        ebm.energy("E", 0.5 * ((x - mean[y]) / scale[y]) ** 2 - logit[y])


def log_joint(params, x):
    """log p̃(x, y), of shape (rows, classes), and log Z."""
    z = (x[:, None] - params["mean"]) / params["scale"]
    log_z = jax.nn.logsumexp(params["logit"] + jnp.log(params["scale"]))
    return params["logit"] - 0.5 * z**2, log_z + 0.5 * jnp.log(2 * jnp.pi)


def of_x(params, x):
    table, log_z = log_joint(params, x)
    return jnp.mean(log_z - jax.nn.logsumexp(table, -1))


def of_y_given_x(params, x, y, known):
    table = jax.nn.log_softmax(log_joint(params, x)[0])
    return -jnp.mean(jnp.where(known, table[jnp.arange(len(x)), y], 0.0))


def score_given_y(params, x, y):
    """½ s² + s' of x given its class."""
    precision = params["scale"][y] ** -2
    return jnp.mean(0.5 * (precision * (x - params["mean"][y])) ** 2 - precision)


def everyone(x):
    return jnp.ones(len(x), bool)


CASES = {
    "p(x) and p(y | x) are the joint": (
        lambda: ML().on("x") + ML().on("y", given="x"),
        lambda p: of_x(p, X) + of_y_given_x(p, X, Y, everyone(X)),
    ),
    "which the joint is": (ML, lambda p: of_x(p, X) + of_y_given_x(p, X, Y, everyone(X))),
    "a cross-entropy": (
        lambda: PL().on("y", given=["x"]),
        lambda p: of_y_given_x(p, X, Y, everyone(X)),
    ),
    "all but those given": (
        lambda: PL().on(given="x"),
        lambda p: of_y_given_x(p, X, Y, everyone(X)),
    ),
    "scores beside a label": (
        lambda: 0.3 * SM().on("x", given="y"),
        lambda p: 0.3 * score_given_y(p, X, Y),
    ),
    "weights of weights": (
        lambda: sum([2.0 * (0.25 * ML().on("x") + SM().on("x", given="y")), PL().on(given="x")]),
        lambda p: (
            0.5 * of_x(p, X) + 2.0 * score_given_y(p, X, Y) + of_y_given_x(p, X, Y, everyone(X))
        ),
    ),
}


def assert_same(loss, expected, params=PARAMS):
    params = jax.tree.map(jnp.asarray, params)
    found, wanted = (jax.jit(jax.value_and_grad(f))(params) for f in (loss, expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_laws_of_the_model(name):
    make, expected = CASES[name]
    assert_same(lambda p: make().loss(jax.random.key(0), p, classes, None, X, Y), expected)


def test_labels_may_be_missing():
    """A row without label adds -log p(x), and nothing to p(y | x)."""
    objective = ML().on("x") + 0.5 * ML().on("y", given="x")
    args = X, jnp.where(KNOWN, Y, 2), KNOWN
    assert_same(
        lambda p: objective.loss(jax.random.key(0), p, classes, None, *args),
        lambda p: of_x(p, X) + 0.5 * of_y_given_x(p, X, Y, KNOWN),
    )
    with pytest.raises(ebm.ModelError, match="'y' leave its support.*obs_mask"):
        objective.loss(jax.random.key(0), PARAMS, classes, None, X, jnp.where(KNOWN, Y, -1))


@pytest.mark.slow
def test_a_site_of_another_support_given_covariates_and_groups():
    """200 rows of a positive site, a label, a covariate in a closure and an index of groups."""
    rng = np.random.default_rng(0)
    z, group = jnp.asarray(rng.normal(size=200)), jnp.asarray(rng.integers(0, 4, 200))
    x, y = jnp.asarray(rng.gamma(2.0, size=200)), jnp.asarray(rng.integers(0, 2, 200))

    def model(x, y):
        rate = numpyro.param("rate", jnp.ones(4), constraint=constraints.positive)
        slope = numpyro.param("slope", 0.0)
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", ebm.Lebesgue(support=constraints.positive), obs=x)
            y = numpyro.sample("y", ebm.Counting(2), obs=y)
            ebm.energy("E", rate[group] * x - jnp.log(x) - slope * z * (y - 0.5) * x)

    def expected(params):
        rates = params["rate"][group][:, None] - params["slope"] * z[:, None] * jnp.array(
            [-0.5, 0.5]
        )
        table = -rates * x[:, None]  # p̃(x, y) up to x, and ∫ x e^{-rx} dx = r⁻²
        of_label = jax.nn.log_softmax(table)[jnp.arange(200), y]
        log_marginal = jnp.log(x) + jax.nn.logsumexp(table, -1)
        log_z = jax.nn.logsumexp(-2.0 * jnp.log(rates), -1)
        return jnp.mean(0.7 * (log_z - log_marginal) - of_label)

    objective = 0.7 * ML(num_nodes=256).on("x") + PL().on("y", given="x")
    params = {"rate": jnp.array([0.8, 1.0, 1.5, 2.0]), "slope": jnp.array(0.2)}
    assert_same(lambda p: objective.loss(jax.random.key(0), p, model, None, x, y), expected, params)


# What parts keep and bring


def mala(model):
    return ebm.MALA(model, step_size=0.8)


def jem():
    chains = ebm.ContrastiveDivergence(mala, 3, persistent=True)
    return chains, chains.on("x") + PL().on("y", given="x")


def many_rows(num=600):
    rng = np.random.default_rng(1)
    y = rng.choice(3, size=num, p=[0.5, 0.2, 0.3])
    mean, scale = np.array([-1.0, 0.4, 2.0]), np.array([0.5, 0.4, 0.6])
    return jnp.asarray(rng.normal(mean[y], scale[y])), jnp.asarray(y)


@pytest.mark.slow
def test_chains_of_a_part_resume_bit_for_bit(tmp_path):
    chains, objective = jem()
    svi = ebm.EnergySVI(classes, None, numpyro.optim.Adam(0.05), objective)
    run = partial(svi.run, jax.random.key(3), batch_size=20, progress_bar=False)
    data = many_rows(60)
    whole, first = run(20, *data), run(8, *data)
    ebm.save(tmp_path / "fit", first)
    second = run(12, *data, init_state=ebm.load(tmp_path / "fit").state)
    losses = np.concatenate([first.losses, second.losses])
    np.testing.assert_array_equal(losses, whole.losses)
    jax.tree.map(np.testing.assert_array_equal, second.params, whole.params)
    assert chains.chain_diagnostics(objective.state_of(chains, whole.state))["visible"].shape == (
        1,
    )
    other = ebm.EnergySVI(classes, None, numpyro.optim.Adam(0.05), PL().on(given="x"))
    with pytest.raises(ebm.ModelError, match="does not belong to what"):
        other.run(jax.random.key(3), 2, *data, init_state=first.state, progress_bar=False)


@pytest.mark.slow
def test_a_joint_energy_model_arrives_at_maximum_likelihood():
    """PCD on x and cross-entropy of y given x: the joint likelihood, whose maximum is known."""
    x, y = many_rows()
    _, objective = jem()
    optim = numpyro.optim.Adam(lambda i: 0.03 / (1 + 0.005 * i))
    svi = ebm.EnergySVI(classes, None, optim, objective)
    fit = svi.run(jax.random.key(0), 3_000, x, y, progress_bar=False, ema=0.99)
    for k in range(3):
        own = np.asarray(x)[np.asarray(y) == k]
        error = own.std() / np.sqrt(len(own))
        np.testing.assert_allclose(fit.ema_params["mean"][k], own.mean(), atol=error)
        np.testing.assert_allclose(fit.ema_params["scale"][k], own.std(), rtol=0.1)


@pytest.mark.slow
def test_networks_of_parts_are_trained_as_alone():
    def flow():
        scale = numpyro.param("flow_scale", 1.0, constraint=constraints.positive)
        return dist.Normal(0.0, scale)

    def gaussian(x):
        precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
            ebm.energy("E", 0.5 * precision * x**2)

    fits = []
    for objective in (
        ebm.NCE(flow, noise_optim=numpyro.optim.SGD(0.1)),
        SM() + 0.0 * ebm.NCE(flow, noise_optim=numpyro.optim.SGD(0.1)),
    ):
        svi = ebm.EnergySVI(gaussian, None, numpyro.optim.SGD(0.1), objective)
        fits.append(svi.run(jax.random.key(0), 5, X, progress_bar=False).params)
    alone, beside = fits
    np.testing.assert_allclose(alone["flow_scale"], beside["flow_scale"], rtol=1e-12)
    assert alone["flow_scale"] != 1.0 and alone["log_normalizer"] != beside["log_normalizer"]


def test_the_network_of_a_part_has_the_problem_of_its_part():
    """Noise that is fitted to the rows of one part, which the other moves."""

    def noise():
        return dist.Normal(numpyro.param("loc", 0.5), 1.0)

    part = ebm.NCE(noise)
    total = ebm.DenoisingScoreMatching(5.0) + part
    problem = total.prepare(jax.random.key(0), {}, bowls, None, (X,), {})
    (network,), key, own = total.networks, jax.random.key(1), {"loc": 2.0}
    assert network.parameters(key, problem)["loc"][0] == 0.5
    found = network.loss(key, {}, own, problem)
    np.testing.assert_allclose(found, -np.mean(dist.Normal(2.0, 1.0).log_prob(X)), rtol=1e-6)


def with_latent(x):
    slope = numpyro.param("slope", 1.0)
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
        h = numpyro.sample("h", ebm.Lebesgue())
        ebm.energy("E", 0.5 * x**2 + 0.25 * h**2 - slope * x * h)


def normal_guide(x):
    loc = numpyro.param("loc", 0.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", dist.Normal(loc * ebm.visible("x", x), 1.0))


def test_the_guide_is_fitted_where_its_parts_are():
    """At the noised values of the one part that draws from it; two such points are refused.

    Rows count for it as they do there. Two parts with noise draw it each for itself.
    """
    noised = ebm.MultiscaleDenoisingScoreMatching(None, ebm.VaGES(2))
    params, exact = {"slope": 1.0, "loc": 0.3}, ebm.GaussianLatents()
    other = ebm.DenoisingScoreMatching(5.0, exact)
    total = SM(exact) + 0.5 * noised + other + 2.0 * other
    problem = total.prepare(jax.random.key(0), params, with_latent, normal_guide, (X,), {})
    _, own, *others = problem.parts
    np.testing.assert_array_equal(problem.unconstrained["x"], own.unconstrained["x"])
    np.testing.assert_array_equal(problem.row_weights, 1 / own.noise[0])
    assert np.all(problem.unconstrained["x"] != X)
    assert np.all(others[0].noise["x"] != others[1].noise["x"])
    both = SM(ebm.VaGES(3)) + noised
    with pytest.raises(ebm.ModelError, match="2 parts draw from one guide.*adds noise"):
        both.prepare(jax.random.key(0), params, with_latent, normal_guide, (X,), {})


def test_a_sum_is_a_loss_where_all_its_parts_are():
    assert (SM() + PL()).is_loss and not (SM() + jem()[0]).is_loss


def test_a_posterior_of_a_sum():
    def model(x):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
            ebm.energy("E", 0.5 * precision * x**2)

    params = {"precision": jnp.array(0.7)}
    log_joints = [
        log_density(ebm.generalized(model, objective), (X,), {}, params)[0]
        for objective in (SM(), 0.25 * SM() + 0.75 * SM())
    ]
    np.testing.assert_allclose(*log_joints, rtol=1e-10)


@pytest.mark.slow
def test_svi_takes_a_sum_as_its_loss():
    objective = ML().on("x") + PL().on("y", given="x")
    svi = SVI(classes, lambda x, y: None, numpyro.optim.SGD(0.1), loss=objective)
    state = svi.init(jax.random.key(0), X, Y)
    params = svi.get_params(state)
    _, loss = jax.jit(svi.update)(state, X, Y)
    expected = of_x(params, X) + of_y_given_x(params, X, Y, everyone(X))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SM() + 1, "An objective and 1 do not add up"),
        (lambda: 1.5 + SM(), "An objective and 1.5 do not add up"),
        (lambda: SM() * "x", "weight.*must be a number"),
        (lambda: SM() * PL(), "weight.*must be a number"),
        (lambda: True * SM(), "weight.*must be a number"),
        (lambda: -0.5 * SM(), "not negative"),
        (lambda: np.float32(np.nan) * SM(), "not negative and finite"),
        (lambda: SM() * np.inf, "not negative and finite"),
        (lambda: jnp.ones(3) * SM(), "must be a number.*handlers.scale"),
        (lambda: SM().on("x", given="x"), "none on both sides"),
        (lambda: SM().on(["x"]), "names of visible sites"),
        (lambda: SM().on("x").on("y"), "on some sites already"),
        (lambda: 2 * jem()[0] + jem()[0] + 0 * PL(), None),
        (lambda: (lambda a: 2 * a + a)(jem()[0]), "same ContrastiveDivergence.*has\\s+chains"),
        (lambda: (lambda a: a + PL() + a)(ebm.FisherDivergence()), "same FisherDivergence"),
    ],
)
def test_what_is_no_sum_is_refused(make, message):
    if message is None:
        assert repr(make()).startswith("WeightedSum(2.0 * ContrastiveDivergence(")
        return
    with pytest.raises(ebm.ModelError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ML().on("z"), r"names the site 'z', and the visible sites are \['x', 'y'\]"),
        (lambda: ML().on(given=["x", "y"]), "all visible sites are given"),
        (lambda: SM().on("y", given="x"), "ScoreMatching.*'y' is discrete"),
        (lambda: SM(ebm.VaGES(3)).on("x"), "VaGES needs a guide.*'y'"),
        (lambda: ebm.NCE(dist.Normal(0, 1)).on("x", given="y"), "NCE learns one log Z.*'y'"),
        (lambda: jem()[0].on("x", given="y") + PL().on(given="x"), "'y'.*persistent chain"),
    ],
)
def test_parts_that_do_not_serve_their_sites_are_refused(make, message):
    svi = ebm.EnergySVI(classes, None, numpyro.optim.SGD(0.1), make())
    with pytest.raises(ebm.ModelError, match=f"(?s){message}"):
        svi.init(jax.random.key(0), X, Y)


class Recorder(ebm.ScoreMatching):
    """Keeps what it is asked with from round to round; no two of its arguments are equal."""

    has_state = True

    def init_state(self, rng_key, params, problem):
        nothing = {name: jnp.zeros_like(x) for name, x in params.items()}
        return {"begun": jnp.array(1.0), "advanced": nothing, "before": nothing, "after": nothing}

    def advance(self, rng_key, params, problem, state):
        return problem, {**state, "begun": state["begun"] + 1, "advanced": dict(params)}

    def settle(self, rng_key, before, after, problem, state):
        return {**state, "before": dict(before), "after": dict(after)}

    def statistics(self, rng_key, params, problem, state=None):
        return params["mean"]

    def review(self, statistics):
        self.reviewed = statistics

    def review_state(self, state):
        self.seen = state


def bowls(data):
    mean = numpyro.param("mean", 0.3)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - mean) ** 2)


def test_a_part_is_asked_in_a_sum_as_it_is_alone():
    """With the same arguments, in the same order, at the same times."""
    alone, part = Recorder(), Recorder()
    fits = [
        ebm.EnergySVI(bowls, None, optax.sgd(0.1), objective).run(
            jax.random.key(5), 3, jnp.asarray(X), progress_bar=False
        )
        for objective in (alone, 0.0 * ebm.ScoreMatching() + 1.0 * part)
    ]
    np.testing.assert_allclose(fits[0].params["mean"], fits[1].params["mean"], rtol=1e-12)
    assert jnp.abs(alone.seen["after"]["mean"] - alone.seen["before"]["mean"]) > 0.01
    for what in ("seen", "reviewed"):
        pair = jax.tree.map(np.asarray, (getattr(alone, what), getattr(part, what)))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), *pair)
    assert alone.seen["begun"] == 4
    np.testing.assert_array_equal(alone.seen["advanced"]["mean"], alone.seen["before"]["mean"])


class Lottery(ebm.ScoreMatching):
    """A loss that is its random number."""

    def energy_loss(self, rng_key, params, problem):
        return jax.random.normal(rng_key)


def test_parts_draw_with_keys_of_their_own():
    """Half of one and half of another have half of the variance."""
    both = 0.5 * Lottery() + 0.5 * Lottery()
    problem = both.prepare(jax.random.key(3), {}, bowls, None, (jnp.asarray(X),), {})
    keys = jax.random.split(jax.random.key(4), 4_000)
    losses = jax.vmap(lambda key: both.energy_loss(key, {}, problem))(keys)
    assert jnp.var(losses) == pytest.approx(0.5, abs=4 * 0.5 * (2 / len(keys)) ** 0.5)
