# SPDX-License-Identifier: Apache-2.0
"""Training from disk and from an iterable beside training from memory; what extras of a run cost.

    python benchmarks/streams.py --rows 1000000          # 3.1 GB of disk, and as much of memory
    python benchmarks/streams.py --rows 400000 --ways parquet --rounds 1 --limit 768
    python benchmarks/streams.py --extras                # callbacks, averages, checkpoints

Denoising score matching of a Gaussian-Bernoulli RBM, its hidden units summed out, on rows of 784
values, batch 256. Every way runs in a process of its own, so that its peak memory (of the process,
in MiB, what it held before the run taken off) is its own; they take turns, and the medians of the
steps a second are reported, compilation left out. An array that is on the device already is never
copied; one in memory is, by every run. `parquet` reads a file of row groups, in a new order
every epoch; `--limit` is how many MiB the process may add to its address space for the run.
"""

import argparse
import itertools
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax

import numpyro_ebm as ebm

NUM_VISIBLE, NUM_HIDDEN, BATCH = 784, 64, 256
WAYS = ("device", "memory", "disk", "iterable", "parquet")
GROUP = 10_000  # rows in a group of Parquet


def grbm(data):
    W = numpyro.param("W", lambda key: 0.01 * jax.random.normal(key, (NUM_VISIBLE, NUM_HIDDEN)))
    b = numpyro.param("b", jnp.zeros(NUM_VISIBLE))
    c = numpyro.param("c", jnp.zeros(NUM_HIDDEN))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(NUM_VISIBLE,)), obs=data)
        hidden = jnp.sum(jax.nn.softplus(v @ W + c), -1)
        ebm.energy("E", 0.5 * jnp.sum((v - b) ** 2, -1) - hidden)


def write_rows(path, num_rows):
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (num_rows, NUM_VISIBLE))
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, 10_000):
        part = rows[start : start + 10_000]
        part[:] = rng.standard_normal(part.shape, np.float32)
    rows.flush()


def batches_of(path):
    """What a user would write; the pages of the file that it maps count as memory."""
    rows, rng = np.load(path, mmap_mode="r"), np.random.default_rng(1)
    while True:
        yield rows[np.sort(rng.choice(len(rows), BATCH, replace=False))]


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.list_(pyarrow.float32(), NUM_VISIBLE)
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema([("v", kind)])) as file:
        for start in range(0, len(rows), GROUP):
            flat = pyarrow.array(np.ravel(rows[start : start + GROUP]))
            column = pyarrow.FixedSizeListArray.from_arrays(flat, NUM_VISIBLE)
            file.write_table(pyarrow.table({"v": column}), row_group_size=GROUP)


def row_groups(path):
    """Batches of one row group after the other, groups and rows of each shuffled by a seed."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    for epoch in itertools.count():
        rng = np.random.default_rng(epoch)
        for group in rng.permutation(file.num_row_groups):
            flat = file.read_row_group(group)["v"].combine_chunks().flatten()
            rows = flat.to_numpy().reshape(-1, NUM_VISIBLE)
            order = rng.permutation(len(rows))
            for chosen in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
                yield rows[chosen]


def peak():
    """MiB of this program; `ru_maxrss` would be at least those of what started it."""
    (told,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(told) / 1024


def arguments(way, path):
    if way == "device":
        return (jnp.asarray(np.load(path)),), {"batch_size": BATCH}
    if way == "memory":
        return (np.load(path),), {"batch_size": BATCH}
    if way == "disk":
        return (np.load(path, mmap_mode="r"),), {"batch_size": BATCH}
    if way == "parquet":
        return (lambda: row_groups(Path(path).with_suffix(".parquet")),), {}
    return (lambda: batches_of(path),), {}


def measure(way, path, num_steps, extras, limit):
    """Peak memory and steps a second of one way, in this process."""
    svi = ebm.EnergySVI(grbm, None, optax.adam(1e-4), ebm.DenoisingScoreMatching(0.3))
    svi.run(
        jax.random.key(1), 5, jnp.zeros((512, NUM_VISIBLE)), batch_size=BATCH, progress_bar=False
    )
    before = peak()
    if limit is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound = pages * resource.getpagesize() + limit * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    args, options = arguments(way, path)
    options |= {name: make() for name, make in extras.items()}
    svi.run(jax.random.key(1), 200, *args, progress_bar=False, **options)
    if "checkpoint" in options:
        options["checkpoint"] = EXTRAS["checkpoint"]["checkpoint"]()
    start = time.perf_counter()
    svi.run(jax.random.key(1), num_steps, *args, progress_bar=False, **options)
    return {"steps/s": num_steps / (time.perf_counter() - start), "MiB": peak() - before}


EXTRAS = {
    "none": {},
    "callback": {"callback": lambda: lambda *told: None, "every": lambda: 100},
    "ema": {"ema": lambda: 0.999},
    "checkpoint": {
        "checkpoint": lambda: ebm.Checkpoint(tempfile.mkdtemp(), seconds=10.0),
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--extras", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:4])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        way, extra, path = chosen.one
        print(json.dumps(measure(way, path, chosen.steps, EXTRAS[extra], chosen.limit)))
        return
    cases = [("memory", extra) for extra in EXTRAS] if chosen.extras else []
    cases = cases or [(way, "none") for way in chosen.ways]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        write_rows(path, chosen.rows)
        if "parquet" in chosen.ways:
            write_parquet(path.with_suffix(".parquet"), np.load(path, mmap_mode="r"))
        found = {case: [] for case in cases}
        for _ in range(chosen.rounds):
            for case in cases:
                command = [sys.executable, __file__, "--steps", str(chosen.steps)]
                command += ["--limit", str(chosen.limit)] if chosen.limit else []
                told = subprocess.run(
                    [*command, "--one", *case, str(path)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                found[case].append(json.loads(told.stdout.splitlines()[-1]))
    base = None
    print(f"{chosen.rows} rows of {NUM_VISIBLE}, batch {BATCH}: median of {chosen.rounds}")
    for (way, extra), runs in found.items():
        rate, memory = (statistics.median(x[what] for x in runs) for what in ("steps/s", "MiB"))
        base = rate if base is None else base
        name = extra if chosen.extras else way
        print(f"  {name:12} {rate:8.0f} steps/s   ratio {rate / base:.3f}   {memory:7.0f} MiB")


if __name__ == "__main__":
    main()
