"""Rewards against hand-computed numbers and independent float64 loops; voting; the registry; the checked call."""

import itertools
import math
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch

from urlvr_fast.rewards import RewardError
from urlvr_fast.rewards.answers import ExactAnswers, MathAnswers
from urlvr_fast.rewards.certainty import Probability, SelfCertainty, TokenEntropy, TrajectoryEntropy
from urlvr_fast.rewards.ensemble import MajorityVoting, vote
from urlvr_fast.rewards.external import GroundTruth, correct
from urlvr_fast.rewards.registry import ALIASES, REWARDS, build_reward, call_reward, reward_needs
from urlvr_fast.trainer.batch import RolloutBatch

WORD = ExactAnswers(r"(?:answer )?(\S+)")


def make_batch(completions, group_ids=None, *, logp=None, train_mask=None, **statistics):
    """One rollout per completion; `logp` and the statistics are a list of per-token numbers for each."""
    n = len(completions)
    group_ids = [0] * n if group_ids is None else group_ids
    logp = [[-1.0, -2.0]] * n if logp is None else logp
    lengths = torch.tensor([len(values) for values in logp])
    prompt_lens = torch.tensor([2 + i % 3 for i in range(n)])
    ends = (lengths + prompt_lens).cumsum(0)
    distinct = list(dict.fromkeys(group_ids))

    def flat(rows):
        return torch.tensor([value for row in rows for value in row], dtype=torch.float32)

    return RolloutBatch(
        tokens=torch.arange(int(ends[-1])),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        prompt_lens=prompt_lens,
        group_ids=torch.tensor(group_ids),
        prompt_ids=[100 + distinct.index(group) for group in group_ids],
        prompts=[f"prompt of group {group}" for group in group_ids],
        completions=list(completions),
        finish_reasons=["stop"] * n,
        sampled_logp=flat(logp),
        temperature=1.0,
        train_mask=train_mask,
        **{name: flat(rows) for name, rows in statistics.items()},
    )


def ragged(seed, n=12, low=1, high=40, scale=3.0):
    rng = random.Random(seed)
    return [[-scale * rng.random() for _ in range(rng.randint(low, high))] for _ in range(n)]


def permuted(batch, order):
    return batch.select(list(order))


# ---- certainty


def test_certainty_rewards_by_hand():
    batch = make_batch(["a", "b"], logp=[[-1.0, -3.0], [-0.5]], entropy=[[0.5, 1.5], [0.25]], self_certainty=[[2.0, 4.0], [1.0]])
    assert SelfCertainty()(batch).tolist() == [3.0, 1.0]
    assert TokenEntropy()(batch).tolist() == [-1.0, -0.25]
    assert TrajectoryEntropy()(batch).tolist() == [-2.0, -0.5]
    assert Probability()(batch).tolist() == pytest.approx([math.exp(-3.5), 1.0], rel=1e-6)
    assert Probability(paper_exact=True)(batch).tolist() == pytest.approx([math.exp(-4.0), math.exp(-0.5)], rel=1e-6)


def test_certainty_rewards_against_float64_loops():
    logp = ragged(0)
    other = [[abs(math.sin(i + j)) + 0.1 for j in range(len(row))] for i, row in enumerate(logp)]
    groups = [7, 7, 3, 7, 3, 3, -5, 7, 3, -5, -5, 7]
    batch = make_batch([str(i) for i in range(12)], groups, logp=logp, entropy=other, self_certainty=other)
    tokens = [batch.sampled_logp.double()[a:b].tolist() for a, b in itertools.pairwise(batch.response_cu_seqlens.tolist())]
    numbers = [batch.entropy.double()[a:b].tolist() for a, b in itertools.pairwise(batch.response_cu_seqlens.tolist())]
    mean = [math.fsum(row) / len(row) for row in numbers]
    assert SelfCertainty()(batch).tolist() == pytest.approx(mean, rel=1e-6)
    assert TokenEntropy()(batch).tolist() == pytest.approx([-m for m in mean], rel=1e-6)
    assert TrajectoryEntropy()(batch).tolist() == pytest.approx([math.fsum(row) / len(row) for row in tokens], rel=1e-6)
    total = [math.fsum(row) for row in tokens]
    best = {g: max(t for t, h in zip(total, groups, strict=True) if h == g) for g in groups}
    assert Probability()(batch).tolist() == pytest.approx([math.exp(t - best[g]) for t, g in zip(total, groups, strict=True)], rel=1e-6)


