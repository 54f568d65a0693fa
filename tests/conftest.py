# SPDX-License-Identifier: Apache-2.0
"""What the tests share: double precision, a small GRBM with closed forms in NumPy, error bars."""

import gc
import importlib.metadata
import os
from types import SimpleNamespace

# Three quarters of the suite's time is compilation, of programs that run for a moment: compile them
# quickly, and in one thread. XLA reads this when JAX is first used, which importing BlackJAX does.
# Flags that are set already stay.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # unknown to later versions
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size

import numpyro_ebm as ebm

# Tracing makes many small objects, and there are no cycles to speak of: look for them rarely.
gc.freeze()
gc.set_threshold(100_000, 20, 50)

collect_ignore = ["svi/devices_program.py"]  # run by test_devices.py, in processes of its own

# Slow laws of many repeats or cases, half of the slow tests' time: `pytest -m longest` runs them.
LONGEST = (
    *(
        f"what_the_page_says[docs/{page}."
        for page in (
            *("conditional", "deep_latents", "images", "latent_priors", "objectives"),
            "posteriors",
        )
    ),
    "test_known_likelihoods.py::",
    "test_chains_and_parameters_go_on_while_steps_fall",
    "test_particle_gradient_descent_ends_where_its_bias_says",
    "test_chains_of_a_deep_machine_arrive_at_maximum_likelihood[",
    "test_the_error_and_the_baseline_of_a_frechet_distance",
    "test_every_route_finds_the_precision",
    "test_proper_sites_are_the_base_measure[",
    "test_annealing_in_double_precision",
    "test_stein_test_has_its_size_and_power[draws",
    "test_tails_of_weights",
    "test_draws_of_a_guide_are_adjusted[",
    "test_few_lattices_are_calibrated_by_simulation",
    "test_learns_an_ising_model",
    "test_derivatives_of_annealed_log_normalizers[gaussian-of_gaussian-smc",
    "test_a_hierarchy_with_nuts_above_has_the_exact_posterior",
    "test_the_references_are_draws_at_the_center_and_frozen_after_the_warmup",
    "test_rows_are_annealed_side_by_side",
    "test_gallery_of_",
    "test_a_killed_run_loses_at_most_an_interval",
    "test_a_run_in_two_parts_is_one_run[",
    "test_runs_of_a_process_that_was_killed_go_on",
    "test_annealed_ising_at_the_critical_point[",
    "test_annealed_mixture[",
    "test_a_proxy_sees_the_likelihoods_of_the_rows_it_asks_for",
    "test_derivatives_of_exact_log_normalizers[quartic",
    "test_derivatives_of_exact_log_normalizers[tilted",
    "test_lattices_share_their_mean",
    "test_laplace_sees_the_curvature_of_a_quadrature",
    "test_one_round_agrees_with_numpyros_svi_in_the_mean",
    "test_stein_test_has_its_size_and_power[exact-rbf",
    "test_training_ends_at_the_likelihood_and_at_log_z",
    "test_variational_nce_trains",
    "test_runs_and_draws_leave_nothing_behind",
    "test_simulated_digits_are_named_and_noise_is_not",
    "test_a_latent_prior_is_learned_with_chains_of_its_prior",
    "test_a_flowjax_flow_of_networks_follows_a_bent_density",
    "test_log_likelihood_integrates_continuous_latents_by_rows",
    "test_two_latent_sites_against_quadrature",
    "test_derivatives_of_annealed_log_normalizers[levels-of_levels",
    "test_derivatives_of_annealed_log_normalizers[gaussian-of_gaussian-ais",
    "test_derivatives_of_exact_log_normalizers[steep",
    "test_stationary_law_is_that_of_enumeration[DiscreteLangevin-lattice",
    "test_the_law_of_every_sampler_is_that_of_enumeration[exact differences-m",
    "test_unrolled_steps_make_the_gradient_of_a_linear_gaussian_model_exact",
    "test_declared_colors_are_used_and_tried",
    "test_mixed_sites[",
    "test_the_posterior_is_the_exact_one[gaussian-mala",
    "test_the_posterior_is_the_exact_one[ising",
    "test_the_posterior_is_the_exact_one[pairs",
    "test_the_posterior_is_the_exact_one[lifetimes-chosen",
    "test_stein_test_has_its_size_and_power[guide",
    "test_a_state_that_the_model_closes_over_is_held[",
    "test_adjusted_intervals_cover_at_their_nominal_rates[",
    "test_annealed_ising[",
    "test_annealed_supports[",
    "test_calibrated_intervals_cover_at_their_nominal_rate",
    "test_chain_methods[",
    "test_chains_in_parallel[",
    "test_annealed_ising_of_a_thousand_spins",
    "test_checkerboard_reaches_the_optimum[1",
    "test_checkerboard_reaches_the_optimum[2",
    "test_counts_are_dispersed_as_they_were",
    "test_divergent_integrals_are_found[out of",
    "test_edges_of_the_graph",
    "test_eight_devices_and_two_processes",
    "test_collectives_of_a_round_on_eight_devices",
    "test_error_bars_cover_at_their_nominal_rate",
    "test_every_support_and_kernel_with_defaults",
    "test_figures_of_draws_stand_beside_those_of_data",
    "test_every_method_of_digits_trains_and_draws[",
    "test_a_mixture_is_learned_and_drawn",
    "test_modes_far_apart_have_their_shares",
    "test_larger_models_with_latents[",
    "test_loss_and_gradient_are_unbiased_for_the_other_pairs",
    "test_more_particles_take_more_of_the_bias_away",
    "test_particles_of_a_positive_latent_follow_their_rows",
    "test_right_runs_are_called_inadequate_in_a_twentieth",
    "test_numpyros_svi_learns_at_the_temperature",
    "test_one_gradient_is_every_change[",
    "test_plain_models.py::",
    "test_rows_of_a_chain_want_rare_flips",
    "test_scores_take_one_half_of_the_particles",
    "test_runs_with_a_tenth_of_the_moves_or_less_are_found",
    "test_stationary_law_in_double_precision",
    "test_stein_test_with_draws_of_a_kernel_has_its_size",
    "test_the_law_of_every_sampler_is_that_of_enumeration[exact differences-l",
    "test_the_law_of_every_sampler_is_that_of_enumeration[exact differences-s",
    "test_the_law_of_every_sampler_is_that_of_enumeration[exact differences-t",
    "test_the_law_of_every_sampler_is_that_of_enumeration[exact differences-u",
    "test_the_law_of_every_sampler_is_that_of_enumeration[BlockGibbs there and back-l",
    "test_the_law_of_every_sampler_is_that_of_enumeration[BlockGibbs there and back-t",
    "test_the_law_of_every_sampler_is_that_of_enumeration[replicas of S",
    "test_the_law_of_every_sampler_is_that_of_enumeration[replicas of D",
    "test_the_posterior_is_the_exact_one_for_five_seeds",
    "test_the_warmup_tunes_what_any_auxiliary_adapts[replicas",
    "test_tools.py::",
    "what_the_page_says[docs/from_",
    "what_the_page_says[docs/methods",
)


