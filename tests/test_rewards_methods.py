"""Every other reward than majority voting and the plain certainty ones: by hand, against independent loops, and on hostile input.

The loops work on lists of Python numbers and know nothing of batches; the batches are ragged, with interleaved groups of different sizes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import statistics
import time
from collections import Counter

import pytest
import torch

from urlvr_fast.rewards import RewardError
from urlvr_fast.rewards.answers import ExactAnswers, MathAnswers, answer_characters
from urlvr_fast.rewards.certainty import TokenEntropy, TrajectoryEntropy
from urlvr_fast.rewards.covo import STEP_END, CoVo, consistency_and_volatility, reasoning_states
from urlvr_fast.rewards.cross_view import CrossViewVoting
from urlvr_fast.rewards.disparity import ProbabilityDisparity
from urlvr_fast.rewards.ensemble import MajorityVoting, WeightedVoting
from urlvr_fast.rewards.external import correct
from urlvr_fast.rewards.next_token import NextToken
from urlvr_fast.rewards.procedural import Procedural
from urlvr_fast.rewards.registry import build_reward, call_reward
from urlvr_fast.rewards.restrain import Restrain
from urlvr_fast.rewards.self_verification import SelfVerification, parse_verdict
from urlvr_fast.rewards.semantic import SemanticClusters
from urlvr_fast.trainer.batch import RolloutBatch

LAST_WORD = ExactAnswers(r"(?s).*?=(\w+)")  # "…=7" answers 7
GROUPS = [4, -1, 4, 9, 4, -1, 9, 4, -1, -1, 9, 4, 30, -1]  # interleaved, sizes 5, 5, 3 and 1


def make_batch(completions, group_ids=None, *, columns=None, prompts=None, train_mask=None, logp=None, **taken):
    n = len(completions)
    group_ids = [0] * n if group_ids is None else group_ids
    logp = [[-1.0, -2.0]] * n if logp is None else logp
    lengths = torch.tensor([len(row) for row in logp])
    prompt_lens = torch.tensor([1 + i % 3 for i in range(n)])
    ends = (lengths + prompt_lens).cumsum(0)

    def flat(rows):
        return torch.tensor([value for row in rows for value in row], dtype=torch.float32)

    return RolloutBatch(
        tokens=torch.arange(int(ends[-1])),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        prompt_lens=prompt_lens,
        group_ids=torch.tensor(group_ids),
        prompt_ids=[100 + group for group in group_ids],
        prompts=[f"prompt {group}?" for group in group_ids] if prompts is None else prompts,
        completions=list(completions),
        finish_reasons=["stop"] * n,
        sampled_logp=flat(logp),
        temperature=1.0,
        columns=columns or {},
        train_mask=train_mask,
        **{name: flat(rows) for name, rows in taken.items()},
    )


def random_batch(seed, **options):
    """Rollouts with answers, some without, of ragged lengths."""
    rng = random.Random(seed)
    n = len(GROUPS)
    completions = [rng.choice([f"step one.\nstep {rng.randint(0, 9)}\n={rng.choice('1234')}"] * 4 + ["no answer"]) for _ in range(n)]
    logp = [[-rng.random() for _ in range(rng.randint(1, 6))] for _ in range(n)]
    return make_batch(completions, GROUPS, logp=logp, **options)


def answers_of(batch):
    return [text.split("=")[1] if "=" in text else None for text in batch.completions]


class AskedPolicy:
    """A policy made of a function: log-probabilities come from a hash of context and continuation, texts from a table."""

    def __init__(self, texts=()):
        self.texts, self.asked = dict(texts), []

    def render(self, message):
        return "<user>" + message

    def likelihood(self, contexts, continuations):
        self.asked.append((list(contexts), list(continuations)))
        pairs = list(zip(contexts, continuations, strict=True))
        counts = torch.tensor([max(1, len(text)) for _, text in pairs])
        return torch.tensor([self.logp(*pair) for pair in pairs], dtype=torch.float64), counts

    def logp(self, context, continuation):
        digest = hashlib.sha256(f"{context}\0{continuation}".encode()).digest()
        return -max(1, len(continuation)) * (0.1 + digest[0] / 64)

    def generate(self, prompts, n, *, temperature, max_tokens):
        self.asked.append((list(prompts), n, temperature, max_tokens))
        return [list(itertools.islice(itertools.cycle(self.texts[prompt]), n)) for prompt in prompts]


COLUMNS = {
    "model": ["a", "b", "a", "b", "b", "a", "a", "b", "a", "b", "b", "a", "a", "a"],
    "question": [min(group, 9) for group in GROUPS],  # 9 and 30 are two views of one question; 4 and −1 have one view
    "rephrased": [f"again {group}?" for group in GROUPS],
    "continuation": ["no answer is known"] * len(GROUPS),
    "answer_tokens": [None if i % 4 == 0 else (0, 1) for i in range(len(GROUPS))],
}
ASKED = {f"<user>again {group}?": ["=1", "=2", "=2", "nothing"] for group in set(GROUPS)}


def every_reward():
    """Name, and a function that makes a fresh reward."""
    checked = {"checker": LAST_WORD}
    return {
        "token_entropy sum": lambda: TokenEntropy("sum"),
        "trajectory_entropy sum": lambda: TrajectoryEntropy("sum"),
        "probability_disparity": lambda: ProbabilityDisparity(**checked),
        "majority_voting soft": lambda: MajorityVoting(**checked, soft=True, threshold=0.3),
        "weighted_voting": lambda: WeightedVoting(**checked),
        "cross_view_voting": lambda: CrossViewVoting(**checked),
        "semantic_clusters": lambda: SemanticClusters(**checked),
        "covo": lambda: CoVo(**checked, bound=None),
        "restrain": lambda: Restrain(**checked, kappa=2),
        "self_verification": lambda: SelfVerification(threshold=None),
        "procedural": lambda: Procedural(lambda text, columns: len(text) * columns["question"]),
        "next_token": lambda: NextToken(),
        "mixture": lambda: build_reward(
            "mixture",
            checker=LAST_WORD,
            options={"rewards": [{"reward": "majority_voting"}, {"reward": "token_entropy", "weight": 0.5, "normalise": "group"}]},
        ),
    }


@pytest.mark.parametrize("name", every_reward())
def test_the_order_of_the_batch_decides_nothing(name):
    """The released code regroups rollouts by position after it has reordered them, which mixes prompts."""
    make, rng = every_reward()[name], random.Random(0)
    batch = random_batch(7, columns=COLUMNS)
    batch.entropy = batch.prob_gap = batch.sampled_logp.abs()
    rewards = call_reward(make(), batch, AskedPolicy(ASKED))
    assert rewards.unique().numel() > 1
    for _ in range(5):
        order = rng.sample(range(len(batch)), len(batch))
        shuffled = call_reward(make(), batch.select(order), AskedPolicy(ASKED))
        torch.testing.assert_close(shuffled, rewards[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", every_reward())
@pytest.mark.parametrize(
    "completions",
    [["no answer"], ["no answer"] * 3, ["=1"], [""] * 2, ["=" + "٣" * 5, "=3", "=³"], ["=" + "1" * 100_000, "=" + "2" * 100_000, "=1"]],
    ids=["group of one", "nothing parses", "one answer", "empty texts", "unicode digits", "100 kB"],
)
def test_odd_groups_have_finite_rewards_in_bounded_time(name, completions):
    n = len(completions)
    columns = {key: values[:n] for key, values in COLUMNS.items()}
    batch = make_batch(completions, [4] * n, columns=columns, entropy=[[0.5, 1.0]] * n, prob_gap=[[0.5, 0.25]] * n)
    started = time.monotonic()
    rewards = call_reward(every_reward()[name](), batch, AskedPolicy(ASKED))
    assert rewards.isfinite().all()
    assert time.monotonic() - started < 5


HOSTILE = [r"__import__('os').system('touch /tmp/urlvr_hostile')", "9**9**9**9", r"\frac{1}{0}", "{" * 50, "٣", "x" * 100_000]


def test_hostile_answers_are_text_like_any_other():
    with MathAnswers(timeout_s=2) as checker:
        batch = make_batch([rf"\boxed{{{answer}}}" for answer in HOSTILE] + [r"\boxed{7}"] * 2)
        for reward in (SemanticClusters(checker), WeightedVoting(checker), MajorityVoting(checker, soft=True), Restrain(checker, kappa=2)):
            batch.columns = {"model": ["m"] * len(batch)}
            rewards = call_reward(reward, batch, None)
            assert rewards[-1] == rewards[-2] == rewards.max()
        assert answer_characters("{" * 100_000, "{", checker) is not None


# ---- certainty


def test_sums_by_hand():
    batch = make_batch(["a", "b"], logp=[[-1.0, -3.0], [-0.5]], entropy=[[0.5, 1.5], [0.25]])
    assert TokenEntropy("sum")(batch).tolist() == [-2.0, -0.25]
    assert TrajectoryEntropy(aggregate="sum")(batch).tolist() == [-4.0, -0.5]
    for reward in (TokenEntropy, TrajectoryEntropy):
        with pytest.raises(RewardError, match="valid are mean, sum"):
            reward(aggregate="median")


def test_sums_and_verifiers_against_float64_loops():
    """The sum forms and the procedural verifier on ragged, interleaved groups; fp32 inputs count as exact numbers."""
    rng = random.Random(5)
    logp = [[-3 * rng.random() for _ in range(rng.randint(1, 30))] for _ in GROUPS]
    entropy = [[2 * rng.random() for _ in row] for row in logp]
    batch = make_batch(
        [f"text {i}={i % 5}" for i in range(len(GROUPS))], GROUPS, logp=logp, entropy=entropy, columns={"target": list(range(len(GROUPS)))}
    )
    single = torch.tensor([value for row in logp for value in row]).double().tolist()
    ends = list(itertools.accumulate(map(len, logp)))
    sums = [math.fsum(single[end - len(row) : end]) for end, row in zip(ends, logp, strict=True)]
    assert TrajectoryEntropy(aggregate="sum")(batch).tolist() == pytest.approx(sums, rel=1e-6)
    single = torch.tensor([value for row in entropy for value in row]).double().tolist()
    sums = [-math.fsum(single[end - len(row) : end]) for end, row in zip(ends, entropy, strict=True)]
    assert TokenEntropy(aggregate="sum")(batch).tolist() == pytest.approx(sums, rel=1e-6)

    def verify(text, columns):
        return float(int(text.rsplit("=")[1]) == columns["target"] % 3)

    expected = [float(i % 5 == i % 3) for i in range(len(GROUPS))]
    assert 0 < sum(expected) < len(GROUPS)
    assert Procedural(verify)(batch).tolist() == expected


def test_entropy_rewards_are_not_inert():
    """The released code drops the entropies before the reward reads them: all rewards are 0, and so are all advantages."""
    batch = make_batch(["a", "b", "c"], entropy=[[0.5, 1.5], [0.1, 0.1], [2.0, 2.0]])
    for aggregate in ("mean", "sum"):
        rewards = call_reward(build_reward("token_level_entropy", checker=LAST_WORD, options={"aggregate": aggregate}), batch, None)
        assert rewards.argsort().tolist() == [2, 0, 1]
        assert rewards.std() > 0.1


def test_disparity_by_hand_and_by_a_loop():
    gap = [[0.1, 0.2, 0.4], [0.9, 0.8], [0.3, 0.6, 0.1]]
    logp = [[-1.0] * len(row) for row in gap]
    batch = make_batch(["=7", "=8", "x"], logp=logp, prob_gap=gap, columns={"answer_tokens": [(1, 3), [0, 1], None]})
    assert ProbabilityDisparity(LAST_WORD)(batch).tolist() == pytest.approx([0.3, 0.9, 0.0])
    rng = random.Random(1)
    rows = [[rng.random() for _ in range(rng.randint(1, 9))] for _ in range(14)]
    spans = [sorted((rng.randint(0, len(row)), rng.randint(0, len(row)))) for row in rows]
    batch = make_batch(["x"] * 14, GROUPS, logp=[[-1.0] * len(row) for row in rows], prob_gap=rows, columns={"answer_tokens": spans})
    wanted = [math.fsum(row[a:b]) / (b - a) if b > a else 0.0 for row, (a, b) in zip(rows, spans, strict=True)]
    assert ProbabilityDisparity(LAST_WORD)(batch).tolist() == pytest.approx(wanted, abs=1e-6)


def test_disparity_says_what_it_misses():
    batch = make_batch(["=7"])
    with pytest.raises(RewardError, match=r"batch\.prob_gap"):
        ProbabilityDisparity(LAST_WORD)(batch)
    batch.prob_gap = batch.sampled_logp.abs()
    with pytest.raises(RewardError, match=r"column 'answer_tokens'.*policy"):
        ProbabilityDisparity(LAST_WORD)(batch)
    assert ProbabilityDisparity(LAST_WORD)(make_batch(["none"], prob_gap=[[0.5, 0.5]])).tolist() == [0.0]  # nothing to find
    batch.columns = {"answer_tokens": [(1, 9)]}
    with pytest.raises(RewardError, match=r"\(1, 9\) is not within the response of rollout 0"):
        ProbabilityDisparity(LAST_WORD)(batch)


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        (r"\boxed{4}. So there are 4.", (7, 8)),
        (r"14 - 10 = \boxed{4}", (17, 18)),
        (r"\boxed{4} or \boxed{4}", (20, 21)),
        (r"\boxed{ 4 }", (8, 9)),
    ],
)
def test_the_answers_place_is_where_the_checker_found_it(completion, found):
    checker = MathAnswers()
    assert answer_characters(completion, "4", checker) == found
    assert answer_characters(completion, "5", checker) is None


# ---- voting


def test_soft_voting_by_hand():
    batch = make_batch(["=7", "=8", "=7", "none", "=5", "=6"], [0, 0, 0, 0, 1, 1])
    assert MajorityVoting(LAST_WORD, soft=True)(batch).tolist() == [0.5, 0.25, 0.5, 0.0, 0.5, 0.5]
    assert MajorityVoting(LAST_WORD, soft=True, threshold=0.5)(batch).tolist() == [0.5, 0.25, 0.5, 0.0, 0.5, 0.5]
    assert MajorityVoting(LAST_WORD, soft=True, threshold=0.51)(batch).tolist() == [0.0] * 6


@pytest.mark.parametrize("seed", range(3))
def test_soft_voting_and_clusters_by_loops(seed):
    batch = random_batch(seed)
    answers = answers_of(batch)
    soft, empo = [], []
    for group, answer in zip(GROUPS, answers, strict=True):
        mine = [a for g, a in zip(GROUPS, answers, strict=True) if g == group]
        share = sum(a == answer for a in mine) / len(mine) if answer is not None else 0.0
        soft.append(share)
        agree = any(a is not None and mine.count(a) > 1 for a in mine)
        empo.append(share if agree else 0.0)
    assert MajorityVoting(LAST_WORD, soft=True)(batch).tolist() == pytest.approx(soft)
    assert SemanticClusters(LAST_WORD)(batch).tolist() == pytest.approx(empo)


def test_clusters_by_hand():
    batch = make_batch(["=1", "=2", "=1", "none", "=1", "=2", "=3", "=5", "=5"], [0, 0, 0, 0, 1, 1, 1, 2, 2])
    assert SemanticClusters(LAST_WORD)(batch).tolist() == [0.5, 0.25, 0.5, 0, 0, 0, 0, 1, 1]
    assert SemanticClusters(LAST_WORD, threshold=0.6)(batch).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert isinstance(build_reward("empo", checker=LAST_WORD), SemanticClusters)


def test_clusters_are_of_values_not_of_strings():
    with MathAnswers(timeout_s=20) as checker:
        batch = make_batch([rf"\boxed{{{answer}}}" for answer in [r"\frac{1}{\sqrt2}", "2", r"\frac{\sqrt2}{2}", r"\sqrt{8}/4"]])
        assert SemanticClusters(checker)(batch).tolist() == [0.75, 0.25, 0.75, 0.75]
        silent = make_batch(["nothing", "None", r"\boxed{None}"])
        assert SemanticClusters(checker)(silent).tolist() == [0, 0, 0]  # "None" is an answer, and one of its kind


def test_weighted_voting_by_hand():
    # Model a: 7, 7, 7 (self-consistency 1). Model b: 8, 8, 8, 9, 9, none (1/2). 3 votes of weight 1 beat 3 of weight 1/2.
    completions = ["=7", "=7", "=7", "=8", "=8", "=8", "=9", "=9", "none"]
    batch = make_batch(completions, columns={"model": list("aaabbbbbb")})
    assert WeightedVoting(LAST_WORD)(batch).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    # One model: plain majority voting.
    batch.columns = {"who": ["m"] * 9}
    assert torch.equal(WeightedVoting(LAST_WORD, column="who")(batch), MajorityVoting(LAST_WORD)(batch))
    with pytest.raises(RewardError, match=r"column 'model'.*the batch has who"):
        WeightedVoting(LAST_WORD)(batch)


@pytest.mark.parametrize("seed", range(4))
def test_weighted_voting_by_a_loop(seed):
    rng = random.Random(seed)
    models = [rng.choice("abc") for _ in GROUPS]
    batch = random_batch(seed, columns={"model": models})
    answers = answers_of(batch)
    rewards = WeightedVoting(LAST_WORD)(batch).tolist()
    for group in set(GROUPS):
        rows = [i for i, g in enumerate(GROUPS) if g == group]
        weight = Counter()
        for i in rows:
            own = [answers[j] for j in rows if models[j] == models[i]]
            trust = max((own.count(a) for a in own if a is not None), default=0) / len(own)
            if answers[i] is not None:
                weight[answers[i]] += trust
        best = [answer for answer in weight if weight[answer] > max(weight.values()) - 1e-9]
        chosen = {answers[i] for i in rows if rewards[i] == 1}
        assert chosen == set(best) if len(best) == 1 else chosen < {*best, "?"} and len(chosen) == min(1, len(best))
        assert all(rewards[i] == (answers[i] in chosen and answers[i] is not None) for i in rows)


def test_cross_view_voting_by_hand():
    # Question q, two views: the first says 1, 1, 2; the second 2, 2, 1. Each is labelled by the other.
    batch = make_batch(
        ["=1", "=2", "=1", "=2", "=2", "=1", "none"], [0, 1, 0, 1, 0, 1, 0], columns={"question": ["q"] * 7}, logp=[[-1.0]] * 7
    )
    assert CrossViewVoting(LAST_WORD)(batch).tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert MajorityVoting(LAST_WORD)(batch).tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_a_question_with_one_view_is_asked_again_in_other_words():
    policy = AskedPolicy({"<user>how many?": ["=2", "none", "=2", "=1"]})
    batch = make_batch(["=1", "=1", "=2", "none"], columns={"rephrased": ["how many?"] * 4})
    assert CrossViewVoting(LAST_WORD, max_tokens=9)(batch, policy).tolist() == [0, 0, 1, 0]
    assert policy.asked == [(["<user>how many?"], 4, 1.0, 9)]
    assert CrossViewVoting(LAST_WORD, votes=1)(batch, AskedPolicy({"<user>how many?": ["=1"]})).tolist() == [1, 1, 0, 0]
    # Nothing parses: the string "None" is nobody's label.
    silent = AskedPolicy({"<user>how many?": ["no", "None"]})
    assert CrossViewVoting(LAST_WORD)(make_batch(["=None", "None"], columns={"rephrased": ["how many?"] * 2}), silent).tolist() == [0, 0]
    with pytest.raises(RewardError, match=r"there is none: call it with a policy"):
        CrossViewVoting(LAST_WORD)(batch)
    with pytest.raises(RewardError, match=r"rollout 0 of 4.*column 'question'.*column 'rephrased'"):
        CrossViewVoting(LAST_WORD)(make_batch(["=1"] * 4), policy)
    with pytest.raises(RewardError, match=r"not by \['q'\]"):
        CrossViewVoting(LAST_WORD)(make_batch(["=1"], columns={"question": [["q"]]}), policy)


@pytest.mark.parametrize("seed", range(4))
def test_cross_view_voting_by_a_loop(seed):
    question = [0 if group in (4, -1) else 1 for group in GROUPS]  # 4 with −1, 9 with 30
    batch = random_batch(seed, columns={"question": question})
    answers = answers_of(batch)
    rewards = CrossViewVoting(LAST_WORD)(batch).tolist()
    for group in set(GROUPS):
        own = [i for i, g in enumerate(GROUPS) if g == group]
        votes = Counter(answers[i] for i, g in enumerate(GROUPS) if g != group and question[i] == question[own[0]] and answers[i])
        best = [answer for answer, count in votes.items() if count == max(votes.values())]
        if len(best) == 1:
            assert [rewards[i] for i in own] == [float(answers[i] == best[0]) for i in own]
        else:  # a tie goes to one of them
            assert len({answers[i] for i in own if rewards[i]}) <= 1
            assert all(answers[i] in best for i in own if rewards[i])


def test_views_and_models_agree_by_value():
    """By spelling, the other view's votes would be three labels, and a match of strings would fail the voters' peers."""
    spellings = [r"\frac{\sqrt2}{2}", "2", r"\sqrt{8}/4", r"\frac{1}{\sqrt2}", "2", r"\sin 45^\circ x"]
    columns = {"question": ["q"] * 6, "model": list("aababb")}
    with MathAnswers(timeout_s=20) as checker:
        batch = make_batch([rf"\boxed{{{answer}}}" for answer in spellings], [0, 0, 1, 1, 1, 0], columns=columns)
        assert CrossViewVoting(checker)(batch).tolist() == [1, 0, 0, 0, 1, 0]  # the first view's tie goes to 2, by string order
        one_group = make_batch(batch.completions, columns=columns)
        assert WeightedVoting(checker)(one_group)[[0, 2, 3]].tolist() == [1, 1, 1]


def test_a_prompt_drawn_twice_is_no_view_of_itself():
    batch = make_batch(["=1", "=1", "=2"], [0, 0, 1], prompts=["same?"] * 3, columns={"question": ["q"] * 3})
    with pytest.raises(RewardError, match="no other phrasing"):
        CrossViewVoting(LAST_WORD)(batch, AskedPolicy())


# ---- CoVo


class TablePolicy(AskedPolicy):
    """Perplexity of each answer given the number of lines of the state."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def logp(self, context, continuation):
        return -len(continuation) * math.log(self.table[continuation.strip("&")][context.count("\n")])


