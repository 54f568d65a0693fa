# SPDX-License-Identifier: Apache-2.0
"""Laws of the exchange algorithm: posteriors against quadrature, joint laws, the protocol.

Oracles are closed forms, sums over all states and quadratures in NumPy. Chains of one test run side
by side in one compiled loop; what NumPyro's `MCMC` adds is tested apart.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean, enable_x64
from numpyro.infer import MCMC, NUTS, Gibbs, init_to_value
from scipy import stats
from scipy.special import gammaln, logsumexp

import numpyro_ebm as ebm
from numpyro_ebm.samplers import block_gibbs
from numpyro_ebm.samplers.gibbs_blocks import plan_block

slow = partial(pytest.param, marks=pytest.mark.slow)
MALA = partial(ebm.MALA, step_size=0.8)


# Models, and their posteriors


def gaussian(data, num_rows=None):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def gaussian_rows(rng_key, params, num_rows=200):
    return {"v": jax.random.normal(rng_key, (num_rows,)) / jnp.sqrt(params["theta"])}


def gaussian_posterior(data):
    return stats.gamma(2 + len(data) / 2, scale=1 / (1 + 0.5 * np.sum(data**2)))


def lifetimes(data):
    """Exponential rows on the positive half-line, and a measurement outside of the plate."""
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    numpyro.sample("gauge", dist.Normal(rate, 0.3), obs=1.5)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((), dist.constraints.positive), obs=data)
        ebm.energy("E", rate * v)


def bonds(s):
    return s * (jnp.roll(s, 1, -1) + jnp.roll(s, 1, -2))


def ising(data):
    beta = numpyro.sample("beta", dist.Uniform(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        s = numpyro.sample("s", ebm.Counting(2, np.shape(data)[1:]), obs=data)
        ebm.energy("E", -beta * jnp.sum(bonds(2.0 * s - 1.0), (-1, -2)))


def lattice_sums(size):
    """Sum of the bonds of every state of a lattice on a torus."""
    states = (np.arange(2 ** (size * size))[:, None] >> np.arange(size * size)) & 1
    s = (2 * states - 1).reshape(-1, size, size)
    return states.reshape(-1, size, size), np.sum(
        s * (np.roll(s, 1, -1) + np.roll(s, 1, -2)), (-1, -2)
    )


def counts(data, num_values=25):
    """Conway-Maxwell-Poisson counts, truncated far out; two parameters."""
    log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 1.0))
    nu = numpyro.sample("nu", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("data", len(data)):
        x = numpyro.sample("x", ebm.Counting(num_values), obs=data)
        ebm.energy("E", nu * jax.lax.lgamma(x + 1.0) - log_rate * x)


def pairs(data):
    """Two visible bits and a hidden one."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(2, (2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, (1,)))
        ebm.energy("E", -(w * jnp.sum(v, -1) - 0.5) * h[..., 0] - 0.3 * v[..., 0])


PAIRS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


def on_grid(log_density, low, high, num=4_000):
    """Mean and sd of a density on the line, by a sum over a fine grid."""
    x = np.linspace(low, high, num)
    weights = log_density(x)
    weights = np.exp(weights - weights.max())
    weights /= weights.sum()
    mean = np.sum(weights * x)
    return mean, np.sqrt(np.sum(weights * (x - mean) ** 2))


def ising_posterior(data):
    _, sums = lattice_sums(data.shape[-1])
    s = 2 * data - 1
    observed = np.sum(s * (np.roll(s, 1, -1) + np.roll(s, 1, -2)))
    values, number = np.unique(sums, return_counts=True)

    def log_density(beta):
        log_z = logsumexp(beta[:, None] * values, axis=1, b=number)
        return beta * observed - len(data) * log_z

    return on_grid(log_density, 0.0, 1.0)


def counts_posterior(data, num_values=25):
    """Means and sds of log_rate and nu, on a grid of both."""
    m, nu = np.linspace(-3, 5, 401), np.exp(np.linspace(-1.6, 1.3, 400))
    x = np.arange(num_values)
    terms = m[:, None, None] * x - nu[:, None] * gammaln(x + 1)
    log_z = logsumexp(terms, axis=-1)
    log_density = m[:, None] * np.sum(data) - nu * np.sum(gammaln(data + 1)) - len(data) * log_z
    # The grid of nu is even in its logarithm, of which the prior is normal.
    log_density += -0.5 * m[:, None] ** 2 - 0.5 * (np.log(nu) / 0.3) ** 2
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    moments = {}
    for name, values in (("log_rate", m[:, None]), ("nu", nu)):
        mean = np.sum(weights * values)
        moments[name] = mean, np.sqrt(np.sum(weights * (values - mean) ** 2))
    return moments


