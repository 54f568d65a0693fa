# SPDX-License-Identifier: Apache-2.0
r"""Simulation-based calibration: whether a route to a posterior returns draws of the posterior.

.. math:: θ \sim π, \quad v \sim p(v \mid θ), \quad θ_1, \dots, θ_L \sim \text{route}(v)
    \quad\Rightarrow\quad r = \#\{l : θ_l < θ\} \sim \text{Uniform}\{0, \dots, L\}

if the route draws from π(θ | v), for then θ and its draws are exchangeable. A posterior that is too
narrow has ranks at both ends, one that is too wide in the middle, a biased one at one end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import Predictive
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm.diagnostics.reading import refuse_weights
from numpyro_ebm.errors import ModelError, check_integer, check_takes, shown
from numpyro_ebm.keys import default_key
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.priors import UnsetParams, isolated, prior_part, read_with_priors
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.posteriors.predictive import predictive
from numpyro_ebm.posteriors.routes import WHO, run_route
from numpyro_ebm.posteriors.uniform_ranks import RankBands, rank_bands
from numpyro_ebm.printed import brief
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model, Params

__all__ = ["SimulationBasedCalibration", "simulation_based_calibration"]


class SimulationBasedCalibration(NamedTuple):
    """What :func:`simulation_based_calibration` found.

    - **ranks** - how many draws are below the parameter that made the data, by name, of shape
      (simulations, ...); 0 to ``num_draws``.
    - **num_draws** - L, the draws of each posterior that it was ranked among.
    - **p_values** - p-values that the ranks are uniform, by name, one for each element.
    - **p_value** - all of them together: the smallest one times their number (Bonferroni).
    - **params** - the parameters that made the data, by name, simulations leading.
    - **bands** - the empirical distribution functions that uniform ranks have.
    """

    ranks: dict[str, np.ndarray]
    num_draws: int
    p_values: dict[str, np.ndarray]
    p_value: float
    params: dict[str, np.ndarray]
    bands: RankBands

    __repr__ = brief

    def plot(self, ax: Any = None) -> Any:
        """Empirical distribution functions of the ranks less the uniform one, in their 95% band.

        :param ax: matplotlib axes; new ones if ``None``.
        :return: the axes. A line that leaves the band is a parameter that is not calibrated: above
            at the left and below at the right where draws are too narrow, the other way round where
            they are too wide, on one side where they are biased.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots()
        x = np.arange(1, self.num_draws + 2) / (self.num_draws + 1)
        low, high = self.bands.band(0.95)
        ax.fill_between(x, low - x, high - x, step="mid", alpha=0.2, color="grey", label="95%")
        for name, ranks in self.ranks.items():
            functions = self.bands.distribution(ranks.reshape(len(ranks), -1))
            for i, values in enumerate(functions):
                ax.plot(x, values - x, label=name if i == 0 else None, lw=1)
        ax.set(xlabel="rank / (L + 1)", ylabel="distribution function less the uniform one")
        ax.legend()
        return ax


