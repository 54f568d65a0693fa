# SPDX-License-Identifier: Apache-2.0
"""Plots are drawn of what they are given, and refuse the rest."""

import sys

import jax.numpy as jnp
import numpy as np
import numpyro
import oracles
import pytest
from diagnostic_cases import KEY, LOG_Z, chain, log_likelihood, own_grbm

import numpyro_ebm as ebm

GRBM, GRBM_FIXED, _ = own_grbm()


@pytest.fixture(scope="module")
def run():
    return chain(ebm.MALA(GRBM_FIXED))


@pytest.fixture
def ax():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt.subplots()[1]
    plt.close("all")


def test_plot_of_a_density(ax):
    limits = dict(xlim=(-4.0, 6.0), ylim=(-5.0, 8.0), num=120)
    assert ebm.plots.density(GRBM_FIXED, ax=ax, log_normalizer=LOG_Z, **limits) is ax
    shown = np.asarray(ax.collections[0].get_array()).reshape(120, 120)
    x, y = np.linspace(-4, 6, 120), np.linspace(-5, 8, 120)
    at = np.array([x[70], y[50]])  # y leads
    assert shown[50, 70] == pytest.approx(np.exp(log_likelihood([at])[0]), rel=1e-3)
    assert np.trapezoid(np.trapezoid(shown, x, axis=1), y) == pytest.approx(1, abs=0.01)
    assert ax.get_xlim() == (-4, 6) and len(ax.figure.axes) == 2
    framed = ebm.plots.density(GRBM_FIXED, colorbar=False, **limits)
    other = np.asarray(framed.collections[0].get_array()).reshape(120, 120)
    assert framed is not ax and len(framed.figure.axes) == 1
    np.testing.assert_allclose(other, shown, rtol=0.01, atol=1e-6)
    energy = ebm.plots.density(GRBM_FIXED, kind="energy", **limits)
    shown = np.asarray(energy.collections[0].get_array()).reshape(120, 120)
    assert shown.min() == 0
    difference = shown[50, 70] - shown[20, 30]
    exact = np.subtract(*log_likelihood([[x[30], y[20]], [x[70], y[50]]]))
    assert difference == pytest.approx(exact, rel=1e-3)


def test_paths_of_chains_are_drawn_from_where_they_start(ax):
    x = np.random.default_rng(3).normal(size=(3, 5, 2))
    assert ebm.plots.chains(x, ax=ax, max_chains=2) is ax
    assert len(ax.lines) == 4  # a path and its start, of two of three chains
    for i in range(2):
        np.testing.assert_allclose(ax.lines[2 * i].get_xydata(), x[i])
        np.testing.assert_allclose(ax.lines[2 * i + 1].get_xydata(), x[i, :1])
        assert ax.lines[2 * i + 1].get_color() == ax.lines[2 * i].get_color()
    low, high = x.min((0, 1)), x.max((0, 1))
    np.testing.assert_allclose(ax.get_xlim(), np.array([-0.1, 1.1]) * np.ptp(x[..., 0]) + low[0])
    np.testing.assert_allclose(ax.get_ylim()[1], high[1] + 0.1 * (high - low)[1])


@pytest.mark.slow
def test_plot_of_chains(ax, run):
    assert ebm.plots.chains(run, GRBM_FIXED, ax=ax, num=30) is ax
    paths = [line for line in ax.lines if len(line.get_xdata()) > 1]
    drawn = np.asarray(run.get_samples(group_by_chain=True)["v"])
    assert len(paths) == 2
    np.testing.assert_allclose(paths[1].get_xydata(), drawn[1, :, 0], rtol=1e-6)
    assert len(ax.collections) >= 2  # the landscape
    rows = np.arange(24.0).reshape(1, 4, 3, 2)  # rows are chains
    found = ebm.plots.chains({"v": rows, "h": np.zeros((1, 4, 3, 5))}, max_chains=3)
    paths = [line for line in found.lines if len(line.get_xdata()) > 1]
    np.testing.assert_array_equal(paths[2].get_xydata(), rows[0, :, 2])


