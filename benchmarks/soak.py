# SPDX-License-Identifier: Apache-2.0
"""What a long-lived process keeps: its memory, its arrays and how often it compiles.

    python benchmarks/soak.py
    python benchmarks/soak.py --steps 20000 --runs 12 --objects 3 --samples 12

In turn, in one process, on a Gaussian with 1,000 rows: one run of many steps; many runs of one
`EnergySVI`, in minibatches; runs of `EnergySVI` objects made anew, each of which compiles its
rounds; and many calls of `sample`. Looks are spread evenly over each, and growth is that from the
third of them to the last but one: before, programs are compiled, and at the end of a run too.
"""

import argparse
import gc
import resource
import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax

import numpyro_ebm as ebm

COMPILES = "/jax/core/compile/backend_compile_duration"
LOOKS = 10


def gaussian(data=None):
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    mean = numpyro.param("mean", jnp.zeros(3))
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum((v - mean) ** 2, -1))


class Watch:
    """Looks at the process: MiB that are resident, live arrays, and programs compiled so far."""

    def __init__(self):
        self.compiled, self.seen = 0, []
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event, seconds, **_):
        self.compiled += event == COMPILES

    def look(self):
        gc.collect()
        with open("/proc/self/statm") as told:
            resident = int(told.read().split()[1]) * resource.getpagesize() / 2**20
        self.seen.append((resident, len(jax.live_arrays()), self.compiled))

    def told(self):
        """Growth between the third look and the last but one: the end of a run compiles."""
        settled = self.seen[2:-1]
        (memory, arrays, compiled), (last, live, in_all) = settled[0], settled[-1]
        self.seen = []
        return {
            "MiB": round(last, 1),
            "MiB more": round(last - memory, 2),
            "arrays more": live - arrays,
            "compiled": in_all - compiled,
        }


def new():
    return ebm.EnergySVI(gaussian, None, optax.adam(0.01), ebm.DenoisingScoreMatching(0.3))


def soak(steps, runs, objects, samples):
    """Yield the name and the growth of each part."""
    watch = Watch()
    data = jax.random.normal(jax.random.key(0), (1_000, 3))
    options = {"batch_size": 100, "progress_bar": False}

    def repeated(number, call):
        start = time.perf_counter()
        for i in range(number):
            if i % max(1, number // LOOKS) == 0:
                watch.look()
            call(i)
        watch.look()
        return watch.told() | {"seconds": round(time.perf_counter() - start, 1)}

    def look(*_):
        watch.look()

    def long_run(_):
        new().run(jax.random.key(1), steps, data, callback=look, every=steps // LOOKS, **options)

    def sample(i):
        model = ebm.fixed(gaussian, {"precision": jnp.array(2.0), "mean": jnp.zeros(3)})
        ebm.sample(jax.random.key(i), model, 20, kernel=ebm.MALA, num_warmup=50, num_chains=8)

    svi = new()
    parts = {
        f"a run of {steps:,} steps": (1, long_run),
        f"{runs} runs": (runs, lambda i: svi.run(jax.random.key(i), 50, data + i, **options)),
        f"{objects} objects": (
            objects,
            lambda i: new().run(jax.random.key(i), 50, data, **options),
        ),
        f"{samples} times `sample`": (samples, sample),
    }
    for name, (number, call) in parts.items():
        if number:
            yield name, repeated(number, call)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--objects", type=int, default=40)
    parser.add_argument("--samples", type=int, default=300)
    for name, told in soak(**vars(parser.parse_args())):
        print(f"{name:26}", "  ".join(f"{what} {x}" for what, x in told.items()), flush=True)


if __name__ == "__main__":
    main()
