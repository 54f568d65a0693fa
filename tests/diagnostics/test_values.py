# SPDX-License-Identifier: Apache-2.0
"""Numbers that diagnostics report, and not only their shapes and ranges."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from diagnostic_cases import GAUSSIAN
from numpyro.infer import MCMC

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics import fisher
from numpyro_ebm.diagnostics.arviz.draws import _final_fields, _kernel_stats
from numpyro_ebm.diagnostics.arviz.fits import _sites_of_chains, convert_fit
from numpyro_ebm.diagnostics.arviz.groups import dataset_of, to_data
from numpyro_ebm.diagnostics.arviz.posteriors import _add_densities, _adjust
from numpyro_ebm.diagnostics.gap.posterior import _fisher, _pareto_shapes
from numpyro_ebm.diagnostics.gap.weights import weigh_particles
from numpyro_ebm.diagnostics.plot_arrays import paths_of_chains
from numpyro_ebm.diagnostics.stein import _signs
from numpyro_ebm.log_normalizers import smc
from numpyro_ebm.log_normalizers.options import Options
from numpyro_ebm.model.reading import read_model

KEY = jax.random.key(6)


def test_the_effective_sample_size_of_smc_counts_particles(monkeypatch):
    """Replicates are weighed against each other; each has all its particles.

    The error is one of sixteen replicates: 2.131 times it is a 95 % interval, not 1.96.
    """
    found = SimpleNamespace(num_temperatures=3), (jnp.array(1.0), jnp.array(0.1), jnp.array(7.0))
    monkeypatch.setattr(smc, "anneal", lambda *args: found)
    result = smc.run_smc(KEY, None, Options(num_particles=100))
    assert result.ess == 700.0
    np.testing.assert_allclose(result.mcse, 0.1 * 2.1314 / 1.9600, rtol=1e-4)


def test_statistics_of_rows_are_brought_together():
    """The log-density of a draw is the sum over its rows, its acceptance their mean."""
    by_row = np.arange(30.0).reshape(2, 3, 5)
    found = _kernel_stats({"potential_energy": by_row, "accept_prob": by_row / 30}, 5)
    np.testing.assert_allclose(found["lp"], -by_row.sum(-1))
    np.testing.assert_allclose(found["acceptance_rate"], by_row.mean(-1) / 30)
    np.testing.assert_allclose(found["row_acceptance_rate"], by_row / 30)
    assert _kernel_stats({"diverging": by_row == 7}, 5)["diverging"].tolist() == [
        [False, True, False],
        [False, False, False],
    ]


def test_pareto_shapes_are_those_of_the_tails():
    """exp(k e) of an exponential e has a Pareto tail of shape k; one for each row."""
    rng = np.random.default_rng(0)
    shapes = np.array([0.2, 0.6, 0.9])
    found = np.asarray(_pareto_shapes(jnp.asarray(shapes * rng.exponential(size=(4_000, 3)))))
    np.testing.assert_allclose(found, shapes, atol=0.2)


def test_few_particles_tell_a_light_tail_from_a_heavy_one():
    tails = jnp.asarray([0.1, 0.9] * np.random.default_rng(0).exponential(size=(80, 2)))
    light, heavy = np.asarray(_pareto_shapes(tails))
    assert abs(light - 0.1) < 0.4 and abs(heavy - 0.9) < 0.4 and light < heavy


def test_the_error_of_a_gap_is_that_of_the_jackknife():
    """Of log mean w - mean log w, (draws, rows); where log p̃ is known, of mean log w."""
    rng = np.random.default_rng(1)
    log_q, log_p = rng.normal(size=(2, 500, 3)) * [[[0.5]], [[0.8]]]
    log_w = log_p - log_q
    found = weigh_particles(jnp.asarray(log_p), jnp.asarray(log_q))
    weights = np.exp(log_w)
    parts = np.log((weights.sum(0) - weights) / 499) - (log_w.sum(0) - log_w) / 499
    np.testing.assert_allclose(found.error, parts.std(0) * np.sqrt(499), rtol=0.02)
    np.testing.assert_allclose(found.log_marginal, np.log(np.exp(log_w).mean(0)), rtol=1e-4)
    known = weigh_particles(jnp.asarray(log_p), jnp.asarray(log_q), jnp.zeros(3))
    np.testing.assert_allclose(known.error, log_w.std(0, ddof=1) / np.sqrt(500), rtol=1e-4)


def test_the_fisher_gap_of_gaussians_by_hand():
    """½ E (h/σ² - h)² of N(0, σ²) against a standard normal: ½ σ² (1/σ² - 1)² a coordinate."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue((2,)))
            ebm.energy("E", 0.5 * jnp.sum(h**2, -1) + 0.5 * v**2)

    row_model = read_model(model, (jnp.zeros(3),))
    h = {"h": 0.7 * jax.random.normal(KEY, (2_000, 3, 2))}
    log_q = lambda h: -0.5 * jnp.sum(h["h"] ** 2, -1) / 0.49  # noqa: E731
    log_p = lambda h: -0.5 * jnp.sum(h["h"] ** 2, -1)  # noqa: E731
    found, error = jax.jit(lambda h: _fisher(row_model, h, log_p, log_q))(h)
    exact = 0.49 * (1 / 0.49 - 1) ** 2
    np.testing.assert_allclose(found, exact, rtol=4 / np.sqrt(2_000))
    np.testing.assert_allclose(error, exact / np.sqrt(2_000), rtol=0.1)  # half of a χ² of two


