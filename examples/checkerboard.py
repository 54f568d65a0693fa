# SPDX-License-Identifier: Apache-2.0
"""Learn a Gaussian-Bernoulli RBM on the checkerboard by VaGES denoising score matching.

The settings are those of the VaGES paper: 4 hidden units, Adam with learning rate 1e-3 and betas
(0.9, 0.95), batches of 100, noise 0.05, L = 2 particles, K = 5 guide steps. With two visible and
four hidden units everything can be checked exactly: the test log-likelihood is a sum of 16 terms.

    python examples/checkerboard.py --num-steps 20000 --seed 0 --out checkerboard.png
"""

import argparse
import os
import time

START = time.perf_counter()
# Compile faster, and run small loops in one thread as one program: with a model this small, a CPU
# otherwise spends more time compiling, and handing out operations, than it could win back.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1 "
    "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=3000000",
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from numpyro.infer import MCMC  # noqa: E402
from tqdm import tqdm  # noqa: E402

import numpyro_ebm as ebm  # noqa: E402
from numpyro_ebm.models import (  # noqa: E402
    grbm,
    grbm_guide,
    grbm_log_likelihood,
    grbm_log_normalizer,
)

# Exact test log-likelihood (nats) after 100,000 steps of the same optimiser, three seeds each, from
# benchmarks/checkerboard_optima.py: what this model reaches with nothing estimated.
OPTIMA = {
    "maximum likelihood": (0.335, 0.007),
    "denoising score matching, exact score": (0.327, 0.007),
}
UPPER_BOUND = -ebm.datasets.TOYS["checkerboard"].entropy
NUM_CHECKPOINTS = 25


def main(num_steps=100_000, seed=0, out="checkerboard.png"):
    key_data, key_run, key_sample = jax.random.split(jax.random.key(seed), 3)
    data = np.asarray(ebm.datasets.checkerboard(key_data, 60_000))
    train, test = data[:50_000], data[50_000:]

    adam = optax.adam(1e-3, b1=0.9, b2=0.95)
    svi = ebm.EnergySVI(
        grbm,
        grbm_guide,
        optim=adam,
        loss=ebm.DenoisingScoreMatching(noise_scale=0.05, marginal=ebm.VaGES(num_particles=2)),
        guide_optim=adam,
        num_guide_steps=5,
    )

    @jax.jit
    def test_log_likelihood(params):
        return jnp.mean(grbm_log_likelihood(params, test))

    # Training stops at checkpoints only to look: resumed runs equal one long run bit for bit.
    length = max(1, num_steps // NUM_CHECKPOINTS)
    steps, log_likelihoods, state, done = [], [], None, 0
    with tqdm(total=num_steps, desc="VaGES-DSM") as bar:
        while done < num_steps:
            count = min(length, num_steps - done)
            fit = svi.run(
                key_run, count, train, batch_size=100, init_state=state, progress_bar=False
            )
            state, done = fit.state, done + count
            steps.append(done)
            log_likelihoods.append(float(test_log_likelihood(fit.params)))
            bar.update(count)
            bar.set_postfix_str(f"test log-likelihood {log_likelihoods[-1]:.3f}")
    seconds = {"training": bar.format_dict["elapsed"]}

    print(f"\nExact test log-likelihood after {num_steps:,} steps, in nats per point")
    print(f"  {'VaGES-DSM, this run':<42}{log_likelihoods[-1]:>7.3f}")
    for name, (mean, sd) in OPTIMA.items():
        print(f"  {name:<42}{mean:>7.3f} ± {sd:.3f} after 100,000 steps")
    print(f"  {'the data themselves (ln 2)':<42}{UPPER_BOUND:>7.3f}")

    model = ebm.fixed(grbm, fit.params)
    start = time.perf_counter()
    mcmc, draws = sample(key_sample, model)
    seconds["sampling"] = time.perf_counter() - start

    import arviz as az

    print("\nMALA on the learned density (free energy, hidden units summed out)")
    summary = az.summary(ebm.to_arviz(mcmc))
    print(summary.to_string())
    start = time.perf_counter()
    draw(out, test, fit.params, draws, steps, log_likelihoods)
    seconds["picture"] = time.perf_counter() - start
    seconds["in all"] = time.perf_counter() - START
    print(f"\nWrote {out}. Seconds: " + ", ".join(f"{k} {s:.1f}" for k, s in seconds.items()))
    return log_likelihoods[-1]


def sample(rng_key, model):
    """Draw from the learned density by four chains."""
    mcmc = MCMC(
        ebm.MALA(model),
        num_warmup=500,
        num_samples=2_000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(rng_key)
    return mcmc, np.asarray(mcmc.get_samples()["v"]).reshape(-1, 2)


def draw(out, data, params, draws, steps, log_likelihoods):
    """One picture: data, learned density, samples, log-likelihood against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    limits = (-0.35, 1.35)
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    axes[0].plot(*data[:2000].T, ".", ms=2, color="0.3")
    axes[0].set_title("data")
    model, log_z = ebm.fixed(grbm, params), grbm_log_normalizer(params)
    ebm.plots.density(model, xlim=limits, ylim=limits, log_normalizer=log_z, ax=axes[1])
    axes[1].set_title("learned density")
    axes[2].plot(*draws[:2000].T, ".", ms=2, color="tab:blue")
    axes[2].set_title("MALA samples")
    for axis in axes[:3]:
        axis.set(xlim=limits, ylim=limits, aspect="equal", xlabel="$v_1$", ylabel="")
    axes[0].set_ylabel("$v_2$")
    axes[3].plot(steps, log_likelihoods, color="tab:blue", label="VaGES-DSM")
    for (name, (mean, _)), style in zip(OPTIMA.items(), (":", "--"), strict=True):
        axes[3].axhline(mean, color="0.4", ls=style, lw=1, label=name)
    axes[3].set(title="exact test log-likelihood", xlabel="steps", ylabel="nats per point")
    axes[3].legend(loc="lower right", fontsize=7)
    figure.savefig(out, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=100_000, help="training steps (100,000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--out", default="checkerboard.png", help="where to write the picture")
    arguments = parser.parse_args()
    main(arguments.num_steps, arguments.seed, arguments.out)
