# SPDX-License-Identifier: Apache-2.0
"""Sweeps by monomials, of energies of degree three: stationary laws against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from discrete_cases import Law, last

import numpyro_ebm as ebm
from numpyro_ebm.program.multi_affine import multi_affine
from numpyro_ebm.program.tempered_form import Tempered
from numpyro_ebm.samplers import block_gibbs, monomial_gibbs
from numpyro_ebm.samplers.gibbs_blocks import Block, plan_block

UP = np.triu_indices(5, 1)
TRIPLES = np.random.default_rng(8).normal(size=(5, 3, 5, 3, 5, 3)) * 0.12


def network_energy(s):
    A = jnp.zeros((len(s), 5, 5)).at[:, *UP].set(s)
    A = A + jnp.swapaxes(A, -1, -2)
    triangles = jnp.einsum("...ij,...jk,...ki->...", A, A, A) / 6
    return 1.1 * jnp.sum(s, -1) - 0.6 * triangles - 0.3 * s[:, 2] * s[:, 7]


def triple_energy(s):
    """Any three sites of three states; two never meet, and are of one colour."""
    o = jax.nn.one_hot(s, 3)
    i, j, k = np.array([x for x in np.ndindex(5, 5, 5) if x[0] < x[1] < x[2] and x[:2] != (0, 1)]).T
    return jnp.einsum("nta,ntb,ntc,tabc->n", o[:, i], o[:, j], o[:, k], TRIPLES[i, :, j, :, k, :])


LAWS = {
    "network": Law(network_energy, 2, 10, "coloured"),
    "three states": Law(triple_energy, 3, 5, "coloured"),
}


CASES = [("network", True), ("network", False), ("three states", True)]


@pytest.mark.slow
@pytest.mark.parametrize("law, reversible", CASES)
def test_the_law_is_that_of_enumeration(monkeypatch, law, reversible):
    law, calls = LAWS[law], []
    draw = block_gibbs.draw_by_monomials
    monkeypatch.setattr(monomial_gibbs, "OPERATIONS_PER_FACTOR", 0)
    monkeypatch.setattr(
        block_gibbs, "draw_by_monomials", lambda *args, **kw: calls.append(1) or draw(*args, **kw)
    )
    kernel = ebm.BlockGibbs(law.model, reversible=reversible)
    state = last(kernel, 10_000, 0, 10, seed=7)
    assert calls and abs(law.z_score(state.z["s"])) < 4.5
    assert np.all(np.abs(law.moment_z_scores(state.z["s"])) < 4.5)


def test_coefficients_follow_parameters_that_are_traced(monkeypatch):
    """Half of a block given other sites; slopes are those of the gradient."""
    monkeypatch.setattr(monomial_gibbs, "OPERATIONS_PER_FACTOR", 0)
    x = {"s": jnp.array([[0, 1, 1], [1, 0, 1]]), "t": jnp.array([[1, 0], [1, 1]])}
    x = {name: jnp.tile(value, (1_000, 1)) for name, value in x.items()}
    values = {"s": [0, 1], "t": [0, 1]}
    one = {k: v[:1] for k, v in x.items()}

    @jax.jit
    def draw(scale):
        def fn(_, x):
            s, t = x["s"] * 1.0, x["t"] * 1.0
            return scale * s[:, 0] * s[:, 1] * t[:, 0] - scale * s[:, 2] * t[:, 1] * s[:, 0]

        block = Block(("s",), "sequential", values, form=multi_affine(fn, {}, one, values))
        sweep = monomial_gibbs.plan_monomials(block)
        return monomial_gibbs.draw_by_monomials(jax.random.key(0), x, block, sweep)["s"]

    # s1 joins s0 where t0 = 1, t1 keeps s0 from s2: large scales leave no choice.
    drawn = np.asarray(draw(1e4))
    assert np.all(drawn[::2, :2] == 1) and np.all(drawn[1::2, 0] == 0)
    # Of the others, and where nothing is coupled, bits are fair.
    assert abs(drawn[1::2, 2].mean() - 0.5) < 4.5 * 0.5 / 1_000**0.5
    assert np.all(abs(np.asarray(draw(0.0)).mean(0) - 0.5) < 4.5 * 0.5 / 2_000**0.5)


BETWEEN = {
    "three states": (triple_energy, 3, 5, 1.0),
    "network": (network_energy, 2, 10, 1.0),
    "uniform": (triple_energy, 3, 5, 0.0),
}


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[pytest.mark.slow] * (k != "three states")) for k in BETWEEN]
)
def test_sweeps_keep_the_law_between_a_reference_and_the_density(monkeypatch, name):
    """Exact draws at several temperatures, one of each row, are exact draws after a sweep."""
    monkeypatch.setattr(monomial_gibbs, "OPERATIONS_PER_FACTOR", 0)
    (energy, num, size, scale), rng = BETWEEN[name], np.random.default_rng(2)
    fields = scale * np.linspace(-1.5, 2.0, size * num).reshape(size, num)
    values, like = {"s": np.arange(num)}, {"s": jnp.zeros((1, size), int)}

    def hot(_, x):
        return jnp.asarray(fields)[np.arange(size), x["s"]].sum(-1)

    def cold(_, x):
        return -2.0 * energy(x["s"])

    states = np.array(list(np.ndindex(*[num] * size)))
    ends = [np.asarray(fn({}, {"s": jnp.asarray(states)})) for fn in (hot, cold)]
    betas, rows = [0.0, 0.3, 0.6, 1.0], 2_000
    laws = [np.exp((1 - b) * ends[0] + b * ends[1]) for b in betas]
    laws = [p / p.sum() for p in laws]
    start = np.stack([rng.choice(len(p), rows, p=p) for p in laws], 1).ravel()  # β by turns
    block = plan_block(lambda x: cold({}, x), like, ["s"], values)
    forms = multi_affine(cold, {}, like, values), multi_affine(hot, {}, like, values)
    forms = forms if scale else (forms[0], None)

    @jax.jit
    def draw(s, beta):
        own = block._replace(form=Tempered(*forms, beta))
        sweep = monomial_gibbs.plan_monomials(own)
        return monomial_gibbs.draw_by_monomials(jax.random.key(4), {"s": s}, own, sweep)["s"]

    drawn = draw(states[start], jnp.tile(jnp.asarray(betas), rows))
    drawn = np.asarray(drawn).reshape(rows, len(betas), size)
    assert np.mean(drawn != states[start].reshape(drawn.shape)) > 0.1
    for i, p in enumerate(laws):
        exact = np.eye(num)[states][..., 1:].reshape(len(states), -1)
        exact = np.column_stack([exact, *ends])
        own = exact[drawn[:, i] @ num ** np.arange(size)[::-1]]
        mean, variance = p @ exact, p @ exact**2 - (p @ exact) ** 2
        assert np.all(abs(own.mean(0) - mean) < 4.5 * (variance / rows) ** 0.5 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ais", "smc"])
def test_annealed_log_z_by_products_is_that_of_enumeration(monkeypatch, method):
    calls, draw = [], block_gibbs.draw_by_monomials
    monkeypatch.setattr(monomial_gibbs, "OPERATIONS_PER_FACTOR", 0)
    monkeypatch.setattr(
        block_gibbs, "draw_by_monomials", lambda *args, **kw: calls.append(1) or draw(*args, **kw)
    )
    model = LAWS["three states"].model
    states = jnp.asarray(list(np.ndindex(*[3] * 5)))
    truth = jax.nn.logsumexp(-LAWS["three states"].energy(states))
    options = {"num_particles": 128, "num_temperatures": 50} if method == "ais" else {}
    found = ebm.log_normalizer(jax.random.key(3), model, method=method, **options)
    assert calls and abs(found.value - truth) < 4.5 * found.mcse
