# SPDX-License-Identifier: Apache-2.0
"""Every objective, once: what the laws over all objectives have to know of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
from numpyro.distributions import constraints

import numpyro_ebm as ebm

ANY = ("Exact", "Enumerated", "VaGES", "ImportanceBound", "Unrolled")
VALUE = ("Exact", "Enumerated")
BOUND = (*VALUE, "ImportanceBound")


class Formula(NamedTuple):
    """A loss in closed form.

    - **make** - marginal -> objective.
    - **expected** - the loss, everything random integrated out. For real sites: system -> loss of
      the parameters. For discrete sites: (log p̃ of all states, one axis a coordinate; indices of
      the rows, (rows, coordinates)) -> losses of the rows.
    - **at** - (system, levels, noise) -> the loss at given noise, for objectives that have noise.
    - **reorder** - data -> the rows in another order, which leaves the loss as it is.
    """

    make: Callable
    expected: Callable
    at: Callable | None = None
    reorder: Callable = lambda data: data[::-1]


class Objective(NamedTuple):
    """An objective.

    - **make** - marginal -> objective.
    - **sites** - the visible sites it is tried on: ``"real"``, ``"discrete"``, or ``"binary"``
      where it takes no others.
    - **marginals** - names of the marginals that serve it.
    - **sigma** - the standard deviation that is added to the data's (denoising), for the optimum.
    - **plain** - whether plain SVI can train it.
    - **formulas** - its loss in closed form, by name of the variant; without any it has a test of
      its own.
    """

    make: Callable
    sites: str = "real"
    marginals: tuple = ANY
    sigma: float = 0.0
    plain: bool = True
    formulas: Mapping[str, Formula] = {}


# Score matching ----------------------------------------------------------------------------------

SIGMA = 0.5
LOW, HIGH, SIGMA_0 = 0.3, 0.7, 0.6


def _degree(system):
    # A quadratic energy needs three nodes; what the GRBM needs, twice as many do not change.
    return 24 if system.model is oracles.grbm else 4


def expected_denoising(system):
    levels, weights = jnp.array([SIGMA]), jnp.array([1.0])
    return oracles.expected_denoising(system, levels, weights, degree=_degree(system))


def _denoising(variance_reduction):
    return Formula(
        partial(ebm.DenoisingScoreMatching, SIGMA, variance_reduction=variance_reduction),
        expected_denoising,
        partial(oracles.denoising, variance_reduction=variance_reduction),
    )


def _multiscale(spacing, noise_scale=SIGMA_0):
    of_oracle = "level" if noise_scale is None else noise_scale

    def expected(system):
        quadrature = oracles.level_quadrature(LOW, HIGH, spacing, degree=10)
        return oracles.expected_denoising(system, *quadrature, of_oracle, degree=_degree(system))

    def make(marginal=None):
        return ebm.MultiscaleDenoisingScoreMatching(
            noise_scale, marginal, min_noise_scale=LOW, max_noise_scale=HIGH, spacing=spacing
        )

    return Formula(
        make, expected, partial(oracles.denoising, noise_scale=of_oracle, variance_reduction=True)
    )


def _sliced(num_slices, variance_reduction):
    make = partial(ebm.SlicedScoreMatching, num_slices, variance_reduction=variance_reduction)
    return Formula(make, oracles.score_matching)


def _stein(**options):
    halves = options.get("pairs") == "halves"  # the pairs stay as they are, and their two sides
    return Formula(
        lambda marginal=None: ebm.KernelSteinDiscrepancy(marginal, **options),
        partial(oracles.stein_discrepancy, **options),
        reorder=(lambda data: data[jnp.array([1, 0, 3, 2])]) if halves else (lambda x: x[::-1]),
    )


def one_level(marginal=None):
    return ebm.MultiscaleDenoisingScoreMatching(
        0.3, marginal, min_noise_scale=0.3, max_noise_scale=0.3
    )


# Discrete sites ----------------------------------------------------------------------------------


def pseudo_likelihood(table, index):
    """-Σ_d log p(x_d | x_-d)."""
    axes = range(table.ndim)
    return -sum(jax.nn.log_softmax(table, axis=d)[tuple(index.T)] for d in axes)


def ratio_matching(table, index):
    """Σ_d p(1 - x_d | x_-d)²."""
    axes = range(table.ndim)
    return sum((1.0 - jax.nn.softmax(table, axis=d)[tuple(index.T)]) ** 2 for d in axes)


def minimum_probability_flow(table, index):
    """Σ over all states y that differ from x in one coordinate, of √(p̃(y) / p̃(x))."""
    states = np.indices(table.shape).reshape(table.ndim, -1).T
    near = (states != index[:, None]).sum(-1) == 1  # rows, states
    log_ratios = table.reshape(-1) - table[tuple(index.T)][:, None]
    return jnp.sum(jnp.where(near, jnp.sqrt(jnp.exp(log_ratios)), 0.0), -1)


def discrete_fisher_divergence(table, index):
    """Σ_d (p̃(x^d-) / p̃(x))² - 2 p̃(x) / p̃(x^d+), round and round."""
    total, here = 0.0, table[tuple(index.T)]
    for d in range(table.ndim):
        step = np.arange(table.ndim) == d
        before, after = (table[tuple(((index + s * step) % table.shape).T)] for s in (-1, 1))
        total = total + jnp.exp(2.0 * (before - here)) - 2.0 * jnp.exp(here - after)
    return total


# Noise, networks and kernels ---------------------------------------------------------------------

NOISE = dist.Normal(0.0, 1.5)


def flow():
    scale = numpyro.param("flow_scale", 1.0, constraint=constraints.positive)
    return dist.Normal(0.0, scale)


def mala(model):
    return ebm.MALA(model, step_size=0.5)


OBJECTIVES = {
    "ScoreMatching": Objective(
        ebm.ScoreMatching,
        formulas={"SM": Formula(ebm.ScoreMatching, oracles.score_matching)},
    ),
    "SlicedScoreMatching": Objective(
        partial(ebm.SlicedScoreMatching, 1),
        formulas={
            "SSM": _sliced(1, True),
            "SSM, plain": _sliced(1, False),
            "SSM, 3 slices": _sliced(3, True),
            "SSM, 3 slices, plain": _sliced(3, False),
        },
    ),
    "DenoisingScoreMatching": Objective(
        partial(ebm.DenoisingScoreMatching, 0.3),
        sigma=0.3,
        formulas={"DSM": _denoising(True), "DSM, plain": _denoising(False)},
    ),
    "MultiscaleDenoisingScoreMatching": Objective(
        one_level,
        sigma=0.3,
        formulas={
            "MDSM, linear": _multiscale("linear"),
            "MDSM, geometric": _multiscale("geometric"),
            "MDSM, own, linear": _multiscale("linear", None),
            "MDSM, own, geometric": _multiscale("geometric", None),
        },
    ),
    "KernelSteinDiscrepancy": Objective(
        ebm.KernelSteinDiscrepancy,
        formulas={
            "KSD, RBF": _stein(kernel="rbf", bandwidth=0.9),
            "KSD, IMQ": _stein(kernel="imq", bandwidth=1.3),
            "KSD, median": _stein(),
            "KSD, halves": _stein(bandwidth=0.8, pairs="halves"),
        },
    ),
    "FisherDivergence": Objective(
        lambda marginal=None: ebm.FisherDivergence(None, marginal), plain=False
    ),
    "NCE": Objective(partial(ebm.NCE, NOISE, 1), marginals=BOUND, plain=False),
    "SelfNormalized": Objective(
        partial(ebm.SelfNormalized, NOISE, 1), marginals=BOUND, plain=False
    ),
    "FlowContrastive": Objective(
        partial(ebm.FlowContrastive, flow, 1), marginals=BOUND, plain=False
    ),
    "RankingNCE": Objective(partial(ebm.RankingNCE, NOISE, 5), marginals=VALUE),
    "ConditionalNCE": Objective(partial(ebm.ConditionalNCE, 1.0, 3), marginals=VALUE),
    "KernelRatioMatching": Objective(partial(ebm.KernelRatioMatching, 1.0, 3), marginals=VALUE),
    "RecoveryLikelihood": Objective(
        partial(ebm.RecoveryLikelihood, 1.0, num_steps=5, step_size=0.3), marginals=VALUE
    ),
    "ContrastiveDivergence": Objective(partial(ebm.ContrastiveDivergence, mala, 5)),
    "MaximumLikelihood": Objective(ebm.MaximumLikelihood, marginals=VALUE),
    "EnergyDiscrepancy": Objective(
        lambda marginal=None: ebm.EnergyDiscrepancy(1.0, 8, marginal=marginal), marginals=VALUE
    ),
    "WeightedSum": Objective(
        lambda marginal=None: (
            0.5 * ebm.ScoreMatching(marginal) + 2.0 * ebm.SlicedScoreMatching(1, marginal)
        ),
    ),
    "DiscreteFisher": Objective(
        ebm.DiscreteFisher,
        sites="discrete",
        marginals=VALUE,
        formulas={"DFD": Formula(ebm.DiscreteFisher, discrete_fisher_divergence)},
    ),
    "MinimumProbabilityFlow": Objective(
        ebm.MinimumProbabilityFlow,
        sites="discrete",
        marginals=VALUE,
        formulas={"MPF": Formula(ebm.MinimumProbabilityFlow, minimum_probability_flow)},
    ),
    "PseudoLikelihood": Objective(
        ebm.PseudoLikelihood,
        sites="discrete",
        marginals=VALUE,
        formulas={"PL": Formula(ebm.PseudoLikelihood, pseudo_likelihood)},
    ),
    "RatioMatching": Objective(
        ebm.RatioMatching,
        sites="binary",
        marginals=VALUE,
        formulas={"RM": Formula(ebm.RatioMatching, ratio_matching)},
    ),
}


def formulas(*sites):
    """The formulas of all objectives of these sites, by name of the variant."""
    return {
        name: formula
        for objective in OBJECTIVES.values()
        if objective.sites in sites
        for name, formula in objective.formulas.items()
    }
