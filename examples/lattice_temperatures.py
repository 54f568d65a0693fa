# SPDX-License-Identifier: Apache-2.0
"""The unknown temperature of a lattice: Ising and Potts, by exchange and by pseudo-likelihood.

A 4 x 4 torus of Ising spins is small enough for the exact posterior (all 65,536 states). An 8 x 8
one of Potts spins is not, and there exchange with block Gibbs draws stands beside the generalised
posterior of the pseudo-likelihood.

    python examples/lattice_temperatures.py --num-samples 500 --out lattice_temperatures.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm


def lattice(data=None, *, size=4, num_values=2, num_rows=1):
    beta = numpyro.sample("beta", dist.Uniform(0.0, 1.0))
    with numpyro.plate("data", num_rows if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(num_values, event_shape=(size, size)), obs=data)
        equal = sum(_equal(v, jnp.roll(v, 1, axis), num_values) for axis in (-1, -2))
        ebm.energy("E", -2 * beta * jnp.sum(equal, (-1, -2)))


def _equal(a, b, num_values):
    if num_values == 2:  # bilinear, so that units can be coloured and drawn together
        return a * b + (1 - a) * (1 - b)
    return jnp.sum(jax.nn.one_hot(a, num_values) * jax.nn.one_hot(b, num_values), -1)


def run(kernel, rng_key, num_samples, *args, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_samples // 2,
        num_samples=num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(rng_key, *args, **kwargs)
    return mcmc


def main(num_samples=500, seed=0, out="lattice_temperatures.png"):
    keys = jax.random.split(jax.random.key(seed), 6)
    small, large = {"size": 4}, {"size": 8, "num_values": 3}
    truth = {"small": 0.3, "large": 0.4}
    spins = ebm.sample(
        keys[0], ebm.fixed(lattice, {"beta": truth["small"]}), 1, num_rows=5, **small
    )["v"][0]
    colours = ebm.sample(
        keys[1], ebm.fixed(lattice, {"beta": truth["large"]}), 1, num_rows=1, **large
    )["v"][0]

    runs = {
        "Ising 4 x 4, five lattices": {
            "exact (enumerated)": run(
                NUTS(ebm.normalized(lattice, "enumerate")), keys[2], num_samples, spins, **small
            ),
            "exchange": run(
                ebm.Exchange(lattice, ebm.BlockGibbs, 50), keys[3], num_samples, spins, **small
            ),
            "pseudo-likelihood, calibrated": run(
                NUTS(ebm.generalized(lattice, ebm.PseudoLikelihood(), "calibrate")),
                keys[4],
                num_samples,
                spins,
                **small,
            ),
        },
        "Potts 8 x 8, one lattice": {
            "exchange": run(
                ebm.Exchange(lattice, ebm.BlockGibbs, 300), keys[3], num_samples, colours, **large
            ),
            "pseudo-likelihood, β = 1": run(
                NUTS(ebm.generalized(lattice, ebm.PseudoLikelihood())),
                keys[4],
                num_samples,
                colours,
                **large,
            ),
        },
    }
    found = {}
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, (title, of_routes), beta in zip(axes, runs.items(), truth.values(), strict=True):
        for name, mcmc in of_routes.items():
            draws = found[title, name] = np.asarray(mcmc.get_samples()["beta"])
            print(f"{title}, {name:30} {draws.mean():.3f} ± {draws.std():.3f}")
            if name == "exchange":
                adequacy = ebm.auxiliary_adequacy(mcmc)
                print(f"    auxiliary lattices forget the data: {adequacy.is_adequate}")
            ax.hist(draws, bins=25, density=True, histtype="step", label=name)
        ax.axvline(beta, color="k", lw=1, label="truth")
        ax.set(title=title, xlabel="inverse temperature", yticks=[])
        ax.legend(fontsize=8)
    fig.savefig(out, dpi=150)
    plt.close(fig)
    return truth, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="lattice_temperatures.png")
    main(**vars(parser.parse_args()))