def test_covo_by_hand():
    # Perplexities after one, two and three lines. Of A: 2, 1, 1; of B: 1, 3, 3.
    policy = TablePolicy({"A": [2, 1, 1], "B": [1, 3, 3]})
    batch = make_batch(["a\nb\n=A", "a\nb\n=B", "c\n\n", "=A"], prompts=["p"] * 4)
    # Rollout 0: ratios 2, 1/3, 1/3: consistency 2/3, volatility 1 − 2/3. Rollout 3, one line: ratio 2: 0 and 1. Rollout 1: ratios
    # 1/2, 3, 3: consistency 1/3, volatility 1.
    a = math.hypot(math.cos(1 / 3) / 3, math.sin(1 / 3) / 3)
    soft = CoVo(LAST_WORD, bound=None, bridge="&")(batch, policy)
    assert soft.tolist() == pytest.approx([a, 1 / 3, 0, a], rel=1e-6)
    linear = CoVo(LAST_WORD, measure="linear", bound=None, bridge="&")(batch, policy)
    assert linear.tolist() == pytest.approx([1 / 3 - 2 / 3, 1 / 3 - 1, 0, -1 / 3], rel=1e-6)
    assert CoVo(LAST_WORD, bridge="&", bound=0.333)(batch, policy).tolist() == [1, 1, 0, 1]
    assert CoVo(LAST_WORD, bridge="&")(batch, policy).tolist() == [0, 0, 0, 0]
    one = make_batch(["a\nb\n=A", "a\nb\n=B"], prompts=["p"] * 2)
    assert CoVo(LAST_WORD, bridge="&")(one, policy).tolist() == [1, 0]  # 2/3 ≥ 0.5 > 1/3


