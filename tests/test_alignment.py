"""Alignment metrics, avg/pass/maj@k and the reward alarm, against hand-made groups, enumeration and independent float64 code."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch

from urlvr_fast.monitor.alignment import alignment_metrics, point_biserial
from urlvr_fast.monitor.hacking import RewardAlarm
from urlvr_fast.monitor.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from urlvr_fast.rewards.answers import ExactAnswers, MathAnswers
from urlvr_fast.rewards.ensemble import MajorityVoting, vote
from urlvr_fast.trainer.batch import RolloutBatch

WORD = ExactAnswers(r"(\S+)")


def make_batch(completions, group_ids, prompt_ids=None):
    """Rollouts of two response tokens each; group g is prompt 100 + g unless `prompt_ids` says otherwise."""
    n = len(completions)
    return RolloutBatch(
        tokens=torch.arange(3 * n),
        cu_seqlens=torch.arange(n + 1) * 3,
        prompt_lens=torch.ones(n, dtype=torch.int64),
        group_ids=torch.tensor(group_ids),
        prompt_ids=[100 + g for g in group_ids] if prompt_ids is None else prompt_ids,
        prompts=[f"prompt {g}" for g in group_ids],
        completions=list(completions),
        finish_reasons=["stop"] * n,
        sampled_logp=torch.full((2 * n,), -1.0),
        temperature=1.0,
    )


def metrics_of(batch, rewards, answers, checker=WORD):
    return alignment_metrics(batch, torch.as_tensor(rewards, dtype=torch.float32), answers, checker)


# ---- alignment


def test_metrics_by_hand():
    """Group 0: votes 7,7,8,(none), truth 7. Group 1: votes 4,4,4,5, truth 5: confidently wrong. Group 2: nothing parses, truth 1."""
    batch = make_batch(["7", "7", "8", "a b", "4", "4", "4", "5", "x y", "x y", "x y", "x y"], [0] * 4 + [1] * 4 + [2] * 4)
    rewards = MajorityVoting(WORD)(batch)
    assert rewards.tolist() == [1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    truth = [1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    metrics = metrics_of(batch, rewards, {100: "7", 101: "5", 102: "1"})
    expected = {
        "majority_ratio": (0.5 + 0.75 + 0.0) / 3,
        "majority_voting_reward": (0.5 + 0.75 + 0.0) / 3,
        "parse_rate": 7 / 12,
        "label_accuracy": 1 / 3,
        "ground_truth_reward": (0.5 + 0.25 + 0.0) / 3,
        "pass@4": 2 / 3,
        "pseudo_label_accuracy": (1.0 + 0.0 + 0.0) / 3,
        "reward_accuracy": (1.0 + 0.0 + 1.0) / 3,  # zeros that match zeros count
        "majority_reward_accuracy": (1.0 + 0.0 + 1.0) / 3,  # the reward is majority voting
        "point_biserial": pearson(truth, rewards.tolist()),
    }
    assert metrics == pytest.approx(expected)


def pearson(x, y):
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y))


def interleaved(seed):
    """Twelve groups of eight, a good part of them right, with continuous rewards; rollouts of a prompt scattered over the batch."""
    rng = random.Random(seed)
    groups = [g for g in range(12) for _ in range(8)]
    completions = [rng.choice(["1", "2", "3"]) for _ in groups]
    rewards = [rng.random() for _ in groups]
    answers = {100 + g: rng.choice(["1", "2", "3"]) for g in range(12)}
    order = rng.sample(range(96), 96)
    batch = make_batch([completions[i] for i in order], [groups[i] for i in order])
    return batch, [rewards[i] for i in order], answers


@pytest.mark.parametrize("seed", range(3))
def test_metrics_group_by_id_not_by_position(seed):
    """The released code reshapes a batch that was reordered by length to (prompts, n), and so mixes prompts."""
    batch, rewards, answers = interleaved(seed)
    metrics = metrics_of(batch, rewards, answers)
    by_group: dict[int, list[tuple[float, float, str]]] = {}
    for group, prompt_id, reward, text in zip(batch.group_ids.tolist(), batch.prompt_ids, rewards, batch.completions, strict=True):
        by_group.setdefault(group, []).append((reward, float(text == answers[prompt_id]), text))
    top = [max(rows)[1] for rows in by_group.values()]
    assert metrics["pseudo_label_accuracy"] == pytest.approx(sum(top) / 12)
    assert metrics["ground_truth_reward"] == pytest.approx(sum(sum(row[1] for row in rows) / 8 for rows in by_group.values()) / 12)
    assert metrics["pass@8"] == pytest.approx(sum(max(row[1] for row in rows) for rows in by_group.values()) / 12)
    assert metrics["majority_ratio"] == pytest.approx(
        sum(Counter(row[2] for row in rows).most_common(1)[0][1] / 8 for rows in by_group.values()) / 12
    )
    assert "reward_accuracy" not in metrics


def test_reshaping_a_reordered_batch_would_say_something_else():
    """Both prompts' best rollouts are right. Read as two rows of two, the second row has no right rollout at all."""
    batch = make_batch(["1", "1", "2", "2"], [0, 1, 0, 1])
    metrics = metrics_of(batch, [0.9, 0.8, 0.1, 0.2], {100: "1", 101: "1"})
    assert metrics["pseudo_label_accuracy"] == 1.0
    assert metrics["pass@2"] == 1.0
    assert metrics["majority_ratio"] == 0.5