# Laws over many members of which the default run takes some, one of each kind: those whose name in
# brackets holds one of these words. The others are slow, all of them where there are no words.
MEMBERS = {
    "test_the_sum_over_layers_is_that_over_all_states": ("[two", "[a label"),
    "test_the_law_of_every_sampler_is_that_of_enumeration": ("[BlockGibbs-spins",),
    "test_discrete_visible_and_real_latent_units_take_turns": (),
    "test_energy_discrepancy_at_uniform_noise_is_the_likelihood": (),
    "test_the_flow_has_an_optimiser_and_steps_of_its_own": (),
    "test_rows_with_parameters_of_their_own_accept_on_their_own": (),
    "test_the_error_of_log_z_is_honest": (),
    "test_svi.py::test_the_guide_follows_the_posterior": (),
    "test_coordinates_that_are_missing_are_integrated_out": (),
    "test_resampling_keeps_every_expectation_and_every_population_to_itself": (),
    "test_a_sweep_there_and_back_over_several_blocks_is_reversible": (),
    "test_gap_of_continuous_latents": (),
    "test_pareto_shapes_are_those_of_the_tails": (),
    "test_any_number_of_chains_has_the_gradient_of_the_likelihood": ("[7",),
    "test_the_log_likelihood_of_a_row_is_weighted": (
        "[by",
        "[masked",
        "[both",
    ),
    "test_gradient_of_the_likelihood_where_the_kernel_draws_from_the_model": (
        "[Exact",
        "[VaGES",
    ),
    "test_enumerated_equals_brute_force": (
        "[two sites",
        "[event",
        "[hidden",
        "[three",
        "[data",
    ),
    "test_log_z_is_known_at_the_end_of_training": (),
    "test_many_rows_with_defaults": (),
    "test_sites_of_two_and_three_values_keep_their_law": ("[gibbs",),
    "test_conditionals_are_those_of_the_table": (
        "[complete",
        "[mapped",
    ),
    "test_log_normalizers_sum_over_the_support": ("[values2",),
    "test_the_law_of_the_model_is_invariant": (
        "[MCLMC-float32",
        "[MALA-float32",
        "[Under",
    ),
    "test_states_start_where_they_are_told_and_refresh": (
        "[BlockG",
        "[DiscreteL",
    ),
    "test_reversible_kernels_are_in_detailed_balance": (
        "[BlockG",
        "[DiscreteL",
        "[MALA]",
    ),
    "test_units_are_summed_as_their_terms_couple_them": (
        "[roll",
        "[weights",
        "[table",
        "[gather",
    ),
    "test_couplings_and_fields_are_the_energy": ("[square",),
    "test_a_row_of_weight_two_is_the_row_twice": (
        "[square",
        "[ScoreM",
    ),
    "test_derivatives_are_those_of_the_exact_marginal": (
        "[VaGES]",
        "[Gauss",
        "[Enum",
        "[Exact",
    ),
    "test_equals_gradient_and_hessian": (
        "[factors",
        "what is left",
        "the other side",
        "spins]",
        "einsum",
        "row by row",
        "jitted",
        "scaled",
    ),
    "test_one_gradient_is_every_change": (
        "a Categorical-1",
        "edges and",
        "codes of pairs-1",
        "a switch",
        "a network of each site-1",
        "products of",
        "equal pairs of a matrix-6",
        "three",
        "relu",
    ),
    "test_parts_are_the_laws_of_the_model": ("are the joint", "entropy", "beside a label"),
    "test_svi_and_energy_svi_agree_at_the_optimum": ("[ScoreM", "[NCE", "Pseudo"),
    "test_every_row_has_its_own_normalizer": (),
    "test_value_and_gradient_are_the_formula": ("[SM-", "[DSM-", "median-", "-Exact"),
    "test_loss_and_gradient_are_unbiased": (
        "[SM-VaGES]",
        "[DSM-VaGES]",
        "weighted",
        "RBF",
    ),
    "test_the_gradient_of_a_loss_is_that_of_its_value": (*("[ScoreMatching]", "[MaximumL", "KSD"),),
    "test_a_loss_is_the_weighted_sum_of_those_of_the_rows": (
        "[ScoreM",
        "KernelS",
        "[NCE-p",
        "[FlowC",
        "Divergence-l",
        "[MaximumL",
        "[Pseudo",
    ),
    "test_programs_draw_the_same_bits": ("[keys]", "[a loop]"),
    "test_a_fit_traces_its_model_five_times_at_most": ("[all", "batches", "posterior]"),
    "test_a_chain_traces_its_model_four_times_at_most": ("[MALA]", "Replica", "Block"),
    "test_normalized_is_the_likelihood_under_the_same_handlers": ("both", "masked"),
    "test_bi_level_objectives_train_a_step": ("BiDSM",),
    "test_stationary_law_is_that_of_enumeration": ("BlockGibbs",),
    "test_sampling.py::test_chain_methods": ("vectorized",),
    "test_bad_models": ("[MALA]", "[MCLMC]", "Annealed"),
    "test_kernels.py::test_protocol": ("MALA-mass", "Replica", "Annealed"),
    "test_moments_of_asymmetric_and_correlated_targets": ("float64",),
    "test_value_and_both_gradients_are_unbiased": ("Exact-True", "Enumerated-False", "VaGES-True"),
    "test_the_energy_descends_and_the_flow_ascends": ("distribution",),
    "test_chains_that_hardly_move_give_the_prior_and_say_so": (),
    "test_a_posterior_outside_of_the_design_is_found_out": (),
    "test_rows_are_left_out_where_they_stand": ("covariates", "blocks", "weights"),
    "test_exchange.py::test_the_posterior_is_the_exact_one": ("gaussian-exact",),
    "test_chains_that_move_are_adequate": (),
    "test_a_thousand_rows_are_a_thousand_chains": ("Underdamped",),
    "test_kernels.py::test_blocks_of_gibbs": ("Underdamped",),
    "test_the_divergence_of_a_gaussian": (),
    "test_bits_equal_enumeration": ("1-1.0", "2-0.3"),
    "test_discrete.py::test_minimal_at_the_truth": ("ising", "latents"),
    "test_discrete.py::test_equals_enumeration": ("PL-ising", "PL-l", "PL-p"),
    "test_quadratic_energies_take_less_than_all_neighbours": ("[PL",),
    "test_annealed_mixture": ("[ais",),
    "test_annealed_gaussian_blocks": ("[smc",),
    "test_kernels_without_statistics": ("AIES",),
    "test_annealing_of_a_mixture_whose_noised_scores_are_known": ("float64",),
    "test_marginals_serve_or_are_refused_by_name": (
        "[Enumerated-S",
        "[Enumerated-D",
        "[Enumerated-N",
        "[Enumerated-K",
        "GES-S",
        "GES-D",
        "Bound-NCE",
    ),
    "test_a_masked_row_is_as_left_out": ("[ScoreM",),
    "test_rows_without_observation_count_as_masked": (),
    "test_normalized.py::test_rows_with_parameters_of_their_own": (),
    "test_rows_that_are_masked_drop_out_of_both_sides_of_the_ratio": (),
    "test_spins_of_any_scale_and_bias": (),
    "test_neighbours_are_the_values_of_the_support": (),
    "test_plain_models.py::test_posteriors": ("mixture-MALA", "-Under", "-ULA"),
    "test_supports_are_kept_where_the_data_are_traced": (
        *("simplex-5", "ordered-300", "Cholesky-5", "one-5"),
    ),
    "test_laplace_of_a_generalised_posterior_has_the_posteriors_width": (),
    "test_the_warmup_lets_a_frozen_auxiliary_move": (),
    "test_the_score_that_minimises_at_many_levels": (),
    "test_derivatives_of_exact_log_normalizers": (),
    "test_exchange_protocol.py::test_chain_methods": (),
    "test_a_guide_is_trained_as_on_the_peer": ("DAIS",),
    "test_a_fit_reads_bounds_however_they_are_made": ("number", "jnp", "argument", "Lebesgue"),
    "test_a_tool_gives_what_it_gives_for_its_peer": (
        "[TraceEnum_ELBO, ",
        "[log_density-",
        "[replay-n",
        "[trace-",
        "[mask-n",
        "hood-n",
        "[block-f",
        "[LocScale",
        "[do-f",
        "[condition-f",
        "[seed-f",
        "[scope-f",
    ),
    "test_datasets.py::test_double_precision": ("moons", "checkerboard"),
    "test_datasets.py::test_sample_is_a_pure_function_of_its_key": ("moons", "checkerboard"),
    "test_datasets.py::test_jit_equals_eager": ("moons", "checkerboard", "ring"),
    "test_the_derivative_through_the_steps_is_that_of_finite_differences": ("[ELBO",),
}