def pairs_posterior(data):
    def log_rows(w, v):
        up = w[:, None] * v.sum(-1) - 0.5
        return np.logaddexp(0.0, up) + 0.3 * v[:, 0]

    def log_density(w):
        log_z = logsumexp(log_rows(w, PAIRS), axis=1)
        return -0.5 * w**2 + log_rows(w, data).sum(1) - len(data) * log_z

    return on_grid(log_density, -6, 8)


RNG = np.random.default_rng(0)
GAUSSIAN = RNG.normal(size=200)
LIFETIMES = RNG.exponential(0.7, size=40)


def draw_lattices(size, num, beta=0.3):
    states, sums = lattice_sums(size)
    return states[RNG.choice(len(states), size=num, p=np.exp(beta * sums - logsumexp(beta * sums)))]


LATTICES = {3: draw_lattices(3, 3), 4: draw_lattices(4, 1)}
COUNTS = RNG.binomial(12, 0.3, size=30)
BITS = PAIRS[RNG.choice(4, size=60, p=[0.1, 0.2, 0.3, 0.4])]


def lifetimes_posterior():
    def log_density(z):  # in the logarithm of the rate
        rate = np.exp(z)
        rows = len(LIFETIMES) * z - rate * LIFETIMES.sum()
        return rows - 0.5 * z**2 - 0.5 * ((1.5 - rate) / 0.3) ** 2

    return on_grid(log_density, -3, 3)


# A compiled loop of many chains


def chains(kernel, args, num_steps, num_chains=20, num_warmup=200, seed=0, **init_params):
    """Constrained draws (chains, draws, ...) by name, and the last state."""

    @jax.jit
    def run(keys):
        def one(key):
            state = kernel.init(key, num_warmup, init_params or None, args, {})

            def step(state, _):
                state = kernel.sample(state, args, {})
                return state, (state.z, state.accept_prob)

            return jax.lax.scan(step, state, None, num_warmup + num_steps)

        return jax.vmap(one)(keys)

    state, (z, accept) = run(jax.random.split(jax.random.key(seed), num_chains))
    z = jax.tree.map(lambda x: x[:, num_warmup:], z)
    constrain = kernel.get_constrain_fn(args, {})
    draws = jax.jit(jax.vmap(jax.vmap(constrain)))(z)
    draws = {name: np.asarray(x, float) for name, x in draws.items()}
    return draws, state, np.asarray(accept)[:, num_warmup:]


def assert_posterior(draws, mean, sd):
    assert_mean(draws, mean)
    assert_mean((draws - mean) ** 2, sd**2)


POSTERIORS = {
    "gaussian": (gaussian, GAUSSIAN, lambda draws: [(draws["theta"], *_moments(GAUSSIAN))]),
    "lifetimes": (
        lifetimes,
        LIFETIMES,
        lambda draws: [(np.log(draws["rate"]), *lifetimes_posterior())],
    ),
    "ising3": (ising, LATTICES[3], lambda draws: [(draws["beta"], *ising_posterior(LATTICES[3]))]),
    "ising4": (ising, LATTICES[4], lambda draws: [(draws["beta"], *ising_posterior(LATTICES[4]))]),
    "counts": (
        counts,
        COUNTS,
        lambda draws: [(draws[k], *x) for k, x in counts_posterior(COUNTS).items()],
    ),
    "pairs": (pairs, BITS, lambda draws: [(draws["w"], *pairs_posterior(BITS))]),
}


def _moments(data):
    exact = gaussian_posterior(data)
    return exact.mean(), exact.std()


def reversible_gibbs(model):
    return ebm.BlockGibbs(model, reversible=True)


def dmala(model):
    return ebm.DiscreteLangevin(model, step_size=1.0)


CASES = {
    "gaussian-exact": ("gaussian", gaussian_rows, {}),
    "gaussian-exact-langevin": ("gaussian", gaussian_rows, {"proposal": "langevin"}),
    "gaussian-mala-bridges": ("gaussian", MALA, {"num_auxiliary_steps": 8, "num_bridges": 4}),
    "gaussian-gibbs": ("gaussian", ebm.BlockGibbs, {"num_auxiliary_steps": 1}),
    "lifetimes-mala": ("lifetimes", MALA, {"num_auxiliary_steps": 10}),
    "ising3-enumerate": ("ising3", "enumerate", {}),
    "ising4-enumerate": ("ising4", "enumerate", {"proposal": "langevin"}),
    "ising4-gibbs": ("ising4", ebm.BlockGibbs, {"num_auxiliary_steps": 20}),
    "ising4-gibbs-bridges": (
        "ising4",
        reversible_gibbs,
        {"num_auxiliary_steps": 10, "num_bridges": 5},
    ),
    "ising3-dmala-bridges": ("ising3", dmala, {"num_auxiliary_steps": 20, "num_bridges": 3}),
    "counts-enumerate": ("counts", "enumerate", {}),
    "counts-langevin": ("counts", "enumerate", {"proposal": "langevin"}),
    "counts-gibbs": ("counts", ebm.BlockGibbs, {"num_auxiliary_steps": 1}),
    "pairs-gibbs-bridges": (
        "pairs",
        reversible_gibbs,
        {"num_auxiliary_steps": 10, "num_bridges": 3},
    ),
    "pairs-enumerate": ("pairs", "enumerate", {}),
}
QUICK = {
    "gaussian-exact-langevin",
    "lifetimes-mala",
    "ising3-enumerate",
}


