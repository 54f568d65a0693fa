# SPDX-License-Identifier: Apache-2.0
"""Deep energies of digits: 8 x 8 images, on a CPU in minutes.

Models of `numpyro_ebm.models`, each by its own recipe:

    mdsm          an energy that is told its noise, by multiscale denoising, drawn by annealing
    recovery      such an energy by recovery likelihood, drawn by annealing
    pcd           an energy by persistent contrastive divergence with a buffer
    jem           a joint energy model of images and labels, drawn class by class
    latent_prior  an energy of latents under a decoder, posterior particles kept for every row
    deep_eblvm    a joint energy of images and latents by VaGES and multiscale denoising

    pip install -e ".[examples,networks]" scikit-learn
    python examples/digits.py pcd --out digits_pcd.png

Draws stand left, the nearest training images right. What is printed stands beside the same figure
of held-out data: how many draws a small classifier names with a confidence above 0.9, the Fréchet
distance in cosine features, a two-sample test, and how often a draw is nearer to a training image
than a held-out image is. Pictures and figures are in the manual.

Data: optical recognition of handwritten digits, E. Alpaydin and C. Kaynak, UCI machine learning
repository (CC BY 4.0), as scikit-learn ships them.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import optax
from numpyro.handlers import block, condition
from numpyro.infer import MCMC
from numpyro.infer.util import log_density

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics import (
    cosine_features,
    frechet_distance,
    nearest_rows,
    two_sample_test,
)

NOISE = 0.15
"""Standard deviation of the noise on images in [-1, 1], which the last step of a draw takes off."""

LEVELS = np.geomspace(3.0, 0.1, 20)
"""Levels of noise, from much wider than the data on."""

models = ebm.models


def load(seed=0):
    """Training and held-out images in (-1, 1), (rows, 64), and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = 2 * ebm.datasets.dequantize(jax.random.key(seed), digits.data, 17) - 1
    order = np.random.default_rng(seed).permutation(len(images))
    labels = jnp.asarray(digits.target)
    return [(images[rows], labels[rows]) for rows in (order[:1_400], order[1_400:])]


def noised(rng_key, images, labels=None, copies=8):
    """Copies of images, each with noise of its own."""
    images = jnp.tile(images, (copies, 1))
    images = images + NOISE * jax.random.normal(rng_key, images.shape)
    return images if labels is None else (images, jnp.tile(labels, copies))


def denoised(model, images, *args):
    """The mean of the clean image given one with noise: v + σ² ∇log p(v)."""
    total = lambda v: log_density(model, (v, *args), {}, {})[0]  # noqa: E731
    return images + NOISE**2 * jax.grad(total)(images)


def adam(num_rounds, rate):
    schedule = optax.cosine_decay_schedule(rate, num_rounds, 0.02)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))


def base(images):
    return dist.Normal(jnp.mean(images, 0), 1.0).to_event(1)


def chains():
    """Persistent chains of images with noise; a step moves them by two thirds of its width."""
    return ebm.ContrastiveDivergence(
        partial(ebm.MALA, step_size=0.01),
        10,
        persistent=True,
        num_chains=128,
        buffer=1_024,
        initial="gaussian",
        reset_probability=0.01,
    )


def gone_on(rng_key, model, v, num_steps):
    """Chains at v after more steps, of a size that they adapt in the first half of them."""
    half = num_steps // 2
    mcmc = MCMC(
        ebm.MALA(model), num_warmup=half, num_samples=half, thinning=half, progress_bar=False
    )
    mcmc.run(rng_key, num_rows=len(v), init_params={"v": v})
    return mcmc.get_samples()["v"][0]


def pcd(keys, images, labels, num_rounds=5_000, temperature=0.5):
    rows = noised(keys[0], images)
    network = models.mlp_network(keys[1], 64, widths=(256, 256))
    model = models.neural_energy(network, 64, base=base(rows))
    svi = ebm.EnergySVI(model, None, adam(num_rounds, 1.5e-3), chains())
    fit = svi.run(keys[2], num_rounds, rows, batch_size=128)
    learned = ebm.fixed(model, fit.params)
    # Some of the chains began anew a moment ago; all go on, cooler, and not for long: cool chains
    # leave the classes with less mass.
    v = fit.state.objective_state.position["v"][::2]
    v = gone_on(keys[3], ebm.temper(learned, 1 / temperature), v, 200)
    return denoised(learned, v), None