def test_metrics_do_not_depend_on_the_order_of_rollouts():
    batch, rewards, answers = interleaved(5)
    reference = metrics_of(batch, rewards, answers)
    rng = random.Random(1)
    for _ in range(5):
        order = rng.sample(range(96), 96)
        assert metrics_of(batch.select(order), [rewards[i] for i in order], answers) == pytest.approx(reference, abs=1e-12)


def test_groups_of_different_sizes_weigh_the_same():
    batch = make_batch(["1", "1", "1", "2"], [0, 0, 0, 1])
    metrics = metrics_of(batch, [1, 1, 1, 1], {100: "1", 101: "1"})
    assert metrics["ground_truth_reward"] == metrics["label_accuracy"] == metrics["reward_accuracy"] == 0.5
    assert metrics["pass@n"] == 0.5
    assert not any(key.startswith("pass@") and key != "pass@n" for key in metrics)


def test_without_answers_only_the_label_free_metrics_are_there():
    batch = make_batch(["1", "1", "2", "a b"], [0, 0, 1, 1])
    for answers in ({}, None, {999: "1"}):
        assert metrics_of(batch, [1, 1, 1, 0], answers) == {"majority_ratio": 0.75, "majority_voting_reward": 0.75, "parse_rate": 0.75}


def test_prompts_without_an_answer_are_left_out_of_what_needs_one():
    batch = make_batch(["1", "1", "2", "2"], [0, 0, 1, 1])
    metrics = metrics_of(batch, [1, 1, 1, 1], {100: "1"})
    assert metrics["label_accuracy"] == metrics["ground_truth_reward"] == metrics["pass@2"] == 1.0
    assert metrics["majority_ratio"] == 1.0


def test_two_groups_of_one_prompt_stay_apart():
    batch = make_batch(["1", "1", "2", "2"], [0, 0, 1, 1], prompt_ids=[100] * 4)
    metrics = metrics_of(batch, [1, 1, 1, 1], {100: "1"})
    assert metrics["label_accuracy"] == 0.5
    assert metrics["majority_ratio"] == 1.0


def test_unanimous_and_wrong_has_reward_accuracy_zero_and_scattered_and_wrong_a_high_one():
    """The collapse that Reward Accuracy below 1 % stands for is consensus on wrong answers, not low accuracy."""
    unanimous = make_batch(["9"] * 8, [0] * 8)
    assert metrics_of(unanimous, MajorityVoting(WORD)(unanimous), {100: "1"})["reward_accuracy"] == 0.0
    scattered = make_batch([str(i) for i in range(2, 10)], [0] * 8)
    assert metrics_of(scattered, MajorityVoting(WORD)(scattered), {100: "1"})["reward_accuracy"] == 7 / 8


def test_label_accuracy_is_by_equivalence():
    with MathAnswers(timeout_s=20) as checker:
        batch = make_batch([r"\boxed{\frac{1}{\sqrt2}}", r"\boxed{\frac{\sqrt2}{2}}", r"\boxed{1}"], [0] * 3)
        metrics = alignment_metrics(batch, MajorityVoting(checker)(batch), {100: r"\sqrt{2}/2"}, checker)
    assert metrics["label_accuracy"] == 1.0
    assert metrics["reward_accuracy"] == 1.0
    assert metrics["majority_ratio"] == pytest.approx(2 / 3)


def test_a_reference_answer_none_is_not_met_by_silence():
    batch = make_batch(["a b", "a b"], [0, 0])
    metrics = metrics_of(batch, [0, 0], {100: "None"})
    assert metrics["label_accuracy"] == metrics["ground_truth_reward"] == 0.0


def test_tied_rewards_share_the_pseudo_label():
    batch = make_batch(["1", "2", "2", "2"], [0] * 4)
    assert metrics_of(batch, [0.7, 0.7, 0.7, 0.1], {100: "1"})["pseudo_label_accuracy"] == pytest.approx(1 / 3)