def check_case(name, seed=0):
    problem, auxiliary, options = CASES[name]
    model, data, expected = POSTERIORS[problem]
    kernel = ebm.Exchange(model, auxiliary, **options)
    size = {"num_steps": 1_000}
    if name == "ising4-enumerate":  # 65,536 states a row and step
        size = {"num_steps": 400, "num_chains": 4}
    elif name == "gaussian-mala-bridges":
        size = {"num_steps": 400}
    elif problem == "counts":
        size = {"num_steps": 1_500, "num_warmup": 600}
    draws, _, _ = chains(kernel, (jnp.asarray(data),), seed=seed, **size)
    for values, mean, sd in expected(draws):
        assert_posterior(values, mean, sd)


FIVE_SEEDS = ["gaussian-gibbs", "ising4-gibbs", "counts-enumerate"]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else slow(n) for n in CASES if n not in FIVE_SEEDS]
)
def test_the_posterior_is_the_exact_one(name):
    check_case(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIVE_SEEDS)
def test_the_posterior_is_the_exact_one_for_five_seeds(name):
    """Seeds run side by side: 20 chains each."""
    problem, auxiliary, options = CASES[name]
    model, data, expected = POSTERIORS[problem]
    kernel = ebm.Exchange(model, auxiliary, **options)
    size = {"num_steps": 1_500, "num_warmup": 600} if problem == "counts" else {"num_steps": 1_000}
    draws, _, _ = chains(kernel, (jnp.asarray(data),), seed=1, num_chains=100, **size)
    for values, mean, sd in expected(draws):
        for seed in range(5):
            assert_posterior(values[20 * seed : 20 * (seed + 1)], mean, sd)


# Laws of the algorithm that need no MCMC


def test_reversible_sweeps_are_in_detailed_balance_and_plain_ones_are_not():
    """Flows x → x' and x' → x of a chain of three spins, from exact draws of its law."""
    couplings, fields = np.array([1.2, -0.8]), np.array([0.7, -0.2, 0.4])
    states = (np.arange(8)[:, None] >> np.arange(3)) & 1

    def log_density(x):
        s = x["s"]
        return s @ fields + couplings[0] * s[:, 0] * s[:, 1] + couplings[1] * s[:, 1] * s[:, 2]

    log_p = np.asarray(log_density({"s": jnp.asarray(states)}), float)
    p = np.exp(log_p - logsumexp(log_p))
    start = np.random.default_rng(0).choice(8, size=200_000, p=p)
    position = {"s": jnp.asarray(states[start])}
    for colors in (None, {"s": np.array([0, 1, 2])}):  # coloured, then every spin on its own
        block = plan_block(log_density, position, ["s"], {"s": [0, 1]}, colors)

        def largest(reversible, block=block):
            kernel = block_gibbs.build_kernel(reversible)
            first = block_gibbs.init(position, log_density)
            state, _ = jax.jit(lambda key: kernel(key, first, log_density, [block]))(
                jax.random.key(1)
            )
            end = np.asarray(state.position["s"]) @ [1, 2, 4]
            flows = np.zeros((8, 8))
            np.add.at(flows, (start, end), 1)
            return np.max(abs(flows - flows.T) / np.sqrt(np.maximum(flows + flows.T, 1)))

        assert largest(True) < 4.5
        assert largest(False) > 20


def test_sequential_sweeps_go_there_and_back():
    def log_density(x):  # nobody can tell what interacts
        return 0.3 * jnp.sum(jnp.sort(x["s"], -1) * jnp.arange(3), -1) * x["s"][:, 0]

    states = jnp.asarray((np.arange(8)[:, None] >> np.arange(3)) & 1)
    block = plan_block(log_density, {"s": states}, ["s"], {"s": [0, 1]})
    assert block.kind == "sequential"
    log_p = np.asarray(log_density({"s": states}), float)
    p = np.exp(log_p - logsumexp(log_p))
    start = np.random.default_rng(0).choice(8, size=100_000, p=p)
    position = {"s": states[start]}
    kernel = block_gibbs.build_kernel(True)
    first = block_gibbs.init(position, log_density)
    state, _ = kernel(jax.random.key(1), first, log_density, [block])
    end = np.asarray(state.position["s"]) @ [1, 2, 4]
    flows = np.zeros((8, 8))
    np.add.at(flows, (start, end), 1)
    assert np.max(abs(flows - flows.T) / np.sqrt(np.maximum(flows + flows.T, 1))) < 4.5
    assert np.max(abs(flows.sum(0) - 1e5 * p) / np.sqrt(1e5 * p)) < 4.5