def test_covo_has_nothing_to_compare_in_a_unanimous_group():
    batch = make_batch(["x\n=1", "=1", "none"])
    assert CoVo(LAST_WORD)(batch).tolist() == [0, 0, 0]  # and asks nobody
    long = make_batch(["=" + "1" * 501, "=2"])
    assert CoVo(LAST_WORD)(long).tolist() == [0, 0]
    with pytest.raises(RewardError, match="call the reward with a policy"):
        CoVo(LAST_WORD)(make_batch(["=1", "=2"]))


def covo_loop(batch, policy, bridge, most):
    """RiV, with perplexities, norms and trigonometry written out."""
    answers = answers_of(batch)
    out = [0.0] * len(batch)
    for group in set(GROUPS):
        rows = [i for i, g in enumerate(GROUPS) if g == group and answers[i] is not None]
        distinct = sorted({answers[i] for i in rows})
        if len(distinct) < 2:
            continue
        vectors = {answer: [] for answer in distinct}
        for i in rows:
            lines = batch.completions[i].split("\n")
            prefixes = ["\n".join(lines[: k + 1]) for k in range(len(lines)) if lines[k].strip()]
            assert len(prefixes) <= most
            ratios = []
            for prefix in prefixes:
                row = {b: math.exp(-policy.logp(batch.prompts[i] + prefix, bridge + b) / len(bridge + b)) for b in distinct}
                total = sum(row.values())
                ratios.append((row[answers[i]] / total) / min(row[b] / total for b in distinct if b != answers[i]))
            tail = next((k for k, ratio in enumerate(reversed(ratios)) if ratio > 1), len(ratios))
            consistency, volatility = sum(ratio < 1 for ratio in ratios) / len(ratios), 1 - tail / len(ratios)
            vectors[answers[i]].append((consistency * math.cos(volatility), consistency * math.sin(volatility)))
        for i in rows:
            x, y = (statistics.fmean(column) for column in zip(*vectors[answers[i]], strict=True))
            out[i] = math.sqrt(x * x + y * y)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_covo_by_a_loop(seed):
    batch, policy = random_batch(seed), AskedPolicy()
    wanted = covo_loop(batch, policy, "\nThe answer is: ", 15)
    assert CoVo(LAST_WORD, bound=None)(batch, policy).tolist() == pytest.approx(wanted, abs=1e-6)
    assert CoVo(LAST_WORD)(batch, policy).tolist() == [float(value >= 0.5) for value in wanted]


