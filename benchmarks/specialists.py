# SPDX-License-Identifier: Apache-2.0
"""Discrete models beside the tools that were made for them.

- ``rbm``: a restricted Boltzmann machine of 784 visible and 500 hidden units, persistent
  contrastive divergence with one sweep, 128 chains and rows a step: this library, a loop in JAX
  written by hand, scikit-learn's ``BernoulliRBM`` and the package ``rbms`` (PyTorch).
- ``florentine``, ``karate``: the posterior of a network's edges and triangles (16 and 34 nodes,
  prior N(0, 5^2)), four chains of the exchange algorithm, auxiliary networks of as many updates of
  dyads: this library and the package ``ergmx``.

Milliseconds of processor time a step, effective draws a second of it. What takes turns in one run
is compared; compilation and warm-up are left out. Peers may live in another environment:

    python -m venv peers && peers/bin/pip install scikit-learn rbms ergmx networkx
    taskset -c 0 python benchmarks/specialists.py --peers peers/bin/python
"""

import argparse
import os
import subprocess
import sys
import time

import numpy as np

VISIBLE, HIDDEN, BATCH, ROWS = 784, 500, 128, 4096
STEPS, DRAWS, CHAINS = 50, 1_000, 4
JOBS = {
    "rbm": {"ours": "rbm_ours", "by hand": "rbm_by_hand", "scikit-learn": "rbm_sklearn"}
    | {"rbms": "rbm_rbms"},
    "florentine": {"ours": "network_ours", "ergmx": "network_ergmx"},
    "karate": {"ours": "network_ours", "ergmx": "network_ergmx"},
}
SWEEPS = {"florentine": 8, "karate": 18}  # of 120 and 561 dyads


def images():
    return np.random.default_rng(0).random((ROWS, VISIBLE)) < 0.2


def seconds(fn, num):
    start = time.process_time()
    fn()
    return (time.process_time() - start) / num


def rbm_ours(_):
    import jax
    import jax.numpy as jnp
    import numpyro
    import optax

    import numpyro_ebm as ebm

    def machine(data):
        W = numpyro.param("W", lambda key: 0.01 * jax.random.normal(key, (VISIBLE, HIDDEN)))
        b, c = numpyro.param("b", jnp.zeros(VISIBLE)), numpyro.param("c", jnp.zeros(HIDDEN))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(2, (VISIBLE,)), obs=data).astype(float)
            h = numpyro.sample("h", ebm.Counting(2, (HIDDEN,))).astype(float)
            ebm.energy("E", -v @ b - h @ c - jnp.sum((v @ W) * h, -1))

    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, 1, persistent=True)
    svi = ebm.EnergySVI(machine, None, optax.sgd(0.01), objective)
    data = jnp.asarray(images(), jnp.int32)
    state = svi.init(jax.random.key(0), data[:BATCH])

    def steps(state, data):
        at = lambda i: jax.lax.dynamic_slice(data, (BATCH * (i % 32), 0), (BATCH, VISIBLE))  # noqa: E731
        return jax.lax.fori_loop(0, STEPS, lambda i, s: svi.update(s, at(i))[0], state)

    steps = jax.jit(steps)
    jax.block_until_ready(steps(state, data))
    return seconds(lambda: jax.block_until_ready(steps(state, data)), STEPS) * 1e3


def rbm_by_hand(_):
    import jax
    import jax.numpy as jnp

    data = jnp.asarray(images(), float)
    W = 0.01 * jax.random.normal(jax.random.key(0), (VISIBLE, HIDDEN))
    start = W, jnp.zeros(VISIBLE), jnp.zeros(HIDDEN), data[:BATCH], jax.random.key(1)

    def step(i, carry):
        W, b, c, chain, key = carry
        key, key_h, key_v = jax.random.split(key, 3)
        v = jax.lax.dynamic_slice(data, (BATCH * (i % 32), 0), (BATCH, VISIBLE))
        h = jax.random.bernoulli(key_h, jax.nn.sigmoid(chain @ W + c)).astype(float)
        chain = jax.random.bernoulli(key_v, jax.nn.sigmoid(h @ W.T + b)).astype(float)
        up, down = jax.nn.sigmoid(v @ W + c), jax.nn.sigmoid(chain @ W + c)
        W = W + 0.01 / BATCH * (v.T @ up - chain.T @ down)
        b, c = b + 0.01 * (v - chain).mean(0), c + 0.01 * (up - down).mean(0)
        return W, b, c, chain, key

    steps = jax.jit(lambda carry: jax.lax.fori_loop(0, STEPS, step, carry))
    jax.block_until_ready(steps(start))
    return seconds(lambda: jax.block_until_ready(steps(start)), STEPS) * 1e3


def rbm_sklearn(_):
    from sklearn.neural_network import BernoulliRBM

    data = images().astype(np.float32)
    machine = BernoulliRBM(HIDDEN, learning_rate=0.01, batch_size=BATCH)
    machine.partial_fit(data[:BATCH])

    def steps():
        for i in range(STEPS):
            machine.partial_fit(data[BATCH * (i % 32) :][:BATCH])

    return seconds(steps, STEPS) * 1e3