def joint_law(kernel, draw, num_steps, num_chains=400, num_rows=4, seed=0):
    """Successive-conditional draws of θ and data: the kernel given data, then data given θ."""
    log = lambda state: jnp.exp(state.z["theta"])  # noqa: E731

    @jax.jit
    def run(key):
        key_theta, key_data, key_run, key_steps = jax.random.split(key, 4)
        theta = jax.random.gamma(key_theta, 2.0)
        data = draw(key_data, {"theta": theta}, num_rows)["v"]
        state = kernel.init(key_run, 0, {"theta": jnp.log(theta)}, (data,), {})

        def step(carry, key):
            state, data = carry
            state = kernel.refresh(state, (data,), {})
            state = kernel.sample(state, (data,), {})
            data = draw(key, {"theta": log(state)}, num_rows)["v"]
            return (state, data), (log(state), data)

        _, out = jax.lax.scan(step, (state, data), jax.random.split(key_steps, num_steps))
        return out

    theta, data = jax.vmap(run)(jax.random.split(jax.random.key(seed), num_chains))
    return np.asarray(theta, float), np.asarray(data, float)


@pytest.mark.parametrize(
    "auxiliary, options",
    [
        slow(lambda rng_key, params: gaussian_rows(rng_key, params, 4), {}),
        slow(ebm.BlockGibbs, {"num_auxiliary_steps": 1}),
        (reversible_gibbs, {"num_auxiliary_steps": 1, "num_bridges": 3}),
    ],
)
def test_geweke_the_joint_law_of_parameters_and_data_is_kept(auxiliary, options):
    """Marginal-conditional moments are those of the prior, and of data given θ, in closed form."""
    kernel = ebm.Exchange(gaussian, auxiliary, step_size=1.0, **options)
    theta, data = joint_law(kernel, gaussian_rows, num_steps=150)
    # Chains start with the law itself: every step has it, and chains are independent.
    theta, data = theta[:, 50:], data[:, 50:]
    squares = theta[..., None] * data**2  # χ² with one degree of freedom, whatever θ is
    for values, expected in (
        (theta, 2.0),
        (np.log(theta), 1 - np.euler_gamma),
        (theta**2, 6.0),
        (1 / (1 + theta), 0.4036526376768058),
        (squares.mean(-1), 1.0),
        (squares.mean(-1) * np.log(theta), 1 - np.euler_gamma),
    ):
        per_chain = values.mean(1)
        error = per_chain.std() / np.sqrt(len(per_chain))
        assert abs(per_chain.mean() - expected) < 4 * error, (per_chain.mean(), expected, error)


@pytest.mark.slow
def test_simulation_based_calibration_ranks_are_uniform():
    kernel = ebm.Exchange(
        gaussian, lambda key, params: gaussian_rows(key, params, 20), step_size=0.8
    )
    num_ranks, thin, replications = 19, 20, 800

    def replicate(key):
        key_theta, key_data, key_start, key_run = jax.random.split(key, 4)
        theta = jax.random.gamma(key_theta, 2.0)
        data = gaussian_rows(key_data, {"theta": theta}, 20)["v"]
        start = {"theta": jnp.log(jax.random.gamma(key_start, 2.0))}
        state = kernel.init(key_run, 0, start, (data,), {})

        def step(state, _):
            state = kernel.sample(state, (data,), {})
            return state, state.z["theta"]

        _, z = jax.lax.scan(step, state, None, (num_ranks + 10) * thin)
        return jnp.sum(jnp.exp(z[10 * thin :: thin]) < theta)

    ranks = jax.jit(jax.vmap(replicate))(jax.random.split(jax.random.key(0), replications))
    observed = np.bincount(np.asarray(ranks), minlength=num_ranks + 1)
    assert observed.sum() == replications
    assert stats.chisquare(observed).pvalue > 1e-3, observed


# The protocol


def run(kernel, *args, num_samples=200, num_warmup=100, seed=0, fields=(), **options):
    init_params = options.pop("init_params", None)
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False, **options
    )
    mcmc.run(jax.random.key(seed), *args, extra_fields=fields, init_params=init_params)
    return mcmc