def test_states_of_a_response():
    assert reasoning_states("a\n\n b\nc", STEP_END["line"], 15) == ["a", "a\n\n b", "a\n\n b\nc"]
    assert reasoning_states("One. Two? 3.5", STEP_END["sentence"], 15) == ["One.", "One. Two?", "One. Two? 3.5"]
    many = "\n".join(map(str, range(100)))
    states = reasoning_states(many, STEP_END["line"], 15)
    assert len(states) == 15
    assert states[-1] == many
    assert reasoning_states("", STEP_END["line"], 3) == [""]
    assert consistency_and_volatility([0.0, 1.0, 0.0]) == (0.0, pytest.approx(2 / 3))  # a ratio of 1 settles, and is not consistent


# ---- RESTRAIN


def restrain_loop(answers, groups, centre, width, kappa, delta, base):
    def g(share):
        return math.exp(-((share - centre) ** 2) / (2 * width**2))

    out = [0.0] * len(answers)
    for group in set(groups):
        rows = [i for i, h in enumerate(groups) if h == group]
        counts = Counter(answers[i] for i in rows if answers[i] is not None)
        total = sum(g(count / len(rows)) for count in counts.values())
        majority = max(counts.values(), default=0)
        u = g(base(group) if base else majority / len(rows))
        for i in rows:
            if majority < kappa:
                out[i] = -u * delta
                continue
            for label, count in counts.items():
                right = [float(answers[j] == label) for j in rows]
                if min(right) == max(right):
                    continue
                normed = (float(answers[i] == label) - statistics.fmean(right)) / (statistics.stdev(right) + 1e-6)
                out[i] += u * g(count / len(rows)) / total * normed
    return out


