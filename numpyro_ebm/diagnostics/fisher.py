# SPDX-License-Identifier: Apache-2.0
r"""The Fisher divergence between data and a fixed model, in one call.

.. math:: D_F = \tfrac12 E_{\text{data}} \|∇_v \log p(v) - ∇_v \log p_{\text{data}}(v)\|^2

A critic f (and, for a model with latents, a guide) is fitted on one part of the rows, chosen on a
second and evaluated on a third; see :class:`~numpyro_ebm.FisherDivergence`. The second part also
scales it: of all multiples t f the best has :math:`t = E[s·f + \operatorname{tr} ∇f] / E\|f\|^2`,
which takes the noise of the fit back where there is nothing to find.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.marginals import choose
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.objectives.fisher_divergence import FisherDivergence
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
    parts = validation_fraction, test_fraction
    if not (min(parts) > 0 and sum(parts) < 1):
        raise ModelError(
            "fisher_divergence: `validation_fraction` and `test_fraction` must be positive, and "
            f"leave rows to train on, got {parts}."
        )
    check_integer("fisher_divergence", num_steps=num_steps, num_looks=num_looks)
    row_model = read_model(model, (data,), kwargs)
    if row_model.parameters:
        raise ModelError(
            f"fisher_divergence: the model has the free parameter(s) "
            f"{sorted(row_model.parameters)}. Hold them fixed: `numpyro_ebm.fixed(model, params)`."
        )
    key_split, key_run, key_look = jax.random.split(rng_key, 3)
    num_rows = row_model.num_rows
    num_test, num_validation = (max(2, int(share * num_rows)) for share in (parts[1], parts[0]))
    if num_rows < num_test + num_validation + 2:
        raise ModelError(f"fisher_divergence: {num_rows} rows are too few to be split in three.")
    order = jax.random.permutation(key_split, num_rows)
    ends = num_test, num_test + num_validation
    test, validation, train = (
        jax.tree.map(lambda x, part=part: jnp.asarray(x)[part], data)
        for part in jnp.split(order, ends)
    )
    if optim is None:
        import optax

        optim = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
        guide_optim = optax.adam(1e-3) if guide_optim is None else guide_optim
    guide_optim = optim if guide_optim is None else guide_optim
    objective = FisherDivergence(critic, marginal, residual=residual, critic_optim=optim)
    objective.order = 2  # there is no parameter to take a third derivative in
    uses_guide = (choose(row_model) if marginal is None else marginal).needs_guide
    svi = EnergySVI(
        model,
        guide if uses_guide else None,
        optim,
        objective,
        guide_loss=guide_loss,
        guide_optim=guide_optim,
        num_guide_steps=num_guide_steps,
        **kwargs,
    )

    @jax.jit
    def terms(rng_key, params, data):
        def one(rng_key):
            key_prepare, key_rows = jax.random.split(rng_key)
            problem = objective.prepare(key_prepare, params, model, svi.guide, (data,), kwargs)
            return objective.terms(key_rows, params, problem)

        per_probe = jax.lax.map(one, jax.random.split(rng_key, PROBES))
        return jax.tree.map(lambda x: jnp.mean(x, 0), per_probe)

    batch_size = min(batch_size, num_rows - num_test - num_validation)
    ends = np.unique(np.linspace(0, num_steps, min(num_looks, num_steps) + 1).astype(int))
    values, best, state = [], (-np.inf, 0, 0.0, {}), None
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        fit = svi.run(
            key_run,
            int(end - start),
            train,
            batch_size=batch_size,
            progress_bar=progress_bar,
            init_state=state,
            init_params=init_params if state is None else None,
        )
        state = fit.state
        linear, square = map(jnp.mean, terms(key_look, fit.params, validation))
        scale = jnp.where(square > 0, linear / square, 0.0)
        values.append(float(0.5 * scale * linear))
        if values[-1] > best[0] or start == 0:
            best = values[-1], int(end), float(scale), fit.params
    _, num_trained, scale, params = best
    linear, square = terms(jax.random.fold_in(key_look, 1), params, test)
    rows = scale * linear - 0.5 * scale**2 * square
    error = float(jnp.std(rows, ddof=1) / np.sqrt(num_test))
    return FisherDivergenceResult(
        float(jnp.mean(rows)), error, num_trained, scale, np.asarray(values), params
    )
