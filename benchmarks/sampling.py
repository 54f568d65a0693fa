# SPDX-License-Identifier: Apache-2.0
r"""Speed of the Langevin kernels: beside bare BlackJAX, and beside torchebm.

    python benchmarks/sampling.py               # MCMC(MALA) against bare BlackJAX, chain-steps/s
    python benchmarks/sampling.py --install     # and MCMC(ULA) against torchebm, ms a step

Both sides take turns in one run, and the best of the rounds counts for each. Compilation is left
out. The clock is processor time, so that other work on the machine does not show; run it on one
core (``taskset -c 0``). ``--install`` puts torch and torchebm into a temporary virtual environment
(or one at ``--torch-env``), with one thread, and runs this same file there as a subprocess.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

SHAPES = ((64, 8), (256, 32), (1024, 128))  # batch x dimension of torchebm's own benchmarks
HIDDEN = 128  # so is the network: two hidden layers of SiLU
STEP_SIZE = 1e-3


def best(functions, rounds):
    """Least processor time of each function, seconds, taken by turns."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            times[i].append(time.process_time() - start)
    return [min(t) for t in times]


def compiled_run(mcmc, **kwargs):
    """A function that runs an MCMC, compiled: NumPyro compiles anew in every run."""
    import jax

    @jax.jit
    def run(key):
        mcmc.run(key, **kwargs)
        return mcmc.get_samples(), mcmc.get_extra_fields(), mcmc.last_state

    def blocked():
        _, _, state = jax.block_until_ready(run(jax.random.key(1)))
        assert bool((abs(state.potential_energy) < float("inf")).all())

    blocked()
    return blocked


def against_blackjax(num_chains, num_steps, rounds, dimension):
    """Chain-steps per second of MALA: bare, as chains, and as rows of a plate."""
    import blackjax
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import MCMC

    import numpyro_ebm as ebm

    jax.config.update("jax_platforms", "cpu")
    step_size = 0.3
    precision = jnp.linalg.inv(0.5 * jnp.eye(dimension) + 0.5)

    def energy(v):  # a correlated Gaussian in a bath of cosines
        return 0.5 * jnp.einsum("...i,ij,...j", v, precision, v) + jnp.sum(jnp.cos(v), -1)

    def model(num_rows=1):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue((dimension,)))
            ebm.energy("E", energy(v))

    algorithm = blackjax.mala(lambda v: -energy(v), step_size)

    @jax.jit
    def bare(key, state):
        def step(state, key):
            state, info = jax.vmap(algorithm.step)(jax.random.split(key, num_chains), state)
            diverging = info.acceptance_rate == 0.0
            return state, (state.position, -state.logdensity, info.acceptance_rate, diverging)

        return jax.lax.scan(step, state, jax.random.split(key, num_steps))

    state = jax.vmap(algorithm.init)(jax.random.normal(jax.random.key(0), (num_chains, dimension)))

    def runner(num_chains, **kwargs):
        kernel = ebm.MALA(ebm.fixed(model, {}), step_size=step_size, adapt_step_size=False)
        options = {"chain_method": "vectorized"} if num_chains > 1 else {}
        mcmc = MCMC(
            kernel,
            num_warmup=0,
            num_samples=num_steps,
            num_chains=num_chains,
            progress_bar=False,
            **options,
        )
        return compiled_run(mcmc, **kwargs)

    def run_bare():
        jax.block_until_ready(bare(jax.random.key(1), state))

    run_bare()
    functions = [run_bare, runner(num_chains), runner(1, num_rows=num_chains)]
    seconds = best(functions, rounds)
    rates = [num_chains * num_steps / s for s in seconds]
    print(f"MALA, {num_chains} chains of dimension {dimension}, {num_steps} steps; chain-steps/s:")
    for name, rate in zip(("bare BlackJAX", "chains", "rows"), rates, strict=True):
        print(f"  {name:14s} {rate:12,.0f}   ratio {rate / rates[0]:.2f}")
    return {
        "dimension": dimension,
        "ratio_chains": rates[1] / rates[0],
        "ratio_rows": rates[2] / rates[0],
    }