def test_given_votes_are_used():
    batch = make_batch(["1", "1", "2"], [0] * 3)
    votes = vote(batch, WORD)
    assert alignment_metrics(batch, torch.ones(3), {100: "1"}, WORD, votes=votes) == metrics_of(batch, [1, 1, 1], {100: "1"})


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="shape"):
        metrics_of(make_batch(["1"], [0]), [1, 1], {})
    with pytest.raises(ValueError, match="empty"):
        metrics_of(make_batch(["1"], [0]).select([]), [], {})


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_point_biserial_is_pearson(scale):
    rng = random.Random(0)
    truth = [float(rng.random() < 0.4) for _ in range(50)]
    rewards = [scale * (rng.random() + 0.5 * t) for t in truth]
    value = point_biserial(torch.tensor(truth), torch.tensor(rewards, dtype=torch.float64))
    assert value == pytest.approx(pearson(truth, [r / scale for r in rewards]), abs=1e-9)
    assert point_biserial(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])) == pytest.approx(1.0)


def test_point_biserial_is_zero_where_it_is_undefined():
    assert point_biserial(torch.ones(4), torch.rand(4)) == 0.0
    assert point_biserial(torch.tensor([0.0, 1.0]), torch.ones(2)) == 0.0
    assert point_biserial(torch.empty(0), torch.empty(0)) == 0.0


# ---- avg@k, pass@k, maj@k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_against_enumeration(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(1024, 1, 1), (1024, 1, 512), (100_000, 3, 256), (4096, 4000, 2048), (1024, 0, 1024), (256, 256, 1)]
)
def test_pass_at_k_at_sizes_where_factorials_overflow(n, c, k):
    survive = Fraction(1)
    for i in range(c):  # none of the c correct ones is among the k drawn
        survive *= Fraction(max(0, n - k - i), n - i)
    assert pass_at_k(n, c, k) == float(1 - survive)


def test_avg_at_k():
    assert avg_at_k([True, False, False, True], 2) == 0.5
    assert avg_at_k(torch.tensor([1.0, 0.0, 0.0, 0.0]).tolist(), 4) == 0.25


@pytest.mark.parametrize(
    "function", [lambda k: pass_at_k(4, 1, k), lambda k: avg_at_k([True] * 4, k), lambda k: maj_at_k([0] * 4, [True] * 4, k)]
)
@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_out_of_range_is_refused(function, k):
    with pytest.raises(ValueError, match="between 1 and the number of rollouts"):
        function(k)


def test_more_correct_than_rollouts_is_refused():
    with pytest.raises(ValueError, match="between 0 and"):
        pass_at_k(4, 5, 1)


def enumerated_maj(classes, correct, k):
    """Every draw of k, one by one: the share of its most voted classes that is right."""
    right = dict(zip(classes, correct, strict=True))
    total = Fraction(0)
    draws = list(itertools.combinations(classes, k))
    for draw in draws:
        counts = Counter(number for number in draw if number >= 0)
        winners = [number for number, count in counts.items() if count == max(counts.values())]
        total += Fraction(sum(right[number] for number in winners), max(1, len(winners)))
    return float(total / len(draws))


@pytest.mark.parametrize(
    ("classes", "right"),
    [
        ([0, 0, 1, 1, 2, -1], {0}),
        ([0, 0, 0, 1, 1, 2, 3, -1], {1}),
        ([0, 1, 2, 3, 4], {2}),
        ([-1, -1, -1], set()),
        ([-1, 0, -1, 0, 1], {0}),
        ([0, 0, 1, 1, 2, 2, 2], {0, 1}),
        ([3, 3, 3], {3}),
        ([0, 1, 1], set()),
    ],
)
def test_maj_at_k_against_enumeration(classes, right):
    correct = [number in right for number in classes]
    for k in range(1, len(classes) + 1):
        assert maj_at_k(classes, correct, k) == pytest.approx(enumerated_maj(classes, correct, k), abs=1e-12), k


def test_maj_at_1_is_the_accuracy_and_all_of_them_is_the_vote():
    classes = [0] * 200 + [1] * 150 + [2] * 100 + [-1] * 50
    assert maj_at_k(classes, [c == 0 for c in classes], 1) == pytest.approx(0.4)
    assert maj_at_k(classes, [c == 0 for c in classes], 500) == 1.0
    assert maj_at_k(classes, [c == 1 for c in classes], 500) == 0.0
    assert 0.4 < maj_at_k(classes, [c == 0 for c in classes], 32) < 1.0


