# SPDX-License-Identifier: Apache-2.0
"""`to_arviz` in ArviZ's words: what `bfmi` and `plot_energy` read, names, and dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.handlers import scope
from numpyro.infer import AIES, HMC, MCMC, NUTS, BarkerMH
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics.arviz.groups import is_tree

pytestmark = pytest.mark.filterwarnings("ignore:to_arviz:numpyro_ebm.errors.ConvergenceWarning")
DATA = np.random.default_rng(0).normal(size=6)


def bayesian(data):
    precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def positive(num_rows=3):
    """Gamma(3, 1) by an energy, with deterministic sites of every layout."""
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,), constraints.positive))
        numpyro.deterministic("total", jnp.sum(v, -1))
        numpyro.deterministic("double", 2 * v)
        numpyro.deterministic("turned", v.T)
        numpyro.deterministic("mean", v.mean(0))
        numpyro.deterministic("fixed", jnp.zeros(num_rows))
        ebm.energy("E", jnp.sum(v - 2 * jnp.log(v), -1))


def run(kernel, *args, extra_fields=(), chain_method="vectorized", num_chains=2, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=30,
        num_samples=20,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(4), *args, extra_fields=extra_fields, **kwargs)
    return mcmc


def as_dict(group):
    data = group.to_dataset() if hasattr(group, "to_dataset") else group
    return dict(data.data_vars)


@pytest.mark.slow
def test_energy_of_parameters_under_the_default_fields_of_hmc():
    import arviz as az

    kernel = HMC(ebm.normalized(bayesian, "enumerate"), num_steps=3, trajectory_length=None)
    idata = ebm.to_arviz(run(kernel, jnp.asarray(DATA)))
    theta = as_dict(idata["posterior"])["precision"].values
    lp = stats.gamma(2).logpdf(theta) + np.log(theta)
    lp += stats.norm.logpdf(DATA, 0, theta[..., None] ** -0.5).sum(-1)
    found = as_dict(idata["sample_stats"])
    np.testing.assert_allclose(found["lp"].values, lp, rtol=1e-4)
    np.testing.assert_allclose(found["energy"].values, -lp, rtol=1e-4)
    az.bfmi(idata)


@pytest.mark.parametrize("kernel, method", [(BarkerMH, "sequential"), (AIES, "vectorized")])
def test_kernels_without_statistics(kernel, method):
    model = ebm.normalized(bayesian, "enumerate")
    mcmc = run(kernel(model), jnp.asarray(DATA), chain_method=method, num_chains=6)
    idata = ebm.to_arviz(mcmc)
    theta = as_dict(idata["posterior"])["precision"].values
    lp = stats.gamma(2).logpdf(theta) + np.log(theta)
    lp += stats.norm.logpdf(DATA, 0, theta[..., None] ** -0.5).sum(-1)
    found = as_dict(idata["sample_stats"])
    np.testing.assert_allclose(found["lp"].values, lp, rtol=1e-4)
    assert found["energy"].dims == ("chain", "draw")


@pytest.mark.slow
def test_the_hamiltonian_is_the_energy_where_it_was_collected():
    extra = ("energy", "potential_energy")
    for kernel, args in (
        (NUTS(ebm.generalized(bayesian, ebm.ScoreMatching())), (jnp.asarray(DATA),)),
        (NUTS(ebm.fixed(positive, {})), ()),
    ):
        mcmc = run(kernel, *args, extra_fields=extra)
        found = as_dict(ebm.to_arviz(mcmc)["sample_stats"])
        fields = mcmc.get_extra_fields(group_by_chain=True)
        np.testing.assert_allclose(found["energy"].values, fields["energy"], rtol=1e-6)
        np.testing.assert_allclose(found["lp"].values, -fields["potential_energy"], rtol=1e-6)


def test_densities_and_dimensions_of_draws():
    draws = {"v": jnp.asarray(np.random.default_rng(1).gamma(3.0, size=(5, 3, 2)))}
    model = ebm.fixed(positive, {})
    shapes = {"total": (3,), "double": (3, 2), "turned": (2, 3), "mean": (2,), "fixed": (3,)}
    draws |= {name: jnp.zeros((5, *shape)) for name, shape in shapes.items()}
    idata = ebm.to_arviz(draws, model)
    v = np.asarray(draws["v"])
    energy = np.sum(v - 2 * np.log(v), (1, 2))
    found = as_dict(idata["sample_stats"])
    np.testing.assert_allclose(found["energy"].values[0], energy, rtol=1e-5)
    np.testing.assert_allclose(found["lp"].values[0], np.log(v).sum((1, 2)) - energy, rtol=1e-5)
    dims = {name: x.dims[2:] for name, x in as_dict(idata["posterior"]).items()}
    assert dims == {
        "v": ("data", "v_dim_0"),
        "total": ("data",),
        "double": ("data", "double_dim_0"),
        "turned": ("turned_dim_0", "data"),
        "mean": ("mean_dim_0",),
        "fixed": ("fixed_dim_0",),  # of as many elements as rows, by chance for all one knows
    }


@pytest.mark.slow
def test_names_of_a_scope():
    dot = "." if is_tree() else "/"
    draws = {"a/v": jnp.ones((5, 3, 2))}
    inner = scope(positive, prefix="a", divider="/")
    idata = ebm.to_arviz(draws, ebm.fixed(inner, {}))
    assert as_dict(idata["posterior"])[f"a{dot}v"].dims[2:] == (f"a{dot}data", f"a{dot}v_dim_0")
    model = ebm.normalized(scope(bayesian, prefix="a", divider="/"), "enumerate")
    idata = ebm.to_arviz(run(ebm.MALA(model), jnp.asarray(DATA)))
    assert as_dict(idata["posterior"]).keys() == {f"a{dot}precision"}
    rows = as_dict(idata["log_likelihood"])[f"a{dot}v"]
    assert rows.dims == ("chain", "draw", f"a{dot}data")
    theta = as_dict(idata["posterior"])[f"a{dot}precision"].values[..., None]
    np.testing.assert_allclose(rows.values, stats.norm.logpdf(DATA, 0, theta**-0.5), rtol=1e-4)


def test_observed_rows_of_another_number():
    def with_covariates(data=None, x=None):
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - x) ** 2)

    model, x = ebm.fixed(with_covariates, {}), jnp.arange(4.0)
    draws = {"v": jnp.zeros((5, 4))}
    idata = ebm.to_arviz(draws, model, None, x, observed=jnp.ones(4))
    assert as_dict(idata["observed_data"])["v"].shape == (4,)
    with pytest.raises(ebm.ModelError, match=r"`observed`, of shape \(3,\).*Covariates"):
        ebm.to_arviz(draws, model, None, x, observed=jnp.ones(3))
    with pytest.raises(ebm.ModelError, match="'v' contain NaN"):
        ebm.to_arviz(draws, model, None, x, observed=jnp.full(4, jnp.nan))
    more = ebm.to_arviz({"v": jnp.zeros((5, 1, 2)) + 1}, ebm.fixed(positive, {}), 1)
    assert as_dict(more["posterior"])["v"].shape == (1, 5, 1, 2)


@pytest.mark.parametrize(
    "guide", [AutoNormal, pytest.param(AutoMultivariateNormal, marks=pytest.mark.slow)]
)
def test_a_fit_with_a_guide_over_priors(guide):
    made = guide(ebm.prior(bayesian))
    svi = ebm.EnergySVI(bayesian, made, optax.adam(0.01), ebm.ScoreMatching())
    data = jnp.asarray(DATA)
    fit = svi.run(jax.random.key(5), 5, data, progress_bar=False)
    idata = ebm.to_arviz(fit, bayesian, data)
    for name, x in fit.params.items():
        np.testing.assert_array_equal(as_dict(idata["posterior"])[name].values[0, 0], x)
    np.testing.assert_allclose(as_dict(idata["observed_data"])["v"].values, DATA, rtol=1e-6)
    with pytest.raises(ebm.ModelError, match="precision"):
        ebm.to_arviz(fit, bayesian, data, log_normalizer=1.0)


def test_runs_of_ordinary_models():
    def normal(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    idata = ebm.to_arviz(run(ebm.MALA(normal), jnp.asarray(DATA)))
    m = as_dict(idata["posterior"])["m"].values[..., None]
    rows = as_dict(idata["log_likelihood"])["y"]
    np.testing.assert_allclose(rows.values, stats.norm.logpdf(DATA, m), rtol=1e-4)
    lp = rows.values.sum(-1) + stats.norm.logpdf(m[..., 0])
    np.testing.assert_allclose(as_dict(idata["sample_stats"])["lp"].values, lp, rtol=1e-4)
