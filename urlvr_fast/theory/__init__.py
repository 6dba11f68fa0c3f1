"""The paper's theory as functions: closed forms that the tests hold against simulated tables, and the conditions under which they fail.

* `sharpening`: the majority reward. Optimum, recursion, rates, limit (Theorem 1).   * `tilts`: the optimum of each other reward.
* `unified`: r_uni and each reward as an instance of it; Proposition 1.   * `voting`: how often a vote of N is right (A1); GRPO on 0/1.
* `simulate`: tabular training, exact and sampled.

Policies are tables. Everything is float64 on the CPU; see `sharpening` for the conventions.
"""

from urlvr_fast.theory.sharpening import (
    asymptotic_rate,
    contraction,
    damped_masses,
    damped_step,
    fixed_reference_mass,
    iterations_to_reach,
    kl_regularised_objective,
    kl_regularised_optimum,
    limit_policy,
    one_step_optimum,
    remaining_mass,
    sharpened_mass,
    sharpening_helps,
)
from urlvr_fast.theory.simulate import TabularRun, iterate_optimum, train_tabular
from urlvr_fast.theory.tilts import (
    FixedPoint,
    answer_mass,
    joint_tilt,
    log_prob_fixed_point,
    log_prob_fixed_reference,
    log_prob_reward,
    log_prob_sharpened,
    log_prob_tilt,
    majority_reward,
    mean_log_prob_reward,
    mean_log_prob_tilt,
    probability_reward,
    probability_tilt,
    self_certainty_reward,
    soft_vote_fixed_points,
    soft_vote_reward,
    soft_vote_step,
    soft_vote_tilt,
    token_distributions,
    token_entropy_reward,
    two_token_first_marginal,
)
from urlvr_fast.theory.unified import INSTANCES, Instance, Response, cross_entropy, monotonicity_violations, r_uni, unified_reward
from urlvr_fast.theory.voting import binary_advantages, vote_success_probability

__all__ = [
    "INSTANCES",
    "FixedPoint",
    "Instance",
    "Response",
    "TabularRun",
    "answer_mass",
    "asymptotic_rate",
    "binary_advantages",
    "contraction",
    "cross_entropy",
    "damped_masses",
    "damped_step",
    "fixed_reference_mass",
    "iterate_optimum",
    "iterations_to_reach",
    "joint_tilt",
    "kl_regularised_objective",
    "kl_regularised_optimum",
    "limit_policy",
    "log_prob_fixed_point",
    "log_prob_fixed_reference",
    "log_prob_reward",
    "log_prob_sharpened",
    "log_prob_tilt",
    "majority_reward",
    "mean_log_prob_reward",
    "mean_log_prob_tilt",
    "monotonicity_violations",
    "one_step_optimum",
    "probability_reward",
    "probability_tilt",
    "r_uni",
    "remaining_mass",
    "self_certainty_reward",
    "sharpened_mass",
    "sharpening_helps",
    "soft_vote_fixed_points",
    "soft_vote_reward",
    "soft_vote_step",
    "soft_vote_tilt",
    "token_distributions",
    "token_entropy_reward",
    "train_tabular",
    "two_token_first_marginal",
    "unified_reward",
    "vote_success_probability",
]