@pytest.mark.parametrize("method", [slow("sequential"), "vectorized", slow("parallel")])
def test_chain_methods(method):
    data = jnp.asarray(GAUSSIAN)
    kernel = ebm.Exchange(gaussian, ebm.BlockGibbs, 1)
    context = warnings.catch_warnings()
    with context:
        if method == "parallel":  # NumPyro tells that there is one device
            warnings.simplefilter("ignore")
        mcmc = run(kernel, data, num_chains=2, chain_method=method, fields=("log_prior", "i"))
    draws = mcmc.get_samples(group_by_chain=True)["theta"]
    assert draws.shape == (2, 200) and bool(jnp.all(draws > 0))
    assert not np.array_equal(draws[0], draws[1])
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert fields["accept_prob"].shape == (2, 200) == fields["log_prior"].shape
    assert fields["auxiliary"].log_ratio.shape == (2, 200, 3)
    state = mcmc.last_state
    assert "acc. prob=0." in kernel.get_diagnostics_str(state)
    mcmc.run(jax.random.key(1), data)  # from the same warm-up anew
    assert mcmc.get_samples()["theta"].shape == (400,)


def test_both_precisions_start_where_they_are_told_and_collect_deterministic_sites():
    def model(data, scale=1.0):
        theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
        numpyro.deterministic("sd", scale / jnp.sqrt(theta))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * theta * v**2)

    with enable_x64():
        kernel = ebm.Exchange(model, gaussian_rows, step_size=0.3)
        start = {"theta": jnp.log(2.0)}
        data = jnp.asarray(GAUSSIAN)
        state = kernel.init(jax.random.key(0), 0, start, (data,), {})
        assert state.z["theta"] == np.log(2.0) and state.log_density.dtype == np.float64
        assert state.log_prior == pytest.approx(stats.gamma(2).logpdf(2.0) + np.log(2.0))
        assert state.log_density == pytest.approx(-np.sum(GAUSSIAN**2))
        mcmc = run(kernel, data, num_warmup=0, num_samples=20, init_params=start)
        draws = mcmc.get_samples()
        assert draws["theta"].dtype == np.float64
        np.testing.assert_allclose(draws["sd"], 1 / np.sqrt(draws["theta"]))
    kernel = ebm.Exchange(
        model, gaussian_rows, step_size=0.3, init_strategy=init_to_value(values={"theta": 0.5})
    )
    state = kernel.init(jax.random.key(0), 0, None, (jnp.asarray(GAUSSIAN),), {})
    assert state.z["theta"] == pytest.approx(np.log(0.5))


@pytest.mark.slow
def test_the_references_are_draws_at_the_center_and_frozen_after_the_warmup():
    data = jnp.asarray(GAUSSIAN)
    kernel = ebm.Exchange(gaussian, gaussian_rows, proposal="langevin", num_references=5)
    _, state, accept = chains(kernel, (data,), 50, 2, num_warmup=100)
    adapt = state.adapt_state
    assert bool(adapt.has_gradient.all()) and 0.1 < accept.mean() < 0.8
    # References are draws at θ̂, a frozen function: their rows have the density they had then.
    theta = np.exp(np.asarray(adapt.reference, float))[:, 0]  # (chains, 1)
    v = np.asarray(adapt.references["v"], float)
    expected = -0.5 * theta[:, :, None] * v**2
    np.testing.assert_allclose(adapt.baselines, expected, rtol=1e-4)
    assert abs(np.mean(theta[:, :, None] * v**2) - 1) < 4 * np.sqrt(2 / v.size)
    moved = jax.vmap(lambda s: kernel.sample(s, (data,), {}))(state)
    for old, new in zip(jax.tree.leaves(adapt), jax.tree.leaves(moved.adapt_state), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_exact_posterior_near_the_reference():
    """With many references the surrogate of log Z is as good as log Z."""
    data = jnp.asarray(GAUSSIAN)
    kernel = ebm.Exchange(gaussian, gaussian_rows, proposal="langevin", num_references=100)
    _, state, _ = chains(kernel, (data,), 1, 4, num_warmup=500)
    z = np.asarray(state.z["theta"], float)
    theta = np.exp(z)
    exact = (2 + 100) - theta * (1 + 0.5 * np.sum(GAUSSIAN**2))
    np.testing.assert_allclose(np.asarray(state.gradient)[:, 0, 0], exact, atol=3.0)
    assert np.max(abs(exact)) < 40


@pytest.mark.slow
def test_param_sites_are_held_where_they_have_values():
    def model(data):
        scale = numpyro.param("scale", 1.0)
        theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * theta * (v / scale) ** 2)

    held = numpyro.handlers.substitute(model, data={"scale": 2.0})
    kernel = ebm.Exchange(held, ebm.BlockGibbs, 1)
    draws, _, _ = chains(kernel, (jnp.asarray(2 * GAUSSIAN),), 500)
    assert_posterior(draws["theta"], *_moments(GAUSSIAN))


# As a block of Gibbs


NUM_GROUPS, NUM_UNITS = 6, 30
GROUPS = np.random.default_rng(1).normal(size=(NUM_GROUPS, NUM_UNITS)) * np.exp(
    -0.5 * (0.3 + 0.5 * np.random.default_rng(2).normal(size=(NUM_GROUPS, 1)))
)


