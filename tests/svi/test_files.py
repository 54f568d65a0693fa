# SPDX-License-Identifier: Apache-2.0
"""Fits in files: what comes back, runs that go on from them, and files that are none."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from conftest import enable_x64

import numpyro_ebm as ebm
from numpyro_ebm.svi.resuming import restored, steps_of
from numpyro_ebm.svi.state import EnergySVIRunResult, EnergySVIState

DATA = np.random.default_rng(4).normal(1.0, 2.0, 60)


def model(data):
    mean = numpyro.param("mean", {"a": jnp.zeros(()), "b": [jnp.zeros(2), (jnp.ones(1),)]})
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        center = mean["a"] + jnp.sum(mean["b"][0]) + 0.1 * mean["b"][1][0][0]
        ebm.energy("E", 0.5 * precision * (v - center) ** 2)


def chains():
    kernel = lambda model: ebm.MALA(model, step_size=0.5)  # noqa: E731
    return ebm.ContrastiveDivergence(kernel, persistent=True)


def svi(objective=None, optim=None):
    objective = ebm.DenoisingScoreMatching(0.3) if objective is None else objective
    return ebm.EnergySVI(model, None, optax.adam(0.1) if optim is None else optim, objective)


def run(one, num_steps, **options):
    options = {"batch_size": 20, "progress_bar": False, **options}
    return one.run(jax.random.key(1, impl=options.pop("impl", None)), num_steps, DATA, **options)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and jnp.array_equal(x, y)


@pytest.mark.parametrize("objective", [None, pytest.param(chains, marks=pytest.mark.slow)])
def test_a_run_from_a_file_is_one_long_run(objective, tmp_path):
    objective = None if objective is None else objective()
    whole = run(svi(objective), 20, ema=0.9)
    first = run(svi(objective), 8, ema=0.9)
    ebm.save(tmp_path / "fit", first)
    saved = ebm.load(tmp_path / "fit")
    for name in ("params", "losses", "ema_params"):
        same(getattr(saved, name), getattr(first, name))
    for one in (svi(objective), svi(objective)):  # read for the first time, and again
        second = run(one, 12, ema=0.9, init_state=saved.state)
        same(second.state, whole.state)
        same(second.ema_params, whole.ema_params)
        assert jnp.array_equal(jnp.concatenate([first.losses, second.losses]), whole.losses)
    assert [x.name for x in tmp_path.iterdir()] == ["fit"]


def test_a_run_in_32_bits_does_not_go_on_from_64(tmp_path):
    """JAX would round what was read, and the run would come to something else."""
    with enable_x64():
        fit = run(svi(), 2)
        ebm.save(tmp_path / "fit", fit)
    saved = ebm.load(tmp_path / "fit")
    assert saved.params["precision"] == float(fit.params["precision"])
    with pytest.raises(ebm.ModelError, match=r"int64\[\] and should be int32\[\]"):
        run(svi(), 2, init_state=saved.state)


def made(step=7):
    """A fit that nobody trained, of all that a state may hold."""
    params = {
        "mean": {"a": jnp.asarray(1.5, jnp.bfloat16), "b": [jnp.ones(2), (jnp.arange(3),)]},
        "few": jnp.asarray([0.5, -2.0], jnp.float8_e4m3fn),
    }
    state = EnergySVIState(
        *({"count": jnp.array(3), "mu": [jnp.ones(2)]}, None, jax.random.key(5, impl="rbg")),
        *(jnp.array(step), ({"mu": jnp.zeros(2)},), {"v": jnp.arange(4.0)}, [params], None),
    )
    fit = EnergySVIRunResult(params, state, jnp.array([3.0, 2.0, 1.5]))
    fit.ema_params, fit.objective = {"mean": (jnp.array(0.25),)}, "ScoreMatching"
    return fit


def test_keys_and_types_come_back(tmp_path):
    fit = made()
    ebm.save(tmp_path / "fit", fit)
    saved = ebm.load(tmp_path / "fit")
    for name in ("params", "losses", "ema_params"):
        same(getattr(saved, name), getattr(fit, name))
    assert saved.objective == "ScoreMatching" and steps_of(saved.state) == 7
    found = restored(fit.state, saved.state, ebm.ScoreMatching())
    assert found.marginal_state is None
    for name in ("objective_state", "ema"):  # whose form is not known before the first batch
        expected = getattr(fit.state, name)
        same(getattr(found, name).part(name, expected), expected)
        found = found._replace(**{name: expected})
    same(found, fit.state)


@pytest.mark.slow
def test_a_saved_fit_serves_in_another_process(tmp_path):
    fit = run(svi(), 3)
    ebm.save(tmp_path / "fit", fit)
    code = (
        "import sys, numpyro_ebm as ebm; fit = ebm.load(sys.argv[1]);"
        "print(float(fit.params['precision']), type(fit.state).__name__, fit.objective)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "fit")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) == float(fit.params["precision"])
    assert out[1:] == ["SavedState", "DenoisingScoreMatching"]


def test_networks_come_back_in_a_structure_that_is_given(tmp_path):
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(0))
    arrays, _ = eqx.partition(net, eqx.is_array)
    fit = run(svi(), 1)
    fit.params["net"] = arrays
    ebm.save(tmp_path / "fit", fit)
    with pytest.raises(ebm.ModelError, match="params.'net'. is a MLP.*like="):
        ebm.load(tmp_path / "fit")
    same(ebm.load(tmp_path / "fit", fit.params).params, fit.params)
    other, _ = eqx.partition(eqx.nn.MLP(1, 1, 4, 2, key=jax.random.key(0)), eqx.is_array)
    with pytest.raises(ebm.ModelError, match="like="):
        ebm.load(tmp_path / "fit", {**fit.params, "net": other})


def test_what_does_not_fit_is_refused(tmp_path):
    ebm.save(tmp_path / "fit", run(svi(), 2))
    state = ebm.load(tmp_path / "fit").state
    with pytest.raises(ebm.ModelError, match="trained by DenoisingScoreMatching.*ScoreMatching"):
        run(svi(ebm.ScoreMatching()), 2, init_state=state)
    with pytest.raises(ebm.ModelError, match="optim_state.*should be"):
        run(svi(optim=optax.sgd(0.1)), 2, init_state=state)
    with pytest.raises(ebm.ModelError, match="EnergySVI.run"):
        ebm.save(tmp_path / "other", {"mean": 1.0})
    (tmp_path / "text").write_text("not a fit")
    np.savez(tmp_path / "arrays.npz", x=1.0)
    for name in ("text", "arrays.npz"):
        with pytest.raises(ebm.ModelError, match="is not a fit"):
            ebm.load(tmp_path / name)


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = Path(tmp_path / "fit")
    ebm.save(path, made())
    before, fit = path.read_bytes(), made(8)

    def full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="no space"):
        ebm.save(path, fit)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