def test_the_error_of_a_fisher_divergence_is_that_of_its_mean(monkeypatch):
    rng = np.random.default_rng(0)
    linear, square = 1.0 + rng.normal(size=50), rng.exponential(size=50)

    def train(run, look, rows, *_):
        assert np.isfinite(run(1, rows).losses).all()  # of a model that needs no guide
        return [(0.1, 10, 1.0, {}), (0.4, 20, 1.5, {})]

    monkeypatch.setattr(fisher, "_train", train)
    monkeypatch.setattr(fisher, "_critic_terms", lambda *a, **k: tuple(map(jnp.array, terms)))
    terms = linear, square
    found = ebm.fisher_divergence(KEY, GAUSSIAN, jnp.asarray(rng.normal(size=500)))
    by_row = 1.5 * linear - 0.5 * 1.5**2 * square
    assert found.num_steps == 20 and found.scale == 1.5
    assert found.value == pytest.approx(by_row.mean(), rel=1e-5)
    assert found.standard_error == pytest.approx(by_row.std(ddof=1) / np.sqrt(50), rel=1e-4)


def test_the_scale_of_a_critic_is_the_best_one():
    """s E[linear] - s² E[square] / 2 is highest at their ratio."""
    terms = jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 1.0, 4.0])
    fit = SimpleNamespace(state=None, params={})
    looks = fisher._train(lambda *a, **k: fit, lambda params: terms, None, 100, 4)
    assert [look[1] for look in looks] == [25, 50, 75, 100]
    for value, _, scale, _ in looks:
        assert scale == pytest.approx(3.0 / 2.0) and value == pytest.approx(0.5 * 3.0**2 / 2.0)


def test_round_trips_are_counted():
    """Without energies every swap is accepted, so that walkers go round by turns."""

    def model():
        with numpyro.plate("data", 2):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0))
            ebm.energy("E", 0.0 * x)

    num_steps, place = 40, np.arange(4)
    kernel = ebm.ReplicaExchange(
        ebm.fixed(model, {}), np.linspace(1.0, 0.1, 4), step_size=0.1, adapt_ladder=False
    )
    mcmc = MCMC(kernel, num_warmup=0, num_samples=num_steps, progress_bar=False)
    mcmc.run(KEY, extra_fields=("round_trips", "swap_prob"))
    trips, was_hot, expected = 0, np.zeros(4, bool), []
    for i in range(num_steps):
        for low in range(i % 2, 3, 2):
            place[[low, low + 1]] = place[[low + 1, low]]
        trips += was_hot[place[0]]
        was_hot[place[0]] = False
        was_hot[place[-1]] = True
        expected.append(trips)
    fields = mcmc.get_extra_fields()
    np.testing.assert_array_equal(fields["round_trips"], np.array(expected)[:, None] + [0, 0])
    np.testing.assert_allclose(fields["swap_prob"], 1.0)
    assert trips > 3


def test_energies_of_draws_are_sums_over_rows():
    def model():
        with numpyro.plate("data", 3):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * v**2 + v)

    v = np.random.default_rng(0).normal(size=(5, 3))
    stats = ebm.to_arviz({"v": v}, ebm.fixed(model, {})).sample_stats
    by_row = 0.5 * v**2 + v
    np.testing.assert_allclose(np.asarray(stats["row_energy"])[0], by_row, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(stats["energy"])[0], by_row.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(stats["lp"])[0], -by_row.sum(-1), rtol=1e-5)