@pytest.hookimpl(tryfirst=True)  # before tests are picked by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        if isinstance(item, pytest.DoctestItem):  # two minutes in all
            item.add_marker(pytest.mark.slow)
        law, _, member = item.nodeid.partition("[")
        words = next((words for name, words in MEMBERS.items() if law.endswith(name)), None)
        if words is not None and not any(word in "[" + member for word in words):
            item.add_marker(pytest.mark.slow)
        is_slow = item.get_closest_marker("slow") is not None
        if is_slow and any(name in item.nodeid for name in LONGEST):
            item.add_marker(pytest.mark.longest)


def enable_x64():
    """Double precision inside of a ``with``, under the names of older and newer JAX."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64(True)


@pytest.fixture
def x64():
    """The whole test in double precision."""
    with enable_x64():
        yield


def grbm_model(data=None, *, num_visible=2, num_hidden=3):
    """GRBM with all hidden units in one event dimension."""
    W = numpyro.param("W", lambda key: 0.1 * jax.random.normal(key, (num_visible, num_hidden)))
    b = numpyro.param("b", jnp.zeros(num_visible))
    c = numpyro.param("c", jnp.zeros(num_hidden))
    scale = numpyro.param("scale", jnp.ones(num_visible), constraint=dist.constraints.positive)
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(num_visible,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(num_values=2, event_shape=(num_hidden,)))
        ebm.energy("E", 0.5 * jnp.sum(((v - b) / scale) ** 2, -1) - h @ c - jnp.sum(v @ W * h, -1))


def grbm_plate_model(data=None, *, num_visible=2, num_hidden=3):
    """The same density with the hidden units in a plate of their own, so that it factorises."""
    W = numpyro.param("W", lambda key: 0.1 * jax.random.normal(key, (num_visible, num_hidden)))
    b = numpyro.param("b", jnp.zeros(num_visible))
    c = numpyro.param("c", jnp.zeros(num_hidden))
    scale = numpyro.param("scale", jnp.ones(num_visible), constraint=dist.constraints.positive)
    units = numpyro.plate("units", num_hidden, dim=-2)
    with numpyro.plate("data", 1 if data is None else len(data), dim=-1):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(num_visible,)), obs=data)
        ebm.energy("E", 0.5 * jnp.sum(((v - b) / scale) ** 2, -1))
        with units:
            h = numpyro.sample("h", ebm.Counting(num_values=2), infer={"enumerate": "parallel"})
            ebm.energy("E_h", -h * (c[:, None] + W.T @ v.T))


def grbm_guide(data=None, *, num_visible=2, num_hidden=3):
    """q(h | v) = Bernoulli(d + v A); the exact posterior at A = W, d = c."""
    A = numpyro.param("A", jnp.zeros((num_visible, num_hidden)))
    d = numpyro.param("d", jnp.zeros(num_hidden))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v @ A + d).to_event(1))


class GRBMOracle:
    """Closed forms of a small GRBM, by enumeration in NumPy (float64) and nothing else."""

    def __init__(self, params):
        self.W, self.b, self.c, self.scale = (params[k] for k in ("W", "b", "c", "scale"))
        num_hidden = len(self.c)
        self.states = (np.arange(2**num_hidden)[:, None] >> np.arange(num_hidden)) & 1

    def log_joint(self, v, h):
        """log p̃(v, h), of shape (...,)."""
        v, h = np.asarray(v, float), np.asarray(h, float)
        bowl = 0.5 * np.sum(((v - self.b) / self.scale) ** 2, -1)
        return h @ self.c + np.sum((v @ self.W) * h, -1) - bowl

    def log_states(self, v):
        """log p̃(v, h) at every h, of shape (states, rows)."""
        return self.log_joint(np.asarray(v, float)[None], self.states[:, None])

    def log_marginal(self, v):
        """log Σ_h p̃(v, h), of shape (rows,)."""
        return np.logaddexp.reduce(self.log_states(v), axis=0)

    def posterior_mean(self, v):
        """E[h | v], of shape (rows, hidden)."""
        return 1 / (1 + np.exp(-(self.c + np.asarray(v, float) @ self.W)))

    def score(self, v):
        """∇_v log p̃(v), of shape (rows, visible)."""
        v = np.asarray(v, float)
        return -(v - self.b) / self.scale**2 + self.posterior_mean(v) @ self.W.T

    def state_probabilities(self):
        """p(h), of shape (states,)."""
        shift = self.states @ self.W.T
        quadratic = 0.5 * np.sum((shift * self.scale) ** 2, -1)
        log_weights = self.states @ self.c + shift @ self.b + quadratic
        return np.exp(log_weights - np.logaddexp.reduce(log_weights))

    def moments(self):
        """E[v], E[v vᵀ] and E[h] of the model."""
        p = self.state_probabilities()
        means = self.b + self.scale**2 * (self.states @ self.W.T)  # E[v | h]
        second = np.einsum("s,si,sj->ij", p, means, means) + np.diag(self.scale**2)
        return p @ means, second, p @ self.states


@pytest.fixture(scope="session")
def grbm():
    """A GRBM with 2 visible and 3 hidden units: models, guide, parameters, 5 rows, oracle.

    The numbers are NumPy arrays in float64, for tests in either precision.
    """
    rng = np.random.default_rng(0)
    params = {
        "W": rng.normal(size=(2, 3)),
        "b": np.array([0.3, -0.2]),
        "c": np.array([0.5, -0.4, 0.1]),
        "scale": np.array([0.8, 1.1]),
    }
    return SimpleNamespace(
        model=grbm_model,
        plate_model=grbm_plate_model,
        guide=grbm_guide,
        params=params,
        exact_guide_params={"A": params["W"], "d": params["c"]},
        data=rng.normal(size=(5, 2)),
        oracle=GRBMOracle(params),
    )


def assert_mean(draws, expected, *, num_errors=4.0, min_ess=100):
    """The mean of Markov chain draws equals ``expected`` within standard errors from their ESS.

    :param draws: of shape (chains, draws, ...).
    """
    draws = np.asarray(draws, float)
    ess = effective_sample_size(draws)
    assert np.all(ess >= min_ess), f"too few effective draws to tell: {ess}"
    error = np.std(draws, axis=(0, 1)) / np.sqrt(ess)
    z = (np.mean(draws, axis=(0, 1)) - expected) / error
    assert np.all(np.abs(z) < num_errors), f"off by {z} standard errors"
