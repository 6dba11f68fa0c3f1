"""Rollouts in a file, and what every reward says about them: by hand, by an independent loop, and on files that somebody broke."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import time

import pytest
import torch

from urlvr_fast.monitor.alignment import alignment_metrics
from urlvr_fast.rewards import RewardError
from urlvr_fast.rewards.answers import ExactAnswers
from urlvr_fast.rewards.registry import REWARDS
from urlvr_fast.tasks.prompt_set import DataError
from urlvr_fast.trainer import rollout_file
from urlvr_fast.trainer.audit import VARIANTS, audit, audit_file, gain_interval, table
from urlvr_fast.trainer.batch import PER_TOKEN
from urlvr_fast.trainer.rollout_file import load_rollouts, read_rollouts, write_rollouts

DIGITS = ExactAnswers(r"([0-9]+)")
HAND = [  # two prompts; the vote is right on the first and wrong on the second
    {"prompt": "2+2=", "completion": "4", "answer": "4", "logp": [-0.1, -0.1]},
    {"prompt": "2+2=", "completion": "4", "logp": [-0.5, -0.5]},
    {"prompt": "2+2=", "completion": "5", "logp": [-0.3]},
    {"prompt": "2+2=", "completion": "x", "logp": [-0.2, -0.2, -0.2]},
    {"prompt": "3+4=", "completion": "8", "answer": 7, "logp": [-0.9]},
    {"prompt": "3+4=", "completion": "8", "logp": [-0.8]},
    {"prompt": "3+4=", "completion": "7", "logp": [-0.05]},
]


def written(tmp_path, rows, name="rollouts.jsonl", end="\n"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + end, encoding="utf-8")
    return path


def by_name(rows):
    return {row.name: row for row in rows}


def rows_of(batch):
    """What a batch holds, field by field, in a form that == compares."""
    fields = {"tokens", "cu_seqlens", "prompt_lens", "group_ids", "train_mask", *PER_TOKEN}
    tensors = {name: None if (t := getattr(batch, name)) is None else t.tolist() for name in fields}
    others = ("prompt_ids", "prompts", "completions", "finish_reasons", "temperature", "columns")
    return tensors | {name: getattr(batch, name) for name in others}


# ---- the numbers -----------------------------------------------------------------------------------------------------------------------


def test_by_hand(tmp_path):
    batch, answers = read_rollouts(written(tmp_path, HAND))
    assert answers == {0: "4", 1: "7"}
    rows = by_name(audit(batch, answers, DIGITS))
    vote = rows["majority_voting"]
    assert vote.missing is None
    assert vote.reward_mean == pytest.approx(4 / 7)
    assert vote.reward_std == pytest.approx(math.sqrt(1 / 3))
    assert vote.flat_groups == 0
    assert (vote.top_accuracy, vote.mean_accuracy) == pytest.approx((1 / 2, 5 / 12))
    assert vote.gain == pytest.approx(1 / 12)
    assert vote.gain_interval == pytest.approx((-1 / 3, 1 / 2))  # of two prompts, each is drawn twice a quarter of the time
    assert vote.point_biserial_within == pytest.approx(0)  # +1 on one prompt and −1 on the other
    assert vote.point_biserial == pytest.approx((2 / 7 - 3 / 7 * 4 / 7) / math.sqrt(3 / 7 * 4 / 7 * 4 / 7 * 3 / 7))
    assert (vote.reward_accuracy, vote.label_accuracy) == (1 / 2, 1 / 2)
    sure = rows["trajectory_entropy"]
    assert (sure.top_accuracy, sure.gain) == pytest.approx((1, 7 / 12))
    assert sure.reward_accuracy is None
    assert sure.label_accuracy is None
    likely = rows["trajectory_entropy sum"]  # −0.2, −1.0, −0.3, −0.6
    assert likely.reward_mean == pytest.approx((-0.2 - 1.0 - 0.3 - 0.6 - 0.9 - 0.8 - 0.05) / 7)
    truth = rows["ground_truth"]
    assert (truth.top_accuracy, truth.point_biserial, truth.reward_accuracy) == pytest.approx((1, 1, 1))
    assert rows["majority_voting soft"].reward_mean == pytest.approx((2 / 4 + 2 / 4 + 1 / 4 + 0 + 2 / 3 + 2 / 3 + 1 / 3) / 7)
    assert rows["majority_voting soft"].label_accuracy == 1 / 2


def test_what_is_missing_is_said(tmp_path):
    batch, _ = read_rollouts(written(tmp_path, [{k: v for k, v in row.items() if k not in ("logp", "answer")} for row in HAND]))
    assert batch.sampled_logp.isnan().all()
    assert batch.response_lens.tolist() == [1] * 7
    rows = audit(batch, {}, DIGITS)
    assert {row.name for row in rows} == {*REWARDS, *VARIANTS}
    assert {row.name: row.missing for row in rows if row.missing} == {
        "weighted_voting": "needs column model",
        "cross_view_voting": "needs column question",
        "next_token": "needs column continuation",
        "covo": "needs the model",
        "self_verification": "needs the model",
        "self_certainty": "needs self_certainty",
        "token_entropy": "needs entropy",
        "token_entropy sum": "needs entropy",
        "trajectory_entropy": "needs logp",
        "trajectory_entropy sum": "needs logp",
        "probability": "needs logp",
        "probability paper_exact": "needs logp",
        "probability_disparity": "needs prob_gap",
        "procedural": "needs a task with a verifier",
        "ground_truth": "needs answers",
        "mixture": "needs its list of rewards",
    }
    assert [row.missing is None for row in rows] == sorted((row.missing is None for row in rows), reverse=True)
    assert all(row.gain is None and row.top_accuracy is None for row in rows)
    vote = by_name(rows)["majority_voting"]
    assert (vote.reward_mean, vote.flat_groups) == (4 / 7, 0)


def test_ties_without_log_probs_go_by_string_order(tmp_path):
    rows = [{"group": "g", "completion": str(n), "answer": 3} for n in (9, 3)]
    for order in (rows, rows[::-1]):
        assert by_name(audit(*read_rollouts(written(tmp_path, order)), DIGITS))["majority_voting"].top_accuracy == 1


def test_columns_and_the_model(tmp_path):
    columns = [
        {**row, "model": "ab"[i % 2], "question": "q", "continuation": "4 and", "prob_gap": [0.5] * len(row["logp"])}
        for i, row in enumerate(HAND)
    ]
    batch, answers = read_rollouts(written(tmp_path, columns))
    rows = by_name(audit(batch, answers, DIGITS, verify=lambda text, columns: float(text == "4" and "answer" not in columns)))
    assert rows["weighted_voting"].label_accuracy is not None
    assert rows["cross_view_voting"].missing is None  # two prompts of one question
    assert rows["next_token"].reward_mean == pytest.approx(2 / 7)
    assert rows["procedural"].reward_mean == pytest.approx(2 / 7)
    assert rows["probability_disparity"].missing == "needs the model"  # only a tokenizer knows which tokens are the answer's
    batch.columns["question"] = batch.prompts
    batch.columns["rephrased"] = ["two and two"] * 7
    assert by_name(audit(batch, answers, DIGITS))["cross_view_voting"].missing == "needs the model"
    batch.columns["rephrased"] = [None] * 7
    assert "no other phrasing" in by_name(audit(batch, answers, DIGITS))["cross_view_voting"].missing


def test_chosen_rewards(tmp_path):
    batch, answers = read_rollouts(written(tmp_path, HAND))
    own = tmp_path / "own.py"
    longest = "def longest(batch, policy):\n    return batch.response_lens.float()\n"
    own.write_text(longest + "def surest(batch, policy):\n    return batch.sequence_mean(batch.sampled_logp)\n")
    names = ["majority_voting", "empo", "token_entropy sum", f"{own}:longest", f"{own}:surest"]
    rows = by_name(audit(batch, answers, DIGITS, rewards=names))
    assert set(rows) == set(names)
    assert rows[f"{own}:longest"].top_accuracy == pytest.approx(1 / 6)  # x, and one of three
    assert rows[f"{own}:surest"].gain == pytest.approx(7 / 12)
    batch.sampled_logp.fill_(math.nan)
    assert "returned nan" in by_name(audit(batch, answers, DIGITS, rewards=names))[f"{own}:surest"].missing
    with pytest.raises(RewardError, match="did you mean 'majority_voting'"):
        audit(batch, answers, DIGITS, rewards=["majority_votin"])


def random_rows(seed=0, prompts=24):
    """Groups of one to six, of which a fifth have no answer; some prompts come twice."""
    draw = random.Random(seed)
    rows = []
    for group in range(prompts + 6):
        prompt = group % prompts
        for _ in range(draw.randint(1, 6)):
            n = draw.randint(1, 5)
            rows.append(
                {
                    "group": f"g{group}",
                    "prompt_id": f"p{prompt}",
                    "prompt": f"{prompt}?",
                    "completion": draw.choice(["1", "2", "3", "03", "none"]),
                }
                | {"logp": [-draw.random() * 3 for _ in range(n)], "entropy": [draw.random() for _ in range(n)]}
                | {"self_certainty": [draw.random() * 9 for _ in range(n)], "token_ids": [draw.randrange(99) for _ in range(n)]}
                | ({} if prompt % 5 == 0 else {"answer": str(prompt % 3 + 1)})
            )
    return rows


def pearson(x, y):
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    return statistics.correlation(x, y)


def test_against_an_independent_loop(tmp_path):
    data = random_rows()
    rows = by_name(audit(*read_rollouts(written(tmp_path, data)), DIGITS))
    scores = {
        "self_certainty": lambda row: statistics.fmean(row["self_certainty"]),
        "token_entropy": lambda row: -statistics.fmean(row["entropy"]),
        "token_entropy sum": lambda row: -sum(row["entropy"]),
        "trajectory_entropy": lambda row: statistics.fmean(row["logp"]),
        "probability paper_exact": lambda row: math.exp(sum(row["logp"])),
    }
    truth_of = {row["prompt_id"]: row["answer"] for row in data if "answer" in row}
    for name, score in scores.items():
        groups = {}
        for row in data:
            groups.setdefault(row["group"], []).append(row)
        tops, means, within, flat_truth, flat_score, stds = [], [], [], [], [], []
        for group in groups.values():
            values = [score(row) for row in group]
            stds.append(statistics.stdev(values) if len(values) > 1 else 0.0)
            if group[0]["prompt_id"] not in truth_of:
                continue
            right = [float(row["completion"] == truth_of[row["prompt_id"]]) for row in group]
            tops.append(right[values.index(max(values))])
            means.append(statistics.fmean(right))
            flat_truth += right
            flat_score += values
            if len(set(right)) > 1:
                within.append(pearson(right, values))
        row = rows[name]
        assert row.reward_mean == pytest.approx(statistics.fmean(score(row) for row in data), rel=1e-5)
        assert row.reward_std == pytest.approx(statistics.fmean(stds), rel=1e-5)
        assert row.top_accuracy == pytest.approx(statistics.fmean(tops), abs=1e-12)
        assert row.mean_accuracy == pytest.approx(statistics.fmean(means), abs=1e-12)
        assert row.gain == pytest.approx(statistics.fmean(tops) - statistics.fmean(means), abs=1e-12)
        assert row.point_biserial == pytest.approx(pearson(flat_truth, flat_score), abs=1e-5)
        assert row.point_biserial_within == pytest.approx(statistics.fmean(within), abs=1e-5)
        low, high = row.gain_interval
        assert low <= row.gain <= high
        assert high - low > 0.05
    assert rows["ground_truth"].missing == "needs an answer for every prompt"


def test_the_metrics_of_training_say_the_same(tmp_path):
    batch, answers = read_rollouts(written(tmp_path, random_rows(1)))
    for row in audit(batch, answers, DIGITS, rewards=["majority_voting", "semantic_clusters", "self_certainty", "probability"]):
        from urlvr_fast.rewards.registry import build_reward

        rewards = build_reward(row.name, checker=DIGITS)(batch, None)
        metrics = alignment_metrics(batch, rewards, answers, DIGITS)
        assert row.top_accuracy == pytest.approx(metrics["pseudo_label_accuracy"], abs=1e-12)
        assert row.mean_accuracy == pytest.approx(metrics["ground_truth_reward"], abs=1e-12)
        assert row.point_biserial == pytest.approx(metrics["point_biserial"], abs=1e-9)
        assert row.reward_accuracy == pytest.approx(metrics.get("reward_accuracy"), abs=1e-12)
        if row.name == "majority_voting":
            assert row.label_accuracy == pytest.approx(metrics["label_accuracy"], abs=1e-12)


def test_the_largest_gain_comes_first(tmp_path):
    rows = audit(*read_rollouts(written(tmp_path, HAND)), DIGITS)
    gains = [row.gain for row in rows if row.missing is None]
    assert gains == sorted(gains, reverse=True)
    assert all(row.missing for row in rows[len(gains) :])


def test_a_prompt_drawn_twice_is_one_prompt():
    assert gain_interval([1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]) == (0.25, 0.25)
    low, high = gain_interval([1.0, -1.0, 0.0, 0.0], [5, 5, 1, 1])
    assert (low, high) == (0.0, 0.0)


@pytest.mark.parametrize("columns", [{}, {"train": None, "level": None}])
def test_the_order_of_lines_changes_nothing(tmp_path, columns):
    data = random_rows(2, prompts=40)
    if columns:
        for i, row in enumerate(data):
            row |= {"train": i % 3 > 0, "level": [i], "completion": f"\\boxed{{{row['completion']}}}"}
    expected = audit_file(written(tmp_path, data))
    for seed in range(3):
        random.Random(seed).shuffle(data)
        assert audit_file(written(tmp_path, data)) == expected  # to the last bit


# ---- the file --------------------------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    data = random_rows(3)
    for i, row in enumerate(data):
        row |= {"prompt_token_ids": list(range(i % 4)), "finish_reason": "length" if i % 2 else "stop", "temperature": 0.7}
        row |= {
            "old_logp": row["logp"],
            "ref_logp": row["logp"],
            "prob_gap": row["entropy"],
            "level": i % 3,
            "tags": ["ä", None, {"a": [1.5]}],
        }
        row |= {"train": False} if i % 7 == 0 else {}
        row |= {"only": "here \u2028 \ud800"} if i == 4 else {}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    batch, answers = read_rollouts(path)
    write_rollouts(tmp_path / "b.jsonl", batch, answers | {10**6: "of no prompt here"})
    again, answers_again = read_rollouts(tmp_path / "b.jsonl")
    assert rows_of(again) == rows_of(batch)
    assert answers_again == answers
    assert os.listdir(tmp_path).count("b.jsonl") == 1
    assert not list(tmp_path.glob(".*"))
    assert batch.columns["only"].count(None) == len(batch) - 1
    assert batch.train_mask.tolist() == [i % 7 > 0 for i in range(len(batch))]
    assert "answer" not in batch.columns
    assert batch.sampled_logp.tolist() == torch.tensor([p for row in data for p in row["logp"]]).tolist()


def test_round_trip_of_little(tmp_path):
    batch, _ = read_rollouts(written(tmp_path, [{"group": 7, "completion": "a"}, {"group": -3, "completion": ""}]))
    assert batch.group_ids.tolist() == [7, -3]
    write_rollouts(tmp_path / "b.jsonl", batch)
    again, answers = read_rollouts(tmp_path / "b.jsonl")
    assert again.sampled_logp.isnan().all()
    assert again.tokens.tolist() == [-1, -1]
    assert answers == {}
    assert "logp" not in (tmp_path / "b.jsonl").read_text()
    assert rows_of(again) | {"sampled_logp": 0} == rows_of(batch) | {"sampled_logp": 0}


def test_what_cannot_be_written(tmp_path):
    batch, _ = read_rollouts(written(tmp_path, HAND))
    target = tmp_path / "out.jsonl"
    for column, error in (({"logp": [1] * 7}, ValueError), ({"x": [object()] * 7}, TypeError)):
        batch.columns = column
        with pytest.raises(error):
            write_rollouts(target, batch)
    batch.columns = {}
    batch.sampled_logp[0] = math.inf
    with pytest.raises(ValueError, match="sampled_logp is not finite"):
        write_rollouts(target, batch)
    assert not target.exists()


def test_identities(tmp_path):
    def groups(*rows):
        batch, _ = read_rollouts(written(tmp_path, [{"completion": "1"} | row for row in rows]))
        return batch.group_ids.tolist(), batch.prompt_ids

    assert groups({"group": 5}, {"group": 9}, {"group": 5}) == ([5, 9, 5], [5, 9, 5])
    assert groups({"group": "b"}, {"group": "a"}, {"group": "b"}) == ([1, 0, 1], [1, 0, 1])
    assert groups({"group": "1"}, {"group": 1}) == ([1, 0], [1, 0])  # a name that looks like a number is a name
    assert groups({"prompt_id": 8}, {"prompt_id": 2}) == ([8, 2], [8, 2])
    assert groups({"prompt": "y"}, {"prompt": "x"}) == ([1, 0], [1, 0])
    assert groups({"group": 0, "prompt_id": 3}, {"group": 1, "prompt_id": 3}) == ([0, 1], [3, 3])
    assert groups({"group": 0, "step": 1}, {"group": 0, "step": 2}, {"group": 0, "step": 1})[0] == [0, 1, 0]
    assert groups({"group": 4, "step": 1}, {"group": 6, "step": 2})[0] == [4, 6]
    assert groups({"group": 0, "step": 0.5}, {"group": 0, "step": 1.5})[0] == [0, 0]


SAMPLE = {
    "prompt_id": 3,
    "prompt": "3+4=",
    "class": 0,
    "in_majority": True,
    "reward": 1.0,
    "advantage": 0.5,
    "finish_reason": "stop",
    "length": 2,
}


def samples(*found):
    """(step, group, completion, answer, correct)"""
    keys = ("step", "group", "completion", "answer", "correct")
    return [SAMPLE | dict(zip(keys, row, strict=True)) | {"prompt_id": row[1], "prompt": f"{row[1]}="} for row in found]


def test_samples_of_a_run(tmp_path):
    """Two steps of two prompts, one of which never gets it right: that one counts, with 0."""
    data = samples(
        *[(1, 0, "=7", "7", True), (1, 0, "=07", "07", True), (1, 0, "=8", "8", False), (1, 1, "=1", "1", False), (1, 1, "?", None, False)],
        *[(2, 0, "=8", "8", False), (2, 0, "=8", "8", False), (2, 0, "=7", "7", True), (2, 5, "=1", "1", None)],
    )
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data) + '{"step": 2, "group"')  # still being written
    loaded = load_rollouts(tmp_path)
    assert loaded.answers == {}
    assert set(loaded.batch.columns) == {"step"}
    assert loaded.batch.group_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3]
    vote = by_name(audit_file(tmp_path))["majority_voting"]
    assert vote.mean_accuracy == pytest.approx((2 / 3 + 0 + 1 / 3) / 3)
    assert vote.label_accuracy == pytest.approx(1 / 3)  # as text, 7 and 07 differ; the tie of three goes to 07
    vote = by_name(audit_file(tmp_path / "samples.jsonl", answers_kind="math"))["majority_voting"]
    assert vote.top_accuracy == pytest.approx(1 / 3)
    assert vote.reward_mean == pytest.approx((2 + 1 + 2 + 1) / 9)  # 7 and 07 agree
    assert vote.label_accuracy == pytest.approx(1 / 3)


def test_samples_are_judged_by_the_checker_of_their_run(tmp_path):
    (tmp_path / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in samples((1, 0, "3*4", "3*4", True), (1, 0, "4*3", "4*3", True)))
    )
    seen = []
    for config in ("data: countdown\n", "data: some.jsonl\n", "[", "&a [*a]"):
        (tmp_path / "config.yaml").write_text(config)
        seen.append(by_name(audit_file(tmp_path))["majority_voting"])
        assert (seen[-1].mean_accuracy, seen[-1].missing) == (1, None)
        procedural = by_name(audit_file(tmp_path))["procedural"].missing
        assert ("KeyError: 'numbers'" in procedural) == (config == "data: countdown\n")  # samples do not keep what the prompt states


GOOD = {"group": 0, "completion": "4", "logp": [-1.0]}
BAD = {
    "no completion": ([GOOD, {"group": 0}], "line 2: no 'completion'"),
    "completion null": ([{"group": 0, "completion": None}], "line 1: 'completion' must be text, not null"),
    "no group": ([{"completion": "4"}], "line 1: nothing says which rollouts"),
    "group kinds": ([GOOD, GOOD | {"group": 1}, {"prompt_id": 0, "completion": "4", "logp": [-1]}], "line 3: .*grouped by 'prompt_id'"),
    "group of a wrong type": ([GOOD | {"group": 1.0}], "'group' must be a whole number"),
    "group true": ([GOOD | {"group": True}], "'group' must be a whole number"),
    "group too large": ([GOOD | {"group": 2**63}], "'group' must be a whole number of 64 bits"),
    "prompt list": ([GOOD | {"prompt": [{"role": "user"}]}], "'prompt' must be text, not a list"),
    "logp text": ([GOOD | {"logp": "-1"}], "'logp' must be a list with a number for each token, not text"),
    "logp of text": ([GOOD | {"logp": ["-1"]}], "'logp' holds '-1' at position 0"),
    "logp of true": ([GOOD | {"logp": [True]}], "'logp' holds True"),
    "logp NaN": ([GOOD, GOOD | {"logp": [-1.0, math.nan]}], "line 2: 'logp' holds nan at position 1"),
    "logp inf": ([GOOD | {"logp": [-math.inf]}], "'logp' holds -inf"),
    "logp beyond fp32": ([GOOD | {"logp": [-1e39]}], "not a finite number"),
    "logp beyond float64": ([GOOD | {"logp": [-(10**400)]}], "not a finite number"),
    "logp is a probability": ([GOOD | {"logp": [0.9]}], "a log-probability is not above 0"),
    "logp twice": ([GOOD | {"sampled_logp": [-1.0]}], "the same thing"),
    "lengths": ([GOOD, GOOD | {"entropy": [1.0, 2.0]}], "line 2: lists of different length: sampled_logp 1, entropy 2"),
    "lengths of tokens": ([GOOD | {"token_ids": [1, 2, 3]}], "different length: sampled_logp 1, token_ids 3"),
    "empty list": ([GOOD | {"logp": []}], "empty, but a response has at least"),
    "statistic in some": ([GOOD, {"group": 0, "completion": "5"}], "line 2: no 'sampled_logp', which .*line 1 has"),
    "statistic in later ones": ([GOOD, GOOD | {"entropy": [1.0]}], "line 1: no 'entropy', which .*line 2 has"),
    "token ids": ([GOOD | {"token_ids": [-1]}], "'token_ids' must be a list of token ids"),
    "temperature": ([GOOD | {"temperature": -1}], "'temperature' must be a number from 0"),
    "temperatures": ([GOOD | {"temperature": 1}, GOOD, GOOD | {"temperature": 0.5}], "line 3: another temperature than in .*line 1"),
    "train": ([GOOD | {"train": 1}], "'train' must be true or false"),
    "answer list": ([GOOD | {"answer": [4]}], "'answer' must be text or a finite number"),
    "answer NaN": ([GOOD | {"answer": math.nan}], "'answer' must be text or a finite number"),
    "two answers": ([GOOD | {"answer": 4}, GOOD | {"answer": "5"}], "line 2: the answer is '5' here and '4' in .*line 1"),
    "two prompts": ([GOOD | {"prompt": "a"}, GOOD | {"prompt": "b"}], "line 2: .*another prompt"),
    "two texts": ([GOOD | {"prompt": "a", "prompt_id": 0}, GOOD | {"prompt": "b", "prompt_id": 0}], "line 2: the text of the prompt"),
    "key twice": (['{"group": 0, "completion": "4", "completion": "5"}'], "line 1: the key 'completion' is there twice"),
    "no JSON": ([GOOD, "{"], r"line 2, column \d: not valid JSON"),
    "no object": ([GOOD, "[]"], "line 2: must be an object"),
    "digits": (['{"group": 0, "completion": "4", "x": ' + "9" * 5000 + "}"], "line 1: .*digits"),
    "nesting": (['{"group": 0, "completion": "4", "x": ' + "[" * 200_000 + "]" * 200_000 + "}"], "line 1: nested too deeply"),
    "a sample among others": ([GOOD, samples((1, 0, "=7", "7", True))[0]], "line 2: .*samples"),
    "others among samples": ([samples((1, 0, "=7", "7", True))[0], GOOD], "line 2: .*samples"),
    "a sample's verdict": (samples((1, 0, "=7", "7", "yes")), "'correct' true, false or null"),
    "empty": ([], "is empty: it has no rollouts"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_name_file_and_line(tmp_path, case):
    rows, message = BAD[case]
    with pytest.raises(DataError, match=message) as raised:
        audit_file(written(tmp_path, rows))
    assert str(tmp_path / "rollouts.jsonl") in str(raised.value)
    assert len(str(raised.value)) < 600


def test_bad_bytes_and_places(tmp_path):
    path = written(tmp_path, [GOOD, json.dumps(GOOD)[:-4]], end="")
    with pytest.raises(DataError, match=r"line 2, .*does not end.*delete it"):
        read_rollouts(path)
    assert len(read_rollouts(written(tmp_path, [GOOD, GOOD], end=""))[0]) == 2  # only the line break is missing
    assert len(read_rollouts(written(tmp_path, ["", GOOD, "  ", GOOD]))[0]) == 2
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(read_rollouts(path)[0]) == 1
    path.write_bytes(b'{"group": 0, "completion": "\xff"}\n')
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        read_rollouts(path)
    with pytest.raises(DataError, match=r"there is no file .*near it.*rollouts\.jsonl"):
        read_rollouts(tmp_path / "rollout.jsonl")
    with pytest.raises(DataError, match="no run directory"):
        read_rollouts(tmp_path)


def test_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_file, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(rollout_file, "MAX_GROUP", 3)
    with pytest.raises(DataError, match="line 2: longer than 1 MiB"):
        read_rollouts(written(tmp_path, [GOOD, GOOD | {"completion": "x" * (1 << 20)}]))
    with pytest.raises(DataError, match="4 rollouts, 3 are the most"):
        read_rollouts(written(tmp_path, [GOOD] * 4))
    assert len(read_rollouts(written(tmp_path, [GOOD] * 3))[0]) == 3  # the same rollout three times is three rollouts


def test_groups_of_one_and_nothing_that_parses(tmp_path):
    rows = by_name(audit(*read_rollouts(written(tmp_path, [{"group": i, "completion": str(i), "answer": 0} for i in range(3)])), DIGITS))
    vote = rows["majority_voting"]
    assert (vote.reward_std, vote.flat_groups, vote.gain, vote.gain_interval) == (0, 1, 0, (0, 0))
    assert (vote.point_biserial, vote.point_biserial_within) == (0, None)
    rows = by_name(audit(*read_rollouts(written(tmp_path, [{"group": 0, "completion": "", "answer": 0}] * 2)), DIGITS))
    assert (rows["majority_voting"].reward_mean, rows["majority_voting"].label_accuracy) == (0, 0)
    assert rows["majority_voting"].reward_accuracy == 1  # zeros match zeros


def test_hostile_answers_are_slow_at_worst(tmp_path):
    """Boxes that would be executed, would take forever, or are too long; digits of other scripts. Nothing runs, and it ends."""
    marker = tmp_path / "was-here"
    texts = [
        f"__import__('os').system('touch {marker}')",
        f"open('{marker}', 'w')",
        "9^{9^{9^{9}}}",
        "x" * 100_000,
        "((((((((((((1+1)^99)^99)^99)^99)^99)^99)^99",
        "٤٢",
        "４２",
        "42",
        "\\frac{1}{0}",
        "[red]\u001b[2J",
    ]
    data = [{"group": "g", "completion": f"so \\boxed{{{text}}}", "answer": "x" * 100_000} for text in texts]
    started = time.monotonic()
    rows = by_name(audit_file(written(tmp_path, data)))
    assert time.monotonic() - started < 240
    assert not marker.exists()
    assert rows["majority_voting"].mean_accuracy == pytest.approx(0.1)  # the same 100 kB of text
    with pytest.raises(DataError, match="CountdownAnswers"):
        audit_file(written(tmp_path, [{"group": 0, "completion": "1+2", "answer": "3"}]), data_task="countdown")


def test_kinds_and_tasks(tmp_path):
    path = written(tmp_path, [{"group": 0, "completion": c, "answer": "1/2"} for c in ("\\boxed{0.5}", "1/2", "\\boxed{2}")])
    assert by_name(audit_file(path))["ground_truth"].reward_mean == pytest.approx(1 / 3)
    assert by_name(audit_file(path, answers_kind="exact"))["ground_truth"].reward_mean == pytest.approx(1 / 3)
    assert by_name(audit_file(path, answers_kind="math", rewards=["ground_truth"]))["ground_truth"].top_accuracy == 1
    countdown = [{"group": 0, "completion": c, "numbers": [3, 5, 7], "target": 26} for c in ("3*7+5", "3+5+7")]
    rows = by_name(audit_file(written(tmp_path, countdown), data_task="countdown"))
    assert rows["procedural"].reward_mean == 0.5
    with pytest.raises(DataError, match="did you mean 'countdown'"):
        audit_file(path, data_task="countdwn")
    with pytest.raises(DataError, match="valid are auto, math, exact"):
        audit_file(path, answers_kind="maths")


def test_table(tmp_path):
    rows = audit(*read_rollouts(written(tmp_path, HAND)), DIGITS)
    header, cells = table(rows)
    assert header[:5] == ("reward", "value", "std in group", "flat", "top")
    assert {len(row) for row in cells} == {len(header)}
    first = dict(zip(header, cells[0], strict=True))
    assert (first["top"], first["mean"], first["gain"]) == ("1.000", "0.417", "+0.583")
    assert dict(zip(header, cells[-1], strict=True))["note"].startswith("needs")
    header, cells = table(audit(*read_rollouts(written(tmp_path, [{"group": 0, "completion": "4"}])), DIGITS))
    assert header == ("reward", "value", "std in group", "flat", "note")
    assert table([]) == (("reward", "value", "std in group"), [])


# ---- real rollouts ---------------------------------------------------------------------------------------------------------------------


def test_rollouts_of_the_bundled_model(tmp_path):
    """Sampled, written, read: the rewards are those of the batch itself, and what the model finds likely is right more often."""
    from urlvr_fast.rewards.registry import build_reward
    from urlvr_fast.trainer import config as configuration
    from urlvr_fast.trainer.data import load_encoded
    from urlvr_fast.trainer.evaluate import sample_batch
    from urlvr_fast.trainer.model import build_rollout, load_model, resolve_model
    from urlvr_fast.trainer.rollout import Sampling

    config = configuration.load(
        None, ["model=bundled", "data=arithmetic", "rollout.engine=hf", "rollout.max_tokens=8", "trainer.device=cpu"]
    )
    loaded = load_model(config, resolve_model(config.model))
    prompts, encoded = load_encoded(config, loaded, config.data, "test", 40, 0)
    rollout = build_rollout(config, loaded, 64, statistics=True)
    sampling = Sampling(8, 1.0, 8, statistics=frozenset({"entropy", "self_certainty", "prob_gap"}))
    batch = sample_batch(rollout, prompts, encoded, range(len(encoded.token_ids)), sampling, 0, loaded.decode)
    write_rollouts(tmp_path / "real.jsonl", batch, prompts.answers)
    again, answers = read_rollouts(tmp_path / "real.jsonl")
    assert rows_of(again) == rows_of(batch)
    assert answers == prompts.answers
    audited = audit_file(tmp_path / "real.jsonl", data_task="arithmetic")
    rows = by_name(audited)
    for name in ("self_certainty", "token_entropy", "trajectory_entropy", "probability", "majority_voting"):
        rewards = build_reward(name, checker=prompts.checker)(batch, None)
        metrics = alignment_metrics(batch, rewards, prompts.answers, prompts.checker)
        assert rows[name].reward_mean == pytest.approx(rewards.double().mean().item())
        assert rows[name].top_accuracy == pytest.approx(metrics["pseudo_label_accuracy"])
    for name in ("trajectory_entropy", "probability", "majority_voting"):
        assert rows[name].gain_interval[0] > 0
    assert audited[0].name == "ground_truth"
    assert rows["probability_disparity"].missing == "needs the model"
    lines = (tmp_path / "real.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (tmp_path / "real.jsonl").write_text("".join(lines))
    assert audit_file(tmp_path / "real.jsonl", data_task="arithmetic") == audited
