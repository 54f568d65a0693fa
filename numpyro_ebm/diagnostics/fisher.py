# SPDX-License-Identifier: Apache-2.0
r"""The Fisher divergence between data and a fixed model, in one call.

.. math:: D_F = \tfrac12 E_{\text{data}} \|∇_v \log p(v) - ∇_v \log p_{\text{data}}(v)\|^2

A critic f (and, for a model with latents, a guide) is fitted on one part of the rows, chosen on a
second and evaluated on a third; see :class:`~numpyro_ebm.FisherDivergence`. The second part also
scales it: of all multiples t f the best has :math:`t = E[s·f + \operatorname{tr} ∇f] / E\|f\|^2`,
which takes the noise of the fit back where there is nothing to find.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.diagnostics.reading import read_rows
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.marginals import choose
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_analysis import check_rows_alike
from numpyro_ebm.objectives.fisher_divergence import FisherDivergence
from numpyro_ebm.printed import brief
from numpyro_ebm.signatures import explaining
from numpyro_ebm.svi.energy_svi import EnergySVI
from numpyro_ebm.types import Model, Optimizer, Params

__all__ = ["FisherDivergenceResult", "fisher_divergence"]

PROBES = 8
"""Random directions and sets of particles for each row in an evaluation."""


class FisherDivergenceResult(NamedTuple):
    """What :func:`fisher_divergence` found.

    - **value** - the divergence on the test rows, per row, in squared units of the score. In the
      mean a lower bound of the true one, so that it may be slightly negative where that is zero.
    - **standard_error** - of ``value``, from the spread over the test rows.
    - **num_steps** - steps after which the critic that was chosen had been trained.
    - **scale** - what the critic was multiplied with, as the validation rows ask for.
    - **validation** - value on the validation rows at every look, the chosen one the highest.
    - **params** - parameters of the chosen critic and guide.
    """

    value: float
    standard_error: float
    num_steps: int
    scale: float
    validation: np.ndarray
    params: dict

    __repr__ = brief


@explaining
def fisher_divergence(
    rng_key: jax.Array,
    model: Model,
    data: Any,
    critic: Model | None = None,
    guide: Model | None = None,
    *,
    marginal: Marginal | None = None,
    residual: bool = True,
    optim: Optimizer | None = None,
    num_steps: int = 5_000,
    batch_size: int = 100,
    guide_loss: Any = None,
    guide_optim: Optimizer | None = None,
    num_guide_steps: int = 5,
    init_params: Params | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    num_looks: int = 20,
    progress_bar: bool = True,
    **kwargs: Any,
) -> FisherDivergenceResult:
    r"""Estimate the Fisher divergence between data and a fixed (latent variable) model.

    :param rng_key: random key.
    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param data: rows, the model's first argument: an array, or a dict of them, rows leading.
    :param critic: as for :class:`~numpyro_ebm.FisherDivergence`.
    :param guide: q(h | v) for a model with latents that cannot be summed out.
    :param marginal: how latent sites are integrated out; ``VaGES(num_particles=2)`` needs a guide.
    :param bool residual: as for :class:`~numpyro_ebm.FisherDivergence`; ``False`` is the paper's.
    :param optim: optimiser of the critic; Adam with a step size that falls from 2e-3 to zero by a
        cosine if ``None``.
    :param int num_steps: steps of the critic.
    :param int batch_size: rows in a step.
    :param guide_loss: as for :class:`~numpyro_ebm.EnergySVI`.
    :param guide_optim: optimiser of the guide; like ``optim`` if ``None``.
    :param int num_guide_steps: steps of the guide for each of the critic.
    :param dict init_params: initial parameters of critic and guide, for instance a guide fitted in
        training.
    :param float validation_fraction: share of the rows that the critic is chosen on.
    :param float test_fraction: share of the rows that the divergence is reported on.
    :param int num_looks: how often the critic is validated.
    :param bool progress_bar: show progress bars.
    :param kwargs: keyword arguments of model and guide.
    :return: :class:`FisherDivergenceResult`.
    :raises ModelError: if the model has free parameters or discrete visible sites, or a share is
        out of range.

    **Example**

    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.param("precision", 1.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = jax.random.normal(jax.random.key(0), (10_000,))  # ½ (θ - 1)² = ½
    >>> model = ebm.fixed(gaussian, {"precision": 2.0})
    >>> found = ebm.fisher_divergence(
    ...     jax.random.key(1), model, data, num_steps=1_000, progress_bar=False
    ... )
    >>> bool(abs(found.value - 0.5) < 4 * found.standard_error + 0.02)
    True
    """
    check_integer("fisher_divergence", num_steps=num_steps, num_looks=num_looks)
    _check_shares(validation_fraction, test_fraction)
    row_model = read_rows("fisher_divergence", model, data, (), kwargs)
    check_rows_alike(
        row_model,
        "fisher_divergence has one critic for all rows, of their visible values",
        "Judge the rows of each group on their own.",
    )
    optim, guide_optim = _optimisers(optim, guide_optim, num_steps)
    objective = FisherDivergence(critic, marginal, residual=residual, critic_optim=optim)
    objective.order = 2  # there is no parameter to take a third derivative in
    key_split, key_run, key_look = jax.random.split(rng_key, 3)
    rows = _split_rows(key_split, data, row_model.num_rows, validation_fraction, test_fraction)
    of_guide = {
        "guide_loss": guide_loss,
        "guide_optim": guide_optim,
        "num_guide_steps": num_guide_steps,
    }
    if not (choose(row_model) if marginal is None else marginal).needs_guide:
        guide, of_guide = None, {}
    svi = EnergySVI(model, guide, optim, objective, **of_guide, **kwargs)
    terms = jax.jit(partial(_critic_terms, objective, model, svi.guide, kwargs))
    run = partial(
        svi.run,
        key_run,
        batch_size=min(batch_size, rows.num_train),
        progress_bar=progress_bar,
        init_params=init_params,
    )
    look = partial(terms, key_look, data=rows.validation)
    looks = _train(run, look, rows.train, num_steps, num_looks)
    _, num_trained, scale, params = max(looks, key=lambda look: look[0])
    linear, square = terms(jax.random.fold_in(key_look, 1), params, rows.test)
    by_row = scale * linear - 0.5 * scale**2 * square
    error = float(jnp.std(by_row, ddof=1) / np.sqrt(len(by_row)))
    validation = np.array([value for value, *_ in looks])
    return FisherDivergenceResult(
        float(jnp.mean(by_row)), error, num_trained, scale, validation, params
    )


def _optimisers(optim, guide_optim, num_steps):
    """Those of critic and guide, with their defaults."""
    if optim is not None:
        return optim, optim if guide_optim is None else guide_optim
    import optax

    optim = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    return optim, optax.adam(1e-3) if guide_optim is None else guide_optim


def _check_shares(*shares):
    if not (min(shares) > 0 and sum(shares) < 1):
        raise ModelError(
            "fisher_divergence: `validation_fraction` and `test_fraction` must be positive, and "
            f"leave rows to train on, got {shares}."
        )


def _train(run, look, data, num_steps, num_looks):
    """Train the critic, and look at it now and then.

    :return: list of value on the validation rows, steps, scale and parameters, one for each look.
    """
    ends = np.unique(np.linspace(0, num_steps, min(num_looks, num_steps) + 1).astype(int))
    looks, state = [], None
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        fit = run(int(end - start), data, init_state=state)
        state = fit.state
        linear, square = map(jnp.mean, look(params=fit.params))
        scale = jnp.where(square > 0, linear / square, 0.0)
        looks.append((float(0.5 * scale * linear), int(end), float(scale), fit.params))
    return looks


class _Rows(NamedTuple):
    """Rows to test on, to choose on and to train on, and how many the last are."""

    test: Any
    validation: Any
    train: Any
    num_train: int


def _split_rows(rng_key, data, num_rows, validation_fraction, test_fraction):
    """Rows in three parts, drawn without replacement."""
    num_validation, num_test = (
        max(2, int(share * num_rows)) for share in (validation_fraction, test_fraction)
    )
    num_train = num_rows - num_test - num_validation
    if num_train < 2:
        raise ModelError(f"fisher_divergence: {num_rows} rows are too few to be split in three.")
    order = jax.random.permutation(rng_key, num_rows)
    parts = jnp.split(order, (num_test, num_test + num_validation))
    test, validation, train = (
        jax.tree.map(lambda x, part=part: jnp.asarray(x)[part], data) for part in parts
    )
    return _Rows(test, validation, train, num_train)


def _critic_terms(objective, model, guide, kwargs, rng_key, params, data):
    """Linear and square term of every row at a critic, means over PROBES draws of directions."""

    def one(rng_key):
        key_prepare, key_rows = jax.random.split(rng_key)
        problem = objective.prepare(key_prepare, params, model, guide, (data,), kwargs)
        return objective.terms(key_rows, params, problem)

    per_probe = jax.lax.map(one, jax.random.split(rng_key, PROBES))
    return jax.tree.map(lambda x: jnp.mean(x, 0), per_probe)
