# SPDX-License-Identifier: Apache-2.0
"""Every objective, from minibatches and from a stream, ended or killed: two parts are one run."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from registry.objectives import OBJECTIVES, Objective, mala

import numpyro_ebm as ebm

pytest.importorskip("orbax.checkpoint")

ROWS = np.random.default_rng(1).normal(0.2, 0.8, 48).astype(np.float32)
BITS = np.random.default_rng(2).integers(0, 2, (48, 3))
BATCH = 16
SOURCES = "minibatches", "stream"

chains = partial(ebm.ContrastiveDivergence, mala, 2, persistent=True)
KEPT = {  # what an objective keeps in its state
    "chains": Objective(chains),
    "reset chains": Objective(partial(chains, reset_probability=0.2)),
    "weighted chains": Objective(partial(chains, num_chains=64, weighted=True, initial="gaussian")),
    "buffer": Objective(partial(chains, buffer=64)),
}
CELLS = OBJECTIVES | KEPT


def real(data):
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def bits(data):
    field, coupling = numpyro.param("field", jnp.zeros(3)), numpyro.param("coupling", 0.1)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(3,)), obs=data)
        ebm.energy("E", -v @ field - coupling * jnp.sum(v[..., 1:] * v[..., :-1], -1))


def runs(name):
    """``run(source, num_steps, ...)`` of an objective; its rounds are compiled once a source."""
    entry = CELLS[name]
    model, rows = (real, ROWS) if entry.sites == "real" else (bits, BITS)
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    svi = {
        source: ebm.EnergySVI(model, None, optax.adam(0.01), entry.make(None), num_rows=len(rows))
        for source in SOURCES
    }

    def run(source, num_steps, **options):
        data = (lambda: iter(batches)) if source == "stream" else rows
        size = BATCH if source == "minibatches" else None
        options |= {"batch_size": size, "progress_bar": False, "ema": 0.9}
        return svi[source].run(jax.random.key(5), num_steps, data, **options)

    return run


def written(path):
    return [int(x.name) for x in Path(path).iterdir() if x.name.isdigit()]


def leave_behind(name, folder):
    """Runs of six rounds that end, and then others that are all in the middle of one: SIGKILL."""
    run = runs(name)
    for source in SOURCES:
        run(source, 6, checkpoint=Path(folder) / source / "ended")

    def begin(source, *others):
        path = Path(folder) / source / "killed"

        def look(*told):
            while not written(path):
                time.sleep(0.01)
            if others:
                begin(*others)
            os.kill(os.getpid(), signal.SIGKILL)

        run(source, 11, checkpoint=ebm.Checkpoint(path, every=3), callback=look, every=7)

    begin(*SOURCES)


PROGRAM = "import sys; sys.path[:0] = sys.argv[3:]; import test_resumption as here; here."


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # runs as short as these are not judged
@pytest.mark.parametrize("name", CELLS)
def test_a_run_in_two_parts_is_one_run(name, tmp_path):
    here = Path(__file__).parent
    code = PROGRAM + "leave_behind(*sys.argv[1:3])"
    command = [sys.executable, "-c", code, name, str(tmp_path), str(here), str(here.parent)]
    left = subprocess.run(command, capture_output=True, text=True)
    assert left.returncode == -signal.SIGKILL, left.stderr
    run = runs(name)
    for source in SOURCES:
        whole = run(source, 11)
        for how in "ended", "killed":
            path = tmp_path / source / how
            assert 0 < max(written(path)) < 11
            parts = run(source, 11, checkpoint=path)
            assert jax.tree.structure(parts) == jax.tree.structure(whole)
            both = [(*fit, fit.ema_params) for fit in (parts, whole)]
            for x, y in zip(*map(jax.tree.leaves, both), strict=True):
                assert x.dtype == y.dtype
                is_number = jnp.issubdtype(x.dtype, jnp.inexact)
                assert jnp.array_equal(x, y, equal_nan=is_number), (source, how)
            print("CELL", name, source, how)
