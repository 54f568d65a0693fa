# SPDX-License-Identifier: Apache-2.0
"""An energy of 28 x 28 images: digits that a pen could have written, simulated.

    pip install -e ".[examples,networks]"
    python examples/pen_digits.py --out pen_digits.png

Every digit is a line through a few points, bent, slanted, turned, scaled, moved and drawn with a
pen of some width, so that there are as many images as one likes and nothing is downloaded. The
energy is of their hundred principal components. It is told the noise on them, learns by multiscale
denoising (no chains in training), and draws from noise down its levels. What is printed stands
beside the same figure of new images: how many draws a small classifier names with a confidence
above 0.9, the Fréchet distance in cosine features, and how often a draw is nearer to a training
image than a new one is (of which the same components are kept).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from numpyro.infer import MCMC

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics import cosine_features, frechet_distance, nearest_rows

SIDE = 28
LEVELS = np.geomspace(6.0, 0.1, 24)
models = ebm.models


def arc(x, y, width, height, start, end):
    """Points on an ellipse, from one angle to another; 0 is right, 90 down."""
    angles = np.radians(np.linspace(start, end, 24))
    return [(x + width * np.cos(a), y + height * np.sin(a)) for a in angles]


LINES = (
    arc(0, 0, 0.6, 1, -90, 270),
    [(-0.35, -0.6), (0.1, -1), (0.1, 1)],
    [*arc(0, -0.45, 0.55, 0.55, 190, 390), (-0.6, 1), (0.65, 1)],
    arc(0, -0.5, 0.5, 0.5, 200, 450) + arc(0, 0.5, 0.55, 0.5, 270, 520),
    [(0.25, 1), (0.25, -1), (-0.65, 0.4), (0.7, 0.4)],
    [(0.55, -1), (-0.4, -1), (-0.5, -0.1), *arc(0, 0.4, 0.55, 0.6, 235, 500)],
    [(0.35, -1), (-0.2, -0.5), (-0.48, 0.2), *arc(0, 0.45, 0.5, 0.55, 190, 550)],
    [(-0.55, -1), (0.55, -1), (-0.15, 1)],
    arc(0, -0.5, 0.42, 0.5, 90, 450) + arc(0, 0.5, 0.52, 0.5, 270, 630),
    [*arc(0, -0.45, 0.5, 0.55, 0, 360), (0.35, 1)],
)
"""The ten digits, in the square from -1 to 1 whose second coordinate points down."""


def evenly(line, num=33):
    """Points at equal distances along a line."""
    line = np.array(line)
    along = np.append(0, np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1)))
    at = np.linspace(0, along[-1], num)
    return np.stack([np.interp(at, along, x) for x in line.T], -1)


POINTS = jnp.array([evenly(line) for line in LINES])


def draw_digit(rng_key, label):
    """One image with values in [0, 1], (28, 28)."""
    keys = jax.random.split(rng_key, 6)
    p = POINTS[label]
    waves = jax.random.normal(keys[0], (2, 2))  # a bend of each coordinate along the other
    p = p + 0.08 * jnp.sin(2.0 * p[:, ::-1] + 3 * waves[0]) * waves[1]
    turn, slant = jax.random.normal(keys[1], (2,)) * jnp.array([0.1, 0.15])
    stretch = jnp.exp(0.1 * jax.random.normal(keys[2], (2,)))
    turned = jnp.array([[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]])
    p = (p * stretch) @ jnp.array([[1.0, 0.0], [-slant, 1.0]]) @ turned.T
    p = SIDE / 2 + 9 * p + jax.random.normal(keys[3], (2,))
    start, way = p[:-1], jnp.diff(p, axis=0)
    pixel = jnp.stack(jnp.meshgrid(*[jnp.arange(SIDE) + 0.5] * 2), -1)[..., None, :]
    part = jnp.sum((pixel - start) * way, -1) / jnp.sum(way**2, -1)
    nearest = start + jnp.clip(part, 0, 1)[..., None] * way
    distance = jnp.min(jnp.linalg.norm(pixel - nearest, axis=-1), -1)
    return jnp.clip(jax.random.uniform(keys[4], (), float, 1.3, 2.0) - distance, 0, 1)


def pen_digits(rng_key, num):
    """Images within (0, 1), (num, 28, 28), and labels."""
    keys = jax.random.split(rng_key, 3)
    labels = jax.random.randint(keys[0], (num,), 0, 10)
    draw = jax.jit(lambda args: jax.lax.map(lambda x: draw_digit(*x), args, batch_size=50))
    grey = jnp.round(255 * draw((jax.random.split(keys[1], num), labels)))
    return ebm.datasets.dequantize(keys[2], grey, 256), labels


def principal_components(images, num=100):
    """The mean image, the directions of largest variance, and the share of it that they hold."""
    rows = images.reshape(len(images), -1)
    mean = jnp.mean(rows, 0)
    _, scales, directions = jnp.linalg.svd(rows - mean, full_matrices=False)
    return mean, directions[:num], jnp.sum(scales[:num] ** 2) / jnp.sum(scales**2)


def adam(num_rounds, rate):
    schedule = optax.cosine_decay_schedule(rate, num_rounds, 0.02)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))


def train(keys, rows, num_rounds):
    size = rows.shape[1]
    # Of a row, and the level of noise on it.
    network = models.mlp_network(keys[0], (2, size), widths=(384, 384, 384))
    model = models.noise_conditional_energy(network, size, data_scale=float(jnp.std(rows)))
    objective = ebm.MultiscaleDenoisingScoreMatching(
        None,
        noise_argument="sigma",
        min_noise_scale=LEVELS[-1],
        max_noise_scale=LEVELS[0],
        spacing="geometric",
        variance_reduction=False,
    )
    svi = ebm.EnergySVI(model, None, adam(num_rounds, 1.5e-3), objective)
    fit = svi.run(keys[1], num_rounds, rows, batch_size=128, ema=0.998)
    return ebm.fixed(model, fit.ema_params)


def draw(rng_key, model, num):
    kernel = ebm.AnnealedLangevin(
        model, noise_scales=LEVELS, noise_argument="sigma", num_steps=20, step_size=0.2
    )
    mcmc = MCMC(kernel, num_warmup=0, num_samples=1, progress_bar=False)
    mcmc.run(rng_key, num_rows=num)
    return mcmc.get_samples()["v"][0]


def classifier(rng_key, images, labels, num_rounds=1_000):
    """Class probabilities of images."""
    network = models.mlp_network(rng_key, (SIDE, SIDE), num_outputs=10, widths=(128,))
    model = models.jem(network, (SIDE, SIDE), 10)
    objective = ebm.PseudoLikelihood().on("y", given="v")
    svi = ebm.EnergySVI(model, None, adam(num_rounds, 1e-3), objective)
    fit = svi.run(rng_key, num_rounds, images, labels, batch_size=128, progress_bar=False)
    return lambda v: jax.nn.softmax(models.jem_logits(network, fit.params, v))


def report(rng_key, draws, images, labels, new, new_kept):
    """The figures of the draws, and the same of new images; a dict of floats."""
    probabilities = classifier(rng_key, images, labels)
    sure = lambda x: jnp.mean(jnp.max(probabilities(x), -1) > 0.9)  # noqa: E731
    found = {"sure": sure(draws), "sure, new images": sure(new)}
    found["classes drawn"] = len(np.unique(jnp.argmax(probabilities(draws), -1)))
    distance = frechet_distance(rng_key, draws, new, features=cosine_features)
    found["Fréchet"], found["its error"], found["its baseline"] = distance
    found["nearer than new images"], found["error"] = nearest_rows(
        draws, images, held_out=new_kept
    ).closer
    return {name: float(x) for name, x in found.items()}


def main(num_rounds=5_000, num_images=4_000, num_draws=200, seed=1, out="pen_digits.png"):
    keys = jax.random.split(jax.random.key(seed), 6)
    images, labels = pen_digits(keys[0], num_images)
    new, _ = pen_digits(keys[1], num_draws)
    mean, directions, share = principal_components(images)
    components = lambda x: (x.reshape(len(x), -1) - mean) @ directions.T  # noqa: E731
    restored = lambda rows: (rows @ directions + mean).reshape(-1, SIDE, SIDE)  # noqa: E731
    start = time.perf_counter()
    model = train(keys[2:4], components(images), num_rounds)
    minutes = (time.perf_counter() - start) / 60
    draws = restored(draw(keys[4], model, num_draws))
    found = {"share of the variance": float(share)}
    found |= report(keys[5], draws, images, labels, new, restored(components(new)))
    fig, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for ax, some, title in zip(axes, (draws, new), ("draws", "new images"), strict=True):
        ebm.plots.samples(jnp.clip(some, 0, 1), num=64, num_columns=8, ax=ax)
        ax.set_title(title)
    fig.savefig(out, dpi=100)
    print(f"trained in {minutes:.1f} minutes")
    for name, x in found.items():
        print(f"{name:>22}: {x:.3f}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-rounds", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="pen_digits.png")
    args = parser.parse_args()
    main(args.num_rounds, seed=args.seed, out=args.out)