def hierarchy(data):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.Gamma(10.0, 20.0))
    with numpyro.plate("groups", len(data)):
        level = numpyro.sample("level", dist.Normal(mu, tau))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
        ebm.energy("E", 0.5 * jnp.exp(level) * jnp.sum(v**2, -1))


def group_rows(rng_key, params):
    noise = jax.random.normal(rng_key, (NUM_GROUPS, NUM_UNITS))
    return {"v": noise * jnp.exp(-0.5 * params["level"])[:, None]}


def hierarchy_moments():
    """Posterior means and sds, on a grid of τ, everything else in closed form or on grids."""
    mu, tau = np.linspace(-2, 2.5, 91), np.linspace(0.02, 2.0, 100)
    z = np.linspace(-2.5, 3.5, 401)
    squares = np.sum(GROUPS**2, -1)
    rows = 0.5 * NUM_UNITS * z - 0.5 * np.exp(z) * squares[:, None]  # (groups, z)
    prior = stats.norm(mu[:, None, None], tau[:, None]).logpdf(z)  # (mu, tau, z)
    log_z = logsumexp(prior[None] + rows[:, None, None], axis=-1)  # (groups, mu, tau)
    row_model = (
        log_z.sum(0) + stats.norm.logpdf(mu)[:, None] + stats.gamma(10, scale=1 / 20).logpdf(tau)
    )
    weights = np.exp(row_model - row_model.max())
    weights /= weights.sum()
    inside = np.exp(prior[None] + rows[:, None, None] - log_z[..., None])
    first, second = (np.einsum("mt,gmtz,z->g", weights, inside, z**power) for power in (1, 2))
    moments = {"level": (first, np.sqrt(second - first**2))}
    for name, values in (("mu", mu[:, None]), ("tau", tau)):
        mean = np.sum(weights * values)
        moments[name] = mean, np.sqrt(np.sum(weights * (values - mean) ** 2))
    return moments


@pytest.mark.slow
def test_a_hierarchy_with_nuts_above_has_the_exact_posterior():
    model = ebm.given(hierarchy, ["level"])
    exchange_block = ebm.Exchange(model, group_rows, by_row=True)
    kernel = Gibbs([(exchange_block, ["level"]), (NUTS(model), ["mu", "tau"])])
    mcmc = run(
        kernel,
        jnp.asarray(GROUPS),
        num_warmup=400,
        num_samples=3_000,
        fields=("block_states.0.auxiliary", "block_states.0.accept_prob"),
    )
    draws = mcmc.get_samples(group_by_chain=True)
    for name, (mean, sd) in hierarchy_moments().items():
        assert_posterior(np.asarray(draws[name], float), mean, sd)
    accept = mcmc.get_extra_fields()["block_states.0.accept_prob"]
    assert accept.shape[1:] == (NUM_GROUPS,)
    assert ebm.auxiliary_adequacy(mcmc).is_adequate


def test_rows_with_parameters_of_their_own_accept_on_their_own():
    def independent(data):
        with numpyro.plate("groups", len(data)):
            rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
            ebm.energy("E", 0.5 * rate * jnp.sum(v**2, -1))

    kernel = ebm.Exchange(independent, ebm.BlockGibbs, 1, by_row=True, proposal="langevin")
    draws, state, _ = chains(kernel, (jnp.asarray(GROUPS),), 500, num_warmup=300)
    assert state.accept_prob.shape == (20, NUM_GROUPS)
    shape, rate = 3 + NUM_UNITS / 2, 2 + 0.5 * np.sum(GROUPS**2, -1)
    assert_posterior(draws["rate"], shape / rate, np.sqrt(shape) / rate)


def test_latents_drawn_by_another_block():
    """The hidden bit drawn beside Exchange, which then sees it: the same posterior."""
    model = ebm.given(pairs, ["w"])
    kernel = Gibbs(
        [(ebm.Exchange(model, ebm.BlockGibbs, 10), ["w"]), (ebm.BlockGibbs(model), None)]
    )
    mcmc = run(kernel, jnp.asarray(BITS), num_samples=8_000, num_warmup=300)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["w"], float)
    assert_posterior(draws, *pairs_posterior(BITS))


