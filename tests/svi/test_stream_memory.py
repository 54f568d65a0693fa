# SPDX-License-Identifier: Apache-2.0
"""Rows on disk are read batch by batch: the peak memory of a process that learns from them."""

import subprocess
import sys

import numpy as np
import pytest

MEMORY = """
import re, sys
import jax, jax.numpy as jnp, numpy as np, numpyro, optax
import numpyro_ebm as ebm

def model(data):
    mean = numpyro.param("mean", jnp.zeros(784))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(784,)), obs=data)
        ebm.energy("E", 0.5 * jnp.sum((v - mean) ** 2, -1))

svi = ebm.EnergySVI(model, None, optax.adam(1e-3), ebm.DenoisingScoreMatching(0.3))
def run(data):
    svi.run(jax.random.key(1), 600, data, batch_size=256, progress_bar=False)
    (peak,) = re.findall(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())
    return int(peak) // 1024  # `ru_maxrss` is that of pytest, which started this, if that is more
small = run(np.zeros((512, 784), np.float32))
print(run(np.load(sys.argv[1], mmap_mode="r")) - small)
"""


@pytest.mark.slow
def test_rows_on_disk_stay_there(tmp_path):
    rows = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (100_000, 784))
    rows[:] = 1.0  # 299 MiB
    rows.flush()
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "a.npy")]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(told.stdout) < 190
