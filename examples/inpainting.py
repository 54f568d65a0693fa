# SPDX-License-Identifier: Apache-2.0
"""The lower half of a digit from its upper half: a restricted Boltzmann machine, by PCD.

Handwritten digits of 8 x 8 pixels, black or white. The two halves are two sites of one model, so
that whatever is observed stays, and block Gibbs draws the rest. Guesses are held against those of
the mean image and of the nearest image of the training set.

    pip install scikit-learn    # brings the digits
    python examples/inpainting.py --num-steps 6000 --out inpainting.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import optax

import numpyro_ebm as ebm

HALF = 32


def machine(upper=None, lower=None, *, num_hidden=96, num_rows=1):
    W = numpyro.param("W", lambda key: 0.05 * jax.random.normal(key, (2 * HALF, num_hidden)))
    b, c = numpyro.param("b", jnp.zeros(2 * HALF)), numpyro.param("c", jnp.zeros(num_hidden))
    with numpyro.plate("digits", num_rows if upper is None else len(upper)):
        upper = numpyro.sample("upper", ebm.Counting(2, (HALF,)), obs=upper)
        lower = numpyro.sample("lower", ebm.Counting(2, (HALF,)), obs=lower)
        h = numpyro.sample("h", ebm.Counting(2, (num_hidden,))).astype(float)
        v = jnp.concatenate([upper, lower], -1).astype(float)
        ebm.energy("E", -v @ b - h @ c - jnp.sum((v @ W) * h, -1))


def main(num_steps=6_000, num_hidden=96, seed=0, out="inpainting.png"):
    from sklearn.datasets import load_digits

    images = (load_digits().data > 7).astype(int)
    images = images[np.random.default_rng(seed).permutation(len(images))]
    train, test = images[:-300], images[-300:]
    key_run, key_draw = jax.random.split(jax.random.key(seed))
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, 5, persistent=True)
    optim = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))
    svi = ebm.EnergySVI(machine, None, optim, objective)
    halves = train[:, :HALF], train[:, HALF:]
    options = {"batch_size": 128, "progress_bar": False, "num_hidden": num_hidden}
    fit = svi.run(key_run, num_steps, *halves, **options)

    model = ebm.fixed(machine, fit.params)
    draws = ebm.sample(key_draw, model, 64, test[:, :HALF], num_hidden=num_hidden, num_warmup=100)
    draws = np.asarray(draws["lower"])  # (draws, rows, pixels)
    far = (train[None, :, :HALF] != test[:, None, :HALF]).sum(-1)
    guesses = {
        "mean image": np.broadcast_to(train[:, HALF:].mean(0), test[:, HALF:].shape),
        "nearest image": train[far.argmin(-1), HALF:],
        "machine": draws.mean(0),
    }
    wrong = {k: float(((p > 0.5) != test[:, HALF:]).mean()) for k, p in guesses.items()}
    print("pixels of the lower half that are wrong, 300 new digits")
    for name, rate in wrong.items():
        print(f"  {name:16}{rate:.3f}")
    draw(out, test, draws, guesses["machine"])
    return wrong


def draw(out, test, draws, mean):
    """A column for each digit: itself, what is seen, the mean guess, and three draws."""
    chosen = slice(0, 14)
    seen = np.concatenate([test[chosen, :HALF], np.full((14, HALF), 0.35)], -1)
    lowers = {"digit": test[chosen, HALF:], "mean": mean[chosen]}
    lowers |= {f"draw {i + 1}": draws[20 * i, chosen] for i in range(3)}
    rows = {k: np.concatenate([test[chosen, :HALF], low], -1) for k, low in lowers.items()}
    rows = {"digit": rows.pop("digit"), "seen": seen, **rows}
    fig, axes = plt.subplots(len(rows), 1, figsize=(9, 0.75 * len(rows)), layout="constrained")
    for ax, (name, sheet) in zip(axes, rows.items(), strict=True):
        ebm.plots.samples(sheet, num_columns=14, cmap="gray_r", ax=ax)
        ax.text(-1.5, 4, name, ha="right", va="center")
    fig.savefig(out, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-steps", type=int, default=6_000)
    parser.add_argument("--num-hidden", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="inpainting.png")
    main(**vars(parser.parse_args()))