def test_given_answers_only_where_it_may():
    data = jnp.asarray(GROUPS)
    model = ebm.given(hierarchy, ["level"])
    values = {"mu": 0.1, "tau": 0.4, "level": jnp.zeros(NUM_GROUPS)}
    with pytest.raises(ebm.UnhandledEnergyError):
        numpyro.infer.util.log_density(model, (data,), {}, values)
    held = numpyro.handlers.condition(model, {"level": values["level"]})
    log_density, _ = numpyro.infer.util.log_density(held, (data,), {}, values)
    expected = stats.norm.logpdf(0.1) + stats.gamma(10, scale=1 / 20).logpdf(0.4)
    expected += NUM_GROUPS * stats.norm(0.1, 0.4).logpdf(0.0) - 0.5 * np.sum(GROUPS**2)
    assert log_density == pytest.approx(expected, rel=1e-5)

    def past(data):  # μ reaches the energy past the level as well
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        level = numpyro.sample("level", dist.Normal(mu, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
            ebm.energy("E", 0.5 * jnp.exp(level) * jnp.sum((v - mu) ** 2, -1))

    held = numpyro.handlers.condition(ebm.given(past, ["level"]), {"level": 0.0})
    with pytest.raises(ebm.ModelError, match="'E' depends on 'mu' as well"):
        numpyro.infer.util.log_density(held, (data,), {}, {"mu": 0.0})
    with pytest.raises(ebm.ModelError, match="sequence of names"):
        ebm.given(past, "level")


# Adequacy of the auxiliary chains


def critical_lattice(size=6, num_sweeps=300):
    """A state of a lattice near its critical temperature, from Gibbs sweeps in NumPy."""
    rng = np.random.default_rng(0)
    s = np.ones((size, size))
    even = np.indices((size, size)).sum(0) % 2 == 0
    for _ in range(num_sweeps):
        for color in (even, ~even):
            field = sum(np.roll(s, step, axis) for step in (1, -1) for axis in (0, 1))
            up = rng.random(s.shape) < 1 / (1 + np.exp(-2 * 0.4406868 * field))
            s = np.where(color, np.where(up, 1, -1), s)
    return jnp.asarray((s[None] + 1) / 2).astype(int)


def test_adequacy_tells_one_step_at_a_critical_lattice_from_a_hundred():
    data = critical_lattice()

    class Run:  # what is asked of NumPyro's MCMC
        def __init__(self, num_steps):
            kernel = ebm.Exchange(ising, ebm.BlockGibbs, num_steps, step_size=0.8)

            def one(key):
                state = kernel.init(key, 0, {"beta": jnp.zeros(())}, (data,), {})

                def step(state, _):
                    state = kernel.sample(state, (data,), {})
                    return state, state.auxiliary

                return jax.lax.scan(step, state, None, 200)[1]

            self.trace = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4))

        def get_extra_fields(self, group_by_chain):
            return {"auxiliary": self.trace}

    with pytest.warns(ebm.ShortAuxiliaryWarning, match="num_auxiliary_steps"):
        found = ebm.auxiliary_adequacy(Run(1))
    assert not found.is_adequate and found.sds > 1 and found.p_value < 1e-10
    assert found.ratio_drift > 5 * found.ratio_error
    found = ebm.auxiliary_adequacy(Run(100))
    assert found.is_adequate and found.sds < 0.1 and found.p_value > 1e-3
    Run.get_extra_fields = lambda self, group_by_chain: {"energy": 0.0}
    with pytest.raises(ebm.ModelError, match="needs one field.*'energy'"):
        ebm.auxiliary_adequacy(Run(1))


# Errors, each at once, with the site and the way out


def flat_prior(data):
    theta = numpyro.sample("theta", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def no_prior(data):
    theta = numpyro.param("theta", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def unset_param(data):
    width = numpyro.param("width", 1.0)
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * (v / width) ** 2)


def discrete_parameter(data):
    theta = numpyro.sample("theta", dist.Poisson(2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (1 + theta) * v**2)


def subsampled(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data), subsample_size=10):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data[:10])
        ebm.energy("E", 0.5 * theta * v**2)


def infinite(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2 + jnp.where(jnp.arange(len(data)) == 3, jnp.inf, 0.0))


def real_latent(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Lebesgue())
        ebm.energy("E", 0.5 * theta * v**2 + 0.5 * (h - v) ** 2)