def jem(keys, images, labels, num_rounds=3_000):
    rows, classes = noised(keys[0], images, labels)
    network = models.mlp_network(keys[1], 64, num_outputs=10, widths=(256, 256))
    model = models.jem(network, 64, 10, base=base(rows))
    negative = chains()
    objective = negative.on("v") + ebm.PseudoLikelihood().on("y", given="v")
    svi = ebm.EnergySVI(model, None, adam(num_rounds, 1.5e-3), objective)
    fit = svi.run(keys[2], num_rounds, rows, classes, batch_size=128)
    # A chain of v and y | v is a draw of both; each then moves given its class.
    v = objective.state_of(negative, fit.state).objective_state.position["v"]
    y = jax.random.categorical(keys[3], models.jem_logits(network, fit.params, v))
    order = jnp.argsort(y, stable=True)
    v, y = v[order], y[order]
    of_class = ebm.fixed(condition(model, {"y": y}), fit.params)
    mcmc = MCMC(ebm.MALA(of_class), num_warmup=200, num_samples=1, progress_bar=False)
    mcmc.run(keys[4], num_rows=len(v), init_params={"v": v})
    return denoised(of_class, mcmc.get_samples()["v"][0]), y


def latent_prior(keys, images, labels, num_rounds=6_000, num_latents=16):
    decoder = models.mlp_network(
        keys[0], num_latents, num_outputs=64, widths=(256, 256), activation=jax.nn.gelu
    )
    network = models.mlp_network(keys[1], num_latents, widths=(128, 128))
    model = models.latent_prior(network, decoder, num_latents, noise_scale=None)
    posterior = ebm.PersistentParticles(partial(ebm.MALA, step_size=0.01), 1, num_steps=10)
    objective = ebm.ContrastiveDivergence(
        lambda model: ebm.MALA(block(model, hide=["x"]), step_size=0.1),
        10,
        posterior,
        persistent=True,
        num_chains=256,
    )
    svi = ebm.EnergySVI(model, None, adam(num_rounds, 1e-3), objective)
    fit = svi.run(keys[2], num_rounds, images, batch_size=128)
    z = fit.state.objective_state.position["z"]
    with_parameters = ebm.fixed(model, fit.params)
    z = ebm.sample(
        keys[3],
        block(with_parameters, hide=["x"]),
        1,
        kernel=ebm.MALA,
        num_rows=1_000,
        num_chains=1,
        num_warmup=1_000,
        init_params={"z": jnp.tile(z, (4, 1))[:1_000]},
    )["z"][0]
    decode = eqx.combine(fit.params["decoder$params"], decoder)
    return jax.vmap(decode)(z), None  # means of images, without noise


def told_of_noise(rng_key, widths):
    """An energy of images that is told the noise on them."""
    network = models.mlp_network(rng_key, (2, 64), widths=widths)
    return models.noise_conditional_energy(network, 64, data_scale=0.6)


def annealed(rng_key, model, params, num_rows=1_000, **options):
    """Draws from noise down its levels."""
    kernel = ebm.AnnealedLangevin(ebm.fixed(model, params), **options)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=1, progress_bar=False)
    mcmc.run(rng_key, num_rows=num_rows)
    return mcmc.get_samples()["v"][0]


def mdsm(keys, images, labels, num_rounds=6_000):
    model = told_of_noise(keys[0], (256, 256, 256))
    objective = ebm.MultiscaleDenoisingScoreMatching(
        None,
        noise_argument="sigma",
        min_noise_scale=LEVELS[-1],
        max_noise_scale=LEVELS[0],
        spacing="geometric",
        variance_reduction=False,
    )
    svi = ebm.EnergySVI(model, None, adam(num_rounds, 2e-3), objective)
    fit = svi.run(keys[1], num_rounds, images, batch_size=128, ema=0.999)
    options = {"noise_argument": "sigma", "num_steps": 20, "step_size": 0.2}
    return annealed(keys[2], model, fit.ema_params, noise_scales=LEVELS, **options), None