def test_plots_of_energies_and_training(ax):
    data = oracles.grbm_draws(GRBM, 50, np.random.default_rng(0))
    gap = ebm.energy_gap(KEY, GRBM_FIXED, jnp.asarray(data), data[:20])
    assert ebm.plots.energies(gap, ax=ax, bins=10) is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["data", "samples"]
    bars = ax.patches[:10]
    assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(1)
    losses = np.random.default_rng(0).normal(size=500)
    line = ebm.plots.training(losses, window=10).lines[0]
    np.testing.assert_allclose(line.get_ydata()[-1], losses[-10:].mean())
    np.testing.assert_allclose(line.get_xdata()[[0, -1]], [10, 500])


def test_plot_of_samples(ax):
    images = np.arange(5 * 6.0).reshape(5, 2, 3)
    assert ebm.plots.samples(images, num_columns=2, ax=ax) is ax
    sheet = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert sheet.shape == (3 * 3 - 1, 2 * 4 - 1)
    np.testing.assert_array_equal(sheet[3:5, :3], images[2])  # the third, below the first
    np.testing.assert_array_equal(sheet[0:2, 4:7], images[1])
    assert np.isnan(sheet[2]).all() and np.isnan(sheet[6:, 4:]).all()
    flat = ebm.plots.samples(images.reshape(5, 1, 6), shape=(2, 3), num_columns=2)
    np.testing.assert_array_equal(np.ma.filled(flat.images[0].get_array(), np.nan), sheet)


def test_plots_refuse_what_they_cannot_draw(run):

    def pairs(data=None):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(3, event_shape=(2,)), obs=data.astype(int))
            ebm.energy("E", jnp.sum(v, -1))

    one = ebm.fixed(pairs, {})
    flat = jnp.zeros((3, 5))
    cases = [
        ("'density' or 'energy'", lambda: ebm.plots.density(GRBM_FIXED, kind="score")),
        ("free parameter", lambda: ebm.plots.density(oracles.grbm)),
        ("two real coordinates", lambda: ebm.plots.density(one, xlim=(0, 2), ylim=(0, 2))),
        ("`xlim`", lambda: ebm.plots.density(GRBM_FIXED, xlim=(1, 0))),
        ("`num`", lambda: ebm.plots.density(GRBM_FIXED, num=1)),
        ("(chains, draws, 2)", lambda: ebm.plots.chains(flat)),
        ("no draws of 'w'", lambda: ebm.plots.chains(run, site="w")),
        ("energy_gap", lambda: ebm.plots.energies(flat)),
        ("no images", lambda: ebm.plots.samples(flat)),
        ("no images of shape", lambda: ebm.plots.samples(flat, shape=(2, 2))),
        ("losses", lambda: ebm.plots.training(flat)),
        ("`window`", lambda: ebm.plots.training(jnp.ones(5), window=0)),
    ]
    for message, draw in cases:
        with pytest.raises(ebm.ModelError, match=message.replace("(", r"\(").replace(")", r"\)")):
            draw()


def test_plots_say_how_to_get_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="numpyro-ebm\\[examples\\]"):
        ebm.plots.training(np.ones(5))


@pytest.mark.parametrize("cmap", ["gray", "Greys", "viridis", "RdBu", "hot", None])
def test_gaps_between_samples_have_a_colour_of_their_own(cmap):
    pytest.importorskip("matplotlib").use("Agg")
    images = np.linspace(0, 1, 4 * 256).reshape(4, 16, 16)
    image = ebm.plots.samples(images, cmap=cmap).images[0]
    colors = np.asarray(image.to_rgba(image.get_array()))[..., :3]
    gap = np.ma.getmaskarray(image.get_array())
    distances = np.linalg.norm(colors[gap][:1] - colors[~gap], axis=-1)
    assert gap.sum() == 33 + 32 and distances.min() > 0.2