@explaining
def simulation_based_calibration(
    rng_key: jax.Array,
    model: Model,
    route: Callable[..., Params] | MCMCKernel,
    num_simulations: int,
    *args: Any,
    num_draws: int = 49,
    num_warmup: int = 500,
    thinning: int = 10,
    simulate: Callable[[jax.Array, Params], Params] | None = None,
    options: dict[str, Any] | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> SimulationBasedCalibration:
    r"""Test a route to posteriors on data sets whose parameters are known.

    Parameters are drawn from the prior, data from the energy-based model at them, and the route is
    asked for the posterior of each data set. If its draws are right, the rank of the true value
    among L of them is uniform.

    The p-value of a parameter is that of the empirical distribution function of its ranks: of the
    smallest probability, over all ranks, of a binomial count so far from its mean, compared with
    what uniform ranks give by simulation (Säilynoja, Bürkner, Vehtari 2022).

    :param rng_key: random key.
    :param model: a model with energy statements and proper priors on its parameters.
    :param route: what is tested, one of

        - a function ``(rng_key, *args, **kwargs)`` of the model's arguments, with simulated data in
          the place of its data, that returns draws of parameters, a dict by name with the draws
          leading. It is called once for each data set; more than ``num_draws`` are thinned evenly;
        - a NumPyro kernel on parameters, ``Exchange(model, ...)``, ``NUTS(normalized(model))`` or
          ``NUTS(generalized(model, objective))``: its chains on all data sets are one program.
          Draws that are adjusted to their data (``learning_rate="calibrate"``) need a function.
    :param int num_simulations: how many data sets. 200 see draws that are twice too narrow, 1,000
        some ten per cent.
    :param args: arguments of the model, its data among them: any of the right shape and type, they
        are replaced.
    :param int num_draws: L, the draws of each posterior that the truth is ranked among.
    :param int num_warmup: warm-up steps of a kernel.
    :param int thinning: steps between draws of a kernel. They have to be nearly independent.
    :param simulate: a function ``(rng_key, params)`` that returns exact data, a dict by visible
        site; :func:`~numpyro_ebm.predictive` draws them if ``None``, exactly where the states of a
        row can be counted.
    :param dict options: of :func:`~numpyro_ebm.predictive`, such as ``{"num_warmup": 2_000}``.
    :param bool progress_bar: show how many data sets are done, from a second on.
    :param kwargs: keyword arguments of the model.
    :return: :class:`SimulationBasedCalibration`, with ``.ranks``, ``.p_value`` and ``.plot()``.
    :raises ModelError: if a prior is missing or improper, the data are no argument of the model,
        or the route returns too few draws, none of a parameter with a prior, other shapes, or
        values that are not finite.

    Warns :class:`~numpyro_ebm.ConvergenceWarning` if the draws of the route are correlated, and as
    :func:`~numpyro_ebm.predictive` does. It tests the route, the simulator of the data, and whether
    the two have the same model; of a posterior that equals the prior it sees nothing.

    Reference: Talts, Betancourt, Simpson, Vehtari, Gelman, *Validating Bayesian inference
    algorithms with simulation-based calibration*, 2018; Säilynoja, Bürkner, Vehtari, *Graphical
    test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple
    sample comparison*, Statistics and Computing 2022.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> import numpyro, numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * (v - mean) ** 2)
    >>> @jax.jit
    ... def conjugate(rng_key, data, power=1.0):  # of the likelihood: 1 is right
    ...     precision = 1.0 + power * len(data)
    ...     noise = jax.random.normal(rng_key, (49,)) / jnp.sqrt(precision)
    ...     return {"mean": power * jnp.sum(data) / precision + noise}
    >>> def rows(rng_key, params):
    ...     return {"v": params["mean"] + jax.random.normal(rng_key, (20,))}
    >>> def calibrate(route):
    ...     return ebm.simulation_based_calibration(
    ...         jax.random.key(0), gaussian, route, 200, jnp.zeros(20), simulate=rows
    ...     )
    >>> found = [calibrate(conjugate), calibrate(lambda *args: conjugate(*args, power=4.0))]
    >>> [x.p_value > 0.01 for x in found], found[0].ranks["mean"].shape
    ([True, False], (200,))
    """
    check_integer(WHO, num_simulations=num_simulations, num_draws=num_draws, thinning=thinning)
    check_integer(WHO, 0, num_warmup=num_warmup)
    unset = UnsetParams(model)
    row_model = read_with_priors(unset, args, kwargs, WHO)
    if unset.names:
        raise ModelError(
            f"{WHO}: the parameter(s) {sorted(unset.names)} have no prior. Give them one, or a "
            "value, `numpyro.handlers.substitute(model, data=...)`."
        )
    refuse_weights(WHO, row_model)
    labels = _labels_of_data(row_model)
    key_prior, key_data, key_route, key_ties = jax.random.split(rng_key, 4)
    prior = Predictive(prior_part(model, row_model.plate), num_samples=num_simulations)
    with isolated():
        found = prior(key_prior, *args, **kwargs)
    params = {name: found[name] for name in row_model.priors}
    data = _simulated(key_data, row_model, model, params, simulate, args, kwargs, options or {})
    arrays = {label: data[name] for label, name in labels.items()}
    keys = jax.random.split(key_route, num_simulations)
    truth = {name: np.asarray(params[name]) for name in row_model.priors}
    lengths: dict[str, Any] = {
        "num_draws": num_draws,
        "num_warmup": num_warmup,
        "thinning": thinning,
        "progress_bar": progress_bar,
    }
    draws = run_route(route, keys, arrays, Arguments(args, kwargs), truth, **lengths)
    ranks = _ranks(key_ties, truth, draws)
    bands = rank_bands(num_simulations, num_draws)
    p_values = {
        name: bands.p_values(x.reshape(len(x), -1)).reshape(x.shape[1:])
        for name, x in ranks.items()
    }
    each = np.concatenate([np.ravel(x) for x in p_values.values()])
    p_value = min(1.0, float(each.min() * each.size))
    return SimulationBasedCalibration(
        ranks, num_draws, p_values, p_value, {k: truth[k] for k in ranks}, bands
    )


def _labels_of_data(row_model: RowModel):
    """Which visible site every argument that holds data is the value of."""
    if not row_model.visible:
        raise ModelError(
            f"{WHO}: the model observes nothing. Pass data of the right shape, any values, as its "
            "arguments."
        )
    labels = row_model.arguments
    traced = row_model.traced
    probes = {label: _probe(traced.arguments.arrays[label]) for label in labels}
    seen = traced.with_arrays({**traced.arguments.arrays, **probes}).visible(default_key(), {})
    whole = {name for label, name in labels.items() if _holds(seen[name].value, probes[label])}
    missing = sorted(row_model.visible.keys() - whole)
    if missing:
        raise ModelError(
            f"{WHO}: the data of {', '.join(map(repr, missing))} are no argument of the model as "
            "they are, so that simulated ones cannot take their place. Pass the values of the site "
            'as an argument of their own, and `numpyro.sample("v", ..., obs=data)`.'
        )
    return labels


def _probe(x):
    """Values of the type of data that no transformation leaves as they are."""
    values = np.arange(np.size(x)) % 7 if jnp.issubdtype(x.dtype, jnp.integer) else None
    values = np.linspace(-3.1, 2.3, np.size(x)) if values is None else values
    return jnp.asarray(values.reshape(np.shape(x)), x.dtype)


def _holds(value, probe):
    return bool(np.allclose(value, probe, rtol=1e-6, equal_nan=True))


def _simulated(rng_key, row_model, model, params, simulate, args, kwargs, options):
    """Data sets by visible site, simulations leading."""
    if simulate is None:
        return predictive(rng_key, model, params, *args, **options, **kwargs)
    sites = row_model.visible
    keys = jax.random.split(rng_key, len(jax.tree.leaves(params)[0]))
    check_takes(WHO, "`simulate` is called with (rng_key, params)", simulate, (rng_key, params))
    data = jax.jit(jax.vmap(simulate))(keys, params)
    if not isinstance(data, dict):
        raise ModelError(
            f"{WHO}: `simulate` must return data by visible site, a dict of {list(sites)}, got "
            f"{shown(data)}."
        )
    for name, site in sites.items():
        shape = np.shape(site.value)
        if name not in data or np.shape(data[name])[1:] != shape:
            found = np.shape(data[name])[1:] if name in data else "nothing"
            raise ModelError(
                f"{WHO}: `simulate(rng_key, params)` must return '{name}' of shape {shape}, got "
                f"{found}."
            )
    return {name: data[name].astype(jnp.result_type(site.value)) for name, site in sites.items()}


def _ranks(rng_key, params, draws):
    """How many draws are below the parameter; equal ones are below with equal chances."""
    seed = np.asarray(jax.random.key_data(rng_key)).ravel().tolist()
    rng = np.random.default_rng(seed)
    found = {}
    for name, x in draws.items():
        truth = params[name][:, None]
        ties = np.sum(x == truth, 1)
        found[name] = np.sum(x < truth, 1) + rng.integers(0, ties + 1)
    return found
