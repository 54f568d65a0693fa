# SPDX-License-Identifier: Apache-2.0
"""The language: energies that must be handled, base measures, `fixed`, and what a model may say."""

import pickle
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean
from language_cases import X, gaussian
from numpyro import handlers
from numpyro.contrib.funsor import config_enumerate, enum
from numpyro.contrib.funsor import log_density as enum_log_density
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.inspect import get_model_relations
from numpyro.infer.util import log_density

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model


def bayesian(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


@pytest.mark.parametrize(
    "fn, value, batch_shape",
    [
        (ebm.Lebesgue(), jnp.ones(4), (4,)),
        (ebm.Lebesgue((2, 3)), jnp.ones((4, 2, 3)), (4,)),
        (ebm.Lebesgue((3,), dist.constraints.simplex), jnp.full((4, 3), 1 / 3), (4,)),
        (ebm.Lebesgue((2,), dist.constraints.positive).expand([4]), jnp.ones((4, 2)), (4,)),
        (ebm.Counting(), jnp.ones(4, int), (4,)),
        (ebm.Counting(3, (2,)), jnp.ones((4, 2), int), (4,)),
    ],
)
def test_base_measures_are_flat_on_their_support(fn, value, batch_shape):
    np.testing.assert_array_equal(fn.log_prob(value), np.zeros(batch_shape))
    assert bool(jnp.all(fn.support(value)))
    leaves, tree = jax.tree.flatten(fn)
    again = jax.tree.unflatten(tree, leaves)
    np.testing.assert_array_equal(again.log_prob(value), np.zeros(batch_shape))


def test_counting_enumerates_its_values():
    np.testing.assert_array_equal(ebm.Counting(3).enumerate_support(), [0, 1, 2])
    assert ebm.Counting(3).expand([4]).enumerate_support(expand=True).shape == (3, 4)
    draws = ebm.Counting(3, (2,)).sample(jax.random.key(0), (1000,))
    assert draws.shape == (1000, 2) and set(np.unique(draws)) == {0, 1, 2}
    assert not ebm.Counting(3).support(3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ebm.Counting(1), "num_values"),
        (lambda: ebm.Counting(2.0), "num_values"),
        (lambda: ebm.Counting(2, (0,)), "event_shape"),
        (lambda: ebm.Lebesgue((), dist.constraints.boolean), "Counting"),
        (lambda: ebm.Lebesgue((), dist.constraints.simplex), "event_shape"),
        (lambda: ebm.Lebesgue((-1,)), "event_shape"),
    ],
)
def test_bad_base_measures(make, message):
    with pytest.raises(ebm.ModelError, match=message):
        make()


def test_lebesgue_has_no_draws():
    with pytest.raises(ebm.ImproperSamplingError, match=r"numpyro_ebm.sample.*fixed"):
        ebm.Lebesgue((2,)).sample(jax.random.key(0))


NAMED = r"'E' is unnormalised.*log Z\(theta\).*EnergySVI.*fixed\(model, params\)"


def test_nuts_over_an_unknown_parameter_refuses():
    mcmc = MCMC(NUTS(bayesian), num_warmup=5, num_samples=5, progress_bar=False)
    with pytest.raises(ebm.UnhandledEnergyError, match=NAMED):
        mcmc.run(jax.random.key(0), X)


def test_an_elbo_over_an_unknown_parameter_refuses():
    svi = SVI(gaussian, lambda data: None, numpyro.optim.Adam(0.1), Trace_ELBO())
    with pytest.raises(ebm.UnhandledEnergyError, match=NAMED):
        svi.run(jax.random.key(0), 2, X, progress_bar=False)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        lambda m: handlers.mask(m, mask=jnp.array([True, False, True])),
        lambda m: handlers.scale(m, scale=2.0),
        lambda m: handlers.seed(m, 0),
    ],
)
def test_every_density_refuses_through_every_wrapper(wrap):
    with pytest.raises(ebm.UnhandledEnergyError, match=NAMED):
        log_density(wrap(gaussian), (X,), {}, {"theta": 2.0})


def test_the_error_names_scoped_parameters():
    with pytest.raises(ebm.UnhandledEnergyError, match=r"log Z\(inner/theta\)"):
        log_density(handlers.scope(gaussian, prefix="inner"), (X,), {}, {})


