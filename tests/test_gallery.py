# SPDX-License-Identifier: Apache-2.0
"""The gallery shows what the examples in the tree do, and these find what is known."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "docs" / "gallery"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load(GALLERY / "make.py")


def test_every_picture_is_of_the_source_in_the_tree():
    done = json.loads((GALLERY / "executed.json").read_text(encoding="utf-8"))
    stale = [name for name in make.names() if done.get(name) != make.digest(name)]
    assert not stale, f"python docs/gallery/make.py {' '.join(stale)}"
    assert sorted(done) == make.names()


def test_every_page_has_its_parts_and_every_example_a_page():
    index = (GALLERY / "index.md").read_text(encoding="utf-8")
    assert set(make.names()) <= {path.stem for path in (ROOT / "examples").glob("*.py")}
    for name in make.names():
        page = (GALLERY / f"{name}.md").read_text(encoding="utf-8")
        assert f":link: {name}\n" in index and f":img-top: {make.picture(name).name}\n" in index
        assert f"]({make.picture(name).name})" in page and f"literalinclude}} {name}.txt" in page
        assert f"](../../examples/{name}.py)" in page
        assert "\n## What can go wrong\n" in page and not page.split("\n", 2)[2].startswith("#")
        size = make.picture(name).stat().st_size
        assert 10_000 < size < 900_000, f"{name}: {size} bytes"
        shown = make.picture(name).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        assert (
            shown[0] == f"$ python examples/{name}.py --out docs/gallery/{shown[0].split('/')[-1]}"
        )
        assert len(shown) > 1, "an example prints what it found"


def run(name, tmp_path, **options):
    """What `main` of an example returns, run short."""
    pytest.importorskip("matplotlib").use("Agg")
    out = tmp_path / make.picture(name).name
    result = load(ROOT / "examples" / f"{name}.py").main(**options, out=out)
    assert out.stat().st_size > 10_000
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::numpyro_ebm.ConvergenceWarning")
def test_gallery_of_planted_and_simulated_couplings(tmp_path):
    precision, slope = run("potts_contacts", tmp_path, num_rows=500, num_steps=150)
    assert precision["Potts couplings"] >= 0.75
    assert 0.7 < slope < 1.4
    laws, gap = run("spikes", tmp_path, num_rows=4_000, num_steps=300)
    assert gap < 0.01
    true, pairwise, single = laws["true"], laws["pairwise Ising"], laws["rates alone"]
    np.testing.assert_allclose([law.sum() for law in laws.values()], 1.0, rtol=1e-5)
    assert np.abs(pairwise - true).sum() < 0.4 * np.abs(single - true).sum()


@pytest.mark.slow
def test_gallery_of_known_densities(tmp_path):
    for found in run("directional", tmp_path, num_rows=1_000, num_steps=300).values():
        np.testing.assert_allclose(found, [2.9, -2.6, 4.0, 2.5, 2.0], atol=0.5)


@pytest.mark.slow
def test_gallery_of_chains(tmp_path):
    apart = run("chains", tmp_path, num_samples=1_500)
    assert apart["replica exchange"] < 0.1 and apart["MALA"] > 0.2


@pytest.mark.slow
def test_gallery_of_bridges(tmp_path):
    _, z = run("log_z_bridges", tmp_path, size=4, temperatures=(80,), num_repeats=3)
    assert all(np.abs(x).max() < 4 for x in z.values())


@pytest.mark.slow
def test_gallery_of_simulations(tmp_path):
    upper, apart, share = run("two_moons", tmp_path, num_steps=300, num_rows=4_000)
    assert abs(upper["learned"] - 0.5) < 0.15 and abs(share - 0.5) < 0.15 and apart < 1


@pytest.mark.slow
def test_gallery_of_regression(tmp_path):
    losses = ("ranking NCE", "energy discrepancy")
    found = run("regression", tmp_path, num_steps=400, objectives=losses)
    assert all(found["least squares"] + 0.3 < found[k] < found["truth"] + 0.02 for k in losses)


@pytest.mark.slow
def test_gallery_of_digits(tmp_path):
    pytest.importorskip("sklearn")
    wrong = run("inpainting", tmp_path, num_steps=500, num_hidden=32)
    assert wrong["machine"] < wrong["mean image"]


@pytest.mark.slow
def test_gallery_of_toys(tmp_path):
    gap = run("toys", tmp_path, num_steps=300, objectives=("energy discrepancy", "NCE"))
    assert all(-0.02 < value < 1.0 for value in gap.values())
