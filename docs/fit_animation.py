# SPDX-License-Identifier: Apache-2.0
"""The animation of the front page: a network learns the density of a pinwheel, frame by frame.

    python docs/fit_animation.py --out docs/fit.gif

Two minutes of two cores.
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpyro
import optax
from matplotlib.animation import FuncAnimation, PillowWriter

import numpyro_ebm as ebm

STEPS, EVERY = 600, 20
FRAME = {"xlim": (-4.0, 4.0), "ylim": (-4.0, 4.0), "num": 120, "colorbar": False}


def layers(rng_key, sizes=(2, 64, 64, 1)):
    keys = jax.random.split(rng_key, len(sizes) - 1)
    return [
        (jax.random.normal(key, (m, n)) / m**0.5, jnp.zeros(n))
        for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def model(data=None):
    *hidden, (last, _) = numpyro.param("layers", layers)
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        features = v
        for weight, bias in hidden:
            features = jax.nn.silu(features @ weight + bias)
        ebm.energy("E", (features @ last)[:, 0] + 0.1 * jnp.sum(v**2, -1))


def main(out="fit.gif", seed=0):
    key_data, key_run = jax.random.split(jax.random.key(seed))
    data = ebm.datasets.pinwheel(key_data, 5_000)
    objective = ebm.MaximumLikelihood(num_nodes=112)
    svi = ebm.EnergySVI(model, None, optax.adam(1e-2), objective)
    frames = []

    def keep(step, state, losses):
        frames.append((step, svi.get_params(state), losses.mean()))

    svi.run(key_run, STEPS, data, batch_size=500, callback=keep, every=EVERY)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.1), dpi=80, layout="constrained")
    left.plot(*data[:2_000].T, ".", color="0.2", markersize=1.5)
    left.set(xlim=FRAME["xlim"], ylim=FRAME["ylim"], aspect="equal", title="data")

    def draw(frame):
        step, params, loss = frame
        right.clear()
        ebm.plots.density(ebm.fixed(model, params), ax=right, **FRAME)
        right.set(title=f"step {step}: {-loss:.2f} nats", xlabel="", ylabel="")

    still = [*frames, *[frames[-1]] * 10]  # the last one stays
    FuncAnimation(figure, draw, still).save(out, writer=PillowWriter(fps=6))
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="fit.gif")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