def test_restrain_by_hand():
    batch = make_batch(["=1", "=1", "=1", "=2", "=5", "=6"], [0, 0, 0, 0, 1, 1])
    reward = Restrain(LAST_WORD, centre=1.0, width=0.5, kappa=2, delta=0.7, prompt_weights={"100": 1.0, 101: 0.5})
    assert reward.returns_advantages
    g = {share: math.exp(-2 * (1 - share) ** 2) for share in (0.75, 0.25, 0.5)}
    w = g[0.75] / (g[0.75] + g[0.25])
    # Under label 1: rewards 1, 1, 1, 0, deviation 1/2: advantages 1/2 and −3/2. Under label 2 the opposite.
    assert reward(batch).tolist() == pytest.approx(
        [*[w * 0.5 - (1 - w) * 0.5] * 3, -1.5 * w + 1.5 * (1 - w), *[-0.7 * g[0.5]] * 2], rel=1e-4
    )


@pytest.mark.parametrize("seed", range(4))
def test_restrain_by_a_loop(seed):
    batch = random_batch(seed)
    options = {"centre": 0.8, "width": 0.3, "kappa": 2, "delta": 0.5}
    wanted = restrain_loop(answers_of(batch), GROUPS, **options, base=None)
    assert Restrain(LAST_WORD, **options)(batch).tolist() == pytest.approx(wanted, abs=1e-6)
    shares = {100 + group: (group % 5) / 5 for group in GROUPS}
    wanted = restrain_loop(answers_of(batch), GROUPS, **options, base=lambda group: shares[100 + group])
    assert Restrain(LAST_WORD, **options, prompt_weights=shares)(batch).tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_prompts_weight_stays_that_of_its_first_visit():
    reward = Restrain(LAST_WORD, kappa=5, delta=1.0)
    unsure, sure = make_batch(["=1", "=2"]), make_batch(["=1", "=1"])
    first = reward(unsure)
    assert torch.equal(reward(sure), first)
    assert Restrain(LAST_WORD, kappa=5, delta=1.0)(sure).tolist() == [-1.0, -1.0]
    with pytest.raises(RewardError, match="no entry for prompt 100"):
        Restrain(LAST_WORD, prompt_weights={1: 0.5})(sure)
    for options in ({"width": 0}, {"prompt_weights": {"x": 1}}, {"kappa": math.nan}):
        with pytest.raises(RewardError, match="restrain"):
            build_reward("restrain", checker=LAST_WORD, options=options)


