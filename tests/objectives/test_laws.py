# SPDX-License-Identifier: Apache-2.0
"""Laws over every objective of the library, whatever its kind.

What an objective estimates is held against its formula elsewhere (test_formulas for those made of
scores, test_discrete for discrete sites; a file of its own for each other kind). Here: jit equals
eager, NumPyro's SVI and EnergySVI arrive at the same place, invalid marginals raise and name the
valid ones, what has no place in plain SVI says so, and every objective can be printed, stored and
resumed.
"""

import pickle
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.distributions import constraints
from numpyro.infer import SVI
from registry.marginals import MARGINALS
from registry.objectives import NOISE, OBJECTIVES, flow, mala

import numpyro_ebm as ebm
from numpyro_ebm import objectives

pytestmark = pytest.mark.usefixtures("x64")


def test_every_objective_is_in_the_registry():
    exported = {
        x.__name__
        for module in (ebm, objectives)
        for x in vars(module).values()
        if isinstance(x, type)
        and issubclass(x, objectives.Objective)
        and x is not objectives.Objective
    }
    assert exported == set(OBJECTIVES)
    here = Path(__file__)
    others = [x.read_text() for x in here.parent.glob("test_*.py") if x != here]
    for name, objective in OBJECTIVES.items():
        made = [objective.make(), *(formula.make() for formula in objective.formulas.values())]
        assert {type(x).__name__ for x in made} == {name}
        assert objective.formulas or any(re.search(rf"\b{name}\(", text) for text in others), name


# Models with and without latents, of either kind, with one parameter each.


def gaussian(data):
    precision = numpyro.param("precision", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def pair(data):
    coupling = numpyro.param("precision", 0.1)
    with numpyro.plate("data", len(data)):
        x = numpyro.sample("v", ebm.Counting(event_shape=(2,)), obs=data)
        s = 2.0 * x - 1.0
        ebm.energy("E", -coupling * s[:, 0] * s[:, 1])


def mixture(data):
    """A binary latent beside the visible site, real or discrete."""
    shift = numpyro.param("precision", 1.0)
    discrete = jnp.issubdtype(data.dtype, jnp.integer)
    shape = (2,) if discrete else ()
    with numpyro.plate("data", len(data)):
        base = ebm.Counting(event_shape=shape) if discrete else ebm.Lebesgue()
        v = numpyro.sample("v", base, obs=data)
        h = numpyro.sample("h", ebm.Counting())
        x = jnp.sum(2.0 * v - 1.0, -1) if discrete else v
        ebm.energy("E", 0.5 * x**2 - shift * h * x + 0.2 * h)


def guide(data):
    slope = numpyro.param("slope", 1.0)
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        x = jnp.sum(2.0 * v - 1.0, -1) if jnp.ndim(v) > 1 else v
        numpyro.sample("h", dist.Bernoulli(logits=slope * x - 0.2))


def is_discrete(member):
    return member.sites != "real"


def rows(member, num=400):
    rng = np.random.default_rng(0)
    if is_discrete(member):
        first = rng.integers(0, 2, size=num)
        same = rng.random(num) < 0.8
        return jnp.asarray(np.stack([first, np.where(same, first, 1 - first)], -1))
    return jnp.asarray(0.7 * rng.normal(size=num))


def all_params(objective, model, reader, data, params):
    """The parameters with those of the objective's own, at their initial values."""
    key = jax.random.key(0)
    problem = objective.prepare(key, params, model, reader, (data,), {})
    for network in objective.networks:
        params = {**params, **{k: v[0] for k, v in network.parameters(key, problem).items()}}
    own = objective.own_parameters(key, params, problem)
    return {**params, **{k: v[0] for k, v in own.items()}}


@pytest.mark.parametrize(
    "name",
    [name if name == "NCE" else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES],
)
def test_jit_equals_eager(name):
    member = OBJECTIVES[name]
    objective, data = member.make(), rows(member, 6)
    model = pair if is_discrete(member) else gaussian
    params = all_params(objective, model, None, data, {"precision": jnp.asarray(0.7)})

    def of(params, data):
        loss = lambda p: objective.loss(jax.random.key(1), p, model, None, data)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    eager, jitted = of(params, data), oracles.jit(of)(params, data)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10), eager, jitted
    )


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("marginal", ["Enumerated", "VaGES", "ImportanceBound", "Unrolled"])
def test_marginals_serve_or_are_refused_by_name(name, marginal):
    member = OBJECTIVES[name]
    objective, data = member.make(MARGINALS[marginal].make()), rows(member, 6)
    params = {"precision": jnp.asarray(0.7), "slope": jnp.asarray(0.5)}

    def of():
        full = all_params(objective, mixture, guide, data, params)
        # The gradient at a critic of zero, where it starts, is zero.
        full = {k: v if k in params else v + 0.3 for k, v in full.items()}
        loss = lambda p: objective.loss(jax.random.key(1), p, mixture, guide, data)  # noqa: E731
        return jax.value_and_grad(loss)(full)

    if marginal in member.marginals:
        value, gradient = oracles.jit(of)()
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
        assert gradient["precision"] != 0
        return
    with pytest.raises(ebm.ModelError, match=r"(?s)" + type(objective).__name__) as error:
        of()
    assert any(f"{valid}()" in str(error.value) for valid in member.marginals)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_exact_is_for_models_without_latents(name):
    member = OBJECTIVES[name]
    with pytest.raises(ebm.ModelError, match=r"Exact\(\) is for models without latent sites"):
        member.make(ebm.Exact()).loss(
            jax.random.key(0), {"precision": 1.0}, mixture, None, rows(member, 6)
        )