def mlp_runner(batch, dimension, num_steps):
    """A function that makes ``num_steps`` Langevin steps on an MLP energy."""
    import jax
    import numpyro
    from numpyro.infer import MCMC

    import numpyro_ebm as ebm

    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (dimension, HIDDEN, HIDDEN, 1)
    layers = [
        jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / shape[0] ** 0.5
        for key, shape in zip(keys, zip(sizes[:-1], sizes[1:], strict=True), strict=True)
    ]

    def model():
        with numpyro.plate("data", batch):
            v = numpyro.sample("v", ebm.Lebesgue((dimension,)))
            x = jax.nn.silu(v @ layers[0])
            ebm.energy("E", (jax.nn.silu(x @ layers[1]) @ layers[2])[:, 0])

    mcmc = MCMC(
        ebm.ULA(ebm.fixed(model, {}), step_size=STEP_SIZE),
        num_warmup=0,
        num_samples=num_steps,
        thinning=num_steps,  # torchebm returns the last state only
        progress_bar=False,
    )
    return compiled_run(mcmc)


def torch_loop():
    """In the other interpreter: serve timings of torchebm, one JSON line for every line read."""
    import torch
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    torch.set_num_threads(1)

    class Energy(BaseModel):
        def __init__(self, dimension):
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(dimension, HIDDEN),
                torch.nn.SiLU(),
                torch.nn.Linear(HIDDEN, HIDDEN),
                torch.nn.SiLU(),
                torch.nn.Linear(HIDDEN, 1),
            )

        def forward(self, x):
            return self.net(x).squeeze(-1)

    for line in sys.stdin:
        batch, dimension, num_steps = json.loads(line)
        sampler = LangevinDynamics(Energy(dimension), step_size=STEP_SIZE, noise_scale=1.0)
        x = torch.randn(batch, dimension)
        sampler.sample(x=x, n_steps=5)
        start = time.process_time()
        sampler.sample(x=x, n_steps=num_steps)
        print(json.dumps(time.process_time() - start), flush=True)


def against_torchebm(python, num_steps, rounds):
    import jax

    jax.config.update("jax_platforms", "cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [python, __file__, "--torch-loop"]
    print("Langevin steps on an MLP energy, ms a step, one thread:")
    results = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as torch:
        for batch, dimension in SHAPES:
            run, ours, theirs = mlp_runner(batch, dimension, num_steps), [], []
            for _ in range(rounds):
                start = time.process_time()
                run()
                ours.append((time.process_time() - start) / num_steps)
                torch.stdin.write(json.dumps([batch, dimension, num_steps]) + "\n")
                torch.stdin.flush()
                theirs.append(json.loads(torch.stdout.readline()) / num_steps)
            ours, theirs = 1e3 * min(ours), 1e3 * min(theirs)
            print(
                f"  {batch:5d} x {dimension:3d}: here {ours:6.3f}, torchebm {theirs:6.3f}, "
                f"{theirs / ours:.1f} times faster"
            )
            results.append({"shape": [batch, dimension], "ms": ours, "torchebm_ms": theirs})
        torch.stdin.close()
    return results


def torch_python(folder):
    """The interpreter of a virtual environment with torchebm, made if it is not there."""
    python = Path(folder) / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch", "torchebm"], check=True)
    return str(python)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chains", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--install", action="store_true", help="install and run torchebm")
    parser.add_argument("--torch-env", help="virtual environment with torchebm, kept")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--torch-loop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch_loop:
        torch_loop()
        return
    figures = {
        "blackjax": [
            against_blackjax(options.chains, options.steps, options.rounds, dimension)
            for dimension in (2, 10, 50)
        ]
    }
    if options.install or options.torch_env:
        with contextlib.ExitStack() as stack:
            folder = options.torch_env or stack.enter_context(tempfile.TemporaryDirectory())
            figures["torchebm"] = against_torchebm(
                torch_python(folder), options.steps, options.rounds
            )
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