def test_votes_that_are_not_trained_on_elect_and_get_no_advantage():
    mask = torch.tensor([True, True, False, False])
    batch = make_batch(["=1", "=2", "=2", "=2"], train_mask=mask)
    advantages = Restrain(LAST_WORD, kappa=3, prompt_weights={100: 1.0})(batch)
    assert advantages[2:].tolist() == [0, 0]
    assert advantages[1] > 0 > advantages[0]
    assert advantages[:2].sum().item() == pytest.approx(0, abs=1e-6)


# ---- self-verification


def test_self_verification_by_hand():
    class Sure(AskedPolicy):
        def logp(self, context, continuation):
            return math.log({"True": 0.3, "False": 0.1}[continuation] if "good" in context else {"True": 0.2, "False": 0.2}[continuation])

    batch = make_batch(["good", "bad"])
    assert SelfVerification(threshold=None)(batch, Sure()).tolist() == pytest.approx([0.75, 0.5])
    assert SelfVerification()(batch, Sure()).tolist() == [1, 0]  # as likely as not is no yes
    assert SelfVerification(threshold=0.8)(batch, Sure()).tolist() == [0, 0]
    with pytest.raises(RewardError, match="with a policy"):
        SelfVerification()(batch)


def test_self_verification_by_a_loop():
    batch, policy = random_batch(3), AskedPolicy()
    reward = build_reward(
        "self_verification",
        checker=LAST_WORD,
        options={"threshold": None},
        verification_prompt=lambda prompt, text, columns: f"{prompt}|{text}|{len(columns)}",
        verdicts=("Y", "N"),
    )
    wanted = []
    for prompt, text in zip(batch.prompts, batch.completions, strict=True):
        yes, no = (math.exp(policy.logp(f"<user>{prompt}|{text}|0", verdict)) for verdict in "YN")
        wanted.append(yes / (yes + no))
    assert reward(batch, policy).tolist() == pytest.approx(wanted, rel=1e-6)