def recovery(keys, images, labels, num_rounds=6_000):
    model = told_of_noise(keys[0], (192, 192, 192))
    levels = np.geomspace(3.0, 0.1, 11)  # ten steps down
    # In training one small step from the data and its mirror image, whose noise cancels.
    objective = ebm.RecoveryLikelihood(
        levels, noise_argument="sigma", num_steps=1, step_size=0.05, antithetic=True
    )
    svi = ebm.EnergySVI(model, None, adam(num_rounds, 2e-3), objective)
    fit = svi.run(keys[1], num_rounds, images, batch_size=128, ema=0.999)
    options = {"noise_argument": "sigma", "num_steps": 40, "step_size": 0.1}
    return annealed(keys[2], model, fit.ema_params, noise_scales=levels[1:], **options), None


class Beside(eqx.Module):
    """A row with features of it beside."""

    network: eqx.Module

    def __call__(self, v):
        return jnp.concatenate([v, self.network(v)])


class Misfit(eqx.Module):
    """½‖v - mean(a)‖²/σ² of a row v and its features a, and a read-out of a and latents."""

    mean: eqx.Module
    readout: eqx.Module
    num_features: int = eqx.field(static=True)

    def __call__(self, both):
        v, rest = both[:64], both[64:]
        distance = jnp.sum((v - self.mean(rest[: self.num_features])) ** 2)
        return 0.5 * distance / NOISE**2 + self.readout(rest)


def deep_eblvm(keys, images, labels, num_rounds=4_500, num_hidden=16):
    mlp, key_mean = models.mlp_network, jax.random.fold_in(keys[2], 1)
    model = models.deep_eblvm(
        Beside(mlp(keys[0], 64, num_outputs=128, widths=(256,))),
        mlp(keys[1], 64 + 128, num_outputs=num_hidden, widths=(128,)),
        Misfit(
            mlp(key_mean, 128, num_outputs=64, widths=(256,)),
            mlp(keys[2], 128 + num_hidden, widths=(128,)),
            128,
        ),
        shape=64,
        latent=num_hidden,
        base=base(images),
    )
    network = mlp(keys[3], 64, num_outputs=2 * num_hidden, widths=(128,))
    guide = models.deep_eblvm_guide(network, num_hidden)
    objective = ebm.MultiscaleDenoisingScoreMatching(
        NOISE,
        ebm.VaGES(2),
        min_noise_scale=0.1,
        max_noise_scale=0.8,
        spacing="geometric",
    )
    optims = [adam(num_rounds, 2e-3) for _ in range(2)]
    svi = ebm.EnergySVI(model, guide, optims[0], objective, guide_optim=optims[1])
    fit = svi.run(keys[4], num_rounds, images, batch_size=128, ema=0.999)
    levels = np.geomspace(1.0, NOISE, 14)
    options = {"noise_scale": NOISE, "num_steps": 300, "step_size": 0.1}
    return annealed(keys[5], model, fit.ema_params, noise_scales=levels, **options), None


METHODS = {f.__name__: f for f in (mdsm, recovery, pcd, jem, latent_prior, deep_eblvm)}


def classifier(rng_key, images, labels, num_rounds=1_500):
    """Class probabilities of images, by a network trained on images with and without noise."""
    network = models.mlp_network(rng_key, 64, num_outputs=10, widths=(128, 128))
    model = models.jem(network, 64, 10)
    rows, classes = noised(rng_key, images, labels)
    rows, classes = jnp.concatenate([images, rows]), jnp.concatenate([labels, classes])
    objective = ebm.PseudoLikelihood().on("y", given="v")
    svi = ebm.EnergySVI(model, None, adam(num_rounds, 1e-3), objective)
    fit = svi.run(rng_key, num_rounds, rows, classes, batch_size=128, progress_bar=False)
    return lambda v: jax.nn.softmax(models.jem_logits(network, fit.params, v))


