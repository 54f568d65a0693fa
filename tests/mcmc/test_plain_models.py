# SPDX-License-Identifier: Apache-2.0
"""The continuous kernels on ordinary NumPyro models, which have no rows and no energy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from kernel_cases import slow
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, DiscreteGibbs, Gibbs, init_to_median, init_to_value
from numpyro.infer.util import log_density, potential_energy
from plain_cases import MODELS

import numpyro_ebm as ebm

KERNELS = {
    "MALA": ebm.MALA,
    "UnderdampedLangevin": ebm.UnderdampedLangevin,
    "MCLMC": ebm.MCLMC,
    "ReplicaExchange": partial(ebm.ReplicaExchange, num_replicas=3, min_inverse_temperature=0.3),
    "ULA": ebm.ULA,
}
QUICK = [
    ("normal", "MALA"),
    ("normal", "ULA"),
    ("gamma_poisson", "UnderdampedLangevin"),
    ("dirichlet_multinomial", "MCLMC"),
    ("beta_binomial", "ReplicaExchange"),
    ("mixture", "MALA"),
]
GRID = [(model, kernel) for model in MODELS for kernel in KERNELS if (model, kernel) not in QUICK]


def run(kernel, *args, num_chains=40, num_samples=300, num_warmup=300, init_params=None, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(7), *args, init_params=init_params, **kwargs)
    return mcmc


@pytest.mark.parametrize("model, kernel", [*QUICK, *(slow(*pair) for pair in GRID)])
def test_posteriors(model, kernel):
    """Means and squares, with the error of the mean over independent chains."""
    case = MODELS[model]()
    options = {}
    if kernel == "ULA":  # without a test it runs away from where the density is steep
        options = {"step_size": case.step_size, "init_strategy": init_to_median}
    length = {"num_samples": 1_500, "num_warmup": 1_000} if (model, kernel) in GRID else {}
    made = KERNELS[kernel](case.model, **options)
    draws = run(made, *case.args, **length, **case.kwargs).get_samples(group_by_chain=True)
    for site, exact in case.exact.items():
        x = np.asarray(case.of.get(site, lambda x: x)(draws[site]), float)
        for power, expected in zip((1, 2), exact, strict=True):
            means = (x**power).mean(1)
            error = means.std(0, ddof=1) / np.sqrt(len(means))
            assert np.all(abs(means.mean(0) - expected) < 4 * error), (site, power)
            assert np.all(error < 0.2 * np.sqrt(exact[1] - exact[0] ** 2) + 0.1 * abs(expected))


def mixed(x, num_rows=4):
    """A simplex, a bounded site, a plate, a discrete site that is summed out, and a factor."""
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    b = numpyro.sample("b", dist.Uniform(0.0, s))
    numpyro.deterministic("half", s / 2)
    with numpyro.plate("data", num_rows):
        z = numpyro.sample("z", dist.Normal(0.0, s))
        c = numpyro.sample("c", dist.Categorical(p), infer={"enumerate": "parallel"})
        numpyro.deterministic("shifted", z + c)
        numpyro.sample("x", dist.Normal(z + c, 1.0), obs=x)
    numpyro.factor("f", -(b**2))


X = jnp.array([0.1, 2.0, 0.5, -1.0])


@pytest.mark.parametrize("kernel", ["MALA", slow("ReplicaExchange")])
def test_the_density_is_numpyros(kernel):
    from numpyro.contrib.funsor import config_enumerate, enum

    made = KERNELS[kernel](mixed, step_size=0.1)
    state = made.init(jax.random.key(3), 0, None, (X,), {})
    state = jax.jit(lambda s: made.sample(s, (X,), {}))(state)
    model = enum(config_enumerate(mixed), -2)
    density = partial(potential_energy, model, (X,), {}, enum=True)
    energy, gradient = jax.jit(jax.value_and_grad(density))(state.z)
    np.testing.assert_allclose(state.potential_energy, energy, rtol=1e-5)
    for name, x in gradient.items():
        np.testing.assert_allclose(state.z_grad[name], x, rtol=1e-4, atol=1e-5)
    for field in ("potential_energy", "energy", "accept_prob", "diverging"):
        assert getattr(state, field).shape == (), field
    values = made.postprocess_fn((X,), {})(state.z)
    assert values.keys() == {"p", "s", "b", "z", "half"}  # no value of `c`, and of what reads it
    assert 0 < values["b"] < values["s"] and values["half"] == values["s"] / 2


@pytest.mark.slow
def test_observed_sites_and_factors_are_tempered():
    def model(y):
        s = numpyro.sample("s", dist.HalfNormal(2.0))
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", dist.Normal(0.0, s))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
        numpyro.factor("f", -jnp.sum(z**4))

    kernel = ebm.ReplicaExchange(model, [1.0, 0.5, 0.0], step_size=0.1)
    state = kernel.init(jax.random.key(3), 0, None, (X,), {})
    for k in range(3):
        z = {name: x[k, 0] for name, x in state.memory[0].position.items()}
        values = {"s": jnp.exp(z["s"]), "z": z["z"]}
        likelihood = dist.Normal(z["z"], 1.0).log_prob(X).sum() - jnp.sum(z["z"] ** 4)
        prior = log_density(model, (X,), {}, values)[0] - likelihood + z["s"]
        np.testing.assert_allclose(state.memory[0].logprior[k, 0], prior, rtol=1e-4)
        np.testing.assert_allclose(state.memory[0].loglikelihood[k, 0], likelihood, rtol=1e-4)


@pytest.mark.slow
def test_replicas_cross_between_modes():
    """Means at ±1 with weights 3 to 1, where MALA stays in the mode where it started."""

    def model(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.factor("side", jnp.where(m > 0, jnp.log(3.0), 0.0))
        numpyro.sample("y", dist.Normal(m**2, 0.1), obs=y)

    kernel = ebm.ReplicaExchange(model, num_replicas=6, min_inverse_temperature=0.01)
    start = {"m": -jnp.ones(20)}
    draws = run(kernel, 1.0, num_chains=20, num_samples=600, init_params=start)
    right = (np.asarray(draws.get_samples(group_by_chain=True)["m"]) > 0).mean(1)
    assert abs(right.mean() - 0.75) < 4 * right.std() / np.sqrt(20)


def normal(y, scale=1.0):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    numpyro.sample("r", dist.Exponential(1.0))
    numpyro.sample("y", dist.Normal(m, scale), obs=y)


@pytest.mark.slow
def test_starts_and_their_refusals():
    kernel = ebm.MALA(normal, 1e-9, init_strategy=init_to_value(values={"m": 1.5, "r": 3.0}))

    def init(params, key=None):
        return kernel.init(jax.random.key(5) if key is None else key, 0, params, (1.0,), {})

    np.testing.assert_allclose(init(None).z["m"], 1.5)
    np.testing.assert_allclose(init({"m": 2.5}).z["m"], 2.5)
    np.testing.assert_allclose(init({"m": 2.5}).z["r"], np.log(3.0), rtol=1e-5)
    keys = jax.random.split(jax.random.key(6), 2)
    assert init({"m": jnp.array([0.5, 1.0])}, keys).z["m"].tolist() == [0.5, 1.0]
    with pytest.raises(ebm.ModelError, match="'nope'.*the latent sites"):
        init({"nope": 0.0})
    with pytest.raises(ebm.ModelError, match=r"'m' of shape \(2,\)"):
        init({"m": jnp.zeros(2)})
    with pytest.raises(ebm.ModelError, match=r"1 of 2 chains \(chains 1; the terms of \['m', 'y'"):
        init({"m": jnp.array([0.5, jnp.inf])}, keys)


@pytest.mark.slow
def test_fields_thinning_and_going_on():
    mcmc = MCMC(
        ebm.UnderdampedLangevin(normal),
        num_warmup=20,
        num_samples=30,
        thinning=3,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(1), 1.0, scale=2.0, extra_fields=("mean_accept_prob",))
    assert mcmc.get_samples(group_by_chain=True)["m"].shape == (2, 10)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert {x.shape for x in fields.values()} == {(2, 10)}
    assert not np.allclose(fields["energy"], fields["potential_energy"])  # the momentum's
    sizes = mcmc.last_state.adapt_state.step_size
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(2), 1.0, scale=2.0)
    assert mcmc.last_state.i.tolist() == [80, 80]
    np.testing.assert_array_equal(mcmc.last_state.adapt_state.step_size, sizes)


@pytest.mark.slow
def test_a_chain_that_does_not_move_warns():
    mcmc = MCMC(
        ebm.MALA(normal, 1e8, adapt_step_size=False),
        num_warmup=0,
        num_samples=200,
        num_chains=3,
        chain_method="vectorized",
        progress_bar=False,
    )
    with pytest.warns(ebm.errors.ConvergenceWarning, match="3 of 3 chains did not move in 75"):
        mcmc.run(jax.random.key(1), 1.0)


def test_refusals():
    def init(kernel, *args):
        return kernel.init(jax.random.key(3), 0, None, args, {})

    def in_batches(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y), subsample_size=2):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=numpyro.subsample(y, 0))

    def discrete():
        numpyro.sample("c", dist.Bernoulli(0.5))

    def prior():
        numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def flat():
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.factor("f", -(x**2))

    def unresolved():
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 2):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", (v - m) ** 2)

    with pytest.raises(ebm.ModelError, match=r"plate 'data' is subsampled \(2 of 4\)"):
        init(ebm.MALA(in_batches, 0.1), X)
    with pytest.raises(ebm.ModelError, match=r"only discrete ones, \['c'\]"):
        init(ebm.MALA(discrete, 0.1))
    with pytest.raises(ebm.ModelError, match="nothing to temper"):
        init(ebm.ReplicaExchange(prior, step_size=0.1))
    with pytest.raises(ebm.ModelError, match=r"\['x'\] is flat"):
        init(ebm.ReplicaExchange(flat, [1.0, 0.0], step_size=0.1))
    with pytest.raises(ebm.ModelError, match=r"normalizer.*\['E'\] is not resolved"):
        init(ebm.MALA(unresolved, 0.1))
    with pytest.raises(ebm.ModelError, match="single coordinate"):
        init(ebm.MCLMC(flat, 0.1))


@pytest.mark.slow
def test_blocks_of_gibbs():
    """An indicator drawn by another block: a mixture of two Gaussians in closed form."""

    def model(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        s = numpyro.sample("s", dist.HalfNormal(1.0))  # reads nothing, nothing reads it
        c = numpyro.sample("c", dist.Bernoulli(0.3))
        numpyro.deterministic("both", m + s + c)
        numpyro.sample("y", dist.Normal(m + 2 * c, 1.0), obs=y)

    kernel = Gibbs([(ebm.MALA(model), ["m", "s"]), (DiscreteGibbs(model), None)])
    mcmc = MCMC(kernel, num_warmup=500, num_samples=20_000, progress_bar=False)
    mcmc.run(jax.random.key(1), 1.0)
    draws = {k: np.asarray(x, float) for k, x in mcmc.get_samples().items()}
    np.testing.assert_allclose(draws["both"], draws["m"] + draws["s"] + draws["c"], atol=1e-5)
    odds = 0.3 / 0.7 * np.exp(-((1 - 2) ** 2) / 4 + 1 / 4)  # y - 2c is N(0, 2)
    share = odds / (1 + odds)
    exact = {"c": share, "m": 0.5 * (1 - 2 * share), "s": np.sqrt(2 / np.pi)}
    for name, mean in exact.items():
        error = draws[name].std() / np.sqrt(effective_sample_size(draws[name][None]))
        assert abs(draws[name].mean() - mean) < 4 * error, name


@pytest.mark.slow
def test_elements_that_nothing_reads_have_a_law():
    """Of `obs_mask`: N(0, 1), where NumPyro has them flat; the others are as if left out."""

    def model(y, seen):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(m, 0.5), obs=y, obs_mask=seen)

    kernel = ebm.MCLMC(model)
    draws = run(kernel, X, jnp.array([True, True, False, False])).get_samples(group_by_chain=True)
    variance = 1 / (1 + 2 / 0.25)
    mean = variance * float(X[:2].sum()) / 0.25
    unseen = np.asarray(draws["y_unobserved"], float)
    for x, moments in (
        (np.asarray(draws["m"], float), (mean, variance + mean**2)),
        (unseen[..., 0], (0.0, 1.0)),
        (unseen[..., 2], (mean, variance + 0.25 + mean**2)),
    ):
        for power, expected in zip((1, 2), moments, strict=True):
            means = (x**power).mean(1)
            error = means.std() / np.sqrt(len(means))
            assert abs(means.mean() - expected) < 4 * error < 0.3  # flat ones would go anywhere


@pytest.mark.slow
def test_a_posterior_of_parameters():
    """`normalized` is an ordinary model: one chain over the parameters, against the Gamma."""

    def gaussian(data):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2)

    draws = run(ebm.MALA(ebm.normalized(gaussian, "enumerate")), X).get_samples(group_by_chain=True)
    means = np.asarray(draws["precision"]).mean(1)
    exact = (2 + 2) / (1 + 0.5 * float(jnp.sum(X**2)))
    assert abs(means.mean() - exact) < 4 * means.std() / np.sqrt(len(means))