def test_the_judge_sees_the_texts_as_they_are():
    """The released code doubles the braces of both texts, and cuts the question out between the words of one chat template."""
    question = "user\nWrite {x} for assistant\n in \\boxed{{}} form.<pad>\nassistant\n{0} %s"
    solution = "assistant\n\\boxed{\\frac{1}{2}} {question} <pad><|endoftext|>"
    for mode in ("probability", "generate"):
        policy = AskedPolicy()
        policy.texts = {}
        batch = make_batch([solution], prompts=[question])
        reward = SelfVerification(mode=mode)
        shown = reward.question(batch, 0)
        assert shown.count(question) == shown.count(solution) == 1
        assert shown.startswith("Question:\n" + question + "\n")
    SelfVerification()(batch, policy)
    assert all(question in context and solution in context for context in policy.asked[0][0])
    with_column = make_batch(["y"], prompts=["<|im_start|>user\nx<|im_end|>"], columns={"problem": ["x"]})
    assert "im_start" not in SelfVerification(question_column="problem").question(with_column, 0)
    with pytest.raises(RewardError, match=r"question_column='nope'.*columns problem"):
        SelfVerification(question_column="nope").question(with_column, 0)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (r"so \boxed{True}", 1),
        (r"\boxed{False}", 0),
        (r"\boxed{True} no wait \boxed{False}", 0),
        (r"\boxed{false} hm \boxed{\text{true}}.", 1),
        ("It is true.", 1),
        ("true, not false", 0),
        ("untrue", 0),
        (r"\boxed{7} is TRUE", 1),
        (r"\boxed{7}", 0),
        (r"\boxed{True", 1),  # cut off: the word is there
        ("", 0),
    ],
)
def test_generated_verdicts(text, verdict):
    assert parse_verdict(text) == verdict
    policy = AskedPolicy({"<user>" + SelfVerification(mode="generate").question(make_batch(["x"]), 0): [text]})
    reward = SelfVerification(mode="generate", max_tokens=77)
    assert reward(make_batch(["x"]), policy).tolist() == [verdict]
    assert policy.asked[0][1:] == (1, 0.5, 77)


def test_self_verification_refuses_bad_options():
    for options in ({"mode": "guess"}, {"threshold": 2}, {"verdicts": ("a", "a")}, {"verdicts": "ab"}):
        with pytest.raises(RewardError, match="self_verification"):
            build_reward("self_verification", checker=LAST_WORD, options=options)
    assert build_reward("self_verify", checker=LAST_WORD, options={"verdicts": ["ja", "nein"]}).yes == "ja"


# ---- programs and text


def test_a_task_verifies_from_the_prompts_columns():
    batch = make_batch(["3+4", "5", ""], columns={"target": [7, 7, 7]})
    reward = build_reward("procedural", checker=LAST_WORD, verify=lambda text, columns: float(text == "3+4" and columns == {"target": 7}))
    assert call_reward(reward, batch, None).tolist() == [1, 0, 0]
    with pytest.raises(RewardError, match="needs a task that brings a verifier"):
        build_reward("procedural", checker=LAST_WORD)
    broken = build_reward("procedural", checker=LAST_WORD, verify=lambda text, columns: 1 / len(text))
    with pytest.raises(RewardError, match=r"ZeroDivisionError.*rollout 2 of 3"):
        call_reward(broken, batch, None)


