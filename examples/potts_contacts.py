# SPDX-License-Identifier: Apache-2.0
"""Which sites touch? Contacts of a Potts model by pseudo-likelihood, beside mutual information.

Twenty couplings are planted among the 120 pairs of sixteen sites with four letters each. Sites
that touch a common third one go together as well: mutual information ranks such pairs high, and
the couplings of a fitted Potts model do not.

    python examples/potts_contacts.py --num-rows 2000 --out potts_contacts.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import optax

import numpyro_ebm as ebm

SITES, LETTERS, CONTACTS = 16, 4, 20
PAIRS = np.triu_indices(SITES, 1)


def potts(data=None):
    h = numpyro.param("h", jnp.zeros((SITES, LETTERS)))
    J = numpyro.param("J", jnp.zeros((len(PAIRS[0]), LETTERS, LETTERS)))
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(LETTERS, (SITES,)), obs=data)
        o = jax.nn.one_hot(v, LETTERS)  # (rows, sites, letters)
        pairs = jnp.einsum("...pa,pab,...pb->...", o[..., PAIRS[0], :], J, o[..., PAIRS[1], :])
        ebm.energy("E", -jnp.sum(o * h, (-1, -2)) - pairs)


def planted(rng):
    """Couplings of the contacts, rows and columns summing to zero, and who touches whom."""
    touching = np.zeros(len(PAIRS[0]), bool)
    touching[rng.choice(len(touching), CONTACTS, replace=False)] = True
    J = 1.2 * rng.normal(size=(len(touching), LETTERS, LETTERS)) * touching[:, None, None]
    h = 0.5 * rng.normal(size=(SITES, LETTERS))
    return {"J": jnp.asarray(zero_sum(J)), "h": jnp.asarray(h)}, touching


def zero_sum(J):
    """The gauge in which fields take all they can."""
    return (
        J - J.mean(-1, keepdims=True) - J.mean(-2, keepdims=True) + J.mean((-1, -2), keepdims=True)
    )


def corrected(score):
    """Average product correction: what a pair has beyond its two sites' own means."""
    F = np.zeros((SITES, SITES))
    F[PAIRS] = score
    F = F + F.T
    mean = F.sum(0) / (SITES - 1)
    return (F - np.outer(mean, mean) / mean.mean())[PAIRS]


def mutual_information(v):
    o = np.eye(LETTERS)[v]
    joint = np.einsum("npa,npb->pab", o[:, PAIRS[0]], o[:, PAIRS[1]]) / len(v) + 1e-9
    product = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    return (joint * np.log(joint / product)).sum((-1, -2))


def main(num_rows=2_000, num_steps=400, seed=0, out="potts_contacts.png"):
    truth, touching = planted(np.random.default_rng(seed))
    key_data, key_run = jax.random.split(jax.random.key(seed))
    data = ebm.sample(
        key_data, ebm.fixed(potts, truth), num_rows, kernel=ebm.BlockGibbs, num_chains=num_rows
    )["v"][:, 0]
    svi = ebm.EnergySVI(potts, None, optax.adam(0.02), ebm.PseudoLikelihood())
    fit = svi.run(key_run, num_steps, data, progress_bar=False)

    strength = np.sqrt((zero_sum(np.asarray(fit.params["J"])) ** 2).sum((-1, -2)))
    scores = {
        "Potts couplings": corrected(strength),
        "mutual information": mutual_information(np.asarray(data)),
    }
    precision = {}
    for name, score in scores.items():
        best = np.argsort(-score)[:CONTACTS]
        precision[name] = touching[best].mean()
        print(f"{name:20} {touching[best].sum()} of the first {CONTACTS} pairs are contacts")
    slope = np.polyfit(
        np.ravel(truth["J"][touching]), np.ravel(zero_sum(fit.params["J"])[touching]), 1
    )[0]
    print(f"slope of fitted against planted couplings {slope:.2f}")
    draw(out, truth, touching, scores, fit.params)
    return precision, slope


def draw(out, truth, touching, scores, params):
    fig, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for ax, (name, score) in zip(axes, scores.items(), strict=False):
        shown = np.full((SITES, SITES), np.nan)
        shown[PAIRS] = score
        shown.T[PAIRS] = score
        ax.imshow(shown, cmap="Greys", vmin=0, vmax=np.quantile(score, 0.98))
        i, j = np.stack(PAIRS)[:, touching]
        ax.plot(j, i, "o", mec="C3", mfc="none", ms=8, label="planted contact")
        best = np.argsort(-score)[:CONTACTS]
        i, j = np.stack(PAIRS)[:, best]
        ax.plot(i, j, "x", color="C0", ms=6, label=f"first {CONTACTS}")
        ax.set(title=name, xlabel="site", ylabel="site")
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, -0.35), ncols=2, fontsize=8)
    x, y = np.ravel(truth["J"]), np.ravel(zero_sum(np.asarray(params["J"])))
    axes[2].plot(x, y, ".", ms=3)
    axes[2].axline((0, 0), slope=1, color="k", lw=1)
    axes[2].set(xlabel="planted", ylabel="fitted", title="Couplings")
    fig.savefig(out, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-rows", type=int, default=2_000)
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="potts_contacts.png")
    main(**vars(parser.parse_args()))
