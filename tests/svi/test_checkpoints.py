# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: runs that were stopped, or killed, end as if they had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.svi.places import set_place, told_place

pytest.importorskip("orbax.checkpoint")

DATA = np.random.default_rng(8).normal(1.0, 2.0, (60, 2)).astype(np.float32)
KEY = jax.random.key(1)


def model(data):
    mean = numpyro.param("mean", {"a": jnp.zeros(2)})
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum((v - mean["a"]) ** 2, -1))


def svi(optim=None):
    optim = optax.adam(0.1) if optim is None else optim
    return ebm.EnergySVI(model, None, optim, ebm.DenoisingScoreMatching(0.3))


ONE = svi()  # its rounds are compiled once for all tests


def run(num_steps, *args, one=ONE, key=KEY, **options):
    args = args or (DATA,)
    options = {"batch_size": 20 if args[0] is DATA else None, "progress_bar": False, **options}
    return one.run(key, num_steps, *args, **options)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype and jnp.array_equal(x, y)


def parts(fit):
    return fit.params, fit.state, fit.losses, fit.ema_params


class Loader:
    """Batches that can say where they are."""

    def __init__(self, can_tell=True):
        self.place = self.num_read = 0
        if can_tell:
            self.state_dict = lambda: {"place": self.place}
            self.load_state_dict = lambda state: setattr(self, "place", state["place"])

    def __iter__(self):
        while True:
            self.num_read += 1
            self.place += 1
            yield np.roll(DATA, self.place, 0)[:20]