@pytest.mark.parametrize(
    ("said", "truth", "word", "character"),
    [
        ("the cat", " the cat sat", 1, 1),
        (" the cat\n", "the cat sat", 1, 1),
        ("the ca", "the cat sat", 0, 1),
        ("the cat sat", "the cat sat", 1, 1),
        ("the cat sat on", "the cat sat", 0, 0),
        ("", "the cat", 0, 0),
        ("  ", "the cat", 0, 0),
        ("don", "don't go", 0, 1),
        ("don't", "don't go", 1, 1),
        ("go", "go, then", 1, 1),
        ("go,", "go, then", 1, 1),
        ("x", "", 0, 0),
        ("été", "été 1", 1, 1),
    ],
)
def test_next_token(said, truth, word, character):
    batch = make_batch([said], columns={"continuation": [truth]})
    assert NextToken()(batch).tolist() == [word]
    assert NextToken(unit="character")(batch).tolist() == [character]


def test_next_token_against_a_loop_over_words():
    rng = random.Random(0)
    truth = " ".join(rng.choice(["ab", "a", "abc", "b"]) for _ in range(6))
    texts = [truth[:k] for k in range(len(truth) + 1)] + [truth[1:k] for k in range(2, 6)]
    batch = make_batch(texts, columns={"continuation": [truth] * len(texts)})
    words = truth.split(" ")
    right = {" ".join(words[: k + 1]) for k in range(6)}
    assert NextToken()(batch).tolist() == [float(text.strip() in right) for text in texts]
    with pytest.raises(RewardError, match="column 'continuation'"):
        NextToken()(make_batch(["x"]))
    with pytest.raises(RewardError, match="holds 3, not text"):
        NextToken()(make_batch(["x"], columns={"continuation": [3]}))


def test_a_task_with_many_right_answers_judges_itself():
    class Countdown(ExactAnswers):
        def correct(self, given, answer):
            return given.isdigit() and sum(map(int, given)) == int(answer)

    checker = Countdown(r"(\w+)")
    assert correct(make_batch(["43", "7", "8", "no answer"]), {100: "7"}, checker).tolist() == [1, 1, 0, 0]


# ---- mixtures


def mix(*entries, **given):
    return build_reward("mixture", checker=LAST_WORD, options={"rewards": list(entries)}, **given)


def test_a_mixture_by_hand():
    batch = make_batch(["=1", "=1", "=2", "=3"], [0, 0, 0, 1], entropy=[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [9.0, 9.0]])
    reward = mix({"reward": "majority_voting", "weight": 2}, {"reward": "token_entropy", "weight": -0.5, "options": {"aggregate": "sum"}})
    assert reward.needs == {"entropy"}
    assert reward(batch).tolist() == [2 + 1, 2 + 2, 0 + 3, 2 + 9]
    by_group = mix({"reward": "token_entropy", "normalise": "group", "weight": 3})
    assert by_group(batch).tolist() == pytest.approx([3, 0, -3, 0], abs=1e-4)


def test_a_mixture_by_a_loop():
    batch = random_batch(5)
    batch.entropy = batch.sampled_logp.abs()
    reward = mix(
        {"reward": "majority_voting", "weight": 0.3, "options": {"soft": True}},
        {"reward": "trajectory_entropy", "weight": 0.7, "normalise": "group"},
        {"reward": "mixture", "options": {"rewards": [{"reward": "ground_truth", "weight": 0.1}]}},
        answers={100 + group: "2" for group in GROUPS},
    )
    votes = MajorityVoting(LAST_WORD, soft=True)(batch).tolist()
    entropy = TrajectoryEntropy()(batch).tolist()
    wanted = []
    for i, group in enumerate(GROUPS):
        mine = [entropy[j] for j, g in enumerate(GROUPS) if g == group]
        scaled = (entropy[i] - statistics.fmean(mine)) / (statistics.stdev(mine) + 1e-6) if len(mine) > 1 else 0.0
        wanted.append(0.3 * votes[i] + 0.7 * scaled + 0.1 * (answers_of(batch)[i] == "2"))
    assert call_reward(reward, batch, None).tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "option `rewards` is a list"),
        (["majority_voting"], "must have `reward`"),
        ([{"reward": "majority_voting", "wait": 1}], "may have weight, options, normalise"),
        ([{"reward": "majority_voting", "weight": math.inf}], "not a finite number"),
        ([{"reward": "majority_voting", "weight": True}], "not a finite number"),
        ([{"reward": "majority_voting", "normalise": "batch"}], "valid are none, group"),
        ([{"reward": "majority_votin"}], "did you mean 'majority_voting'"),
        ([{"reward": "restrain"}], "returns advantages"),
        ([{"reward": "ground_truth"}], "needs answers"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(entries, message):
    with pytest.raises(RewardError, match=message):
        mix(*entries)
    with pytest.raises(RewardError, match=r"mixture.*options are rewards"):
        build_reward("mixture", checker=LAST_WORD)


def test_a_parts_error_keeps_its_name():
    with pytest.raises(RewardError, match=r"TokenEntropy needs batch\.entropy"):
        mix({"reward": "token_entropy"})(make_batch(["x"]))