def optimum(member, data):
    """What each objective tends to on these rows: the moment or the coupling they ask for."""
    if is_discrete(member):
        return np.arctanh(np.mean((2 * data[:, 0] - 1) * (2 * data[:, 1] - 1)))
    return 1 / (np.mean(np.asarray(data) ** 2) + member.sigma**2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_svi_and_energy_svi_agree_at_the_optimum(name):
    """One parameter, for which every objective has (nearly) the same minimiser."""
    member = OBJECTIVES[name]
    data = rows(member, 500 if name == "KernelSteinDiscrepancy" else 2_000)  # it is quadratic
    model = pair if is_discrete(member) else gaussian
    steps = numpyro.optim.Adam(lambda i: 0.1 / (1 + 0.02 * i))
    fit = ebm.EnergySVI(model, None, steps, member.make()).run(
        jax.random.key(1), 400, data, progress_bar=False
    )
    results = [fit.params["precision"]]
    svi = SVI(model, None, steps, loss=member.make())
    if member.plain:
        results.append(
            svi.run(jax.random.key(2), 400, data, progress_bar=False).params["precision"]
        )
    else:
        with pytest.raises(ebm.ModelError, match="numpyro_ebm.EnergySVI"):
            svi.run(jax.random.key(2), 2, data, progress_bar=False)
    # 2,000 rows tell the parameter to 3%; objectives differ by less than that, and by their noise.
    np.testing.assert_allclose(results, optimum(member, data), rtol=0.12)


def test_persistent_chains_have_no_place_in_svi():
    objective = ebm.ContrastiveDivergence(mala, persistent=True)
    svi = SVI(gaussian, None, numpyro.optim.Adam(0.1), loss=objective)
    with pytest.raises(ebm.ModelError, match="keeps a state.*numpyro_ebm.EnergySVI"):
        svi.run(jax.random.key(0), 2, rows(OBJECTIVES["NCE"], 10), progress_bar=False)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_repr_names_the_objective_and_its_options(name):
    objective = OBJECTIVES[name].make()
    assert repr(objective).startswith(name + "(")
    assert "marginal=" in repr(objective)
    assert "players" not in repr(objective)


@pytest.mark.parametrize("name", ["NCE", "FlowContrastive", "FisherDivergence"])
def test_a_player_named_as_the_model_is_refused_or_shared(name):
    """The noise's parameters may not be called like the energy's."""

    def clashing():
        scale = numpyro.param("precision", 1.0, constraint=constraints.positive)
        return dist.Normal(0.0, scale)

    make = {
        "NCE": lambda: ebm.NCE(clashing),
        "FlowContrastive": lambda: ebm.FlowContrastive(clashing),
        "FisherDivergence": lambda: ebm.FisherDivergence(
            lambda v: v * numpyro.param("precision", 1.0)
        ),
    }[name]
    svi = ebm.EnergySVI(gaussian, None, numpyro.optim.Adam(0.1), make())
    with pytest.raises(ebm.ModelError, match=r"parameters named \['precision'\].*rename"):
        svi.init(jax.random.key(0), rows(OBJECTIVES["NCE"], 10))


@pytest.mark.slow
def test_states_pickle_and_resume_with_everything():
    """Flow, its optimiser, log Z and chains are all in the state."""
    data = rows(OBJECTIVES["NCE"], 60)
    for make in (
        lambda: ebm.FlowContrastive(flow),
        lambda: ebm.FisherDivergence(),
        lambda: ebm.ContrastiveDivergence(mala, persistent=True, reset_probability=0.1),
    ):
        svi = ebm.EnergySVI(gaussian, None, numpyro.optim.Adam(0.05), make())
        run = partial(svi.run, jax.random.key(3), batch_size=20, progress_bar=False)
        whole = run(9, data)
        first = run(4, data)
        leaves, tree = jax.tree.flatten(first.state)
        is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
        stored = pickle.dumps(
            [
                np.asarray(jax.random.key_data(x) if k else x)
                for x, k in zip(leaves, is_key, strict=True)
            ]
        )
        leaves = [
            jax.random.wrap_key_data(x) if k else jnp.asarray(x)
            for x, k in zip(pickle.loads(stored), is_key, strict=True)
        ]
        second = run(5, data, init_state=jax.tree.unflatten(tree, leaves))
        np.testing.assert_array_equal(
            np.concatenate([first.losses, second.losses]), np.asarray(whole.losses)
        )
        jax.tree.map(np.testing.assert_array_equal, second.params, whole.params)


# What misleads silently is refused


def spins(data):
    field = numpyro.param("field", 0.0)
    with numpyro.plate("data", len(data)):
        x = numpyro.sample("x", ebm.Counting(event_shape=(2,)), obs=data)
        ebm.energy("E", -field * jnp.sum(x, -1))


def regression(v, x):
    slope = numpyro.param("slope", 1.0)
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        ebm.energy("E", 0.5 * (v - slope * x) ** 2)


@pytest.mark.parametrize("name", [k for k, member in OBJECTIVES.items() if is_discrete(member)])
def test_data_off_their_support_are_refused(name):
    data = jnp.array([[1, -1], [-1, -1]])
    with pytest.raises(ebm.ModelError, match=r"'x' leave its support.*3 of 4|'x' leave.*2 of 2"):
        OBJECTIVES[name].make().loss(jax.random.key(0), {"field": 0.1}, spins, None, data)


@pytest.mark.parametrize(
    "name",
    [
        *("NCE", "SelfNormalized", "FlowContrastive"),
        *("KernelSteinDiscrepancy", "FisherDivergence"),
    ],
)
def test_covariates_are_refused_where_rows_are_taken_for_draws_of_one_density(name):
    x = jnp.arange(4.0)
    params = {"slope": 1.0, "log_normalizer": 0.0}
    with pytest.raises(ebm.ModelError, match=r"differs from row\s+to row.*RankingNCE"):
        OBJECTIVES[name].make().loss(jax.random.key(0), params, regression, None, x, x + 1)


def test_noise_with_latent_sites_of_its_own_is_refused():
    def mixed():
        component = numpyro.sample("component", dist.Bernoulli(0.5))
        return dist.Normal(component, 1.0)

    params = {"precision": 1.0, "log_normalizer": 0.0}
    with pytest.raises(ebm.ModelError, match=r"samples \['component'\].*MixtureSameFamily"):
        ebm.NCE(mixed).loss(jax.random.key(0), params, gaussian, None, jnp.ones(3))


def test_a_log_normalizer_inside_of_the_energy_is_refused():
    def model(data):
        shift = numpyro.param("log_normalizer", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2 + shift)

    with pytest.raises(ebm.ModelError, match="'log_normalizer' is part of its energy"):
        ebm.NCE(NOISE).loss(jax.random.key(0), {"log_normalizer": 0.0}, model, None, jnp.ones(3))


def test_an_order_of_blocks_that_loses_the_data_is_refused():
    wrong = partial(ebm.BlockGibbs, blocks=[["v"], ["h"]])
    params = jax.tree.map(jnp.asarray, oracles.GRBM)
    with pytest.raises(ebm.ModelError, match="Put the latent sites first"):
        ebm.ContrastiveDivergence(wrong).loss(
            jax.random.key(0), params, oracles.grbm, None, jnp.zeros((3, 2))
        )


@pytest.mark.slow
def test_one_particle_corrects_no_guide():
    def blind(data, **kwargs):
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.Bernoulli(0.5).expand([3]).to_event(1))

    params = jax.tree.map(jnp.asarray, oracles.GRBM)
    for num_particles in (1, 2):
        objective = ebm.KernelSteinDiscrepancy(ebm.ImportanceBound(num_particles))
        of = partial(
            objective.loss, jax.random.key(0), params, oracles.grbm, blind, jnp.eye(3)[:, :2]
        )
        if num_particles > 1:
            assert np.isfinite(of())
            continue
        with pytest.raises(ebm.ModelError, match="ignores the visible sites"):
            of()