def test_funsors_density_refuses_too():
    def latent(data):
        w = numpyro.param("w", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Counting(2))
            ebm.energy("E", 0.5 * v**2 - w * h * v)

    def density(model):
        model = enum(config_enumerate(handlers.seed(model, 0)), -2)
        return enum_log_density(model, (X,), {}, {})[0]

    with pytest.raises(ebm.UnhandledEnergyError, match=r"log Z\(w\)"):
        density(latent)
    expected = jnp.sum(jnp.logaddexp(0, 1.5 * X) - 0.5 * X**2)
    np.testing.assert_allclose(density(ebm.fixed(latent, {"w": 1.5})), expected, rtol=1e-6)


def test_a_masked_energy_does_not_count():
    masked = handlers.mask(ebm.fixed(gaussian, {"theta": 2.0}), mask=jnp.array([True, False, True]))
    np.testing.assert_allclose(log_density(masked, (X,), {}, {})[0], -(0.25 + 4.0), rtol=1e-6)
    assert log_density(handlers.mask(gaussian, mask=False), (X,), {}, {})[0] == 0.0


@pytest.mark.parametrize(
    "value, plates",
    [
        (lambda v: 0.5 * jnp.sum(v**2), "data"),
        (lambda v: jnp.zeros((5, 3)), "data"),
        (lambda v: jnp.zeros((3, 1)), "data"),
        (lambda v: v, "data and units"),
        (lambda v: v, ""),
    ],
)
def test_an_energy_of_the_wrong_shape_raises(value, plates):
    def model(data):
        if plates == "":
            ebm.energy("E", data)
            return
        with numpyro.plate("data", 3):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            if "units" in plates:
                with numpyro.plate("units", 2, dim=-2):
                    ebm.energy("E", value(v))
            else:
                ebm.energy("E", value(v))

    with pytest.raises(ebm.ModelError, match="energy 'E' has shape.*ask for"):
        handlers.trace(model).get_trace(X)


def test_a_scalar_energy_is_refused_in_a_plate_of_one_as_well():
    with pytest.raises(ebm.ModelError, match=r"shape \(\)"), numpyro.plate("data", 1):
        ebm.energy("E", jnp.array(1.0))


def test_fixed_makes_numpyros_tools_right():
    model = ebm.fixed(gaussian, {"theta": 4.0, "not in the model": 1.0})
    expected = jnp.sum(-2.0 * X**2)
    np.testing.assert_allclose(log_density(model, (X,), {}, {})[0], expected, rtol=1e-6)
    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["v"])
    assert_mean(draws, 0.0)
    assert_mean(draws**2, 0.25)


def test_fixed_parameters_are_no_parameters_any_more():
    model = ebm.fixed(gaussian, {"theta": 4.0})
    assert "theta" not in handlers.trace(model).get_trace(X)
    # An outer substitute, such as that of SVI, cannot replace them.
    np.testing.assert_allclose(
        log_density(model, (X,), {}, {"theta": 100.0})[0], jnp.sum(-2.0 * X**2), rtol=1e-6
    )
    state = SVI(
        ebm.fixed(gaussian, {"theta": 4.0}),
        lambda data: None,
        numpyro.optim.Adam(1.0),
        Trace_ELBO(),
    ).run(jax.random.key(0), 2, X, progress_bar=False)
    assert state.params == {}


def test_fixed_covers_priors_scopes_and_pickles():
    model = ebm.fixed(bayesian, {"theta": 2.0})
    np.testing.assert_allclose(log_density(model, (X,), {}, {})[0], jnp.sum(-(X**2)), rtol=1e-6)
    scoped = ebm.fixed(handlers.scope(gaussian, prefix="a"), {"a/theta": 2.0})
    np.testing.assert_allclose(log_density(scoped, (X,), {}, {})[0], jnp.sum(-(X**2)), rtol=1e-6)
    outer = handlers.scope(ebm.fixed(gaussian, {"theta": 2.0}), prefix="a")
    np.testing.assert_allclose(log_density(outer, (X,), {}, {})[0], jnp.sum(-(X**2)), rtol=1e-6)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(log_density(again, (X,), {}, {})[0], jnp.sum(-(X**2)), rtol=1e-6)


