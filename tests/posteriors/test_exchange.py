# SPDX-License-Identifier: Apache-2.0
"""Laws of the exchange algorithm: posteriors against quadrature, joint laws, the protocol.

Oracles are closed forms, sums over all states and quadratures in NumPy. Chains of one test run side
by side in one compiled loop; what NumPyro's `MCMC` adds is tested apart."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from exchange_cases import (
    BITS,
    GAUSSIAN,
    LATTICES,
    MALA,
    RNG,
    _moments,
    assert_posterior,
    chains,
    gaussian,
    gaussian_rows,
    ising,
    lattice_sums,
    on_grid,
    pairs,
    pairs_posterior,
    slow,
)
from scipy import stats
from scipy.special import gammaln, logsumexp

import numpyro_ebm as ebm
from numpyro_ebm.samplers import block_gibbs
from numpyro_ebm.samplers.gibbs_blocks import plan_block


def lifetimes(data):
    """Exponential rows on the positive half-line, and a measurement outside of the plate."""
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    numpyro.sample("gauge", dist.Normal(rate, 0.3), obs=1.5)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((), dist.constraints.positive), obs=data)
        ebm.energy("E", rate * v)


def counts(data, num_values=25):
    """Conway-Maxwell-Poisson counts, truncated far out; two parameters."""
    log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 1.0))
    nu = numpyro.sample("nu", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("data", len(data)):
        x = numpyro.sample("x", ebm.Counting(num_values), obs=data)
        ebm.energy("E", nu * jax.lax.lgamma(x + 1.0) - log_rate * x)


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


LIFETIMES = RNG.exponential(0.7, size=40)
COUNTS = RNG.binomial(12, 0.3, size=30)


def lifetimes_posterior():
    def log_density(z):  # in the logarithm of the rate
        rate = np.exp(z)
        rows = len(LIFETIMES) * z - rate * LIFETIMES.sum()
        return rows - 0.5 * z**2 - 0.5 * ((1.5 - rate) / 0.3) ** 2

    return on_grid(log_density, -3, 3)


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
    "lifetimes-chosen": ("lifetimes", None, {"num_auxiliary_steps": 20}),
    "ising4-chosen": ("ising4", None, {"num_auxiliary_steps": 20}),
    "pairs-chosen": ("pairs", None, {"num_auxiliary_steps": 20}),
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


@pytest.mark.parametrize(
    ("problem", "kernel"), {"gaussian": "BlockGibbs", "lifetimes": "MALA"}.items()
)
def test_the_auxiliary_kernel_is_chosen_for_the_model(problem, kernel, caplog):
    model, data, _ = POSTERIORS[problem]
    with caplog.at_level("INFO", "numpyro_ebm"):
        ebm.Exchange(model, num_auxiliary_steps=2).init(
            jax.random.key(5), 10, None, (jnp.asarray(data),), {}
        )
    assert f"Exchange: {kernel} draws the fictitious data" in caplog.text


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


@pytest.mark.slow
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
        s = jnp.concatenate([x["s"], x["t"]], -1)
        ends = 2.0 * (2 * s[:, 0] - 1) * (2 * s[:, 2] - 1)  # by far the strongest
        return ends + 0.5 * jnp.sum(jnp.sort(s, -1) * jnp.arange(3), -1) * s[:, 1]

    def sites(s):
        return {"s": s[:, :2], "t": s[:, 2:]}

    states = jnp.asarray((np.arange(8)[:, None] >> np.arange(3)) & 1)
    block = plan_block(log_density, sites(states), ["s", "t"], {"s": [0, 1], "t": [0, 1]})
    assert block.kind == "sequential"
    log_p = np.asarray(log_density(sites(states)), float)
    p = np.exp(log_p - logsumexp(log_p))
    start = np.random.default_rng(0).choice(8, size=100_000, p=p)
    position = sites(states[start])
    kernel = block_gibbs.build_kernel(True)
    first = block_gibbs.init(position, log_density)
    state, _ = kernel(jax.random.key(1), first, log_density, [block])
    end = np.concatenate([state.position["s"], state.position["t"]], -1) @ [1, 2, 4]
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
