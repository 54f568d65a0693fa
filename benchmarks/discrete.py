# SPDX-License-Identifier: Apache-2.0
"""A Potts model of sequences, learned and sampled, beside loops that are written by hand for it.

Pairs of sites interact, as in direct coupling analysis of proteins: D sites of q states, one-hot
codes, D (D - 1) / 2 blocks of q x q couplings. Each pair of lines takes turns in one run, on one
core if it is pinned to one; compilation and the check of the energy's form are timed apart. Memory
is what the compiled program needs: its arguments, its results and what lies between.

    taskset -c 0 python benchmarks/discrete.py --num-sites 50 --num-states 21 --num-rows 200

``--log-z`` times whole calls of `log_normalizer` by annealed importance sampling instead, of a
Potts model of 30 sites of 4 states and of the edges and triangles of 10 nodes, with the sweeps of
particles by products of indicators and by a gradient at each coordinate, in turns.
"""

import argparse
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

import numpyro_ebm as ebm
from numpyro_ebm.program.multi_affine import MultiAffine

SWEEPS = 5  # in one timing


def parameters(rng, num_sites, num_states):
    pairs = num_sites * (num_sites - 1) // 2
    shapes = {"h": (num_sites, num_states), "J": (pairs, num_states, num_states)}
    return {k: jnp.asarray(0.1 * rng.normal(size=x), jnp.float32) for k, x in shapes.items()}


def potts(data=None, *, num_sites, num_states, num_rows=1):
    """As a user writes it."""
    pairs = np.triu_indices(num_sites, 1)
    h = numpyro.param("h", jnp.zeros((num_sites, num_states)))
    couplings = numpyro.param("J", jnp.zeros((len(pairs[0]), num_states, num_states)))
    J = jnp.zeros((num_sites, num_sites, num_states, num_states)).at[pairs].set(couplings)
    J = J.transpose(0, 2, 1, 3).reshape(num_sites * num_states, -1)
    with numpyro.plate("data", num_rows if data is None else len(data)):
        x = numpyro.sample("x", ebm.Counting(num_states, (num_sites,)), obs=data)
        o = jax.nn.one_hot(x, num_states).reshape(*x.shape[:-1], -1)
        ebm.energy("E", -o @ h.ravel() - jnp.sum((o @ J) * o, -1))


def symmetric(params):
    """The couplings as (sites, states, sites, states), each pair twice."""
    num_sites, num_states = params["h"].shape
    pairs = np.triu_indices(num_sites, 1)
    J = jnp.zeros((num_sites, num_sites, num_states, num_states)).at[pairs].set(params["J"])
    return (J + J.transpose(1, 0, 3, 2)).transpose(0, 2, 1, 3)


def logits_by_hand(params, x):
    """log p(x_i = a | all others) up to a constant, (rows, sites, states)."""
    o = jax.nn.one_hot(x, params["h"].shape[1])
    return params["h"] + jnp.tensordot(o, symmetric(params), 2)


def loss_by_hand(params, x):
    """The usual one-gradient form of the pseudo-likelihood."""
    o = jax.nn.one_hot(x, params["h"].shape[1])
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits_by_hand(params, x)) * o, (-1, -2)))


def gibbs_by_hand(params, num_rows):
    num_sites, num_states = params["h"].shape

    def sweep(i, carry):
        x, key = carry
        key, key_noise = jax.random.split(key)
        J = symmetric(params)
        noise = jax.random.gumbel(key_noise, (num_sites, num_rows, num_states))

        def draw(o, at):
            i, noise = at
            chosen = jnp.argmax(params["h"][i] + jnp.tensordot(o, J[:, :, i], 2) + noise, -1)
            return o.at[:, i].set(jax.nn.one_hot(chosen, num_states)), chosen

        at = jnp.arange(num_sites), noise
        return jax.lax.scan(draw, jax.nn.one_hot(x, num_states), at)[1].T, key

    return lambda key: jax.lax.fori_loop(
        0, SWEEPS, sweep, (jnp.zeros((num_rows, num_sites), int), key)
    )


def langevin_by_hand(params, num_rows, step_size=1.0):
    """Discrete Langevin steps with exact differences, accepted or rejected."""
    num_sites, num_states = params["h"].shape

    def at(x):
        logits = logits_by_hand(params, x)
        o = jax.nn.one_hot(x, num_states)
        here = jnp.sum(logits * o, -1, keepdims=True)
        energy = 0.5 * jnp.sum(here[..., 0] + params["h"][jnp.arange(num_sites), x], -1)
        return energy, jax.nn.log_softmax(0.5 * (logits - here) - (1 - o) / (2 * step_size))

    def picked(log_q, x):
        return jnp.sum(jnp.take_along_axis(log_q, x[..., None], -1), (-1, -2))

    def step(i, carry):
        x, (value, log_q), key = carry
        key, key_x, key_u = jax.random.split(key, 3)
        y = jax.random.categorical(key_x, log_q)
        new_value, new_q = at(y)
        ratio = new_value - value + picked(new_q, x) - picked(log_q, y)
        accept = jnp.log(jax.random.uniform(key_u, ratio.shape)) < ratio
        x = jnp.where(accept[:, None], y, x)
        value = jnp.where(accept, new_value, value)
        return x, (value, jnp.where(accept[:, None, None], new_q, log_q)), key

    start = jnp.zeros((num_rows, num_sites), int)
    return lambda key: jax.lax.fori_loop(0, SWEEPS, step, (start, at(start), key))