def test_self_certainty_differs_from_the_papers_only_by_log_v():
    """KL(U‖p) + log V = logsumexp − mean, from the definition, on a real distribution."""
    torch.manual_seed(0)
    logits = torch.randn(5, 50, dtype=torch.float64)
    logp = logits.log_softmax(-1)
    kl = (torch.full_like(logp, 1 / 50) * (math.log(1 / 50) - logp)).sum(-1)
    batch = make_batch(["a"], logp=[[-1.0] * 5], self_certainty=[kl.tolist()])
    papers = (logits.logsumexp(-1) - logits.mean(-1)).mean().item()
    assert SelfCertainty()(batch).item() + math.log(50) == pytest.approx(papers, rel=1e-6)


def test_long_responses_underflow_only_where_the_paper_does():
    """A thousand tokens of −1 nat: exp(−1000) is 0 in fp32, and with it every reward of the released code."""
    batch = make_batch(["a", "b", "c"], logp=[[-1.0] * 1000, [-1.0] * 1001, [-0.5] * 4])
    assert Probability(paper_exact=True)(batch)[:2].tolist() == [0.0, 0.0]
    two = make_batch(["a", "b"], logp=[[-1.0] * 1000, [-1.0] * 1001])
    assert Probability(paper_exact=True)(two).tolist() == [0.0, 0.0]
    assert Probability()(two).tolist() == pytest.approx([1.0, math.exp(-1.0)], rel=1e-6)