def report(rng_key, draws, classes, train, held_out, num_rounds=1_500):
    """The figures of the draws, and the same of held-out images; a dict of floats."""
    probabilities = classifier(rng_key, *train, num_rounds)
    sure = lambda x: jnp.mean(jnp.max(probabilities(x), -1) > 0.9)  # noqa: E731
    found = {"sure": sure(draws), "sure, data": sure(held_out[0])}
    if classes is not None:
        named = jnp.argmax(probabilities(draws), -1)
        found["named as its class"] = jnp.mean(named == classes)
        found["named right, data"] = jnp.mean(
            jnp.argmax(probabilities(held_out[0]), -1) == held_out[1]
        )
    keys = jax.random.split(rng_key)
    few = draws[:: max(1, len(draws) // len(held_out[0]))][: len(held_out[0])]
    distance = frechet_distance(keys[0], few, held_out[0], features=cosine_features)
    found["Fréchet"], found["its error"], found["its baseline"] = distance
    found["MMD p-value"] = two_sample_test(keys[1], few, held_out[0]).p_value
    copies = nearest_rows(few, train[0], held_out=held_out[0])
    found["nearer than held-out"], found["error"] = copies.closer
    return {name: float(x) for name, x in found.items()}, copies


def picture(draws, train, copies, out, by_class):
    fig, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    ebm.plots.samples(draws, num=100, num_columns=10, ax=axes[0])
    axes[0].set_title("draws, a class in each column" if by_class else "draws")
    ebm.plots.samples(train[0][copies.nearest[:, 0]], num=100, num_columns=10, ax=axes[1])
    axes[1].set_title("nearest training images")
    fig.savefig(out, dpi=100)


def sheet(seed, draws, classes, out, num=50):
    """Numbered draws in random order, for a reader; the classes go to a text file beside it."""
    order = np.random.default_rng(seed).permutation(len(draws))[:num]
    fig, axes = plt.subplots(num // 10, 10, figsize=(14, 0.16 * num), layout="constrained")
    for i, (ax, row) in enumerate(zip(axes.flat, order, strict=True)):
        image = jnp.clip(draws[row], -1, 1).reshape(8, 8)
        ax.imshow(image, cmap="gray", interpolation="bicubic")
        ax.set_title(str(i), fontsize=8)
        ax.axis("off")
    fig.savefig(out, dpi=80)
    np.savetxt(Path(out).with_suffix(".txt"), np.asarray(classes)[order], fmt="%d")


def main(
    method="pcd",
    num_rounds=None,
    seed=1,
    out="digits.png",
    num_report_rounds=1_500,
    unlabelled=None,
):
    train, held_out = load()
    keys = jax.random.split(jax.random.key(seed), 7)
    start, start_cpu = time.perf_counter(), time.process_time()
    rounds = {} if num_rounds is None else {"num_rounds": num_rounds}
    draws, classes = METHODS[method](keys[:6], *train, **rounds)
    minutes = (time.perf_counter() - start) / 60
    of_processor = (time.process_time() - start_cpu) / 60
    found, _ = report(keys[6], draws, classes, train, held_out, num_report_rounds)
    if classes is None:
        shown = draws[:: max(1, len(draws) // 100)][:100]
    else:  # ten of every class, a column each; of a class with fewer, the last one again
        rows = [np.flatnonzero(np.asarray(classes) == k) for k in range(10)]
        rows = [np.resize(i, 10) if len(i) else np.zeros(10, int) for i in rows]
        shown = draws[np.stack(rows, 1).ravel()]
    if unlabelled:
        sheet(seed, draws, classes, unlabelled)
    copies = nearest_rows(shown, train[0])
    picture(jnp.clip(shown, -1, 1), train, copies, out, classes is not None)
    print(f"{method}: {minutes:.1f} minutes, {of_processor:.1f} of the processor")
    for name, x in found.items():
        print(f"{name:>22}: {x:.3f}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--num-rounds", type=int, default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="digits.png")
    parser.add_argument("--unlabelled", help="of jem: a sheet of draws to be named by a reader")
    args = parser.parse_args()
    if args.unlabelled and args.method != "jem":
        parser.error("--unlabelled needs draws that have classes, those of jem")
    main(args.method, args.num_rounds, args.seed, args.out, unlabelled=args.unlabelled)
