# SPDX-License-Identifier: Apache-2.0
"""What callbacks, averages, checkpoints and streams add to a round of a GRBM at 560 x 400.

    taskset -c 0 python benchmarks/overheads.py

VaGES with denoising score matching, as in `training.py` (L = 2, K = 5, batch 100), on random rows.
One run of each kind in turn, for several rounds; medians of processor and of wall time a step, and
their ratios to those of the bare run. A callback comes every 100 steps. A checkpoint costs what a
run with two of them takes longer, and one a minute adds the sixtieth part of that. The stream
yields the batches one by one, so that they are read and put on the device in blocks beside rounds.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import jax
import numpy as np
import optax

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm, grbm_guide

NUM_ROWS, NUM_VISIBLE, NUM_HIDDEN, BATCH = 1_400, 560, 400, 100


def batches(rows):
    rng = np.random.default_rng(1)
    while True:
        yield rows[rng.choice(len(rows), BATCH, replace=False)]


def ways(rows, num_steps):
    """Arguments and options of each kind of run, by name."""
    in_memory = (rows,), {"batch_size": BATCH}
    folder = tempfile.mkdtemp()

    def with_options(**options):
        return in_memory[0], in_memory[1] | options

    return {
        "bare": lambda: in_memory,
        "callback": lambda: with_options(callback=lambda *told: None, every=100),
        "averages": lambda: with_options(ema=0.999),
        "checkpoints": lambda: with_options(
            checkpoint=ebm.Checkpoint(tempfile.mkdtemp(dir=folder), every=num_steps // 2)
        ),
        "stream": lambda: ((lambda: batches(rows),), {}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    rows = np.random.default_rng(0).standard_normal((NUM_ROWS, NUM_VISIBLE), np.float32)
    adam = optax.adam(2e-4, b1=0.9, b2=0.95)
    svi = ebm.EnergySVI(
        grbm,
        grbm_guide,
        adam,
        ebm.DenoisingScoreMatching(0.3, ebm.VaGES(2)),
        guide_optim=adam,
        num_guide_steps=5,
        num_visible=NUM_VISIBLE,
        num_hidden=NUM_HIDDEN,
    )
    found = {way: [] for way in ways(rows, 2)}
    for i in range(chosen.rounds + 1):
        num_steps = chosen.steps if i else 10  # the first one compiles
        for way, make in ways(rows, num_steps).items():
            args, options = make()
            begin = time.process_time(), time.perf_counter()
            svi.run(jax.random.key(0), num_steps, *args, progress_bar=False, **options)
            end = time.process_time(), time.perf_counter()
            if i:
                found[way].append([(y - x) / num_steps for x, y in zip(begin, end, strict=True)])
    print(f"GRBM {NUM_VISIBLE} x {NUM_HIDDEN}, {chosen.steps} steps: median of {chosen.rounds}")
    bare = [statistics.median(x) for x in zip(*found["bare"], strict=True)]
    for way, runs in found.items():
        seconds = [statistics.median(x) for x in zip(*runs, strict=True)]
        more = [x / y - 1 for x, y in zip(seconds, bare, strict=True)]
        if way == "checkpoints":
            each = [chosen.steps / 2 * (x - y) for x, y in zip(seconds, bare, strict=True)]
            more = [x / 60 for x in each]
        cpu, wall = (f"{1e3 * x:7.2f} ms ({y:+.1%})" for x, y in zip(seconds, more, strict=True))
        print(f"  {way:12} processor {cpu}   wall {wall}")


if __name__ == "__main__":
    main()