def test_shifted_probability_gives_the_advantages_of_the_exact_one():
    logp = ragged(3, n=8, high=10, scale=1.0)
    batch = make_batch(["x"] * 8, logp=logp)

    def advantages(rewards):
        rewards = rewards.double()
        return (rewards - rewards.mean()) / rewards.std()

    torch.testing.assert_close(advantages(Probability()(batch)), advantages(Probability(paper_exact=True)(batch)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("reward", "field"), [(SelfCertainty(), "self_certainty"), (TokenEntropy(), "entropy")])
def test_a_missing_statistic_raises_and_is_never_zeros(reward, field):
    """The released code reads a missing entropy as zeros: every reward is then 0 and nothing is learnt."""
    assert reward.needs == {field}
    batch = make_batch(["a", "b"])
    with pytest.raises(RewardError, match=field):
        reward(batch)
    with pytest.raises(RewardError, match=rf"{type(reward).__name__}.*{field}"):
        call_reward(reward, batch, None)


def test_an_empty_response_is_an_error_not_the_best_reward():
    with pytest.raises(RewardError, match="rollout 1 of 2"):
        TrajectoryEntropy()(make_batch(["a", "b"], logp=[[-1.0], []]))


def test_certainty_rewards_are_detached_and_do_not_change_the_batch():
    batch = make_batch(["a", "b"], logp=[[-1.0, -3.0], [-0.5]])
    batch.sampled_logp.requires_grad_()
    before = batch.sampled_logp.detach().clone()
    for reward in (TrajectoryEntropy(), Probability(), Probability(paper_exact=True)):
        assert not reward(batch).requires_grad
    assert torch.equal(batch.sampled_logp, before)


# ---- voting


def test_votes_by_hand():
    batch = make_batch(["7", "8", "answer 7", "no answer at all", "8", "7", "9", "?? ?", "? ?"], [0, 0, 0, 0, 1, 1, 1, 2, 2])
    votes = vote(batch, WORD)
    assert votes.answers == ["7", "8", "7", None, "8", "7", "9", None, None]
    assert votes.classes == [0, 1, 0, -1, 0, 1, 2, -1, -1]
    assert votes.ratios == {0: 0.5, 1: pytest.approx(1 / 3), 2: 0.0}
    assert votes.labels[0] == "7"
    assert (votes.winners[2], votes.labels[2]) == (-1, None)
    assert votes.parse_rate == pytest.approx(6 / 9)
    assert MajorityVoting(WORD)(batch).tolist() == [1, 0, 1, 0, 0, 1, 0, 0, 0]  # 7 wins group 1 by string order, all else equal


def test_a_threshold_silences_groups_without_agreement():
    batch = make_batch(["7", "8", "7", "no answer at all", "8", "7", "9"], [0, 0, 0, 0, 1, 1, 1])  # shares 2/4 and 1/3
    assert MajorityVoting(WORD, threshold=0.5)(batch).tolist() == [1, 0, 1, 0, 0, 0, 0]
    assert MajorityVoting(WORD, threshold=0.51)(batch).tolist() == [0] * 7
    with pytest.raises(RewardError, match=r"threshold=1\.5"):
        MajorityVoting(WORD, threshold=1.5)


def test_ratio_counts_rollouts_without_an_answer():
    votes = vote(make_batch(["5", "a b", "a b", "a b"]), WORD)
    assert votes.ratios == {0: 0.25}
    assert votes.in_winner.tolist() == [True, False, False, False]


def test_boxing_the_word_none_wins_nothing_for_the_silent():
    """The released code labels a group where nothing parses "None", and would reward a model that boxes that word."""
    checker = MathAnswers()
    nothing = make_batch(["no box", "none either", "None"])
    assert MajorityVoting(checker)(nothing).tolist() == [0, 0, 0]
    assert vote(nothing, checker).labels == {0: None}
    mixed = make_batch([r"\boxed{None}", "no box", "no box", "no box"])
    votes = vote(mixed, checker)
    assert votes.labels == {0: "None"}  # an answer like any other: one vote of four
    assert votes.ratios == {0: 0.25}
    assert votes.in_winner.tolist() == [True, False, False, False]
    assert correct(nothing, {100: "None"}, checker).tolist() == [0, 0, 0]


def test_equal_answers_in_different_spellings_vote_together():
    """By spelling, 2 would win with two votes; by value the half has three. (The released code clusters strings.)"""
    with MathAnswers(timeout_s=20) as checker:
        batch = make_batch([rf"\boxed{{{answer}}}" for answer in ["2", "2", r"\sqrt{8}/4", r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"]])
        votes = vote(batch, checker)
        assert votes.classes == [0, 0, 1, 1, 1]
        assert votes.in_winner.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    "answer", [r"\frac{\sqrt{2}}{2}", r"\left(\frac{3}{5},\frac{8}{3}\right]", r"x^2+2x+1", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"]
)
def test_whoever_voted_for_the_winner_is_rewarded(answer):
    """The released code grades the responses again, against the label in sympy's spelling, and may fail the very voters."""
    with MathAnswers(timeout_s=20) as checker:
        batch = make_batch([rf"so \boxed{{{answer}}}", rf"hence $\boxed{{ {answer} }}$.", r"\boxed{0}"])
        assert MajorityVoting(checker)(batch).tolist() == [1, 1, 0]
        assert vote(batch, checker).labels == {0: answer}


def test_tie_goes_to_the_likelier_class_then_to_the_first_in_string_order():
    likelier = make_batch(["3", "9", "3", "9"], logp=[[-1.0], [-0.5], [-1.0], [-0.7]])
    assert vote(likelier, WORD).labels == {0: "9"}
    # Per token, so that a long response is not at a disadvantage.
    longer = make_batch(["3", "9"], logp=[[-1.0], [-0.9] * 30])
    assert vote(longer, WORD).labels == {0: "9"}
    equal = make_batch(["9", "3", "3", "9"])
    assert vote(equal, WORD).labels == {0: "3"}
    # A count decides before any likelihood does.
    more = make_batch(["3", "3", "9"], logp=[[-5.0], [-5.0], [-0.1]])
    assert vote(more, WORD).labels == {0: "3"}


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rollouts_decides_nothing(seed):
    rng = random.Random(seed)
    n = 18
    completions = [rng.choice(["1", "2", "3", "no answer here", "04"]) for _ in range(n)]
    groups = [rng.choice([5, -2, 9]) for _ in range(n)]
    logp = [[rng.choice([-0.1, -0.3, -0.7])] * rng.randint(1, 3) for _ in range(n)]
    batch = make_batch(completions, groups, logp=logp)
    rewards, votes = MajorityVoting(WORD)(batch), vote(batch, WORD)
    for _ in range(20):
        order = rng.sample(range(n), n)
        shuffled = permuted(batch, order)
        assert MajorityVoting(WORD)(shuffled).tolist() == rewards[order].tolist()
        assert vote(shuffled, WORD).labels == votes.labels
        assert vote(shuffled, WORD).ratios == votes.ratios


def test_votes_that_are_not_trained_on_count():
    batch = make_batch(["1", "2", "2", "2"], train_mask=torch.tensor([True, True, False, False]))
    assert MajorityVoting(WORD)(batch).tolist() == [0, 1, 1, 1]


def test_several_workers_give_the_votes_of_one():
    spellings = [r"\sqrt{8}", r"2\sqrt2", "x+x", "2x", "3"]
    batch = make_batch([rf"\boxed{{{spellings[i % 5]}}}" for i in range(24)], [i % 6 for i in range(24)])
    with MathAnswers(timeout_s=30, workers=1) as one, MathAnswers(timeout_s=30, workers=2) as two:
        a, b = vote(batch, one), vote(batch, two)
    assert a.classes == b.classes
    assert a.labels == b.labels
    assert torch.equal(a.in_winner, b.in_winner)


def election_probability(probabilities, n, wins):
    """P(`wins(counts)`) for multinomial counts, summed over all of them."""
    total = 0.0
    for x in range(n + 1):
        for y in range(n + 1 - x):
            counts = (x, y, n - x - y)
            ways = math.factorial(n) // math.prod(math.factorial(c) for c in counts)
            if wins(counts):
                total += ways * math.prod(p**c for p, c in zip(probabilities, counts, strict=True))
    return total


def test_few_rollouts_often_miss_the_most_probable_answer():
    """Theorem 1 assumes a majority that does not change. With answers of probability .40/.35/.25 and 8 rollouts it does.

    The probability is taken over all outcomes of the real vote (equal log-probs, so ties go by string order) and agrees with the counting
    done without it. Even when every tie favours the mode, it loses two elections in five; when none does, most of them.
    """
    probabilities, n = (0.40, 0.35, 0.25), 8

    def by_voting(names):
        def wins(counts):
            completions = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
            return vote(make_batch(completions), WORD).labels[0] == names[0]

        return election_probability(probabilities, n, wins)

    favoured, hindered = by_voting(("a", "b", "c")), by_voting(("z", "b", "c"))
    assert favoured == pytest.approx(election_probability(probabilities, n, lambda c: c[0] == max(c)), abs=1e-12)
    assert hindered == pytest.approx(election_probability(probabilities, n, lambda c: c[0] > max(c[1:])), abs=1e-12)
    assert hindered < 0.5 < favoured < 0.6
    many = election_probability(probabilities, 64, lambda c: c[0] > max(c[1:]))
    assert favoured < many < 0.7  # 64 votes are better, and a third of the prompts are still elected wrong


def test_a_sampled_vote_misses_the_mode_as_often_as_counting_says():
    rng = random.Random(0)
    groups, n = 400, 8
    completions = rng.choices(["a", "b", "c"], weights=[0.40, 0.35, 0.25], k=groups * n)
    batch = make_batch(completions, [i // n for i in range(groups * n)], logp=[[-1.0]] * (groups * n))
    share = Counter(vote(batch, WORD).labels.values())["a"] / groups
    expected = election_probability((0.40, 0.35, 0.25), n, lambda c: c[0] == max(c))
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / groups)


# ---- truth


def test_ground_truth_by_hand():
    batch = make_batch(["7", "8", "no answer", "8"], [0, 0, 1, 1])
    assert GroundTruth({100: "7", 101: "8"}, WORD)(batch).tolist() == [1, 0, 0, 1]
    partly = correct(batch, {101: "8"}, WORD)
    assert partly[:2].isnan().all()
    assert partly[2:].tolist() == [0, 1]
    with pytest.raises(RewardError, match=r"1 of this batch have none.*rollout 0 of 4.*prompt 100"):
        GroundTruth({101: "8"}, WORD)(batch)


# ---- registry


class IndifferentPolicy:
    """Finds everything equally likely."""

    def render(self, message):
        return message

    def likelihood(self, contexts, continuations):
        return torch.full((len(contexts),), -1.0, dtype=torch.float64), torch.ones(len(contexts), dtype=torch.int64)

    def token_span(self, batch, index, start, end):
        return 0, 1

    def generate(self, prompts, n, *, temperature, max_tokens):
        return [["7"] * n for _ in prompts]


MIXED = {"mixture": {"rewards": [{"reward": "majority_voting"}]}}


@pytest.mark.parametrize("name", [*REWARDS, *ALIASES])
def test_every_name_builds_and_runs(name):
    task = {"verify": lambda text, columns: 1.0, "options": MIXED.get(name)}
    reward = build_reward(name, checker=WORD, answers={100: "7"}, **task)
    batch = make_batch(["7", "8", "7"], entropy=[[1.0, 2.0]] * 3, self_certainty=[[1.0, 2.0]] * 3, prob_gap=[[0.5, 0.5]] * 3)
    batch.columns = {"model": ["m"] * 3, "rephrased": ["again"] * 3, "continuation": ["7 8"] * 3}
    rewards = call_reward(reward, batch, IndifferentPolicy())
    assert rewards.shape == (3,)
    assert rewards.dtype == torch.float32
    assert rewards.isfinite().all()
    assert type(reward) is REWARDS[ALIASES.get(name, name)]
    assert reward.__doc__


def test_only_the_oracle_gets_answers():
    secret = {100: "secret-7"}
    for name in REWARDS:
        reward = build_reward(name, checker=WORD, answers=secret, verify=lambda text, columns: 1.0, options=MIXED.get(name))
        held = [value for value in vars(reward).values() if value is secret or "secret-7" in repr(value)]
        assert bool(held) == (name == "ground_truth")
    with pytest.raises(RewardError, match="answer_column"):
        build_reward("ground_truth", checker=WORD, answers={})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("majority_votng", "did you mean 'majority_voting'"),
        ("selfcertainty", "did you mean 'self_certainty'"),
        ("zzz", "Valid are majority_voting"),
        ("no_such_package_xyz.fn", "cannot import 'no_such_package_xyz'"),
        ("math.sqroot", "did you mean 'sqrt'"),
        ("math:pi", "not a function"),
        ("nowhere/reward.py:fn", "there is no file nowhere/reward.py"),
    ],
)
def test_bad_names_are_explained(spec, message):
    with pytest.raises(RewardError, match=message):
        build_reward(spec, checker=WORD, answers=None, options={})


def test_options_reach_the_reward_or_are_refused():
    assert build_reward("probability", checker=WORD, options={"paper_exact": True}).paper_exact is True
    with pytest.raises(RewardError, match=r"papr_exact.*options are paper_exact"):
        build_reward("probability", checker=WORD, options={"papr_exact": True})
    with pytest.raises(RewardError, match="options are none"):
        build_reward("self_certainty", checker=WORD, options={"length": 1})
    with pytest.raises(RewardError, match="options are threshold, soft"):
        build_reward("majority_voting", checker=WORD, options={"checker2": 1})


USER_FILE = '''
from __future__ import annotations
from dataclasses import dataclass
import torch

def by_length(batch, policy, scale=1.0):
    """Longer is better."""
    return [scale * len(text) for text in batch.completions]
by_length.needs = frozenset({"entropy"})

@dataclass
class Constant:
    value: float = 0.5
    needs = frozenset()
    def __call__(self, batch, policy):
        return torch.full((len(batch),), self.value)

class Wants:
    needs = frozenset({"answers"})
    def __call__(self, batch, policy):
        return [0.0] * len(batch)

class NotCallable:
    pass

def one_argument(batch):
    return []
'''


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(USER_FILE)
    return path


def test_a_function_from_a_file_keeps_its_name_and_its_needs(user_file):
    batch = make_batch(["a", "bbb"], entropy=[[1.0, 2.0]] * 2)
    plain = build_reward(f"{user_file}:by_length", checker=WORD)
    scaled = build_reward(f"{user_file}:by_length", checker=WORD, options={"scale": 2})
    assert call_reward(plain, batch, None).tolist() == [1, 3]
    assert call_reward(scaled, batch, None).tolist() == [2, 6]
    assert scaled.__name__ == "by_length"
    assert reward_needs(scaled) == {"entropy"}
    with pytest.raises(RewardError, match=r"by_length needs batch\.entropy"):
        call_reward(scaled, make_batch(["a"]), None)


def test_a_class_from_a_file_is_built_with_the_options(user_file):
    reward = build_reward(f"{user_file}:Constant", checker=WORD, options={"value": 0.25})
    assert call_reward(reward, make_batch(["a", "b"]), None).tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Constant", {"volume": 1}, "options are value"),
        ("by_length", {"scael": 1}, "scael"),
        ("one_argument", {}, "one_argument"),
        ("Wants", {}, "needs answers"),
        ("NotCallable", {}, "cannot be called"),
        ("by_lenght", {}, "did you mean 'by_length'"),
    ],
)
def test_a_user_reward_that_does_not_fit_is_refused(user_file, name, options, message):
    with pytest.raises(RewardError, match=message):
        build_reward(f"{user_file}:{name}", checker=WORD, options=options)


@pytest.mark.parametrize("separator", [".", ":"])
def test_dotted_paths(user_file, monkeypatch, separator):
    monkeypatch.syspath_prepend(str(user_file.parent))
    assert build_reward(f"my_rewards{separator}by_length", checker=WORD).__name__ == "by_length"


# ---- the checked call


def nine_for_a(value):
    def odd_reward(batch, policy):
        return [value if text == "bad" else 1.0 for text in batch.completions]

    return odd_reward


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, None, "1", "x", 1j, [1.0]])
def test_what_is_no_number_names_function_prompt_and_rollout(value):
    with pytest.raises(RewardError, match=r"odd_reward returned .*rollout 1 of 3, 'bad', of prompt 100, 'prompt of group 4'"):
        call_reward(nine_for_a(value), make_batch(["a", "bad", "c"], [4, 4, 4]), None)


