# SPDX-License-Identifier: Apache-2.0
"""ArviZ data of runs and fits, which invent no likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import oracles
import pytest
from diagnostic_cases import KEY, LOG_Z, chain, gaussian, log_likelihood, own_grbm
from numpyro.handlers import scale
from numpyro.infer import NUTS, DiscreteGibbs, Gibbs
from oracles import LINEAR
from scipy.special import gammaln
from scipy.stats import gamma as gamma_law

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics.arviz.labels import label
from numpyro_ebm.log_normalizers import LogNormalizer

GRBM, GRBM_FIXED, _ = own_grbm()


def groups_of(idata):
    return {str(g).strip("/") for g in (idata.groups() if callable(idata.groups) else idata.groups)}


@pytest.fixture(scope="module")
def run():
    return chain(ebm.MALA(GRBM_FIXED))


@pytest.fixture(scope="module")
def held_out():
    return oracles.grbm_draws(GRBM, 30, np.random.default_rng(3))


@pytest.mark.slow
def test_log_likelihood_only_with_log_z(run, held_out):
    import arviz as az

    plain = ebm.to_arviz(run, observed=jnp.asarray(held_out))
    assert groups_of(plain) - {""} == {
        "posterior",
        "sample_stats",
        "posterior_predictive",
        "observed_data",
    }
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError)):
        az.loo(plain)
    log_z = LogNormalizer(LOG_Z, 0.02, 500.0, "ais", "below")
    idata = ebm.to_arviz(run, log_normalizer=log_z, observed=jnp.asarray(held_out))
    rows = idata["log_likelihood"]["v"]
    assert rows.dims == ("chain", "draw", "data") and rows.shape == (2, 60, 30)
    np.testing.assert_allclose(
        rows.values, np.broadcast_to(log_likelihood(held_out), (2, 60, 30)), rtol=1e-5
    )
    assert np.all(rows.values == rows.values[0, 0])  # no draw depends on a row
    attrs = idata["log_likelihood"].attrs
    assert attrs["log_normalizer"] == LOG_Z and attrs["log_normalizer_mcse"] == 0.02
    assert (attrs["log_normalizer_method"], attrs["log_normalizer_bias"]) == ("ais", "below")
    np.testing.assert_array_equal(idata["observed_data"]["v"].values, held_out.astype("float32"))
    drawn = run.get_samples(group_by_chain=True)["v"]
    np.testing.assert_array_equal(idata["posterior_predictive"]["v"].values, drawn)

    plain_number = ebm.to_arviz(run, log_normalizer=LOG_Z, observed=jnp.asarray(held_out))
    assert np.isnan(plain_number["log_likelihood"].attrs["log_normalizer_mcse"])


def some_draws(num, rows=1):
    rng = np.random.default_rng(7)
    v = oracles.grbm_draws(GRBM, num * rows, rng).reshape(num, rows, 2)
    return {"v": v, "h": rng.integers(0, 2, (num, rows, 3))}


def test_log_likelihood_of_what_was_observed(held_out):
    """h given v: one log-likelihood a row, whatever h; one log Z for each row works as well."""
    data, h = jnp.asarray(held_out[:5]), {"h": some_draws(120, 5)["h"]}
    idata = ebm.to_arviz(h, GRBM_FIXED, data, log_normalizer=np.full(5, LOG_Z))
    expected = np.broadcast_to(log_likelihood(held_out[:5]), (1, 120, 5))
    np.testing.assert_allclose(idata["log_likelihood"]["v"].values, expected, rtol=1e-4)
    assert idata["posterior"]["h"].shape == (1, 120, 5, 3)
    assert "posterior_predictive" not in groups_of(idata)
    idata = ebm.to_arviz(h, GRBM_FIXED, data, fantasies=some_draws(40))
    assert set(idata["posterior_predictive"]) == {"v"}
    assert idata["posterior_predictive"]["v"].shape == (1, 40, 1, 2)
    assert "log_likelihood" not in groups_of(idata)


def test_log_likelihood_of_continuous_latents_is_given():
    system = oracles.linear_system(num_rows=5)
    model, data = ebm.fixed(oracles.linear_opaque, LINEAR), jnp.asarray(system.data)
    draws = {"h": np.random.default_rng(0).normal(size=(10, 5, 2))}
    with pytest.raises(ebm.ModelError, match="log_likelihood=numpyro_ebm.log_likelihood"):
        ebm.to_arviz(draws, model, data, log_normalizer=0.0)
    idata = ebm.to_arviz(draws, model, data, log_likelihood=np.arange(5.0))
    values = idata["log_likelihood"]["v"].values
    assert values.shape == (1, 10, 5)
    np.testing.assert_allclose(values[0, 0], np.arange(5), atol=1e-5)
    assert np.isnan(idata["log_likelihood"].attrs["log_normalizer"])


def test_log_z_and_log_likelihood_of_the_library(held_out):
    """What `log_normalizer` and `log_likelihood` return goes in as it is."""
    data = jnp.asarray(held_out)
    log_z = ebm.log_normalizer(KEY, GRBM_FIXED)
    by_row = ebm.log_likelihood(KEY, GRBM_FIXED, data, log_normalizer=log_z, with_error=True)
    for known in ({"log_normalizer": log_z}, {"log_likelihood": by_row}):
        idata = ebm.to_arviz(some_draws(40), GRBM_FIXED, observed=data, **known)
        rows = idata["log_likelihood"]
        np.testing.assert_allclose(rows["v"].values[0, 0], log_likelihood(held_out), rtol=1e-4)
        assert rows.attrs["log_normalizer_method"] == "enumerate"
        assert rows.attrs["log_normalizer_mcse"] == 0


def test_log_likelihood_on_a_bounded_support():
    params = {"a": np.array(2.5), "rate": np.array(1.3)}
    data = np.random.default_rng(0).gamma(2.0, size=4)
    log_z = gammaln(2.5) - 2.5 * np.log(1.3)
    model = scale(ebm.fixed(oracles.gamma, params), scale=2.0)  # every row is there twice
    idata = ebm.to_arviz(
        {"v": np.ones((100, 1))}, model, log_normalizer=log_z, observed=jnp.asarray(data)
    )
    expected = 2 * gamma_law(2.5, scale=1 / 1.3).logpdf(data)
    np.testing.assert_allclose(idata["log_likelihood"]["v"].values[0, 0], expected, atol=1e-4)


FIELDS = {
    "MALA": (ebm.MALA, {"step_size", "acceptance_rate", "diverging", "lp"}),
    "UnderdampedLangevin": (
        ebm.UnderdampedLangevin,
        {"step_size", "acceptance_rate", "diverging", "hamiltonian_energy"},
    ),
    "MCLMC": (ebm.MCLMC, {"step_size", "acceptance_rate", "diverging", "n_steps"}),
    "ReplicaExchange": (
        ebm.ReplicaExchange,
        {"step_size", "acceptance_rate", "diverging", "swap_prob", "mean_swap_prob"},
    ),
    "BlockGibbs": (ebm.BlockGibbs, {"lp"}),
    "NUTS": (NUTS, {"step_size", "acceptance_rate", "diverging", "n_steps"}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:to_arviz:numpyro_ebm.errors.ConvergenceWarning")  # too short
@pytest.mark.filterwarnings("ignore:Some algorithms will automatically enumerate:FutureWarning")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("MALA", "ReplicaExchange") else pytest.param(name, marks=pytest.mark.slow)
        for name in FIELDS
    ],
)
def test_statistics_of_every_kernel(name):
    kernel, expected = FIELDS[name]
    extra = {
        "MCLMC": ("num_steps",),
        "ReplicaExchange": ("swap_prob",),
        "NUTS": ("num_steps", "accept_prob", "adapt_state.mass_matrix_sqrt", "diverging"),
    }.get(name, ())
    model = ebm.fixed(oracles.grbm_plated, GRBM) if name == "NUTS" else GRBM_FIXED
    mcmc = chain(kernel(model), extra_fields=extra)
    stats = ebm.to_arviz(mcmc)["sample_stats"]
    assert expected | {"energy", "row_energy"} <= set(stats)
    assert stats["energy"].shape == (2, 60)
    draws = {k: np.asarray(x) for k, x in mcmc.get_samples(group_by_chain=True).items()}
    v = draws["v"].reshape(-1, 2)
    if "h" in draws:
        bowl = 0.5 * np.sum(((v - GRBM["b"]) / GRBM["scale"]) ** 2, -1)
        energy = bowl - np.sum(draws["h"].reshape(-1, 3) * (v @ GRBM["W"] + GRBM["c"]), -1)
    else:
        energy = -np.array([oracles.grbm_log_density(GRBM, x) for x in v])
    np.testing.assert_allclose(stats["energy"].values.ravel(), energy, rtol=1e-3, atol=1e-3)
    final = getattr(mcmc.last_state, "adapt_state", None)
    if final is not None:
        step = np.asarray(final.step_size)
        np.testing.assert_array_equal(stats["step_size"].values[:, -1], step)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning")
def test_statistics_of_the_blocks_of_gibbs():
    kernel = Gibbs([(NUTS(GRBM_FIXED), ["v"]), (DiscreteGibbs(GRBM_FIXED), ["h"])])
    stats = ebm.to_arviz(chain(kernel, extra_fields=("block_states.0.accept_prob",)))[
        "sample_stats"
    ]
    assert stats["block_states_0_step_size"].shape == (2, 60)
    assert stats["block_states_0_acceptance_rate"].shape == (2, 60)


@pytest.fixture(scope="module")
def persistent():
    data = jnp.asarray(oracles.grbm_draws(GRBM, 30, np.random.default_rng(5)))
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True)
    svi = ebm.EnergySVI(oracles.grbm, None, optax.adam(0.01), objective)
    return svi.run(jax.random.key(1), 50, data, batch_size=6, progress_bar=False), data


@pytest.mark.slow
def test_a_fit_with_persistent_chains(persistent):
    import arviz as az

    fit, data = persistent
    idata = ebm.to_arviz(fit, oracles.grbm, data)
    chains = fit.state.objective_state
    v = idata["posterior"]["v"]
    assert v.dims == ("chain", "draw", "data", "v_dim_0") and v.shape == (6, 12, 1, 2)
    # The last round that is remembered: the 48th of 50, at place 11 of the ring.
    np.testing.assert_array_equal(
        v.values[:, -1, 0], np.asarray(chains.history.rings["visible"])[11]
    )
    energy = idata["sample_stats"]["energy"]
    np.testing.assert_array_equal(
        energy.values[:, -1], np.asarray(chains.history.rings["energy"])[11]
    )
    np.testing.assert_array_equal(idata["training"]["loss"].values, fit.losses)
    assert idata["training"]["loss"].dims == ("step",)
    np.testing.assert_array_equal(idata["constant_data"]["W"].values, fit.params["W"])
    assert "v[0, 0]" in az.summary(idata).index
    assert ebm.to_arviz(fit)["posterior"]["visible"].shape == (6, 12, 2)
    with pytest.raises(ebm.ModelError, match="2 coordinates, and a row of this model has 1"):
        ebm.to_arviz(fit, gaussian, jnp.zeros(6))


@pytest.mark.slow
def test_a_fit_without_chains(held_out):

    data = jnp.asarray(held_out)
    svi = ebm.EnergySVI(oracles.grbm, None, optax.adam(0.01), ebm.DenoisingScoreMatching(0.1))
    fit = svi.run(KEY, 20, data, progress_bar=False)
    assert groups_of(ebm.to_arviz(fit)) - {""} == {"posterior", "training"}
    idata = ebm.to_arviz(
        fit,
        oracles.grbm,
        data,
        log_normalizer=ebm.models.grbm_log_normalizer(fit.params),
        fantasies=some_draws(50),
    )
    assert idata["posterior"]["W"].shape == (1, 1, 2, 3)
    assert idata["posterior_predictive"]["v"].shape == (1, 50, 1, 2)
    exact = np.asarray(ebm.models.grbm_log_likelihood(fit.params, data))
    np.testing.assert_allclose(idata["log_likelihood"]["v"].values[0, 0], exact, rtol=1e-5)


@pytest.mark.slow
def test_bounded_supports_of_persistent_chains():
    data = jnp.asarray(np.random.default_rng(0).gamma(2.0, size=8), jnp.float32)
    objective = ebm.ContrastiveDivergence(
        lambda model: ebm.MALA(model, step_size=0.1), persistent=True
    )
    fit = ebm.EnergySVI(oracles.gamma, None, optax.adam(0.001), objective).run(
        KEY, 8, data, progress_bar=False
    )
    v = ebm.to_arviz(fit, oracles.gamma, data)["posterior"]["v"].values
    u = np.asarray(fit.state.objective_state.history.rings["visible"])[:2, :, 0].T
    np.testing.assert_allclose(v[..., 0], np.exp(u), rtol=1e-5)


def test_to_arviz_refuses_what_it_cannot_do(run, held_out, persistent):
    data, h = jnp.asarray(held_out), {"h": some_draws(5, 30)["h"]}
    cases = [
        ("observed rows, and there are none", (run,), {"log_normalizer": LOG_Z}),
        ("itself observed", (h, GRBM_FIXED, data), {"observed": data}),
        ("has shape", (run,), {"observed": data, "log_normalizer": jnp.zeros(3)}),
        ("has shape", (run,), {"observed": data, "log_likelihood": jnp.zeros(3)}),
        (
            "not both",
            (run,),
            {"observed": data, "log_likelihood": jnp.zeros(30), "log_normalizer": LOG_Z},
        ),
        ("must be a dict", (run,), {"fantasies": data}),
        ("none of the visible", (run,), {"fantasies": {"h": data}, "observed": data}),
        ("takes an MCMC", (data,), {}),
        ("needs the model", (persistent[0],), {"observed": data}),
        ("needs its data", (persistent[0], oracles.grbm), {}),
        ("needs? the model", (persistent[0], None, data), {}),
    ]
    for message, args, options in cases:
        with pytest.raises(ebm.ModelError, match=message):
            ebm.to_arviz(*args, **options)


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning")
def test_arviz_plots_run(run, held_out):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import arviz as az
    import matplotlib.pyplot as plt

    idata = ebm.to_arviz(run, observed=jnp.asarray(held_out))
    az.plot_energy(idata)
    az.plot_trace(idata)
    plt.close("all")


def plane(data=None):
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        ebm.energy("E", jnp.sum(v**2, -1))


def test_dimensions_and_labels_of_the_user(held_out):
    draws = {"v": held_out[:6, None]}  # six draws of one row
    names = {"dims": {"v": ["flower", "measure"]}, "coords": {"measure": ["length", "width"]}}
    model = ebm.fixed(plane, {})
    idata = ebm.to_arviz(draws, model, log_normalizer=0.0, observed=held_out[:4], **names)
    v = idata["posterior"]["v"]
    assert v.dims == ("chain", "draw", "flower", "measure")
    np.testing.assert_allclose(v.sel(measure="width")[0, :, 0], held_out[:6, 1])
    data = idata["observed_data"]["v"]
    assert data.dims == ("flower", "measure") and list(data.measure) == ["length", "width"]
    assert idata["log_likelihood"]["v"].dims == ("chain", "draw", "flower")
    assert "log_normalizer" in idata["log_likelihood"].attrs
    assert idata["sample_stats"]["row_energy"].dims[2:] == ("data",)  # another array
    plain = ebm.to_arviz(draws, model)
    assert plain["posterior"]["v"].dims[2:] == ("data", "v_dim_0")


def test_arrays_share_a_dimension_and_trees_have_labels():
    xr = pytest.importorskip("xarray")
    arrays = {"W": ("chain", "draw", "W_dim_0", "W_dim_1"), "b": ("chain", "draw", "b_dim_0")}
    values = {
        k: (d, np.arange(2.0 * 3 ** (len(d) - 1)).reshape(2, *[3] * (len(d) - 1)))
        for k, d in arrays.items()
    }
    values["c"] = (("chain", "draw", "c_dim_0"), np.zeros((2, 3, 2)))
    data = xr.Dataset(values, attrs={"by": "hand"})
    tree = xr.DataTree.from_dict({"posterior": data})
    with pytest.raises(ebm.ModelError, match="'seen' to dimensions of 3 and of 2"):
        label(tree, {"b": ["seen"], "c": ["seen"]}, {})
    label(tree, {"W": ["seen", "hidden"], "b": ["seen"]}, {"seen": ["x", "y", "z"]})
    found = tree["posterior"]
    assert found["W"].dims[2:] == ("seen", "hidden") and found["b"].dims[2:] == ("seen",)
    np.testing.assert_allclose(found["b"].sel(seen="z"), values["b"][1][..., 2])
    np.testing.assert_allclose(found["W"].sel(seen="y"), values["W"][1][..., 1, :])
    assert found.attrs == {"by": "hand"} and "W_dim_0" not in found.coords
