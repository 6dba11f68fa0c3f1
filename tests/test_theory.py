"""The theory against tables: closed forms against simulation, and the conditions under which each statement of the paper fails.

`tilt` and `simulate` below are the definition, written down again without logarithms: the library's own iteration is held to them.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from urlvr_fast import group_advantages, theory

EXACT = {"rtol": 0, "atol": 1e-10}
BETAS = [0.5, 1.0, 2.0]
PI0 = torch.tensor([0.10, 0.20, 0.25, 0.25, 0.05, 0.15], dtype=torch.float64)
ANSWERS = torch.tensor([0, 0, 1, 2, 1, 2])  # masses .30, .30, .40: answer 2 is the majority
MAJORITY = ANSWERS == 2
LENGTHS = torch.tensor([1.0, 4, 2, 3, 2, 5], dtype=torch.float64)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tables of a dozen numbers: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tilt(pi_ref, reward, beta):
    weights = pi_ref * torch.exp(reward / beta)
    return weights / weights.sum()


def simulate(pi0, reward_of, beta, steps, reset=True):
    policies = [pi0]
    for _ in range(steps):
        policies.append(tilt(policies[-1] if reset else pi0, reward_of(policies[-1]), beta))
    return policies


def masses(pi):
    return torch.tensor([float(pi[a == ANSWERS].sum()) for a in range(3)], dtype=torch.float64)


def majority_indicator(pi):
    return (masses(pi).argmax() == ANSWERS).double()


def close(a, b, **tolerance):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), **(tolerance or EXACT))


# The optimum


@pytest.mark.parametrize("beta", [*BETAS, 1e-3])
def test_the_optimum_maximises_the_objective(beta):
    reward = torch.tensor([0.3, -1.0, 0.7, 0.7, 0.0, 0.2], dtype=torch.float64)
    best = theory.kl_regularised_optimum(PI0, reward, beta)
    value = theory.kl_regularised_objective(best, PI0, reward, beta)
    close(value, beta * torch.logsumexp(PI0.log() + reward / beta, 0))  # β log Z
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-2, 1.0):
        for _ in range(50):
            other = torch.softmax(best.log() + scale * torch.randn(6, dtype=torch.float64, generator=generator), -1)
            assert theory.kl_regularised_objective(other, PI0, reward, beta) < value


def test_zeros_stay_zero_and_no_beta_overflows():
    ref = [0.0, 0.5, 0.5, 0.0]
    reward = [math.inf, 1.0, 0.0, math.nan]
    assert theory.kl_regularised_optimum(ref, reward, 1e-300).tolist() == [0, 1, 0, 0]
    assert theory.kl_regularised_optimum(ref, reward, 1e300).tolist() == [0, 0.5, 0.5, 0]
    assert theory.kl_regularised_optimum(ref, [0, -math.inf, 3, 0], math.inf).tolist() == [0, 0, 1, 0]


def test_beta_to_zero_is_the_reference_on_the_best_and_not_uniform():
    reward = [0, 1, 1, 0, 1, 0]
    limit = theory.kl_regularised_optimum(PI0, reward, 0)
    close(limit, [0, 0.4, 0.5, 0, 0.1, 0])
    close(theory.kl_regularised_optimum(PI0, reward, 1e-2), limit)


@pytest.mark.parametrize(
    ("pi_ref", "reward", "beta"),
    [
        ([0.5, 0.6], [0, 1], 1.0),
        ([-0.5, 1.5], [0, 1], 1.0),
        ([math.nan, 1.0], [0, 1], 1.0),
        ([0.5, 0.5], [0, 1], -1.0),
        ([0.5, 0.5], [0, 1], math.nan),
        ([0.5, 0.5], [0, math.nan], 1.0),
        ([0.5, 0.5], [0, math.inf], 1.0),
        ([0.5, 0.5], [-math.inf, -math.inf], 1.0),
    ],
)
def test_what_the_optimum_refuses(pi_ref, reward, beta):
    with pytest.raises(ValueError, match=r"probabilities|beta|infinite"):
        theory.kl_regularised_optimum(pi_ref, reward, beta)


# Majority reward: Theorem 1


@pytest.mark.parametrize("beta", BETAS)
def test_recursion_with_a_reset_reference(beta):
    policies = simulate(PI0, majority_indicator, beta, 12)
    p = torch.stack([pi[MAJORITY].sum() for pi in policies])
    close(theory.sharpened_mass(0.4, np.arange(13), beta), p)
    close(theory.remaining_mass(0.4, range(13), beta), 1 - p)
    close(theory.one_step_optimum(p[:-1], beta), p[1:])
    close(theory.contraction(p[:4], beta), (1 - p[1:5]) / (1 - p[:4]))
    close(theory.iterations_to_reach(0.4, p[:6], beta), range(6))
    close(theory.iterate_optimum(PI0, majority_indicator, beta, 12), torch.stack(policies))


def test_limit_policy():
    limit = theory.limit_policy(PI0, MAJORITY)
    close(limit, simulate(PI0, majority_indicator, 0.5, 20)[-1])
    close(limit, [0, 0, 0, 0.625, 0, 0.375])  # deterministic in the answer, not in the trajectory
    with pytest.raises(ValueError, match="no mass"):
        theory.limit_policy([1.0, 0.0], [False, True])


def test_masses_that_a_float_cannot_tell_from_one():
    assert theory.sharpened_mass(0.3, 100, 1.0) == 1
    close(theory.remaining_mass(0.3, 100, 1.0), 0.7 / 0.3 * math.exp(-100), rtol=1e-12, atol=0)
    assert theory.sharpened_mass([0.0, 1.0], 5, 1.0).tolist() == [0, 1]
    assert theory.iterations_to_reach(0.3, 1.0, 1.0) == math.inf


def test_the_rate_is_asymptotic_and_not_uniform():
    p = theory.sharpened_mass(0.3, range(31), 1.0)
    ratios = theory.contraction(p, 1.0)
    assert [round(float(r), 2) for r in ratios[:3]] == [0.66, 0.52, 0.43]
    assert bool((ratios[:20] > theory.asymptotic_rate(1.0)).all())
    close(ratios[-1], theory.asymptotic_rate(1.0))
    assert [round(theory.asymptotic_rate(beta), 4) for beta in (0.5, 1.0, 2.0)] == [0.1353, 0.3679, 0.6065]


@pytest.mark.parametrize(("beta", "stop"), [(0.5, 0.760), (1.0, 0.538), (2.0, 0.414)])
def test_a_fixed_reference_does_not_converge_to_one(beta, stop):
    start = torch.tensor([0.3, 0.45, 0.25], dtype=torch.float64)
    masses_seen = [float(pi[0]) for pi in simulate(start, lambda _: torch.tensor([1.0, 0, 0], dtype=torch.float64), beta, 50, reset=False)]
    assert round(masses_seen[-1], 3) == stop
    close(theory.fixed_reference_mass(0.3, range(51), beta), masses_seen)
    assert theory.sharpened_mass(0.3, 50, beta) > 0.999  # what the same reward does when the reference is reset


@pytest.mark.parametrize(("eta", "rate"), [(0.1, 0.9368), (0.5, 0.6839), (1.0, 0.3679)])
def test_damped_steps(eta, rate):
    policies = theory.iterate_optimum(PI0, majority_indicator, 1.0, 40, eta=eta)
    p = theory.damped_masses(0.4, [eta] * 40, 1.0)
    close(p, policies[:, MAJORITY].sum(-1))
    optimum = theory.one_step_optimum(p[:-1], 1.0)
    assert bool((optimum >= p[1:]).all())
    assert bool((p[1:] >= p[:-1]).all())
    assert round(theory.asymptotic_rate(1.0, eta), 4) == rate
    late = theory.damped_masses(1 - 1e-6, [eta] * 2, 1.0)
    close((1 - late[2]) / (1 - late[1]), theory.asymptotic_rate(1.0, eta), rtol=1e-5, atol=0)
    fixed = theory.iterate_optimum(PI0, majority_indicator, 1.0, 40, eta=eta, reset_reference=False)
    close(theory.fixed_reference_mass(0.4, range(41), 1.0, eta), fixed[:, MAJORITY].sum(-1))


def test_ordering_alone_gives_no_rate():
    p = theory.damped_masses(0.3, [0.5**k for k in range(2, 45)], 1.0)
    assert bool((p[1:] > p[:-1]).all())  # A2's p_{k+1} > p_k and the ordering p* ≥ p_{k+1} ≥ p_k both hold
    assert bool((theory.one_step_optimum(p[:-1], 1.0) >= p[1:]).all())
    assert p[-1] < 0.45
    assert p[-1] - p[-2] < 1e-12
    slow = theory.damped_masses(0.3, [1 / k for k in range(2, 1000)], 1.0)  # converges, but slower than any geometric rate
    assert 0.95 < slow[-1] < 0.9999
    assert (1 - slow[-1]) / (1 - slow[-2]) > 0.999


@pytest.mark.parametrize(
    "call",
    [
        lambda: theory.sharpened_mass(1.1, 1, 1.0),
        lambda: theory.sharpened_mass(math.nan, 1, 1.0),
        lambda: theory.sharpened_mass(0.5, 1, 0.0),
        lambda: theory.damped_step(0.5, 1.5, 1.0),
        lambda: theory.asymptotic_rate(1.0, -0.1),
        lambda: theory.iterations_to_reach(0.0, 0.5, 1.0),
        lambda: theory.iterations_to_reach(1.0, 0.5, 1.0),
    ],
)
def test_what_the_recursion_refuses(call):
    with pytest.raises(ValueError, match=r"mass|beta|eta"):
        call()


# Who profits


def test_an_aligned_start_helps_and_a_misaligned_one_locks_the_error_in():
    answer_probs = masses(PI0)
    helps = theory.sharpening_helps(answer_probs.expand(3, 3), [0, 1, 2])
    assert helps.tolist() == [False, False, True]
    final = masses(simulate(PI0, majority_indicator, 1.0, 60)[-1])
    close(final, helps)  # the accuracy of the limit is 1 or 0
    assert final[0] < 1e-10 < answer_probs[0]  # wrong majority: right .30 of the time before, never after


def test_a_tie_is_decided_by_the_rule_and_kept_by_a_soft_vote():
    tied = torch.tensor([0.2, 0.3, 0.3, 0.2], dtype=torch.float64)
    answers = [0, 1, 0, 1]
    assert not theory.sharpening_helps([0.5, 0.5], 0)
    assert not theory.sharpening_helps([0.5, 0.5], 1)
    close(theory.soft_vote_tilt(tied, answers, 0.3), tied)
    winner = theory.iterate_optimum(tied, lambda pi: theory.majority_reward(pi, answers), 1.0, 60)[-1]
    close(theory.answer_mass(winner, answers), [1, 0])
    relabelled = theory.iterate_optimum(tied, lambda pi: theory.majority_reward(pi, [1, 0, 1, 0]), 1.0, 60)[-1]
    close(theory.answer_mass(relabelled, answers), [0, 1])


def test_the_likeliest_trajectory_need_not_give_the_likeliest_answer():
    pi = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    answers = [0, 1, 1]
    by_vote = theory.iterate_optimum(pi, lambda p: theory.majority_reward(p, answers), 1.0, 60)[-1]
    close(theory.answer_mass(by_vote, answers), [0, 1])
    close(theory.answer_mass(theory.log_prob_sharpened(pi, 12, 1.0), answers), [1, 0])


# The other rewards


@pytest.mark.parametrize("beta", BETAS)
def test_log_probability_with_a_reset_reference(beta):
    for k, pi in enumerate(simulate(PI0, torch.log, beta, 5)):
        close(theory.log_prob_sharpened(PI0, k, beta), pi)
        close(pi, PI0 ** ((1 + 1 / beta) ** k) / (PI0 ** ((1 + 1 / beta) ** k)).sum())
    close(theory.log_prob_sharpened(PI0, 200, beta), [0, 0, 0.5, 0.5, 0, 0])  # the modes, in equal parts


@pytest.mark.parametrize("beta", BETAS)
def test_log_probability_with_a_fixed_reference(beta):
    policies = simulate(PI0, torch.log, beta, 8, reset=False)
    for k, pi in enumerate(policies):
        close(theory.log_prob_fixed_reference(PI0, k, beta), pi)
    close(theory.log_prob_tilt(policies[3], beta, PI0), policies[4])
    if beta > 1:
        stop = theory.log_prob_fixed_point(PI0, beta)
        close(theory.log_prob_fixed_reference(PI0, 60, beta), stop)
        assert stop.min() > 1e-3  # short of the mode
    else:
        close(theory.log_prob_fixed_reference(PI0, 500, beta), [0, 0, 0.5, 0.5, 0, 0])
        with pytest.raises(ValueError, match="beta > 1"):
            theory.log_prob_fixed_point(PI0, beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reset", [True, False])
def test_one_step_tilts_of_the_policy_dependent_rewards(beta, reset):
    pi = simulate(PI0, torch.log, 3.0, 1)[-1]
    ref = None if reset else PI0
    base = pi if reset else PI0
    by_hand = {
        "log": base * pi ** (1 / beta),
        "mean_log": base * pi ** (1 / (beta * LENGTHS)),
        "probability": base * torch.exp(pi / beta),
        "soft": base * torch.exp(torch.stack([pi[a == ANSWERS].sum() for a in ANSWERS]) / beta),
    }
    tilts = {
        "log": theory.log_prob_tilt(pi, beta, ref),
        "mean_log": theory.mean_log_prob_tilt(pi, LENGTHS, beta, ref),
        "probability": theory.probability_tilt(pi, beta, ref),
        "soft": theory.soft_vote_tilt(pi, ANSWERS, beta, ref),
    }
    for name, weights in by_hand.items():
        close(tilts[name], weights / weights.sum())


def test_a_mean_of_log_probabilities_has_a_closed_form_for_equal_lengths_only():
    def powers(lengths, k):
        return torch.softmax(PI0.log() * (1 + 1 / lengths) ** k, -1)

    for lengths, holds in ((torch.full((6,), 3.0, dtype=torch.float64), True), (LENGTHS, False)):
        last = simulate(PI0, lambda pi, n=lengths: pi.log() / n, 1.0, 3)[-1]
        assert torch.allclose(last, powers(lengths, 3), **EXACT) is holds
    longer = theory.mean_log_prob_tilt([0.5, 0.5], [2, 20], 1.0)
    assert longer[1] > 0.5  # the mean prefers the longer of two that are equally likely, the sum does not care
    close(theory.log_prob_tilt([0.5, 0.5], 1.0), [0.5, 0.5])


@pytest.mark.parametrize("beta", BETAS)
def test_soft_vote_fixed_points(beta):
    answers = torch.tensor([0, 1, 1])
    for start in (0.3, 0.5, 0.6):
        pi = torch.tensor([start, (1 - start) / 4, 3 * (1 - start) / 4], dtype=torch.float64)
        p = torch.tensor(start, dtype=torch.float64)
        for _ in range(10):
            pi = tilt(pi, torch.where(answers == 0, pi[0], pi[1] + pi[2]), beta)
            p = theory.soft_vote_step(p, beta)
            close(p, pi[0])
            close(pi[2], 3 * pi[1])  # odds within an answer stay
    for point in theory.soft_vote_fixed_points(beta):
        at = torch.tensor(point.mass, dtype=torch.float64)
        close(theory.soft_vote_step(at, beta), at)
        inside = at + (1e-7 if point.mass < 1 else -1e-7)
        slope = (theory.soft_vote_step(inside, beta) - at) / (inside - at)
        close(slope, point.multiplier, rtol=1e-5, atol=0)
        assert point.stable is (point.mass != 0.5)


def test_the_half_is_unstable_and_three_answers_have_more_such_points():
    p = torch.tensor([0.5 - 1e-6, 0.5, 0.5 + 1e-6], dtype=torch.float64)
    for _ in range(100):
        p = theory.soft_vote_step(p, 1.0)
    close(p, [0, 0.5, 1])
    close(theory.soft_vote_tilt([0.5, 0.5, 0.0], [0, 1, 2], 1.0), [0.5, 0.5, 0])
    close(theory.soft_vote_tilt([1 / 3] * 3, [0, 1, 2], 1.0), [1 / 3] * 3)


def test_soft_vote_with_a_fixed_reference_has_other_fixed_points():
    p = torch.tensor([1e-9, 0.9, 1 - 1e-9], dtype=torch.float64)
    strong, weak = p, p
    for _ in range(400):
        strong, weak = theory.soft_vote_step(strong, 1.0, 0.5), theory.soft_vote_step(weak, 0.4, 0.5)
    close(strong, [0.5] * 3)  # β > ½: one half attracts
    assert weak[0] < 0.3
    assert 0.7 < weak[2] < 0.95  # β < ½: it does not, and neither 0 nor 1 is reached
    close(theory.soft_vote_step(weak, 0.4, 0.5), weak)


# Rewards of token distributions

FIRST = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
SECOND = torch.tensor([[0.4, 0.35, 0.25], [0.6, 0.3, 0.1], [0.05, 0.9, 0.05]], dtype=torch.float64)
JOINT = FIRST[:, None] * SECOND


def test_token_distributions_of_a_joint_table():
    table = theory.token_distributions(JOINT)
    assert table.shape == (3, 3, 2, 3)
    for y1, y2 in itertools.product(range(3), range(3)):
        close(table[y1, y2], torch.stack([FIRST, SECOND[y1]]))
    three = JOINT[:, :, None] * torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    close(
        theory.token_distributions(three)[2, 1],
        torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.9, 0.05], [0.2, 0.3, 0.5]], dtype=torch.float64).expand(3, 3, 3),
    )
    close(theory.token_distributions([[1.0, 0.0], [0.0, 0.0]])[1, 0], [[1, 0], [0.5, 0.5]])
    with pytest.raises(ValueError, match="same size"):
        theory.token_distributions([[0.5, 0.25, 0.25]])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["token_entropy", "self_certainty"])
def test_two_token_responses_under_certainty_rewards(name, beta):
    def certainty(p):
        return (p * p.log()).sum(-1) if name == "token_entropy" else -(p * 3).log().mean(-1)

    joint = JOINT
    reward = theory.token_entropy_reward if name == "token_entropy" else theory.self_certainty_reward
    for k in range(8):
        first, second = joint.sum(1), joint / joint.sum(1, keepdim=True)
        close(second, SECOND)
        close(theory.two_token_first_marginal(FIRST, certainty(SECOND), k, beta), first)
        by_hand = ((certainty(first) + certainty(second)) / 2)[:, None].expand(3, 3)
        close(reward(joint), by_hand)
        joint, expected = theory.joint_tilt(joint, reward(joint), beta), tilt(joint, by_hand, beta)
        close(joint, expected)
    limit = theory.two_token_first_marginal(FIRST, certainty(SECOND), 1000, beta)
    close(limit, [0, 0, 1])  # the least likely first token, because what follows it is the surest


def test_a_single_token_gives_certainty_rewards_nothing_to_choose_between():
    close(theory.joint_tilt(FIRST, theory.token_entropy_reward(FIRST), 0.1), FIRST)
    close(theory.joint_tilt(FIRST, theory.self_certainty_reward(FIRST), 0.1), FIRST)


def test_a_self_certainty_of_infinity_cannot_be_tilted_by():
    joint = [[0.5, 0.0], [0.25, 0.25]]
    assert theory.self_certainty_reward(joint)[0].tolist() == [math.inf, math.inf]
    with pytest.raises(ValueError, match="infinite"):
        theory.joint_tilt(joint, theory.self_certainty_reward(joint), 1.0)


# The unified reward

TOKEN_PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]], dtype=torch.float64)
TOKENS = [0, 2, 2, 1]


def response(answer=1, majority=1, token_probs=TOKEN_PROBS, tokens=TOKENS):
    return theory.Response(token_probs, tokens, [0.3, 0.45, 0.25], answer, majority)


def test_every_instance_equals_its_direct_formula():
    sampled = [0.7, 0.25, 0.8, 0.3]
    uniform_kl = sum(sum(math.log((1 / 3) / float(p)) / 3 for p in row) for row in TOKEN_PROBS) / 4
    direct = {
        "self_certainty": uniform_kl,
        "token_level_entropy": sum(float(p) * math.log(float(p)) for row in TOKEN_PROBS for p in row) / 4,
        "trajectory_level_entropy": sum(map(math.log, sampled)) / 4,
        "probability": math.prod(sampled),
        "empo": 0.45,
        "majority_voting": 1.0,
    }
    assert set(direct) == set(theory.INSTANCES)
    for method, value in direct.items():
        close(theory.unified_reward(method, response()), value)


def test_what_each_instance_depends_on():
    changed = {
        "tokens": response(tokens=[1, 2, 2, 1]),
        "answer": response(answer=2),
        "majority": response(majority=0),
        "token_probs": response(token_probs=TOKEN_PROBS.flip(1)),
    }
    seen = {}
    for method in theory.INSTANCES:
        before = theory.unified_reward(method, response())
        seen[method] = {name for name, other in changed.items() if theory.unified_reward(method, other) != before}
    assert seen == {
        "self_certainty": set(),  # a uniform anchor does not know which token was sampled, nor in which order tokens are listed
        "token_level_entropy": set(),
        "trajectory_level_entropy": {"tokens", "token_probs"},
        "probability": {"tokens", "token_probs"},
        "empo": {"answer"},
        "majority_voting": {"answer", "majority"},
    }
    assert theory.unified_reward("majority_voting", response(answer=2)) == 0
    close(theory.unified_reward("empo", response(answer=2)), 0.25)


def test_the_mean_form_of_probability_needs_the_length():
    terms = theory.cross_entropy(torch.eye(3, dtype=torch.float64)[TOKENS], TOKEN_PROBS)
    mean = theory.r_uni(terms, -1, "identity")
    close(theory.r_uni(terms, -1, "exp", averaged=False), torch.exp(4 * mean))
    assert not torch.isclose(theory.r_uni(terms, -1, "exp"), theory.r_uni(terms, -1, "exp", averaged=False))


def test_cross_entropy_at_zeros():
    assert theory.cross_entropy([1.0, 0.0], [1.0, 0.0]) == 0
    assert theory.cross_entropy([0.5, 0.5], [1.0, 0.0]) == math.inf
    for bad in ({"sigma": 0, "psi": "exp"}, {"sigma": 1, "psi": "log"}):
        with pytest.raises(ValueError, match="psi"):
            theory.r_uni([1.0], **bad)
    with pytest.raises(ValueError, match="empty"):
        theory.r_uni([], 1, "exp")
    with pytest.raises(ValueError, match="none of"):
        theory.unified_reward("entropy", response())


def test_monotonicity_holds_where_the_reward_is_a_function_of_the_probability():
    assert theory.monotonicity_violations(PI0, theory.probability_reward(PI0)) == []
    assert theory.monotonicity_violations(PI0, theory.log_prob_reward(PI0)) == []
    assert theory.monotonicity_violations(PI0, theory.mean_log_prob_reward(PI0, [3] * 6)) == []
    assert theory.monotonicity_violations([0.3, 0.45, 0.25], theory.soft_vote_reward([0.3, 0.45, 0.25], [0, 1, 2])) == []


def test_where_monotonicity_fails():
    assert theory.monotonicity_violations([0.6, 0.4], theory.mean_log_prob_reward([0.6, 0.4], [1, 20])) == [(0, 1)]
    pi, answers = [0.4, 0.3, 0.3], [0, 1, 1]
    assert theory.monotonicity_violations(pi, theory.soft_vote_reward(pi, answers)) == [(0, 1), (0, 2)]
    # Equal rewards are a failure of the strict inequality: two answers that both lost, whatever their masses.
    assert theory.monotonicity_violations([0.5, 0.3, 0.2], theory.majority_reward([0.5, 0.3, 0.2], [0, 1, 2])) == [(1, 2)]


@pytest.mark.parametrize("reward", [theory.self_certainty_reward, theory.token_entropy_reward])
def test_certainty_rewards_violate_monotonicity(reward):
    likely, sure = (0, 0), (2, 1)  # .24 after which anything may follow; .09, nine tenths of what follows a rare token
    values = reward(JOINT)
    assert JOINT[likely] > JOINT[sure]
    assert values[likely] < values[sure]
    assert (0, 7) in theory.monotonicity_violations(JOINT.flatten(), values.flatten())


def test_self_certainty_and_entropy_can_disagree_about_which_is_surer():
    peaked = response(token_probs=[[0.9, 0.05, 0.05]], tokens=[0])
    two_way = response(token_probs=[[0.5, 0.5 - 1e-9, 1e-9]], tokens=[0])
    assert theory.unified_reward("token_level_entropy", peaked) > theory.unified_reward("token_level_entropy", two_way)
    assert theory.unified_reward("self_certainty", peaked) < theory.unified_reward("self_certainty", two_way)


# Votes of N

THREE = (0.40, 0.35, 0.25)


def brute_force(probs, rollouts, elect):
    total = 0.0
    for sequence in itertools.product(range(len(probs)), repeat=rollouts):
        if elect(sequence) == max(range(len(probs)), key=probs.__getitem__):
            total += math.prod(probs[a] for a in sequence)
    return total


@pytest.mark.parametrize("probs", [THREE, (0.25, 0.35, 0.40), (0.1, 0.5, 0.4)])
@pytest.mark.parametrize("rollouts", [1, 4, 7, 8])
def test_vote_success_against_all_sequences(probs, rollouts):
    rules = {
        "first_seen": lambda s: Counter(s).most_common(1)[0][0],
        "first_index": lambda s: max(range(3), key=lambda a: (s.count(a), -a)),
        "none": lambda s: -1 if len(tops := [a for a in range(3) if s.count(a) == max(map(s.count, s))]) > 1 else tops[0],
    }
    for ties, elect in rules.items():
        close(theory.vote_success_probability(probs, rollouts, ties), brute_force(probs, rollouts, elect))


def test_small_votes_often_miss_the_mode():
    """Published for "first index": 57.6, 57.5, 62.9, 69.0, 96.8 %, by sampling; these are the exact values."""
    sizes = (8, 16, 32, 64, 1024)
    exact = {ties: [theory.vote_success_probability(THREE, n, ties) for n in sizes] for ties in ("first_index", "first_seen", "none")}
    assert [round(100 * p, 2) for p in exact["first_index"]] == [57.06, 57.80, 63.08, 68.73, 96.91]
    assert [round(100 * p, 2) for p in exact["first_seen"]] == [47.13, 52.35, 58.66, 66.06, 96.78]
    for bound, fair, strict in zip(exact["first_index"], exact["first_seen"], exact["none"], strict=True):
        assert bound > fair > strict
    for sampled, value in zip((57.6, 57.5, 62.9, 69.0, 96.8), exact["first_index"], strict=True):
        assert abs(sampled - 100 * value) < 0.6


def test_more_votes_are_not_always_better():
    ties_help = [theory.vote_success_probability(THREE, n, "first_index") for n in (2, 3, 8, 15)]
    assert ties_help[0] > max(ties_help[1:])  # the likeliest answer, listed first, wins all ties: at N = 2 it loses only when absent
    assert theory.vote_success_probability(THREE, 2) == pytest.approx(0.40)  # a fair draw: two votes say no more than one


def test_what_a_vote_refuses():
    for args in (([0.4, 0.4, 0.2], 8), (THREE, 0), (THREE, 8, "last"), ([0.11] + [0.089] * 10, 64)):
        with pytest.raises(ValueError, match=r"likeliest|rollouts"):
            theory.vote_success_probability(*args)


@pytest.mark.parametrize("rollouts", [2, 8, 16])
def test_binary_advantages_are_those_of_grpo(rollouts):
    for matches in range(rollouts + 1):
        rewards = torch.tensor([1.0] * matches + [0.0] * (rollouts - matches), dtype=torch.float64)
        advantages = group_advantages(rewards, torch.zeros(rollouts, dtype=torch.int64), eps=1e-6)
        match, miss = theory.binary_advantages(matches, rollouts, eps=1e-6)
        close(advantages, [match] * matches + [miss] * (rollouts - matches))
        if 0 < matches < rollouts:
            match, _ = theory.binary_advantages(matches, rollouts)
            close(match, (1 - matches / rollouts) / float(rewards.std(unbiased=True)))
            biased = (1 - matches / rollouts) / float(rewards.std(unbiased=False))
            assert abs(match - biased) > 1e-3
    assert theory.binary_advantages(rollouts, rollouts) == (0, 0) == theory.binary_advantages(0, rollouts)
    assert theory.binary_advantages(rollouts - 1, rollouts)[0] > 0.2  # one dissenter is enough to go on


# Tabular GRPO

WIDE, NARROW = [0.60, 0.25, 0.15], [0.42, 0.38, 0.20]


def run(aligned, misaligned, rollouts=8, copies=1, **options):
    """Half of the prompts start from `aligned`, whose mode is the right answer 0, half from `misaligned` with answers 0 and 1 swapped."""
    wrong_first = [misaligned[1], misaligned[0], misaligned[2]]
    return theory.train_tabular([aligned, wrong_first] * copies, [0] * 2 * copies, lr=0.5, steps=150, rollouts=rollouts, **options)


def test_rise_then_fall_when_the_aligned_prompts_converge_first():
    result = run(WIDE, NARROW)
    peak = int(result.accuracy.argmax())
    assert 0 < peak < 150
    assert result.accuracy[peak] > result.accuracy[0] + 0.05
    assert result.accuracy[peak] > result.accuracy[-1] + 0.05
    assert bool((result.majority_mass.diff() > 0).all())  # the reward it trains on never stops rising
    assert result.reward_accuracy[-1] < result.reward_accuracy[0] - 0.05
    close(result.accuracy[-1], 0.5, rtol=0, atol=0.01)  # the aligned half


def test_fall_then_rise_when_the_misaligned_prompts_converge_first():
    result = run(NARROW, WIDE)
    trough = int(result.accuracy.argmin())
    assert 0 < trough < 150
    assert result.accuracy[trough] < result.accuracy[0] - 0.02
    assert result.accuracy[trough] < result.accuracy[-1] - 0.05


def test_rise_and_fall_comes_from_votes_that_flip():
    result = run(WIDE, NARROW, rollouts=None)  # N → ∞: a narrow lead is pushed as hard as a wide one
    assert float(result.accuracy.max() - result.accuracy[-1]) < 0.01


def test_no_rise_and_fall_without_a_mixture():
    for rollouts in (8, None):
        aligned = theory.train_tabular([WIDE, NARROW], [0, 0], lr=0.5, steps=100, rollouts=rollouts)
        assert bool((aligned.accuracy.diff() > 0).all())
        wrong = theory.train_tabular([WIDE, NARROW], [1, 1], lr=0.5, steps=100, rollouts=rollouts)
        assert wrong.accuracy[-1] < 0.01
        assert wrong.reward_accuracy[-1] < 0.02


def test_reward_accuracy_by_hand():
    start = theory.train_tabular([WIDE, NARROW], [0, 1], lr=0.5, steps=0)
    close(start.reward_accuracy, [(1 + (1 - 0.42 - 0.38)) / 2])  # right majority: all agree; wrong one: those who gave neither
    close(start.accuracy, [(0.60 + 0.38) / 2])


def test_noise_of_the_votes_carries_some_misaligned_prompts_over():
    """In expectation every narrow misaligned prompt locks its error in; sampled votes let some of them cross to the right answer."""
    result = run(WIDE, NARROW, rollouts=32, copies=40, generator=torch.Generator().manual_seed(0))
    assert result.majority_mass[-1] > 0.99
    assert 0.55 < result.accuracy[-1] < 0.9
    assert run(WIDE, NARROW, rollouts=32).accuracy[-1] < 0.51


@pytest.mark.parametrize("rollouts", [2, 5, 8])
def test_the_expected_step_is_the_mean_over_all_samples(rollouts):
    expected = torch.zeros(3, dtype=torch.float64)
    for sequence in itertools.product(range(3), repeat=rollouts):
        elected = Counter(sequence).most_common(1)[0][0]
        rewards = torch.tensor([float(a == elected) for a in sequence], dtype=torch.float64)
        if rewards.min() == rewards.max():
            continue
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        chance = math.prod(THREE[a] for a in sequence)
        expected.index_add_(0, torch.tensor(sequence), chance * advantages / rollouts)
    result = theory.train_tabular([list(THREE)], [0], lr=1.0, steps=1, rollouts=rollouts)
    close(result.policies[0], torch.softmax(torch.tensor(THREE, dtype=torch.float64).log() + expected, -1))


def test_sampled_steps_have_the_expected_mean():
    start, options = [list(THREE)] * 10_000, {"lr": 1e-3, "steps": 1, "rollouts": 8}
    sampled = theory.train_tabular(start, [0] * 10_000, generator=torch.Generator().manual_seed(1), **options).policies.mean(0)
    exact = theory.train_tabular(start[:1], [0], **options).policies[0]
    moved = float((exact - torch.tensor(THREE, dtype=torch.float64)).abs().max())
    close(sampled, exact, rtol=0, atol=0.1 * moved)
    alone = theory.train_tabular(start[:2], [0, 0], lr=0.3, steps=3, rollouts=1)
    close(alone.policies, start[:2])  # a group of one has no advantage


def test_a1_fails_with_eight_rollouts_and_prompts_lock_onto_other_answers():
    def share_on_the_mode(rollouts, prompts, steps):
        generator = torch.Generator().manual_seed(0)
        result = theory.train_tabular([list(THREE)] * prompts, [0] * prompts, lr=2.0, steps=steps, rollouts=rollouts, generator=generator)
        assert result.majority_mass[-1] > 0.97
        return float((result.policies.argmax(-1) == 0).double().mean())

    assert 0.3 < share_on_the_mode(8, prompts=60, steps=30) < 0.75
    assert share_on_the_mode(1024, prompts=30, steps=15) > 0.85


def test_what_training_refuses():
    for args, options in (
        (([[1.0, 0.0]], [0]), {}),
        (([[0.5, 0.5]], [0, 1]), {}),
        (([[0.5, 0.5]], [2]), {}),
        (([[0.5, 0.5]], [0]), {"rollouts": 0}),
    ):
        with pytest.raises(ValueError, match=r"expected positive|rollouts"):
            theory.train_tabular(*args, lr=0.1, steps=1, **options)