def rbm_rbms(_):
    import torch
    from rbms.bernoulli_bernoulli.classes import BBRBM
    from rbms.training.pcd import fit_batch_pcd

    torch.set_num_threads(1)
    data, weights = torch.as_tensor(images()).float(), torch.ones(BATCH, 1)
    machine = BBRBM(0.01 * torch.randn(VISIBLE, HIDDEN), torch.zeros(VISIBLE), torch.zeros(HIDDEN))
    for parameter in machine.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(machine.parameters(), lr=0.01, maximize=True)
    chains = [machine.init_chains(BATCH)]

    def steps():
        for i in range(STEPS):
            optimizer.zero_grad(set_to_none=False)
            batch = data[BATCH * (i % 32) :][:BATCH], weights
            chains[0], _ = fit_batch_pcd(batch, chains[0], machine, 1, 1.0, centered=False)
            optimizer.step()

    with torch.no_grad():
        steps()
        return seconds(steps, STEPS) * 1e3


def network(name):
    import networkx

    if name == "karate":
        return networkx.Graph(networkx.karate_club_graph().edges())
    graph = networkx.Graph(networkx.florentine_families_graph())
    graph.add_node("Pucci")  # no marriage with any of the others
    return graph


def network_ours(name):
    import jax
    import jax.numpy as jnp
    import networkx
    import numpyro
    import numpyro.distributions as dist
    from numpyro.diagnostics import effective_sample_size

    import numpyro_ebm as ebm

    graph = network(name)
    num = len(graph)
    pairs = np.triu_indices(num, 1)
    ties = networkx.to_numpy_array(graph, weight=None)[pairs].astype(int)

    def model(data):
        theta = numpyro.sample("theta", dist.Normal(0, 5).expand([2]).to_event(1))
        with numpyro.plate("networks", len(data)):
            y = numpyro.sample("y", ebm.Counting(2, (len(ties),)), obs=data).astype(float)
            A = jnp.zeros((*y.shape[:-1], num, num)).at[..., *pairs].set(y)
            A = A + jnp.swapaxes(A, -1, -2)
            triangles = jnp.einsum("...ij,...jk,...ki->...", A, A, A) / 6
            ebm.energy("E", -theta[0] * jnp.sum(y, -1) - theta[1] * triangles)

    kernel = ebm.Exchange(model, ebm.BlockGibbs, SWEEPS[name])
    args = (jnp.asarray(ties)[None],)
    keys = jax.random.split(jax.random.key(0), CHAINS)
    init = jax.vmap(lambda key: kernel.init(key, 300, None, args, {}))
    step = jax.vmap(lambda state: kernel.sample(state, args, {}))
    warm_up = jax.jit(lambda state: jax.lax.fori_loop(0, 300, lambda _, s: step(s), state))

    @jax.jit
    def run(state):
        def one(state, _):
            state = step(state)
            return state, state.z["theta"]

        return jax.lax.scan(one, state, None, DRAWS)[1]

    state = warm_up(init(keys))
    jax.block_until_ready(run(state))
    draws = []
    spent = seconds(lambda: draws.append(jax.block_until_ready(run(state))), 1)
    draws = np.swapaxes(np.asarray(draws[0]), 0, 1)
    return _posterior(draws, effective_sample_size(draws), spent)


def network_ergmx(name):
    import ergmx

    graph, num = network(name), len(network(name))
    updates = SWEEPS[name] * num * (num - 1) // 2

    def fit(draws):
        options = {"prior_sigma": 25.0, "nchains": CHAINS, "main_iters": draws, "seed": 0}
        return ergmx.bergm(graph, "edges + triangle", aux_iters=updates, **options)

    short = seconds(lambda: fit(10), 1)
    fits = []
    spent = seconds(lambda: fits.append(fit(DRAWS)), 1)
    draws = np.asarray(fits[0].draws).reshape(-1, 2)
    return _posterior(draws, np.asarray(list(dict(fits[0].ess).values()), float), spent - short)


def _posterior(draws, ess, spent):
    draws = draws.reshape(-1, draws.shape[-1])
    both = zip(draws.mean(0), draws.std(0), strict=True)
    moments = ", ".join(f"{mean:.2f} ± {sd:.2f}" for mean, sd in both)
    return f"{spent / DRAWS / CHAINS * 1e3:.3f} {np.min(ess) / spent:.1f} {moments}"


def job(python, fn, name):
    """What a job prints in an interpreter of its own, on one thread."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [python, "-W", "ignore", __file__, "--job", fn, name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["failed"])[-1]
    return done.stdout.strip().splitlines()[-1], None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has them")
    parser.add_argument("--models", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(globals()[options.job[0]](options.job[1]))
        return
    for name in options.models:
        print(
            f"{name}: {'ms a step' if name == 'rbm' else 'ms a step and chain, effective draws/s'}"
        )
        best = {}
        for _ in range(options.rounds):
            for who, fn in JOBS[name].items():
                mine = fn.endswith(("ours", "hand"))
                out, error = job(sys.executable if mine else options.peers, fn, name)
                if error:
                    print(f"  {who:14s} not run: {error}", flush=True)
                    continue
                found = float(out.split()[0]), out
                best[who] = min(best.get(who, found), found)
        for who, (_, out) in best.items():
            print(f"  {who:14s} {out}", flush=True)


if __name__ == "__main__":
    main()