def quartic(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", theta * v**4)


def coupled_rows(data):
    with numpyro.plate("groups", len(data)):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
        ebm.energy("E", 0.5 * (rate + jnp.roll(rate, 1)) * jnp.sum(v**2, -1))


def coupled_prior(data):
    with numpyro.plate("groups", len(data)):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    numpyro.sample("total", dist.Normal(jnp.sum(rate), 1.0), obs=3.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
        ebm.energy("E", 0.5 * rate * jnp.sum(v**2, -1))


class Biased(ebm.MALA):
    leaves_invariant = False


class OneWay(ebm.MALA):
    is_reversible = False


V, S = jnp.asarray(GAUSSIAN), jnp.asarray(LATTICES[3])
BY_ROW = {"by_row": True, "step_size": 1.0}
REFUSED = {
    "no prior": (no_prior, ebm.BlockGibbs, {}, V, "no parameter.*prior.*'theta'"),
    "improper": (flat_prior, ebm.BlockGibbs, {}, V, "'theta' is improper"),
    "unset param": (unset_param, ebm.BlockGibbs, {}, V, "'width'.*substitute"),
    "discrete": (discrete_parameter, ebm.BlockGibbs, {}, V, "'theta'.*discrete.*DiscreteGibbs"),
    "subsampled": (subsampled, ebm.BlockGibbs, {}, V, "'data' subsamples 10"),
    "infinite": (infinite, ebm.BlockGibbs, {}, V, r"row\(s\) \[3\] is not finite.*init_params"),
    "latent": (real_latent, ebm.BlockGibbs, {}, V, "'h'.*given.*Gibbs"),
    "bare MALA on spins": (ising, ebm.MALA, {}, S, "MALA cannot draw.*'s'.*discrete"),
    "MALA on spins": (ising, MALA, {}, S, "MALA cannot draw.*'s'.*discrete"),
    "MALA without step": (gaussian, ebm.MALA, {}, V, "step_size.*lambda model"),
    "Gibbs on quartic": (quartic, ebm.BlockGibbs, {}, V, "BlockGibbs cannot draw.*'v'"),
    "ULA": (gaussian, lambda m: ebm.ULA(m, 0.1), {}, V, "ULA without a Metropolis"),
    "DULA": (
        ising,
        lambda m: ebm.DiscreteLangevin(m, 0.1, adjusted=False),
        {},
        S,
        "without a Metropolis",
    ),
    "says it is biased": (gaussian, lambda m: Biased(m, 0.1), {}, V, "Biased without a Metropolis"),
    "says it is not reversible": (
        gaussian,
        lambda m: OneWay(m, 0.1),
        {"num_bridges": 2},
        V,
        "OneWay does not",
    ),
    "no kernel": (gaussian, lambda m: 3, {}, V, "returned 3"),
    "wrong draws": (gaussian, lambda k, p: {"v": jnp.zeros(3)}, {}, V, r"\(200,\).*\(3,\)"),
    "enumerate reals": (gaussian, "enumerate", {}, V, "'v', which is continuous"),
    "too many states": (ising, "enumerate", {"max_states": 100}, S, "512 states.*BlockGibbs"),
    "bridges of Gibbs": (ising, ebm.BlockGibbs, {"num_bridges": 2}, S, "reversible=True"),
    "bridges of draws": (gaussian, gaussian_rows, {"num_bridges": 2}, V, "num_bridges.*kernel"),
    "by_row": (gaussian, ebm.BlockGibbs, BY_ROW, V, r"'theta' has shape \(\)"),
    "coupled": (coupled_rows, ebm.BlockGibbs, BY_ROW, jnp.asarray(GROUPS), "energy of a row"),
    "coupled prior": (coupled_prior, ebm.BlockGibbs, BY_ROW, jnp.asarray(GROUPS), "couple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sampled_is_refused(name):
    model, auxiliary, options, data, message = REFUSED[name]
    kernel = ebm.Exchange(model, auxiliary, **options)
    with pytest.raises(ebm.ModelError, match=message):
        kernel.init(jax.random.key(0), 100, None, (data,), {})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"auxiliary": 3}, "auxiliary.*Got 3"),
        ({"auxiliary": "gibbs"}, "auxiliary"),
        ({"auxiliary": lambda a, b, c: None}, "auxiliary"),
        ({"auxiliary": ebm.BlockGibbs(gaussian)}, "auxiliary"),
        ({"num_auxiliary_steps": 0}, "num_auxiliary_steps"),
        ({"num_auxiliary_steps": 2.0}, "num_auxiliary_steps"),
        ({"proposal": "nuts"}, "proposal"),
        ({"num_bridges": -1}, "num_bridges"),
        ({"step_size": 0.0}, "step_size"),
        ({"target_accept_prob": 1.0}, "target_accept_prob"),
        ({"num_references": 0}, "num_references"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ebm.ModelError, match=message):
        ebm.Exchange(gaussian, **{"auxiliary": ebm.BlockGibbs, **options})


def test_what_the_warmup_needs_is_refused_before_it_starts():
    with pytest.raises(ebm.ModelError, match="step_size"):
        ebm.Exchange(gaussian, gaussian_rows).init(jax.random.key(0), 0, None, (V,), {})
    kernel = ebm.Exchange(gaussian, gaussian_rows, proposal="langevin", num_references=20)
    with pytest.raises(ebm.ModelError, match="at least 84"):
        kernel.init(jax.random.key(0), 50, None, (V,), {})
    with pytest.raises(ebm.ModelError, match=r"init_params.*\['rate'\]"):
        ebm.Exchange(gaussian, gaussian_rows).init(
            jax.random.key(0), 10, {"rate": jnp.zeros(())}, (V,), {}
        )