@pytest.mark.parametrize("model", [gaussian, bayesian])
def test_fixed_names_a_missing_parameter(model):
    with pytest.raises(ebm.ModelError, match="no value for the parameter.*'theta'"):
        log_density(ebm.fixed(model, {"other": 1.0}), (X,), {}, {})
    with pytest.raises(ebm.ModelError, match="dict"):
        ebm.fixed(model, [1.0])


def test_fixed_finds_priors_in_a_plate_of_their_own():
    def hidden_prior(data):
        with numpyro.plate("units", 4):
            w = numpyro.sample("w", dist.Normal(0, 1))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2 * jnp.sum(w**2))

    with pytest.raises(ebm.ModelError, match="'w'"):
        handlers.trace(handlers.seed(ebm.fixed(hidden_prior, {}), 0)).get_trace(X)


def spins(data=None):
    w = numpyro.param("w", 1.0)
    with numpyro.plate("data", 2 if data is None else len(data)):
        x = numpyro.sample("x", ebm.Counting(2), obs=data)
        ebm.energy("E", -w * x)


def tilted(data=None):
    with numpyro.plate("data", 2 if data is None else len(data)):
        v = numpyro.sample("v", dist.Normal(0.0, 1.0), obs=data)
        ebm.energy("E", v**4)


@pytest.mark.parametrize("model, name", [(gaussian, "Lebesgue"), (spins, "'x'"), (tilted, "'v'")])
def test_predictive_does_not_draw_from_base_measures(model, name):
    for m in (model, ebm.fixed(model, {"theta": 1.0, "w": 1.0})):
        with pytest.raises(ebm.ImproperSamplingError, match=name):
            Predictive(m, num_samples=2)(jax.random.key(0))


