# SPDX-License-Identifier: Apache-2.0
"""What a round on several devices costs each of them, read off the compiled program.

    python benchmarks/devices.py
    python benchmarks/devices.py --devices 1 8 --json

A host that looks like 1, 2, 4 and 8 devices trains an RBM (its hidden units summed out) by
denoising score matching and by persistent contrastive divergence, in `run` with `sharding=`. Of
each device: its share of the data and of the chains, floating-point operations of a round, and the
collective operations of a round, with the bytes of their results. The first are those of `update`,
the last are read in the text of its program and of that of `run`, which gathers minibatches too,
and draws noise for many rounds at once: what it reduces of that (sums over rows) is told apart.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8, "s64": 8}


def collectives(text):
    """Collective operations in the text of a program: how many, and the bytes of their results."""
    found = []
    for line in text.splitlines():
        told = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if told:
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", told[1])
            sizes = [BYTES[kind] * product(shape.split(",")) for kind, shape in arrays]
            # The rounds of `run` are a loop in the loop over those whose noise is drawn at once.
            loops = re.search(r'op_name="[^"]*take_chunk\)((?:/while/body)*)', line)
            ahead = loops and loops[1].count("while") == 1
            found.append((told[2] + " (of many rounds)" * bool(ahead), sum(sizes)))
    return found


def product(sizes):
    result = 1
    for size in filter(None, sizes):
        result *= int(size)
    return result


def program_of_run(folder):
    """The text of the largest program that took rounds, as XLA left it."""
    texts = Path(folder).glob("*_take_chunk*after_optimizations.txt")
    return max(texts, key=lambda path: path.stat().st_size).read_text()


def measure(objective, sizes, folder):
    """What the first device does and holds, in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import numpyro_ebm as ebm

    rows, num_visible, num_hidden, batch = sizes

    def rbm(data):
        W = numpyro.param("W", lambda key: 0.01 * jax.random.normal(key, (num_visible, num_hidden)))
        b = numpyro.param("b", jnp.zeros(num_visible))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(num_visible,)), obs=data)
            hidden = jnp.sum(jax.nn.softplus(v @ W), -1)
            ebm.energy("E", 0.5 * jnp.sum((v - b) ** 2, -1) - hidden)

    loss = {
        "DSM": partial(ebm.DenoisingScoreMatching, 0.3),
        "PCD": partial(
            ebm.ContrastiveDivergence, partial(ebm.ULA, step_size=1e-3), 5, persistent=True
        ),
    }[objective]()
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))
    data = np.random.default_rng(0).standard_normal((rows, num_visible), np.float32)
    data = jax.device_put(data, sharding)
    svi = ebm.EnergySVI(rbm, None, optax.adam(1e-3), loss)
    fit = svi.run(jax.random.key(1), 3, data, batch_size=batch, progress_bar=False)
    here = jax.device_put(np.zeros((batch, num_visible), np.float32), sharding)
    one_round = jax.jit(svi.update).lower(fit.state, here).compile()
    held = [data, *jax.tree.leaves(fit.state.objective_state)]
    held = [x for x in held if x.size > batch]
    return {
        "MiB": sum(x.addressable_shards[0].data.nbytes for x in held) / 2**20,
        "share": max(x.addressable_shards[0].data.nbytes / x.nbytes for x in held),
        "flops": one_round.cost_analysis()["flops"],
        "update": collectives(one_round.as_text()),
        "run": collectives(program_of_run(folder)),
        "losses": np.asarray(fit.losses).tolist(),
    }


def started(num_devices, objective, sizes):
    """`measure` in a process with so many devices."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_force_host_platform_device_count={num_devices} --xla_dump_to={folder} "
            "--xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*take_chunk.*"
        )
        told = subprocess.run(
            [sys.executable, __file__, "--one", objective, folder, *map(str, sizes)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            check=True,
            capture_output=True,
            text=True,
        )
    return json.loads(told.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sizes", type=int, nargs=4, default=[8_192, 784, 256, 256])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        objective, folder, *sizes = chosen.one
        print(json.dumps(measure(objective, list(map(int, sizes)), folder)))
        return
    found = {
        objective: {n: started(n, objective, chosen.sizes) for n in chosen.devices}
        for objective in ("DSM", "PCD")
    }
    if chosen.json:
        print(json.dumps(found))
        return
    print("{} rows of {} values, {} hidden units, batch {}".format(*chosen.sizes))
    for objective, of_number in found.items():
        base = next(iter(of_number.values()))["flops"]
        for number, told in of_number.items():
            print(
                f"  {objective} {number} devices: {told['MiB']:6.2f} MiB ({told['share']:.3f}), "
                f"operations {told['flops'] / base:.3f}"
            )
            for what in ("update", "run"):
                parts = ", ".join(f"{name} {size:,} bytes" for name, size in told[what])
                print(f"      collectives of `{what}`: {parts or 'none'}")


if __name__ == "__main__":
    main()
