# SPDX-License-Identifier: Apache-2.0
"""Kernels that are put into a file and taken out again, and runs that go on from there."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.infer import MCMC
from registry.kernels import KERNELS

import numpyro_ebm as ebm


def real():
    with numpyro.plate("data", 2):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)))
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + 0.1 * jnp.sum(v**4, -1))


def spins():
    with numpyro.plate("data", 2):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(4,)))
        ebm.energy("E", -0.3 * jnp.sum(v[..., 1:] * v[..., :-1], -1))


def warmed(name):
    """An `MCMC` that has its draws, and goes on from its last state."""
    kernel = KERNELS[name].make(ebm.fixed(real, {}))
    kernel = KERNELS[name].make(ebm.fixed(spins, {})) if kernel.moves_discrete else kernel
    mcmc = MCMC(kernel, num_warmup=20, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(3))
    mcmc.post_warmup_state = mcmc.last_state
    return mcmc


def run(mcmc):
    mcmc.run(mcmc.post_warmup_state.rng_key)
    return mcmc.get_samples(group_by_chain=True)


def assert_same(found, expected):
    assert expected.keys() == found.keys()
    assert all(bool(jnp.array_equal(expected[k], found[k])) for k in expected)


DEFAULT = "MALA", "DiscreteLangevin"


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x not in DEFAULT)) for x in KERNELS]
)
def test_a_run_goes_on_from_a_pickle(name):
    mcmc = warmed(name)
    again = pickle.loads(pickle.dumps(mcmc))
    assert_same(run(again), run(mcmc))


def leave_behind(folder):
    """A pickle of a run of every kernel, and the draws that it went on with; then SIGKILL."""
    for name in KERNELS:
        mcmc = warmed(name)
        kept = pickle.dumps(mcmc)
        draws = jax.tree.map(np.asarray, run(mcmc))
        (Path(folder) / name).write_bytes(pickle.dumps((kept, draws)))
    os.kill(os.getpid(), signal.SIGKILL)


PROGRAM = "import sys; sys.path[:0] = sys.argv[2:]; import test_pickling as here; here."


@pytest.mark.slow
def test_runs_of_a_process_that_was_killed_go_on(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-c", PROGRAM + "leave_behind(sys.argv[1])", str(tmp_path)]
    left = subprocess.run([*command, str(here), str(here.parent)], capture_output=True, text=True)
    assert left.returncode == -signal.SIGKILL, left.stderr
    for name in KERNELS:
        kept, expected = pickle.loads((tmp_path / name).read_bytes())
        assert_same(run(pickle.loads(kept)), expected)
        print("CELL", name)
