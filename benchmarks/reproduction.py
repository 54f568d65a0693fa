# SPDX-License-Identifier: Apache-2.0
"""Learn a GRBM on the checkerboard by every objective, and log its exact test log-likelihood.

The settings are those of the VaGES paper's comparison: two visible and four hidden units, Adam with
learning rate 1e-3 and betas (0.9, 0.95), batches of 100, 50,000 rows; the likelihood is exact, a
sum of 16 terms. Results are merged into one JSON file, and drawn from there.

    python benchmarks/reproduction.py run --methods DSM CD-1 --num-steps 100000 --seeds 0 1 2
    python benchmarks/reproduction.py draw
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=3000000",
)

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm, grbm_guide, grbm_log_likelihood

BATCH_SIZE, NUM_LOOKS = 100, 50
RESULTS = Path(__file__).parent / "reproduction.json"
NOISE = dist.Normal(0, 1).expand([2]).to_event(1)
PAPER = {"kernel": "rbf", "bandwidth": 0.1, "pairs": "halves"}
RBF = {"kernel": "rbf", "bandwidth": 0.1}


def uniform_guide(data=None):
    """The proposal of IS-KSD: fair coins, whatever v is."""
    with numpyro.plate("data", len(data)):
        numpyro.sample("h", dist.Bernoulli(0.5).expand([4]).to_event(1))


def flow():
    """A Gaussian with full covariance: the simplest flow that can follow the data."""
    loc = numpyro.param("flow_loc", jnp.zeros(2))
    scale = numpyro.param("flow_scale", jnp.eye(2), constraint=dist.constraints.lower_cholesky)
    return dist.MultivariateNormal(loc, scale_tril=scale)


KSD, DSM = ebm.KernelSteinDiscrepancy, partial(ebm.DenoisingScoreMatching, 0.05)


def multiscale(low, high, noise_scale=0.05):
    return partial(
        ebm.MultiscaleDenoisingScoreMatching,
        noise_scale,
        min_noise_scale=low,
        max_noise_scale=high,
        spacing="geometric",
    )


# Name -> (objective, guide).
METHODS = {
    "ML": (lambda: ebm.MaximumLikelihood(num_nodes=48), None),
    "CD-1": (lambda: ebm.ContrastiveDivergence(ebm.BlockGibbs), None),
    "PCD-1": (lambda: ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True), None),
    "SM": (ebm.ScoreMatching, None),
    "SSM": (ebm.SlicedScoreMatching, None),
    "DSM": (DSM, None),
    "MDSM, levels .04 to .06": (multiscale(0.04, 0.06), None),
    "MDSM, levels .03 to .07": (multiscale(0.03, 0.07), None),
    "MDSM, levels .05 to 1": (multiscale(0.05, 1.0), None),
    "MDSM, each its own, .05 to 1": (multiscale(0.05, 1.0, None), None),
    "MDSM, each its own, .015 to 1": (multiscale(0.015, 1.0, None), None),
    "MDSM, each its own, .01 to 1": (multiscale(0.01, 1.0, None), None),
    "VaGES-DSM": (lambda: DSM(ebm.VaGES(2)), grbm_guide),
    "VaGES-MDSM, levels .04 to .06": (lambda: multiscale(0.04, 0.06)(ebm.VaGES(2)), grbm_guide),
    "VaGES-MDSM, each its own, .01 to 1": (
        lambda: multiscale(0.01, 1.0, None)(ebm.VaGES(2)),
        grbm_guide,
    ),
    "VaGES-SSM": (lambda: ebm.SlicedScoreMatching(1, ebm.VaGES(3)), grbm_guide),
    "BiDSM, N=5": (lambda: DSM(ebm.Unrolled(5)), grbm_guide),
    "BiDSM, N=0": (lambda: DSM(ebm.Unrolled(0)), grbm_guide),
    "BiSSM, N=5": (lambda: ebm.SlicedScoreMatching(1, ebm.Unrolled(5)), grbm_guide),
    "NCE": (lambda: ebm.NCE(NOISE, init_log_normalizer=0.0), None),
    "NCE, log Z started by the noise": (lambda: ebm.NCE(NOISE), None),
    "VNCE": (
        lambda: ebm.NCE(NOISE, 1, ebm.ImportanceBound(5), init_log_normalizer=0.0),
        grbm_guide,
    ),
    "RankingNCE": (lambda: ebm.RankingNCE(NOISE), None),
    "ConditionalNCE": (lambda: ebm.ConditionalNCE(0.3), None),
    "FCE": (lambda: ebm.FlowContrastive(flow, likelihood_weight=0.1), None),
    "ED": (lambda: ebm.EnergyDiscrepancy(0.3), None),
    "Fisher": (lambda: ebm.FisherDivergence(num_critic_steps=3), None),
    "KSD": (lambda: KSD(**PAPER), None),
    "KSD, all pairs": (lambda: KSD(**RBF), None),
    "KSD, all pairs, median": (KSD, None),
    "KSD, all pairs, IMQ": (lambda: KSD(kernel="imq", bandwidth=0.1), None),
    "VaGES-KSD, all pairs, L=2": (lambda: KSD(ebm.VaGES(2), **RBF), grbm_guide),
}
for num in (2, 5, 10):
    METHODS[f"VaGES-KSD, L={num}"] = (
        lambda num=num: KSD(ebm.VaGES(num), **PAPER),
        grbm_guide,
    )
    METHODS[f"IS-KSD, L={num}"] = (
        lambda num=num: KSD(ebm.ImportanceBound(num), **PAPER),
        uniform_guide,
    )


def learn(name, seed, num_steps, learning_rate):
    """Steps, exact test log-likelihoods and seconds (with and without compilation) of one run."""
    make, guide = METHODS[name]
    train = ebm.datasets.checkerboard(jax.random.key(100 + seed), 50_000)
    test = ebm.datasets.checkerboard(jax.random.key(200 + seed), 10_000)
    adam = optax.adam(learning_rate, b1=0.9, b2=0.95)
    num_guide_steps = 5 if guide is grbm_guide else 1
    svi = ebm.EnergySVI(
        grbm,
        guide,
        adam,
        make(),
        guide_optim=None if guide is None else adam,
        num_guide_steps=num_guide_steps,
    )
    evaluate = jax.jit(lambda params: jnp.mean(grbm_log_likelihood(params, test)))
    steps, values, state = [], [], None
    begin = time.perf_counter()
    for look in range(NUM_LOOKS):
        fit = svi.run(
            jax.random.key(seed),
            num_steps // NUM_LOOKS,
            train,
            batch_size=BATCH_SIZE,
            init_state=state,
            progress_bar=False,
        )
        state = fit.state
        steps.append((look + 1) * (num_steps // NUM_LOOKS))
        values.append(float(evaluate({k: fit.params[k] for k in ("W", "b", "c", "scale")})))
        if look == 0:
            after_first = time.perf_counter()
    end = time.perf_counter()
    per_second = (steps[-1] - steps[0]) / (end - after_first)
    return {
        "steps": steps,
        "log_likelihood": values,
        "seconds": end - begin,
        "steps_per_second": per_second,
    }


def run(methods, seeds, num_steps, learning_rate, results=RESULTS):
    found = json.loads(results.read_text()) if results.exists() else {}
    for name in methods:
        for seed in seeds:
            one = learn(name, seed, num_steps, learning_rate)
            label = name if learning_rate == 1e-3 else f"{name}, lr {learning_rate:g}"
            found = json.loads(results.read_text()) if results.exists() else {}
            found.setdefault(label, {})[str(seed)] = one
            results.write_text(json.dumps(found))
            print(
                f"{label:<28} seed {seed}: {one['log_likelihood'][-1]:.4f} at {num_steps:,} steps "
                f"(best {max(one['log_likelihood']):.4f}), {one['seconds']:.0f} s, "
                f"{one['steps_per_second']:,.0f} steps/s",
                flush=True,
            )


PANELS = {
    "likelihood and scores": [
        "ML",
        "CD-1",
        "PCD-1",
        "SM",
        "SSM",
        "DSM",
        "MDSM, each its own, .015 to 1",
        "Fisher",
    ],
    "latents by a guide": ["DSM", "VaGES-DSM", "VaGES-SSM", "BiDSM, N=5", "BiSSM, N=5", "VNCE"],
    "noise contrast and energy discrepancy": ["NCE", "RankingNCE", "ConditionalNCE", "FCE", "ED"],
    "Stein discrepancies": [
        "KSD, all pairs",
        "KSD, all pairs, IMQ",
        "VaGES-KSD, all pairs, L=2",
        "KSD",
        "VaGES-KSD, L=2",
        "IS-KSD, L=2",
    ],
}
MARKS = (10_000, 20_000, 50_000, 60_000, 100_000)


def table(found):
    """A row for each method: log-likelihood at the marks, and when it first passes 0.32."""
    print("| method | " + " | ".join(f"{n // 1000}k" for n in MARKS) + " | first ≥ 0.32 | seeds |")
    print("|---|" + "---|" * (len(MARKS) + 2))
    for name in [*METHODS, *(set(found) - set(METHODS))]:
        if name not in found:
            continue
        runs = found[name].values()
        cells = []
        for mark in MARKS:
            values = [dict(zip(r["steps"], r["log_likelihood"], strict=True))[mark] for r in runs]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        first = [
            next((n for n, x in zip(r["steps"], r["log_likelihood"], strict=True) if x >= 0.32), 0)
            for r in runs
        ]
        when = f"{np.mean(first):,.0f}" if all(first) else "not by all" if any(first) else "never"
        print(f"| {name} | " + " | ".join(cells) + f" | {when} | {len(first)} |")


def draw(results, out):
    import matplotlib.pyplot as plt

    found = json.loads(results.read_text())
    table(found)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for axis, (title, names) in zip(axes.ravel(), PANELS.items(), strict=True):
        for name in [name for name in names if name in found]:
            runs = list(found[name].values())
            steps = np.asarray(runs[0]["steps"]) / 1000
            curves = np.asarray([run["log_likelihood"] for run in runs])
            (line,) = axis.plot(steps, curves.mean(0), label=name)
            low, high = curves.min(0), curves.max(0)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.axhline(0.335, color="0.4", linestyle=":", linewidth=1)
        axis.set(title=title, ylim=(-0.8, 0.38))
        axis.legend(fontsize=8, loc="lower right", frameon=False)
    last = axes[1, 1]  # where importance sampling falls off, and leaves room on the left
    last.set_ylim(-1.6, 0.38)
    last.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.08, 0.0), frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("thousand steps")
    for axis in axes[:, 0]:
        axis.set_ylabel("exact test log-likelihood, nats")
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    learner = commands.add_parser("run")
    learner.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME")
    learner.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    learner.add_argument("--num-steps", type=int, default=100_000)
    learner.add_argument("--learning-rate", type=float, default=1e-3)
    learner.add_argument("--results", type=Path, default=RESULTS)
    artist = commands.add_parser("draw")
    artist.add_argument("--results", type=Path, default=RESULTS)
    artist.add_argument("--out", type=Path, default=Path("reproduction.png"))
    arguments = parser.parse_args()
    if arguments.command == "draw":
        draw(arguments.results, arguments.out)
        raise SystemExit
    run(
        arguments.methods,
        arguments.seeds,
        arguments.num_steps,
        arguments.learning_rate,
        arguments.results,
    )