def test_signs_of_a_wild_bootstrap_go_on():
    """A chain of signs that turns with the given probability."""
    signs = np.asarray(_signs(KEY, 2_000, 30, 0.1, jnp.float32))
    assert set(np.unique(signs)) == {-1.0, 1.0} and abs(signs.mean()) < 0.05
    for lag, expected in ((1, 0.8), (2, 0.64)):
        assert np.mean(signs[:, lag:] * signs[:, :-lag]) == pytest.approx(expected, abs=0.02)


def test_the_norm_bound_of_vages_by_hand():
    """At v = 1: scores -1 and 1, slopes 0 and 1, mixed 0 and 1, so that it is (2 + 6) TV."""

    def model(data):
        w = numpyro.param("w", 2.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Counting())
            ebm.energy("E", 0.5 * v**2 - w * v * h)

    def guide(data):
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.BernoulliLogits(jnp.zeros(len(data))))

    gap = ebm.posterior_gap(KEY, model, guide, {"w": 2.0}, jnp.ones(1), gradient=True)
    np.testing.assert_allclose(gap.vages.norm_bound, 8.0 * gap.tv, rtol=1e-5)


def test_what_a_kernel_ended_with_holds_for_all_draws_of_its_chain():
    """Of one kernel, and of the blocks of `Gibbs`, whose fields have their number."""
    adapted = SimpleNamespace(step_size=np.array([[0.1, 0.2], [0.3, 0.4]]))
    state = SimpleNamespace(adapt_state=adapted, mean_swap_prob=np.array([0.5, 0.7]))
    found = _final_fields(state, 2, (2, 3))
    np.testing.assert_array_equal(found["step_size"], adapted.step_size[:, None].repeat(3, 1))
    np.testing.assert_array_equal(found["mean_swap_prob"], [[0.5] * 3, [0.7] * 3])
    blocks = SimpleNamespace(block_states=(SimpleNamespace(step_size=0.1), state))
    found = _final_fields(blocks, 1, (1, 3))
    np.testing.assert_array_equal(found["block_states_0_step_size"], [[0.1] * 3])
    assert found["block_states_1_step_size"].shape == (1, 3, 2, 2)


def test_coordinates_of_persistent_chains_are_sites_on_their_supports():
    """Sites by name, their coordinates side by side; a row of the data is one of the chain."""

    def model(data):
        with numpyro.plate("data", 4):
            r = numpyro.sample("r", ebm.Lebesgue((), dist.constraints.positive), obs=data["r"])
            a = numpyro.sample("a", ebm.Lebesgue((2,)), obs=data["a"])
            ebm.energy("E", r + 0.5 * jnp.sum(a**2, -1))

    row_model = read_model(model, ({"r": jnp.ones(4), "a": jnp.zeros((4, 2))},))
    flat = np.random.default_rng(2).normal(size=(3, 5, 3))
    found = _sites_of_chains(row_model, flat)
    np.testing.assert_allclose(found["a"], flat[:, :, None, :2], rtol=1e-5)
    np.testing.assert_allclose(found["r"], np.exp(flat[..., 2:]), rtol=1e-5)
    for wrong in (flat[..., :2], np.zeros((3, 5, 4))):
        with pytest.raises(ebm.ModelError, match=r"coordinates, and a row of this model has 3"):
            _sites_of_chains(row_model, wrong)


def test_rows_are_trained_on_chosen_on_or_tested_on():
    data = {"v": jnp.arange(100.0)}
    found = fisher._split_rows(KEY, data, 100, 0.3, 0.2)
    assert [len(x["v"]) for x in found[:3]] == [20, 30, 50] and found.num_train == 50
    np.testing.assert_array_equal(np.sort(np.concatenate([x["v"] for x in found[:3]])), data["v"])


