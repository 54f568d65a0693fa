# SPDX-License-Identifier: Apache-2.0
"""The worked posteriors find what made their data, and draw a picture."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(request, tmp_path):
    """What the example's `main` returns, run short; its picture is there."""
    pytest.importorskip("matplotlib").use("Agg")
    if request.param[0] == "digits":
        pytest.importorskip("sklearn")
    if request.param[0] in ("digits", "pen_digits"):
        pytest.importorskip("equinox")
    name, options = request.param
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.main(**options, out=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    return result


def run(name, **options):
    return pytest.mark.parametrize("example", [(name, options)], indirect=True)


@run("posterior_routes", num_samples=1_500)
def test_every_route_finds_the_precision(example):
    exact, draws = example
    mean, deviation = float(exact.mean), float(exact.variance) ** 0.5
    for name, theta in draws.items():
        off = abs(theta.mean() - mean) / deviation
        if name == "plain NumPyro":
            assert off > 8
        elif name.startswith("generalized"):
            assert off < 1 and 0.6 < theta.std() / deviation < 1.5
        else:
            assert off < 0.2 and 0.85 < theta.std() / deviation < 1.15


@run("counts", num_samples=1_000, num_rows=300)
def test_counts_are_dispersed_as_they_were(example):
    truth, found = example
    exact = found["exact (series)"]
    for draws in found.values():
        for name, x in draws.items():
            assert abs(x.mean() - truth[name]) < 4 * x.std()
            assert abs(x.mean() - exact[name].mean()) < 0.6 * exact[name].std()


@run("nonnegative_graph", num_samples=400, num_rows=1_000)
def test_edges_of_the_graph_are_told_from_pairs_without_one(example):
    truth, exact, draws = example
    is_edge = np.asarray(truth["pairs"]) < 0
    mean = np.asarray(exact.mean["pairs"])
    assert mean[is_edge].max() < mean[~is_edge].min()
    gap = np.abs(draws["pairs"].mean(0) - mean) / exact.standard_deviation["pairs"]
    assert gap.max() < 0.5


@run("many_lattices", num_samples=300, num_lattices=6)
def test_lattices_share_their_mean(example):
    truth, draws = example
    assert abs(draws["mu"].mean() - truth.mean()) < 4 * draws["mu"].std() < 0.3
    z = (draws["beta"].mean(0) - truth) / draws["beta"].std(0)
    assert np.abs(z).max() < 4


@run("digits", method="latent_prior", num_rounds=20, num_report_rounds=300)
def test_figures_of_draws_stand_beside_those_of_data(example):
    """Twenty rounds draw no digits, and every figure says so; the classifier knows real ones."""
    assert example["sure"] < 0.3 < 0.7 < example["sure, data"]
    assert example["Fréchet"] - example["its baseline"] > 10 * example["its error"]
    assert example["MMD p-value"] < 0.01 and example["nearer than held-out"] < 0.2


DIGITS = ("mdsm", "recovery", "pcd", "jem", "deep_eblvm")
SHORT = [("digits", {"method": x, "num_rounds": 5, "num_report_rounds": 5}) for x in DIGITS]


@pytest.mark.parametrize("example", SHORT, indirect=True, ids=DIGITS)
def test_every_method_of_digits_trains_and_draws(example):
    """Five rounds draw finite images, and none that could be digits."""
    assert all(np.isfinite(x) for x in example.values())
    assert example["MMD p-value"] < 0.01 and example["nearer than held-out"] < 0.2


@pytest.mark.slow
@run("pen_digits", num_rounds=5, num_images=400, num_draws=50)
def test_simulated_digits_are_named_and_noise_is_not(example):
    assert example["sure"] + 0.2 < example["sure, new images"] > 0.6
    assert example["nearer than new images"] < 0.1