def test_predictive_passes_draws_through():
    def with_square(data=None):
        with numpyro.plate("data", 3 if data is None else len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            numpyro.deterministic("square", v**2)
            ebm.energy("E", 0.5 * v**2)

    draws = jnp.arange(6.0).reshape(2, 3)
    out = Predictive(ebm.fixed(with_square, {}), {"v": draws})(jax.random.key(0))
    np.testing.assert_allclose(out["square"], draws**2)


def test_models_can_be_drawn_and_handled():
    relations = get_model_relations(gaussian, (X,), {})
    assert relations["sample_param"]["E"] == ["theta"] and "v" in relations["observed"]


def test_models_render():
    pytest.importorskip("graphviz")
    assert "theta" in numpyro.render_model(gaussian, (X,), render_params=True).source


def test_handlers_compose():
    model = handlers.substitute(gaussian, {"theta": 3.0, "v": 2 * X})
    trace = handlers.trace(handlers.seed(model, 0)).get_trace(X)
    np.testing.assert_array_equal(trace["v"]["value"], 2 * X)
    np.testing.assert_allclose(trace["E"]["fn"].energy, 1.5 * 4 * X**2)
    trace = handlers.trace(handlers.condition(gaussian, {"v": X})).get_trace()
    assert trace["v"]["is_observed"]
    row_model = read_model(handlers.scope(gaussian, prefix="a"), (X,), {}, {})
    assert list(row_model.visible) == ["a/v"] and row_model.energies == ["a/E"]
    assert ebm.energy("alone", 1.0) is None and ebm.visible("v", 3) == 3


@pytest.mark.parametrize("outside", [True, False])
def test_tempering_multiplies_energies_and_nothing_else(outside):
    def model(data=None):
        scale = numpyro.param("scale", 2.0)
        with numpyro.plate("data", 3):
            v = numpyro.sample("v", dist.Normal(0.0, 1.0), obs=data)
            with numpyro.plate("more", 2, dim=-2):
                ebm.energy("E", jnp.broadcast_to(scale * v**4, (2, 3)))
            ebm.energy("F", v)

    v = np.array([0.5, -1.0, 2.0])
    if outside:
        tempered = ebm.temper(ebm.temper(ebm.fixed(model, {"scale": 3.0}), 0.5), 0.5)
    else:
        tempered = ebm.fixed(ebm.temper(model, 0.25), {"scale": 3.0})
    expected = -0.5 * v**2 - 0.5 * np.log(2 * np.pi) - 0.25 * (6 * v**4 + v)
    row_model = read_model(tempered, (jnp.asarray(v),), {})
    np.testing.assert_allclose(row_model.log_density({}, {}), expected, rtol=1e-5)
    total, _ = numpyro.infer.util.log_density(tempered, (jnp.asarray(v),), {}, {})
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
    gradient = jax.jit(
        jax.grad(
            lambda beta: numpyro.infer.util.log_density(
                ebm.temper(ebm.fixed(model, {"scale": 3.0}), beta), (jnp.asarray(v),), {}, {}
            )[0]
        )
    )(0.3)
    np.testing.assert_allclose(gradient, -(6 * v**4 + v).sum(), rtol=1e-5)


def test_tempering_does_not_answer_for_the_normalizer():
    def model():
        scale = numpyro.param("scale", 2.0)
        with numpyro.plate("data", 3):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", scale * v**2)

    with pytest.raises(ebm.UnhandledEnergyError, match=r"log Z\(scale\)"):
        numpyro.infer.util.log_density(ebm.temper(model, 0.5), (), {}, {"v": jnp.zeros(3)})


@pytest.mark.parametrize("inverse_temperature", [-0.1, np.inf, np.nan, np.ones(2)])
def test_temperatures_that_are_none(inverse_temperature):
    with pytest.raises(ebm.ModelError, match="inverse_temperature"):
        ebm.temper(lambda: None, inverse_temperature)


@pytest.mark.parametrize("base", [ebm.Lebesgue, ebm.Counting])
@pytest.mark.parametrize("num_rows", [None, 3])
def test_a_flat_measure_without_an_energy_raises(base, num_rows):
    """A `factor` in the place of the energy would forget log Z."""
    x = jnp.ones(() if num_rows is None else (num_rows,), int)

    def with_factor():
        theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
        with nullcontext() if num_rows is None else numpyro.plate("data", num_rows):
            v = numpyro.sample("v", base(), obs=x)
            numpyro.factor("E", -0.5 * theta * v**2)

    message = f"base measure {base.__name__}.*states no energy.*factor"
    with pytest.raises(ebm.UnhandledEnergyError, match=message):
        log_density(with_factor, (), {}, {"theta": 1.0})
    kernel = NUTS(with_factor)
    with pytest.raises(ebm.UnhandledEnergyError, match=message):
        kernel.init(jax.random.key(3), 10, None, (), {})


def test_an_energy_answers_for_its_flat_measures():
    """The error of an energy comes before, and a density that is resolved has none."""

    def model():
        with numpyro.plate("data", 2), handlers.mask(mask=True):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=jnp.ones(2))
            h = numpyro.sample("h", ebm.Counting(), obs=jnp.ones(2, int))
            ebm.energy("E", numpyro.param("b", 1.0) * v * h)

    with pytest.raises(ebm.UnhandledEnergyError, match=r"The energy 'E'.*log Z\(b\)"):
        log_density(model, (), {}, {})
    assert log_density(ebm.fixed(model, {"b": 2.0}), (), {}, {})[0] == -4.0
    assert ebm.Counting().log_prob(1) == 0.0  # outside of a model nobody is asked


def test_flat_measures_end_where_their_support_does():
    found = ebm.Lebesgue((), dist.constraints.positive).log_prob(jnp.array([-1.0, 1.0]))
    assert found.tolist() == [-np.inf, 0.0]


def test_a_support_is_empty_if_its_bounds_are_exchanged_anywhere():
    low = jnp.array([0.0, 1.0])
    with pytest.raises(ebm.ModelError, match="is empty: its lower bound"):
        ebm.Lebesgue((2,), dist.constraints.independent(dist.constraints.interval(low, 1.0), 1))
    with pytest.raises(ebm.ModelError, match="is empty: its lower bound"):
        ebm.Lebesgue((2,), dist.constraints.interval(low, 1.0))
    traced = jax.jit(
        lambda low: ebm.Lebesgue((2,), dist.constraints.interval(low, 1.0)).log_prob(low)
    )
    traced(low)  # of bounds that are traced nothing is known