def test_terms_of_a_critic_are_means_over_draws_of_directions():
    """Of problems and directions with keys of their own."""

    def prepare(key, params, model, guide, args, kwargs):
        return jax.random.normal(key, (4,)) + args[0]

    def terms(key, params, problem):
        return problem, params * jax.random.normal(key, (4,)) ** 2

    objective = SimpleNamespace(prepare=prepare, terms=terms)
    found = fisher._critic_terms(objective, None, None, {}, KEY, 3.0, jnp.arange(4.0))
    keys = [jax.random.split(key) for key in jax.random.split(KEY, fisher.PROBES)]
    first = [np.asarray(jax.random.normal(a, (4,))) for a, _ in keys]
    second = [np.asarray(jax.random.normal(b, (4,))) ** 2 for _, b in keys]
    np.testing.assert_allclose(found[0], np.mean(first, 0) + np.arange(4), rtol=1e-5)
    np.testing.assert_allclose(found[1], 3.0 * np.mean(second, 0), rtol=1e-5)


def test_a_fit_without_chains_is_its_parameters_and_losses():
    params = {"w": np.array([1.0, 2.0]), "b": np.array(3.0)}
    fit = SimpleNamespace(state=None, params=params, losses=np.arange(4.0))
    found = convert_fit(fit, None, (), {})
    data = to_data(found.groups, found.dims)
    np.testing.assert_array_equal(dataset_of(data["posterior"])["w"], [[params["w"]]])
    assert float(dataset_of(data["posterior"])["b"].values[0, 0]) == 3.0
    np.testing.assert_array_equal(dataset_of(data["training"])["loss"], fit.losses)
    with pytest.raises(ebm.ModelError, match="arguments of the model need the model"):
        convert_fit(fit, None, (1,), {})


def test_adjusted_draws_stand_beside_those_of_the_run():
    """What `adjust` gives at the run's own arguments is the posterior; sites it leaves out go."""
    draws = {"a": np.arange(6.0).reshape(2, 3), "other": np.zeros((2, 3))}
    data = to_data({"posterior": draws}, {})

    def adjust(samples, *args, **kwargs):
        assert args == ("data",) and kwargs == {"x": 1}
        return {"a": 10.0 * np.asarray(samples["a"])}

    model = SimpleNamespace(adjust=adjust, learning_rate=0.25)
    mcmc = SimpleNamespace(
        _args=("data",), _kwargs={"x": 1}, get_samples=lambda group_by_chain: draws
    )
    _adjust(data, model, mcmc)
    posterior, raw = (dataset_of(data[name]) for name in ("posterior", "posterior_raw"))
    np.testing.assert_array_equal(posterior["a"], 10.0 * draws["a"])
    assert list(posterior.data_vars) == ["a"] and set(raw.data_vars) == {"a", "other"}
    np.testing.assert_array_equal(raw["a"], draws["a"])
    assert "learning rate 0.25" in posterior.attrs["adjusted"]


def test_draws_without_statistics_get_their_densities():
    """Of a chain after the other, in the coordinates of the model; and what is there is kept."""

    def model(y):
        scale = numpyro.sample("scale", dist.Exponential(2.0))
        numpyro.sample("y", dist.Normal(0.0, scale), obs=y)

    scale, y = np.array([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]]), np.array([0.3, -0.7])
    data = to_data({"posterior": {"scale": scale}}, {})
    run = {"_args": (jnp.asarray(y),), "_kwargs": {}, "num_chains": 2}
    mcmc = SimpleNamespace(
        sampler=SimpleNamespace(model=model),
        get_samples=lambda: {"scale": jnp.asarray(scale.ravel())},
        **run,
    )
    _add_densities(data, mcmc)
    lp = np.log(2.0) - 2.0 * scale + np.log(scale)
    lp = lp - 0.5 * np.sum(y**2) / scale**2 - 2 * np.log(scale * np.sqrt(2 * np.pi))
    found = dataset_of(data["sample_stats"])
    np.testing.assert_allclose(found["lp"], lp, rtol=1e-5)
    np.testing.assert_allclose(found["energy"], -lp, rtol=1e-5)


def test_rows_of_chains_are_paths():
    x = np.arange(48.0).reshape(2, 4, 3, 2)  # chains, draws, rows
    found = paths_of_chains({"v": x, "w": np.zeros((2, 4))}, None)
    assert found.shape == (6, 4, 2)
    for chain in range(2):
        for row in range(3):
            np.testing.assert_array_equal(found[3 * chain + row], x[chain, :, row])
    np.testing.assert_array_equal(paths_of_chains(x[:, :, 0], None), x[:, :, 0])
    with pytest.raises(ebm.ModelError, match="name one"):
        paths_of_chains({"a": x, "b": x}, None)
