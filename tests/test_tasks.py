"""Procedural arithmetic: the split, the draw, the checker."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from urlvr_fast.tasks import arithmetic
from urlvr_fast.tasks.arithmetic import IntegerAnswers, Problem


def test_answers_are_what_the_prompt_says() -> None:
    assert [Problem(23, "+", 45).prompt, Problem(37, "-", 81).prompt, Problem(7, "*", 46).prompt] == ["23+45=", "37-81=", "7*46="]
    assert [Problem(23, "+", 45).answer, Problem(37, "-", 81).answer, Problem(7, "*", 46).answer] == [68, -44, 322]


def test_the_splits_partition_every_problem() -> None:
    train = {p.prompt for pool in arithmetic.pools("train") for p in pool}
    test = {p.prompt for pool in arithmetic.pools("test") for p in pool}
    assert not train & test
    assert len(train) + len(test) == sum(len(kind.operands) for kind in arithmetic.KINDS)
    assert 0.17 < len(test) / (len(train) + len(test)) < 0.23


def test_the_split_is_the_documented_hash() -> None:
    # By hand: SHA-256, first eight bytes as a big-endian number, modulo five.
    by_hand = int.from_bytes(hashlib.sha256(b"23+45=").digest()[:8], "big") % 5 == 0
    assert (Problem(23, "+", 45).split == "test") is by_hand is True
    assert Problem(81, "-", 37).split == "train"
    assert Problem(10, "+", 10).split == "test"


@given(st.sampled_from("+*"), st.integers(2, 99), st.integers(2, 99))
def test_swapped_operands_stay_in_their_split(operation: str, a: int, b: int) -> None:
    assert Problem(a, operation, b).split == Problem(b, operation, a).split


def test_the_draw_is_the_same_in_another_process() -> None:
    here = [p.prompt for p in arithmetic.draw("test", limit=50, seed=3)]
    program = "from urlvr_fast.tasks import arithmetic as a; print(*[p.prompt for p in a.draw('test', limit=50, seed=3)])"
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert there == here


def test_seeds_differ_and_a_smaller_limit_is_a_prefix() -> None:
    whole = arithmetic.draw("train", limit=300, seed=1)
    assert arithmetic.draw("train", limit=100, seed=1) == whole[:100]
    assert arithmetic.draw("train", limit=300, seed=2) != whole
    assert len(arithmetic.draw("train")) == arithmetic.DEFAULT_LIMIT


def test_no_problem_repeats_before_all_have_come() -> None:
    pool = {p.prompt for kind in arithmetic.pools("test") for p in kind}
    prompts = [p.prompt for p in arithmetic.draw("test", limit=len(pool) + 200, seed=0)]
    assert set(prompts[: len(pool)]) == pool
    assert len(set(prompts[len(pool) :])) == 200


def test_the_draw_keeps_the_shares() -> None:
    operations = Counter(p.operation for p in arithmetic.draw("train", limit=3000, seed=0))
    for operation in "+-*":
        share = sum(kind.share for kind in arithmetic.KINDS if kind.operation == operation)
        assert operations[operation] / 3000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    ("split", "seed", "digest"),
    [("train", 0, "4aa89d95b82b260f"), ("train", 7, "598771ac9e5b7aa8"), ("test", 0, "d29bd80a68ef1473"), ("test", 1, "6de256a0820ef871")],
)
def test_the_draw_stays_what_the_bundled_model_was_trained_and_measured_on(split: str, seed: int, digest: str) -> None:
    text = "\n".join(f"{p.prompt}{p.answer}{p.operation}" for p in arithmetic.draw(split, seed=seed))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_kinds_and_their_difficulty() -> None:
    names = [kind.name for kind in arithmetic.KINDS]
    assert names == ["sum", "difference", "short_product", "long_product"]
    for difficulty, name in enumerate(names):
        problems = arithmetic.draw("train", limit=100, kinds=[name])
        assert {(p.difficulty, p.operation) for p in problems} == {(difficulty, arithmetic.KINDS[difficulty].operation)}
        assert arithmetic.draw("train", limit=100, kinds=name) == problems
    assert Problem(12, "*", 5).difficulty == 2
    assert Problem(12, "*", 15).difficulty == 3
    assert Problem(12, "-", 15).columns == {"operation": "-", "difficulty": 1}


def test_some_kinds_keep_their_proportions_and_a_mapping_sets_them() -> None:
    two = Counter(p.difficulty for p in arithmetic.draw("train", limit=2000, kinds=("short_product", "long_product")))
    assert set(two) == {2, 3}
    assert two[2] / 2000 == pytest.approx(0.08 / 0.28, abs=0.05)
    shares = Counter(p.difficulty for p in arithmetic.draw("train", limit=2000, kinds={"sum": 3, "long_product": 1}))
    assert set(shares) == {0, 3}
    assert shares[0] / 2000 == pytest.approx(0.75, abs=0.04)
    assert arithmetic.draw("test", limit=50, kinds=[kind.name for kind in arithmetic.KINDS]) == arithmetic.draw("test", limit=50)


@pytest.mark.parametrize("kinds", ["sums", [], {}, ["sum", "quotient"], 3, {"sum": 0}, {"sum": -1}, {"sum": "1"}, {"sum": float("inf")}])
def test_unknown_kinds(kinds: Any) -> None:
    with pytest.raises(ValueError, match=r"arithmetic: kinds=.*(valid are some of sum, difference|a share is a number above 0)"):
        arithmetic.draw(kinds=kinds)


def test_there_is_no_verifier_beside_the_answer() -> None:
    assert not hasattr(arithmetic, "verify")


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match=r"no split 'dev'; it has train and test"):
        arithmetic.draw("dev")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [("68", "68"), (" 68\n", "68"), ("007", "7"), ("+7", "7"), ("-012", "-12"), ("-0", "0"), ("000", "0"), ("9" * 5000, "9" * 5000)],
)
def test_checker_extracts(completion: str, answer: str) -> None:
    assert IntegerAnswers().extract(completion) == answer


@pytest.mark.parametrize("completion", ["", "-", "6 8", "68=", "6.0", "--1", "٦٨", "²", "1_000", "0x10", "sixty"])
def test_checker_finds_no_answer(completion: str) -> None:
    assert IntegerAnswers().extract(completion) is None


@given(st.integers())
def test_checker_reads_every_integer_as_itself(number: int) -> None:
    checker = IntegerAnswers()
    extracted = checker.extract(str(number))
    assert extracted == str(number)
    assert checker.equivalent(extracted, str(number))
    assert not checker.equivalent(extracted, str(number + 1))