def test_a_reward_that_raises_is_named_with_the_rollout_it_raises_on():
    def fragile(batch, policy):
        return [1.0 / len(text.strip()) for text in batch.completions]

    with pytest.raises(RewardError, match=r"fragile raised ZeroDivisionError.*rollout 2 of 3, ' ', of prompt 101") as caught:
        call_reward(fragile, make_batch(["a", "b", " "], [0, 0, 1]), None)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def whole_batch(batch, policy):
        if len(batch) > 1:
            raise KeyError("several")
        return [0.0]

    with pytest.raises(RewardError, match=r"whole_batch raised KeyError: 'several'\.$"):
        call_reward(whole_batch, make_batch(["a", "b"]), None)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], r"shape \(2,\) for 3 rollouts.*first without a reward is rollout 2 of 3, 'c'"),
        ([1.0] * 4, r"shape \(4,\) for 3 rollouts"),
        (torch.ones(3, 1), r"shape \(3, 1\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.ones(3, dtype=torch.complex64), "complex"),
        (1.0, "returned a float"),
        (None, "returned a NoneType"),
        ("abc", "returned a str"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "returned a dict"),
    ],
)
def test_the_wrong_shape_or_type_is_refused(returned, message):
    def mine(batch, policy):
        return returned

    with pytest.raises(RewardError, match="mine .*" + message):
        call_reward(mine, make_batch(["a", "b", "c"]), None)


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5, True],
        (1.0, 0.5, 1.0),
        torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([1.0, 0.5, 1.0], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(0.5), torch.tensor(1)],
    ],
)
def test_lists_and_tensors_will_do(returned):
    rewards = call_reward(lambda batch, policy: returned, make_batch(["a", "b", "c"]), None)
    assert rewards.tolist() == [1.0, 0.5, 1.0]
    assert rewards.dtype == torch.float32
    assert not rewards.requires_grad


def test_long_texts_are_shortened_in_messages():
    batch = make_batch(["bad" + "x" * 10_000])
    with pytest.raises(RewardError) as caught:
        call_reward(lambda b, p: [math.nan], batch, None)
    assert len(str(caught.value)) < 500


def test_the_policy_is_handed_through():
    asked = object()
    assert call_reward(lambda batch, policy: [float(policy is asked)] * len(batch), make_batch(["a"]), asked).tolist() == [1.0]


def test_importing_the_rewards_needs_torch_alone():
    program = (
        "import sys, urlvr_fast.rewards.registry, urlvr_fast.monitor.alignment, urlvr_fast.monitor.hacking\n"
        "print([name for name in ('sympy', 'math_verify', 'transformers', 'vllm', 'rich', 'yaml') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"
