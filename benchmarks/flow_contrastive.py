# SPDX-License-Identifier: Apache-2.0
"""Flow contrastive estimation on two-dimensional toys: the energy beside its flow.

An energy network is learned against a coupling flow (of flowjax, `pip install flowjax`) that learns
beside it. Both log-likelihoods are those of held-out rows; the energy's log Z is a quadrature.

    python benchmarks/flow_contrastive.py --toys moons eight_gaussians
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpyro
import optax

import numpyro_ebm as ebm


def network(data=None, *, width=128):
    """Energy: a bowl minus a smooth network with two hidden layers."""
    layers = []
    for i, (inputs, outputs) in enumerate([(2, width), (width, width), (width, 1)]):
        scale = (2.0 / inputs) ** 0.5 if outputs > 1 else 0.01
        weights = numpyro.param(
            f"weights_{i}",
            lambda key, shape=(inputs, outputs), scale=scale: scale * jax.random.normal(key, shape),
        )
        layers.append((weights, numpyro.param(f"bias_{i}", jnp.zeros(outputs))))
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        x = v
        for weights, bias in layers[:-1]:
            x = jax.nn.silu(x @ weights + bias)
        weights, bias = layers[-1]
        ebm.energy("E", 0.125 * jnp.sum(v**2, -1) - (x @ weights + bias)[..., 0])


def coupling_flow(rng_key):
    """A stack of affine couplings, as in the paper."""
    import flowjax.distributions as distributions
    from flowjax.flows import coupling_flow

    base = distributions.Normal(jnp.zeros(2))
    return coupling_flow(rng_key, base_dist=base, flow_layers=6, nn_width=64)


def compare(toy, num_steps, batch_size, seed):
    train = getattr(ebm.datasets, toy)(jax.random.key(seed), 50_000)
    test = getattr(ebm.datasets, toy)(jax.random.key(seed + 1), 5_000)
    center, scale = train.mean(0), train.std(0)
    train, test = (train - center) / scale, (test - center) / scale
    objective = ebm.FlowContrastive(
        coupling_flow(jax.random.key(seed + 2)),
        flow_optim=optax.adam(optax.cosine_decay_schedule(1e-3, num_steps)),
        likelihood_weight=1.0,
    )
    svi = ebm.EnergySVI(
        network, None, optax.adam(optax.cosine_decay_schedule(5e-3, num_steps)), objective
    )
    start = time.perf_counter()
    fit = svi.run(jax.random.key(seed), num_steps, train, batch_size=batch_size, progress_bar=False)
    seconds = time.perf_counter() - start
    flow = objective.noise_distribution(fit.params, network, train[:1])
    exact = ebm.MaximumLikelihood(num_nodes=400)
    of_energy = -exact.loss(jax.random.key(0), fit.params, network, None, test)
    of_flow = jnp.mean(flow.log_prob(test))
    log_z = -of_energy + exact_mean_log_density(fit.params, test)
    print(
        f"{toy}: energy {of_energy:.4f}, flow {of_flow:.4f} nats a row; learned log Z "
        f"{fit.params['log_normalizer']:.3f}, quadrature {log_z:.3f}; {num_steps:,} steps in "
        f"{seconds:.0f} s",
        flush=True,
    )
    return float(of_energy), float(of_flow)


def exact_mean_log_density(params, test):
    from numpyro_ebm.model.reading import read_model

    joint = read_model(network, (test,), {}, params)
    return jnp.mean(joint.log_density(params, {"v": test}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toys", nargs="+", default=["moons", "eight_gaussians"])
    parser.add_argument("--num-steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for toy in arguments.toys:
        compare(toy, arguments.num_steps, arguments.batch_size, arguments.seed)
