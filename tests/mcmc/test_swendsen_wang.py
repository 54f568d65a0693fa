# SPDX-License-Identifier: Apache-2.0
"""Cluster moves: laws of lattices, rows of their own, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import lax
from numpyro.infer import MCMC, Gibbs
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as components_of
from test_enumerated_states import last, z_score

import numpyro_ebm as ebm
from numpyro_ebm.program.potts import Potts
from numpyro_ebm.samplers import swendsen_wang
from numpyro_ebm.samplers.connected_components import connected_components

RIGHT, DOWN = (
    np.stack([np.arange(9).reshape(3, 3), np.roll(np.arange(9).reshape(3, 3), -1, k)])
    for k in (1, 0)
)
TORUS = np.concatenate([x.reshape(2, -1) for x in (RIGHT, DOWN)], 1)
FIELDS = np.random.default_rng(0).normal(size=(9, 3)) * 0.5
POTTS_STATES = np.indices((3,) * 9).reshape(9, -1).T


def potts_energy(s, coupling):
    """A 3 x 3 lattice of three values with fields."""
    equal = s[:, TORUS[0]] == s[:, TORUS[1]]
    return -coupling * jnp.sum(equal, -1) - jnp.sum(jnp.asarray(FIELDS)[jnp.arange(9), s], -1)


def potts(coupling):
    with numpyro.plate("data", len(coupling)):
        s = numpyro.sample("s", ebm.Counting(3, (9,)))
        ebm.energy("E", potts_energy(s, coupling))


def pairs_of(energy, num_values=3, size=4):
    def model(num_rows=2):
        with numpyro.plate("data", num_rows):
            ebm.energy("E", energy(numpyro.sample("s", ebm.Counting(num_values, (size,)))))

    return ebm.fixed(model, {})


@pytest.mark.parametrize(
    "num_values, coupling, rest", [(2, -0.7, 0.0), (3, 0.7, 0.0), (3, 0.7, 1.0)]
)
def test_one_step_keeps_the_law_of_a_pair(num_values, coupling, rest):
    """exp(c [x = y] + f(x) + g(y) + r(x, y)): pairs that are drawn from it have it after a step."""
    num_rows, rng = 20_000, np.random.default_rng(5)
    fields = rng.normal(size=(2, num_values))
    log_p = coupling * np.eye(num_values) + fields[0][:, None] + fields[1]
    log_p += rest * rng.normal(size=log_p.shape)  # what the clusters do not see
    p = np.exp(log_p - np.logaddexp.reduce(log_p, None)).ravel()
    states = np.indices((num_values, num_values)).reshape(2, -1).T
    start = states[rng.choice(len(p), num_rows, p=p)]
    values, pairs = np.tile(np.arange(num_values), (2, 1)), np.array([[0, 1]])
    arrays = np.full((num_rows, 1), coupling), np.tile(fields, (num_rows, 1, 1))
    form = Potts(("s",), values, pairs, *arrays, num_values == 2, not rest)
    log_density = lambda x: jnp.asarray(log_p)[tuple(x["s"].T)]  # noqa: E731
    step = swendsen_wang.as_top_level_api(log_density, form)
    state, _ = jax.jit(step.step)(jax.random.key(3), step.init({"s": jnp.asarray(start)}))
    s = np.asarray(state.position["s"])
    found = np.bincount(s @ [num_values, 1], minlength=len(p)) / num_rows
    assert np.abs((found - p) / np.sqrt(p * (1 - p) / num_rows)).max() < 4.5
    assert np.mean(s != start) > 0.2  # and they moved


@pytest.mark.slow
def test_rows_have_couplings_of_their_own():
    coupling = jnp.repeat(jnp.array([0.3, 0.9]), 50)
    kernel = ebm.SwendsenWang(ebm.fixed(potts, {}))
    start = kernel.init(jax.random.key(0), 0, None, (coupling,), {})

    def draw(state, _):
        state = lax.fori_loop(0, 12, lambda _, s: kernel.sample(s, (coupling,), {}), state)
        return state, (state.z["s"], state.num_clusters, state.accept_prob)

    _, (s, clusters, accepted) = jax.jit(lambda x: lax.scan(draw, x, None, 60))(start)
    for i, value in enumerate((0.3, 0.9)):
        energies = np.asarray(potts_energy(POTTS_STATES, value))
        own = np.asarray(s)[10:, 50 * i : 50 * (i + 1)].reshape(-1, 9)
        assert abs(z_score(POTTS_STATES, energies, own)) < 4.5
    assert clusters[:, :50].mean() > 1.5 * clusters[:, 50:].mean()
    np.testing.assert_array_equal(accepted, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["couplings are negative", "tables are of another kind"])
def test_traced_couplings_keep_the_law_whatever_they_are(bad):
    coupling = jnp.array([0.8, -0.7, 0.4])

    def energy(s, coupling):
        if bad == "couplings are negative":
            return -jnp.sum(coupling * (s[:, 1:] == s[:, :-1]), -1) + 0.3 * s[:, 0]
        return -jnp.sum(coupling * s[:, 1:] * s[:, :-1], -1) + 0.3 * s[:, 0]

    def model(coupling, num_rows=8_000):
        with numpyro.plate("data", num_rows):
            ebm.energy("E", energy(numpyro.sample("s", ebm.Counting(3, (4,))), coupling))

    kernel = ebm.SwendsenWang(ebm.fixed(model, {}))
    run = jax.jit(lambda c: last(kernel, num_steps=60, args=(c,)))
    state = run(coupling)
    states = np.indices((3,) * 4).reshape(4, -1).T
    assert abs(z_score(states, np.asarray(energy(states, coupling)), state.z["s"])) < 4.5
    assert 0.2 < state.mean_accept_prob < 0.99
    with pytest.raises(ebm.ModelError, match="SwendsenWang: the energy of 's'"):
        kernel.init(jax.random.key(0), 0, None, (coupling,), {})


def test_the_energy_of_the_state_is_that_of_its_values_where_couplings_are_not_known():
    """Also in the rows that stay where they are."""
    coupling, fields = jnp.array([[0.8, -0.7, 0.4]]), jnp.arange(12.0).reshape(1, 4, 3) / 10
    pairs = np.stack([np.arange(3), np.arange(1, 4)], 1)
    form = Potts(("s",), np.tile(np.arange(3), (4, 1)), pairs, coupling, fields, False, False)

    def log_density(x):
        s = x["s"]
        linear = jnp.sum(fields[0][jnp.arange(4), s], -1)
        return jnp.sum(coupling * (s[:, 1:] == s[:, :-1]), -1) + linear

    start = {"s": jax.random.randint(jax.random.key(5), (300, 4), 0, 3)}
    state = swendsen_wang.init(start, log_density)
    kernel = jax.jit(lambda key, x: swendsen_wang.build_kernel()(key, x, log_density, form))
    for key in jax.random.split(jax.random.key(6), 2):
        state, info = kernel(key, state)
    assert np.mean(np.asarray(info.acceptance_rate) < 1) > 0.2
    np.testing.assert_allclose(state.logdensity, log_density(state.position), rtol=1e-5)


REFUSED = {
    "negative": (lambda s: jnp.sum(s[:, 1:] == s[:, :-1], -1) * 1.0, r"'s'\[0\] and 's'\[1\] rew"),
    "ordinal": (lambda s: -jnp.sum(s[:, 1:] * s[:, :-1], -1) * 1.0, "no multiple of .equal val"),
    "squares": (lambda s: 0.1 * jnp.sum(s, -1) ** 2, "no multiple of .equal val"),
    "pair codes": (
        lambda s: jnp.take(jnp.arange(9.0), 3 * s[:, 0] + s[:, 1]) * s[:, 2],
        "multiplies up to 3 units",
    ),
    "one negative": (
        lambda s: (s[:, 2] == s[:, 3]) * 0.2 - jnp.sum(s[:, 1:] == s[:, :-1], -1) * 0.1,
        r"'s'\[2\] and 's'\[3\] rewards different",
    ),
    "a maximum": (lambda s: -jnp.max(s, -1) * 1.0, "not seen to be a sum"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_energies_without_clusters_are_refused(name):
    energy, message = REFUSED[name]
    with pytest.raises(ebm.ModelError, match=message):
        ebm.SwendsenWang(pairs_of(energy)).init(jax.random.key(0), 0, None, (), {})


def mixed(num_rows=1):
    """Real units that weigh the couplings of discrete ones."""
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        s = numpyro.sample("s", ebm.Counting(2, (3,)))
        pulls = jnp.sum(v * (s[:, 1:] == s[:, :-1]), -1)
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - pulls)


def test_continuous_sites_are_refused_with_the_block_to_write():
    kernel = ebm.SwendsenWang(ebm.fixed(mixed, {}))
    with pytest.raises(ebm.ModelError, match=r"\['v'\] are continuous.*SwendsenWang\(model\), \['"):
        kernel.init(jax.random.key(0), 0, None, (), {})


@pytest.mark.slow
def test_a_block_of_gibbs_beside_real_units():
    """Couplings are real units, of either sign: E exp(k v) over v is exp(k²/2)."""
    model = ebm.fixed(mixed, {})
    kernel = Gibbs([(ebm.BlockGibbs(model), ["v"]), (ebm.SwendsenWang(model), ["s"])])
    mcmc = MCMC(kernel, num_warmup=50, num_samples=400, progress_bar=False)
    mcmc.run(jax.random.key(0), num_rows=200)
    s = np.asarray(mcmc.get_samples()["s"])
    equal = np.mean(s[..., 1:] == s[..., :-1], (0, 2))
    error = equal.std() / len(equal) ** 0.5
    assert abs(equal.mean() - np.exp(0.5) / (1 + np.exp(0.5))) < 4.5 * error


def test_components_are_those_of_scipy():
    rng = np.random.default_rng(1)
    path = np.stack([rng.permutation(60), np.zeros(60, int)], 1)
    path[:, 1] = np.roll(path[:, 0], 1)  # a cycle through all vertices, in no order
    pairs = np.concatenate([path, rng.integers(0, 60, (20, 2))])
    active = rng.random((30, 80)) < np.linspace(0.0, 1.0, 30)[:, None]
    found = np.asarray(connected_components(pairs, jnp.asarray(active), 60))
    for i, (on, own) in enumerate(zip(active, found, strict=True)):
        graph = coo_matrix((np.ones(on.sum()), pairs[on].T), (60, 60))
        _, expected = components_of(graph, False)
        assert set(own) <= set(range(60 * i, 60 * i + 60))
        np.testing.assert_array_equal(own[:, None] == own, expected[:, None] == expected)
    assert connected_components(pairs[:0], jnp.zeros((2, 0), bool), 3).tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]


def test_one_row_with_negative_couplings_among_others_is_refused():
    def potts():
        couplings = jnp.array([0.7, -0.4])
        with numpyro.plate("data", 2):
            x = numpyro.sample("x", ebm.Counting(3, (2,)))
            ebm.energy("E", -couplings * (x[:, 0] == x[:, 1]))

    kernel = ebm.SwendsenWang(ebm.fixed(potts, {}))
    with pytest.raises(ebm.ModelError, match="rewards different values"):
        kernel.init(jax.random.key(0), 0, None, (), {})