def test_a_class_whose_rollouts_disagree_counts_by_its_share():
    assert maj_at_k([0, 0, 0, 0, 1], [True, True, True, False, False], 5) == 0.75


# ---- the alarm


def flat_batch(n=16, group_size=8, completion="no answer at all"):
    return make_batch([completion] * n, [i // group_size for i in range(n)])


def spread(n=16):
    return torch.arange(n, dtype=torch.float32) % 2


def test_a_first_step_of_sixteen_rollouts_says_what_is_wrong():
    alarm = RewardAlarm(constant_steps=1)
    said = alarm.update(1, flat_batch(), torch.zeros(16), 0.0)
    assert len(said) == 3
    assert all(sentence.startswith("step 1: ") for sentence in said)
    assert any("no answer could be extracted from any of the 16 rollouts" in s and "prompts.suffix" in s for s in said)
    assert any("every one of the 16 rewards so far is 0" in s and "Check" in s for s in said)
    assert any("constant within every group" in s and "check" in s for s in said)


def test_each_warning_is_said_once_and_again_at_the_end():
    alarm = RewardAlarm(constant_steps=2)
    assert len(alarm.update(1, flat_batch(), torch.ones(16), 0.0)) == 2
    assert len(alarm.update(2, flat_batch(), torch.ones(16), 0.0)) == 1
    for step in range(3, 10):
        assert alarm.update(step, flat_batch(), torch.ones(16), 0.0) == []
    final = alarm.final()
    assert len(final) == 3
    assert all(sentence.startswith("whole run (9 steps): ") for sentence in final)
    assert "144 rollouts" in final[0]


def test_a_healthy_run_is_left_alone():
    alarm = RewardAlarm()
    for step in range(1, 6):
        assert alarm.update(step, flat_batch(completion="7"), spread(), 1.0) == []
    assert alarm.final() == []
    assert RewardAlarm().final() == []


def test_fewer_than_sixteen_rollouts_are_waited_for_but_not_forgotten():
    alarm = RewardAlarm()
    assert alarm.update(1, flat_batch(8), torch.zeros(8), 0.0) == []
    assert len(alarm.final()) == 3
    assert len(alarm.update(2, flat_batch(8), torch.zeros(8), 0.0)) == 2


def test_different_constants_in_each_group_give_no_gradient_either():
    """Rewards do vary over the run; within a group they never do."""
    alarm = RewardAlarm(constant_steps=3)
    rewards = torch.tensor([0.0] * 8 + [1.0] * 8)
    said = [alarm.update(step, flat_batch(), rewards, 1.0) for step in range(1, 5)]
    assert [len(s) for s in said] == [0, 0, 1, 0]
    assert "constant within every group for 3 steps" in said[2][0]
    # Groups are by id: the same rewards over interleaved groups are a signal.
    mixed = make_batch(["a"] * 16, [i % 2 for i in range(16)])
    other = RewardAlarm(constant_steps=1)
    assert other.update(1, mixed, rewards, 1.0) == []


def test_a_single_varied_step_resets_the_count_of_flat_ones():
    alarm = RewardAlarm(constant_steps=2)
    flat = torch.tensor([0.0] * 8 + [1.0] * 8)
    assert alarm.update(1, flat_batch(), flat, 1.0) == []
    assert alarm.update(2, flat_batch(), spread(), 1.0) == []
    assert alarm.update(3, flat_batch(), flat, 1.0) == []
    assert len(alarm.update(4, flat_batch(), flat, 1.0)) == 1
    assert alarm.final() == []


def test_groups_of_one_are_named_as_the_reason():
    alarm = RewardAlarm(constant_steps=1)
    (sentence,) = alarm.update(1, flat_batch(group_size=1), spread(), 1.0)
    assert "rollout.group_size" in sentence


def test_one_answer_anywhere_ends_the_alarm_about_answers():
    alarm = RewardAlarm(min_rollouts=32)
    assert alarm.update(1, flat_batch(), spread(), 0.0) == []
    assert alarm.update(2, flat_batch(), spread(), 1 / 16) == []
    assert alarm.update(3, flat_batch(), spread(), 0.0) == []
    assert alarm.final() == []


def test_rewards_that_look_for_no_answer_raise_no_alarm_about_answers():
    alarm = RewardAlarm()
    assert alarm.update(1, flat_batch(), spread(), None) == []
    assert alarm.final() == []


@pytest.mark.parametrize("options", [{"constant_steps": 0}, {"min_rollouts": 0}])
def test_alarm_options_are_checked(options):
    with pytest.raises(ValueError, match="at least 1"):
        RewardAlarm(**options)