def test_the_same_call_goes_on_from_the_latest_checkpoint(tmp_path):
    seen = {"of whole": [], "of parts": []}
    options = {"ema": 0.9, "every": 7}
    whole = run(31, callback=lambda *x: seen["of whole"].append(x), **options)
    kept = ebm.Checkpoint(tmp_path / "kept", every=5, keep=2)
    options |= {"checkpoint": kept, "callback": lambda *x: seen["of parts"].append(x)}
    first = run(13, **options)
    assert len(first.losses) == 13
    assert sorted(int(x.name) for x in kept.path.iterdir()) == [10, 13]
    second = run(31, **options)
    assert_same(parts(second), parts(whole))
    read = ebm.load(kept.path)
    assert_same((read.params, read.losses), (whole.params, whole.losses))
    third = run(31, **options)  # nothing is left to do
    assert_same(parts(third), parts(whole))
    told, again = seen["of whole"], seen["of parts"]
    assert [x[0] for x in told] == [x[0] for x in again] == [7, 14, 21, 28]
    for (_, _, x), (_, _, y) in zip(told, again, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("can_tell", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stream_goes_on_where_it_was(can_tell, tmp_path, monkeypatch):
    monkeypatch.setattr("numpyro_ebm.svi.streamed.BLOCK_BYTES", 4 * 20 * 2 * 4)
    whole = run(27, Loader())
    kept, loader = ebm.Checkpoint(tmp_path / "kept", every=5), Loader(can_tell)
    run(14, Loader(can_tell), checkpoint=kept)
    second = run(27, loader, checkpoint=kept)
    assert_same(parts(second), parts(whole))
    # It is read from where it was, or once more from its beginning.
    assert loader.num_read < 27 if can_tell else loader.num_read >= 27


def test_a_place_is_what_it_was():
    """What loaders say of theirs: nested, with bytes, tuples and generators of random numbers."""
    state = {"a": [1, {"b": (2.5, None, "x")}], "c": b"\x00\xff", "d": np.arange(6).reshape(2, 3)}
    state["e"] = np.random.default_rng(0).bit_generator.state

    class Source:
        def state_dict(self):
            return state

        def load_state_dict(self, found):
            self.found = found

    source = Source()
    assert set_place(source, json.loads(json.dumps(told_place(None, source))))
    np.testing.assert_equal(source.found, state)
    assert isinstance(source.found["a"][1]["b"], tuple) and isinstance(source.found["a"], list)
    source.set_epoch = None  # its place is that of one epoch
    assert told_place(source) is None and not set_place(source, None)
    for wrong in (object(), np.array(["a"]), {1: 2}):
        state["d"] = wrong
        with pytest.raises(ebm.ModelError, match=f"holds a {type(wrong).__name__}"):
            told_place(Source())


def test_a_source_that_could_not_be_found_again_is_refused(tmp_path):
    with pytest.raises(ebm.ModelError, match="a generator can neither begin anew nor say where"):
        run(5, iter(Loader(can_tell=False)), checkpoint=tmp_path)


def test_a_run_without_checkpoints_asks_no_source_where_it_is():
    loader = Loader()
    loader.state_dict = lambda: pytest.fail("it was asked")
    run(3, loader)


def test_best_ones_are_kept(tmp_path):
    kept = ebm.Checkpoint(tmp_path, every=10, keep=1, keep_best=1)
    rate = optax.piecewise_constant_schedule(0.1, {20: 1e3})  # the best is not the last
    run(40, one=svi(optax.adam(rate)), checkpoint=kept)
    found = sorted(int(x.name) for x in tmp_path.iterdir())
    losses = ebm.load(tmp_path).losses
    means = [float(losses[i : i + 10].mean()) for i in range(0, 40, 10)]
    assert found == sorted({40, 10 * (1 + int(np.argmin(means)))}) and len(found) == 2


@pytest.mark.slow
def test_a_run_that_stops_leaves_its_last_finite_state(tmp_path):
    one = svi(optax.sgd(lambda i: jnp.where(i < 12, 0.1, jnp.inf)))
    for _ in range(2):
        with pytest.warns(ebm.NonFiniteLossWarning):
            fit = run(40, one=one, checkpoint=ebm.Checkpoint(tmp_path, every=5))
        saved = ebm.load(tmp_path)
        assert np.isfinite(saved.params["precision"]) and len(saved.losses) == len(fit.losses) - 1


def test_what_does_not_fit_is_refused(tmp_path):
    run(5, checkpoint=tmp_path / "a", batch_size=np.int64(20))
    with pytest.raises(ebm.ModelError, match="another random key"):
        run(9, key=jax.random.key(2), checkpoint=tmp_path / "a")
    with pytest.raises(ebm.ModelError, match="and `init_state`"):
        run(9, init_state=run(2).state, checkpoint=tmp_path / "a")
    with pytest.raises(ebm.ModelError, match="optim_state"):
        run(9, one=svi(optax.sgd(0.1)), checkpoint=tmp_path / "a")
    ways = {
        "batch_size 20 and not 30": {"batch_size": 30},
        "rows 60 and not 40, batch_size 20 and not 40": {"batch_size": None, "args": (DATA[:40],)},
        "ema None and not 0.9": {"ema": 0.9},
    }
    for message, way in ways.items():
        with pytest.raises(ebm.ModelError, match=message):
            run(9, *way.pop("args", ()), checkpoint=tmp_path / "a", **way)
    with pytest.raises(ebm.ModelError, match="of 5 rounds, and `num_steps`, .* is 4"):
        run(4, checkpoint=tmp_path / "a")
    with pytest.raises(ebm.ModelError, match="no checkpoint in"):
        ebm.load(tmp_path)
    for options in ({"every": 0}, {"seconds": 0.0}, {"keep": 0}, {"keep_best": -1}):
        with pytest.raises(ebm.ModelError, match=next(iter(options))):
            ebm.Checkpoint(tmp_path, **options)
    with pytest.raises(ebm.ModelError, match="`path`"):
        run(5, checkpoint=3)


def test_two_runs_do_not_share_a_folder(tmp_path):
    """Not in one process either; when the first one is over the next one goes on."""

    def second(*_):
        run(9, checkpoint=tmp_path / "a")

    with pytest.raises(ebm.ModelError, match="another run writes its checkpoints"):
        run(5, checkpoint=tmp_path / "a", callback=second, every=2)
    assert len(run(5, checkpoint=tmp_path / "a").losses) == 5
    (tmp_path / "file").write_text("")
    with pytest.raises(ebm.ModelError, match="is no folder"):
        run(5, checkpoint=tmp_path / "file")


def test_a_checkpoint_that_is_broken_is_told(tmp_path):
    run(5, checkpoint=ebm.Checkpoint(tmp_path, every=2))
    whole = run(9)
    for file in (tmp_path / "5").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    for call in (lambda: run(9, checkpoint=tmp_path), lambda: ebm.load(tmp_path)):
        with pytest.raises(ebm.ModelError, match="after 5 rounds .* Remove its folder, '5'"):
            call()
    shutil.rmtree(tmp_path / "5")
    assert_same(run(9, checkpoint=tmp_path).state, whole.state)


@pytest.mark.parametrize("when", ["save", "wait_until_finished"])
def test_a_disk_that_is_full_loses_nothing(when, tmp_path, monkeypatch):
    """Orbax says so at the next checkpoint, or at the end: in the words of whatever failed."""
    import orbax.checkpoint as ocp

    done, works = [], getattr(ocp.CheckpointManager, when)

    def fails(self, *args, **kwargs):
        if when == "wait_until_finished":
            works(self, *args, **kwargs)
        if len(done) == 2 if when == "save" else self.latest_step() == 12:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
        done.append(args)
        return works(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, when, fails)
        with pytest.warns(ebm.InterruptedWarning, match=r"write a checkpoint \(.*No space left"):
            fit = run(12, checkpoint=ebm.Checkpoint(tmp_path, every=3))
    assert len(fit.losses) == (9 if when == "save" else 12)
    assert_same(fit.state, run(len(fit.losses)).state)
    assert_same(run(12, checkpoint=tmp_path).state, run(12).state)  # once there is room


def test_rounds_that_were_undone_are_no_best_ones(tmp_path):
    """The mean of losses that are NaN would be the best of all, or hide the others."""
    one = svi(optax.sgd(lambda i: jnp.where(i < 10, 0.1, jnp.inf)))
    kept = ebm.Checkpoint(tmp_path, every=10, keep=1, keep_best=1)
    with pytest.warns(ebm.NonFiniteLossWarning, match="were undone"):
        fit = run(30, one=one, checkpoint=kept, stable_update=True)
    assert np.isnan(fit.losses[12:]).all() and np.isfinite(fit.losses[:10]).all()
    assert sorted(int(x.name) for x in tmp_path.iterdir()) == [10, 30]


PROGRAM = """
import sys, time
sys.path.insert(0, {folder!r})
from test_checkpoints import *
wait = float(sys.argv[1])
kept = ebm.Checkpoint({path!r}, every=20)
fit = run(200, checkpoint=kept, callback=lambda *x: time.sleep(wait), every=5)
"""


@pytest.mark.slow
def test_a_killed_run_loses_at_most_an_interval(tmp_path):
    whole = run(200)
    path = str(tmp_path / "kept")
    code = PROGRAM.format(folder=os.path.dirname(__file__), path=path)
    steps, rng = 0, np.random.default_rng(3)
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", code, "0.2"]) as process:
            began = time.monotonic()
            while time.monotonic() - began < 60:  # until it has made some progress
                time.sleep(0.05)
                found = os.listdir(path) if os.path.isdir(path) else []
                done = [int(x) for x in found if x.isdigit()]
                if done and max(done) > steps:
                    break
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        assert max(done) >= steps + 20
        steps = max(int(x) for x in os.listdir(path) if x.isdigit())
        assert ebm.load(path).losses.shape == (steps,)
    subprocess.run([sys.executable, "-c", code, "0"], check=True)
    read = ebm.load(path)
    assert_same((read.params, read.losses), (whole.params, whole.losses))