def chain_of(kernel, kwargs):
    """Steps of a kernel in one program, and the state that it starts from."""
    state = kernel.init(jax.random.key(0), 0, None, (), kwargs)
    step = lambda i, state: kernel.sample(state, (), kwargs)  # noqa: E731
    return lambda state: jax.lax.fori_loop(0, SWEEPS, step, state), state


def compare(name, fn, args, by_hand, hand_args, rounds, per):
    """Print seconds a step of both, the least of some rounds in turns, their ratio and memory."""
    start = time.process_time()
    fn = jax.jit(fn).lower(*args).compile()
    jax.block_until_ready(fn(*args))
    first = time.process_time() - start
    by_hand = jax.jit(by_hand).lower(*hand_args).compile()
    jax.block_until_ready(by_hand(*hand_args))
    times = {"ours": [], "by hand": []}
    for _ in range(rounds):
        for who, f, a in (("ours", fn, args), ("by hand", by_hand, hand_args)):
            start = time.process_time()
            jax.block_until_ready(f(*a))
            times[who].append((time.process_time() - start) / per)
    ours, hand = min(times["ours"]), min(times["by hand"])
    print(
        f"{name:34s} {ours * 1e3:9.3f} ms {hand * 1e3:9.3f} ms   ratio {hand / ours:.2f}"
        f"   first call {first:.1f} s   memory {mebibytes(fn):.0f} MiB, {mebibytes(by_hand):.0f}",
        flush=True,
    )


def mebibytes(compiled):
    """What a compiled program needs: its arguments, results, and what lies between."""
    found = compiled.memory_analysis()
    needed = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return (needed - found.alias_size_in_bytes) / 2**20


def dense(num_sites=30, num_states=4):
    """A Potts model in which all pairs of sites interact."""
    rng, size = np.random.default_rng(0), num_sites * num_states
    J = np.kron(1 - np.eye(num_sites), np.ones((num_states, num_states)))
    J = jnp.asarray(0.1 * J * rng.normal(size=(size, size)), jnp.float32)
    with numpyro.plate("data", 1):
        x = numpyro.sample("x", ebm.Counting(num_states, (num_sites,)))
        o = jax.nn.one_hot(x, num_states).reshape(1, -1)
        ebm.energy("E", -jnp.sum((o @ J) * o, -1))


def network(num_nodes=10):
    """Edges and triangles."""
    pairs = np.triu_indices(num_nodes, 1)
    with numpyro.plate("data", 1):
        y = numpyro.sample("y", ebm.Counting(2, (len(pairs[0]),))).astype(float)
        A = jnp.zeros((1, num_nodes, num_nodes)).at[..., *pairs].set(y)
        A = A + jnp.swapaxes(A, -1, -2)
        triangles = jnp.einsum("...ij,...jk,...ki->...", A, A, A) / 6
        ebm.energy("E", 1.5 * jnp.sum(y, -1) - 0.2 * triangles)


def log_z(rounds):
    """Print seconds of whole calls, by products of indicators and by gradients."""
    options = {"num_temperatures": 50, "num_particles": 256, "num_replicates": 2}
    by_gradients = mock.patch.multiple(
        MultiAffine, coefficients=lambda self, args: None, monomials=lambda self: None
    )

    def call(model):
        start = time.process_time()
        key = jax.random.key(0)
        ebm.log_normalizer(key, model, method="ais", progress_bar=False, **options)
        return time.process_time() - start

    for model in (dense, network):
        fixed, times = ebm.fixed(model, {}), []
        for _ in range(rounds):
            with by_gradients:
                slow = call(fixed)
            times.append((call(fixed), slow))
        ours, slow = np.min(times, 0)
        text = f"ours {ours:.1f} s   by gradients {slow:.1f} s   ratio {slow / ours:.2f}"
        print(f"log Z of {model.__name__:25s} {text}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-sites", type=int, default=50)
    parser.add_argument("--num-states", type=int, default=21)
    parser.add_argument("--num-rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--log-z", action="store_true")
    args = parser.parse_args()
    if args.log_z:
        return log_z(args.rounds)
    rng = np.random.default_rng(0)
    params = parameters(rng, args.num_sites, args.num_states)
    sizes = {"num_sites": args.num_sites, "num_states": args.num_states}
    x = jnp.asarray(rng.integers(0, args.num_states, (args.num_rows, args.num_sites)))

    def model(data=None, num_rows=1):
        return potts(data, num_rows=num_rows, **sizes)

    print(f"{args.num_sites} sites, {args.num_states} states, {args.num_rows} rows; processor time")
    print(f"{'':34s} {'ours':>12s} {'by hand':>12s}")
    objective = ebm.PseudoLikelihood()
    loss = lambda p, x: objective.loss(jax.random.key(0), p, model, None, x)  # noqa: E731
    compare(
        "pseudo-likelihood and gradient",
        jax.value_and_grad(loss),
        (params, x),
        jax.value_and_grad(loss_by_hand),
        (params, x),
        args.rounds,
        1,
    )
    both = [jax.jit(f)(params, x) for f in (loss, loss_by_hand)]
    assert np.allclose(*both, rtol=1e-4), both
    kwargs = {"num_rows": args.num_rows}
    fixed = ebm.fixed(model, params)
    langevin = ebm.DiscreteLangevin(fixed, 1.0, adapt_step_size=False, differences="exact")
    for name, kernel, by_hand in (
        ("a sweep of BlockGibbs", ebm.BlockGibbs(fixed), gibbs_by_hand),
        ("a step of DiscreteLangevin", langevin, langevin_by_hand),
    ):
        fn, state = chain_of(kernel, kwargs)
        hand = by_hand(params, args.num_rows)
        compare(name, fn, (state,), hand, (jax.random.key(1),), args.rounds, SWEEPS)


if __name__ == "__main__":
    main()
