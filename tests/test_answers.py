"""Extraction and equivalence of answers, with the real math-verify in real worker processes."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urlvr_fast.rewards.answers import (
    AnswerWorkerError,
    ExactAnswers,
    MathAnswers,
    equivalence_classes,
    equivalent,
    extract_boxed,
    plain_number,
    spelling,
)

TOWER = "9^{9^{9^9}}"  # parses at once, never evaluates


@pytest.fixture(scope="module")
def checker():
    with MathAnswers(timeout_s=20) as math_answers:
        yield math_answers


# ---- extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5", "5"),
        (r"thus $\boxed -12.5$.", "-12.5"),
        (r"\boxed\frac{3}{4}.", r"\frac{3}{4}"),
        (r"\boxed {8}", "8"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{1} but cut off: \boxed{2", "1"),
        (r"{{ \boxed{3}", "3"),
        (r"}} \boxed{3} }", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{x \} y}", r"x \} y"),
        (r"\boxed{\text{a \boxed{3}}}", "3"),
        (r"\\boxed{9}", "9"),
        (r"a\\\boxed{9}", "9"),
        (r"\boxed{ \left( 3, \frac{\pi}{2} \right) }", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{None}", "None"),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed{1} \boxed{}", None),
        (r"put it in the \boxed notation", None),
        (r"\boxedness{3}", None),
        ("no box at all: 42", None),
        ("", None),
        (r"\boxed", None),
        (r"\boxed{{5}", None),
    ],
)
def test_extract_boxed(text, answer):
    assert extract_boxed(text) == answer


@given(st.text(alphabet="ab{}\\ $", max_size=30).filter(lambda s: _plainly_balanced(s) and s.strip() and "\\" not in s))
@settings(max_examples=150, deadline=None)
def test_any_balanced_content_comes_back_from_prose(content):
    assert extract_boxed(f"prose {{ with }} braces \\boxed{{{content}}} and more }} prose {{") == content.strip()


def _plainly_balanced(text):
    depth = 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize(
    "block", ["\\boxed{", "{", "}", "\\", "\\boxed", "\\boxed ", "\\boxed 1", "\\boxed{1}", "\\boxed\\a", " ", "\\{", "\\boxed\t"]
)
def test_extraction_takes_linear_work(block):
    """Count the steps the interpreter takes rather than seconds: eight times the text, at most about eight times the calls and lines."""

    def lines_executed(text):
        count = 0

        def tracer(frame, event, argument):
            nonlocal count
            count += event == "line"
            return tracer

        sys.settrace(tracer)
        try:
            extract_boxed(text)
        finally:
            sys.settrace(None)
        return count

    small, large = lines_executed(block * 500), lines_executed(block * 4000)
    assert large <= 8.5 * small + 100
    extract_boxed(block * (100_000 // len(block)))  # and at full size the regular expressions, which no tracer sees, come to an end


# ---- equivalence

EQUAL = [
    ("142", "142.0"),
    ("58,500", "58500"),
    (r"10,\!080", "10080"),
    (r"\frac12", "0.5"),
    (r"\dfrac{1}{2}", "1/2"),
    ("−5", "-5"),
    (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"2 \sqrt{5}", r"\sqrt{20}"),
    (r"\{1,2\}", "2, 1"),
    (r"\text{East}", "east"),
    (r"\text{(B)}", "B"),
    (r"50\%", "50"),
    (r"36^\circ", "36"),
    (r"15\mbox{ cm}^2", "15"),
    ("0.333333", r"\frac{1}{3}"),
    ("x=5", "5"),
    ("AB = 5", "5"),
    ("f(x) = x^2", "x^2"),
    ("x=5", "5=x"),
    ("5x-7y+4=0", "-5x+7y-4=0"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("x>5", r"(5,\infty)"),
    (r"1\frac{4}{5}", "1.8"),
    ("40_9", "36"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
]
DIFFERENT = [
    ("5x - 7y + 11z + 4 = 0", "0.0"),
    ("5x - 7y + 11z + 4 = 0", "0"),
    ("x+y=5", "5"),
    ("x^2=4", "4"),
    ("0=5", "5"),
    ("x=5", "y=5"),
    ("1", "2"),
    ("1.0000001", "1"),
    (".0000672", ".0000671"),
    ("0.0", "10^{-9}"),
    ("0.33", r"\frac13"),
    (r"50\%", "0.5"),
    ("(2,4)", "2,4"),
    ("(2,4)", "(4,2)"),
    ("(8,-2)", "(15,-29)"),
    ("40_9", "40"),
    ("40_9", "40_8"),
    ("3, 500", "3500"),
    ("east", "seat"),
    (r"\text{no}", "on"),
    ("A", "B"),
    ("x>5", "x>=5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    ("None", "0"),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_both_ways(checker, a, b):
    assert checker.equivalent(a, b)
    assert checker.equivalent(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_both_ways(checker, a, b):
    assert not checker.equivalent(a, b)
    assert not checker.equivalent(b, a)


def test_a_worker_itself_is_symmetric(checker):
    """`equivalent` sorts its arguments, which would hide a direction that matters: ask the worker both ways."""
    worker = checker._take()
    try:
        for a, b in EQUAL + DIFFERENT:
            forth, back = worker.compare(spelling(a), spelling(b), 20), worker.compare(spelling(b), spelling(a), 20)
            assert forth[0] is not None
            assert forth == back, (a, b)
    finally:
        checker._idle.put(worker)


@given(st.fractions(), st.fractions())
@settings(max_examples=100, deadline=None)
def test_plain_numbers_compare_exactly_without_a_worker(p, q):
    with MathAnswers() as fast:
        a, b = f"\\frac{{{p.numerator}}}{{{p.denominator}}}", f"{q.numerator}/{q.denominator}"
        assert fast.equivalent(a, b) == (p == q)
        assert fast.equivalent(a, f"${p.numerator}/{p.denominator}$")
        assert fast.worker_calls == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        ("-0.50", Fraction(-1, 2)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("1,234.5", Fraction(2469, 2)),
        ("1,23", None),
        ("-3/4", Fraction(-3, 4)),
        ("1/0", None),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac34", Fraction(3, 4)),
        ("4210_{5}", Fraction(555)),
        ("12_2", None),
        ("", None),
        (".", None),
        ("-", None),
        ("５", None),
        ("٣", None),
        ("1e9", None),
        ("9" * 501, None),
    ],
)
def test_plain_number(text, value):
    assert plain_number(text) == value


def test_identical_answers_and_repeated_questions_need_no_worker():
    with MathAnswers() as fast:
        assert fast.equivalent(r"\sqrt{2}", r" $\sqrt{2}$ ")
        assert fast.equivalent("x" * 100_000, "x" * 100_000)
        assert not fast.equivalent("x" * 100_000, "x" * 99_999)
        assert fast.worker_calls == 0
        assert [fast.equivalent(r"\sqrt{8}", r"2\sqrt2") for _ in range(5)] == [True] * 5
        assert fast.equivalent(r"2\sqrt2", r"\sqrt{8}")
        assert fast.worker_calls == 1


# ---- hostile input


def test_a_timeout_counts_as_different_and_the_worker_is_replaced():
    with MathAnswers(timeout_s=2.0) as impatient:
        assert not impatient.equivalent(TOWER, "7")
        assert impatient.timeouts == 1
        assert impatient.equivalent(r"\sqrt{8}", r"2\sqrt2", timeout_s=20)  # a fresh worker serves the next
        assert not impatient.equivalent(TOWER, r"\sqrt{8}")
        assert impatient.timeouts == 2
        # Twice is enough: from now on it is compared as text, and an innocent that met it once is not held to blame.
        assert not impatient.equivalent(TOWER, "9")
        assert impatient.equivalent(TOWER, f" {TOWER} ")
        assert impatient.timeouts == 2
        assert impatient.equivalent(r"\sqrt{8}", r"\sqrt{4\cdot2}", timeout_s=20)


def test_nothing_in_an_answer_is_executed(tmp_path):
    target = tmp_path / "executed"
    attacks = [
        f"__import__('os').system('touch {target}')",
        f"\\text{{__import__('os').system('touch {target}')}}",
        f"open('{target}','w')",
        f"f(open('{target}','w'))",
        f"\\operatorname{{exec}}(open('{target}','w'))",
        "9**9**9**9",
        "\\operatorname{eval}(1)",
        "lambda: 1",
        "().__class__",
    ]
    with MathAnswers(timeout_s=10) as guarded:
        for attack in attacks:
            assert not guarded.equivalent(attack, "0")
            assert not guarded.equivalent(attack, "x")
        assert guarded.worker_calls > 0
        assert guarded.timeouts == guarded.crashes == 0
    assert not target.exists()


def test_the_worker_knows_no_way_to_evaluate_a_string(tmp_path):
    """Were a string to reach sympy's own parser all the same, it would be refused, and so would a process or a file."""
    script = Path(__file__).parents[1] / "urlvr_fast" / "rewards" / "answer_worker.py"
    program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("answer_worker", {str(script)!r})
worker = importlib.util.module_from_spec(spec); spec.loader.exec_module(worker)
worker.load_libraries()
sys.addaudithook(worker.refuse)
import os, subprocess, sympy, math_verify
attempts = [
    lambda: sympy.sympify("open({str(tmp_path / "a")!r}, 'w')"),
    lambda: sympy.sympify("[].append(1)"),
    lambda: sympy.parsing.parse_expr("1+1"),
    lambda: math_verify.parser.parse_expr("1+1"),
    lambda: open({str(tmp_path / "b")!r}, "w"),
    lambda: os.system("true"),
    lambda: subprocess.run(["true"]),
    lambda: os.fork(),
]
for attempt in attempts:
    try:
        attempt()
    except (sympy.SympifyError, ValueError, PermissionError):
        print("refused")
assert sympy.sympify("12") == 12 and sympy.sympify("x").is_Symbol
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == ["refused"] * 8
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "hostile",
    ["(" * 100 + "1" + ")" * 100, "{" * 100 + "1" + "}" * 100, "\ud800", "\x00", "５" * 100, "\\" * 400, "{" * 400, "\n" * 400 + "1\\n2"],
    ids=["parentheses", "braces", "surrogate", "nul", "digits", "backslashes", "unbalanced", "lines"],
)
def test_odd_answers_come_out_different_and_leave_the_checker_working(checker, hostile):
    assert not checker.equivalent(hostile, "2")
    assert checker.equivalent(hostile, hostile)
    assert checker.equivalent("x+x", "2x")


def test_the_worker_runs_under_the_memory_limit_and_a_killed_one_is_a_crash():
    with MathAnswers(memory_mb=300, timeout_s=60) as limited:
        assert limited.equivalent("x+x", "2x")
        worker = limited._idle.queue[-1]
        limits = Path(f"/proc/{worker.process.pid}/limits")
        if limits.exists():
            (line,) = (line for line in limits.read_text().splitlines() if line.startswith("Max address space"))
            assert line.split()[3] == str(300 << 20)

        def kill_when_busy():
            while worker in limited._idle.queue:
                time.sleep(0.01)
            time.sleep(0.2)
            os.kill(worker.process.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        assert not limited.equivalent(TOWER, "7")  # killed in the middle of the comparison
        killer.join()
        assert (limited.crashes, limited.timeouts) == (1, 0)
        assert limited.equivalent("x+x+x", "3x")


def test_workers_start_late_are_reused_and_end_with_the_checker():
    checker = MathAnswers(workers=2)
    assert list(checker._idle.queue) == [None, None]
    assert checker.equivalent("x+x", "2x")
    assert checker.equivalent("y+y", "2y")
    (worker,) = (w for w in checker._idle.queue if w is not None)
    assert worker.process.poll() is None
    checker.close()
    checker.close()
    assert worker.process.poll() is not None
    assert checker.equivalent("z+z", "2z")  # closing is not the end of it
    checker.close()


def test_threads_share_a_checker():
    with MathAnswers(timeout_s=30, workers=2) as shared:
        verdicts: dict[int, bool] = {}

        def ask(i):
            verdicts[i] = shared.equivalent(f"x+{i}x", f"{i + 1}x") and not shared.equivalent(f"x+{i}x", f"{i}y")

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2, 14)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(verdicts.values())
        assert len(verdicts) == 12
        assert sum(worker is not None for worker in shared._idle.queue) <= 2


def test_the_interpreter_ends_with_a_worker_running():
    program = (
        "from urlvr_fast.rewards.answers import equivalent, _shared; import urlvr_fast.rewards.answers as a\n"
        "assert equivalent('x+x', '2x'); print([w for w in a._shared._idle.queue if w][0].process.pid)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(result.stdout), 0)
    assert result.stderr == ""


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with MathAnswers() as broken, pytest.raises(AnswerWorkerError, match="math-verify"):
        broken.equivalent("x+x", "2x")


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"workers": 0}, {"memory_mb": 10}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="must be above 0"):
        MathAnswers(**options)


def test_module_level_equivalent():
    assert equivalent("x+x", "2x", timeout_s=20)
    assert not equivalent("5x-7y+11z+4=0", "0.0")


# ---- exact answers and classes


def test_exact_answers():
    exact = ExactAnswers(r"(-?[0-9]+)")
    assert exact.extract("  -12\n") == "-12"
    assert exact.extract("12 apples") is None
    assert exact.equivalent("12", "12")
    assert not exact.equivalent("12", "012")
    assert ExactAnswers(r"([0-9]+)", canonical=lambda s: s.lstrip("0") or "0").equivalent("12", "012")
    with pytest.raises(ValueError, match="group"):
        ExactAnswers(r"[0-9]+")


class Table:
    """A checker whose equivalences are a given list of pairs; counts its calls."""

    def __init__(self, *pairs):
        self.pairs, self.calls = {frozenset(pair) for pair in pairs}, 0

    def extract(self, completion):
        return completion or None

    def equivalent(self, a, b):
        self.calls += 1
        assert a != b
        return frozenset((a, b)) in self.pairs


def test_classes_are_numbered_by_first_appearance():
    assert equivalence_classes(["b", None, "a", "b", "c", None, "a"], Table()) == [0, -1, 1, 0, 2, -1, 1]
    assert equivalence_classes([], Table()) == []
    assert equivalence_classes([None, None], Table()) == [-1, -1]


def test_the_string_none_is_an_answer():
    assert equivalence_classes(["None", None, "None"], Table()) == [0, -1, 0]


def test_equal_strings_need_no_call_and_calls_are_bounded():
    same = Table()
    assert equivalence_classes(["7"] * 50, same) == [0] * 50
    assert same.calls == 0
    distinct = Table()
    equivalence_classes([str(i % 9) for i in range(90)], distinct)
    assert distinct.calls == 9 * 8 // 2


def test_classes_are_connected_components_in_any_order():
    """a = b and b = c but not a = c: one class, whichever comes first."""
    for order in itertools.permutations("abcd"):
        classes = dict(zip(order, equivalence_classes(order, Table(("a", "b"), ("b", "c"))), strict=True))
        assert classes["a"] == classes["b"] == classes["c"] != classes["d"]


def test_spellings_of_one_number_are_one_class_without_a_worker():
    with MathAnswers() as fast:
        assert equivalence_classes(["1/2", r"\frac12", "0.5", "2", "2.0", None, "0.50"], fast) == [0, 0, 0, 1, 1, -1, 0]
        assert fast.worker_calls == 0


def test_classes_through_math_verify(checker):
    answers = [r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}", "0.7", r"\sqrt{0.5}", None, r"\sqrt2/2"]
    assert equivalence_classes(answers, checker) == [0, 0, 1, 0, -1, 0]


# ---- real contest problems

CONTEST_DATA = Path(os.environ.get("URLVR_FAST_CONTEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def contest_answers():
    files = [CONTEST_DATA / f"{name}.json" for name in ("aime", "amc", "math")]
    if not all(file.is_file() for file in files):
        pytest.skip(f"no contest problems in {CONTEST_DATA} (URLVR_FAST_CONTEST_DATA names the folder)")
    return [row["answer"] for file in files for row in json.loads(file.read_text(encoding="utf-8"))]


def test_every_reference_answer_equals_itself_in_prose(checker, contest_answers):
    assert len(contest_answers) == 613
    for answer in contest_answers:
        extracted = checker.extract(
            f"With {{2x}} and \\frac{{1}}{{2}} we get, after some work,\n\\[\\boxed{{ {answer} }}\\]\nand are done."
        )
        assert extracted is not None
        assert checker.equivalent(extracted, answer), answer


def test_every_reference_answer_equals_itself_in_the_worker(checker, contest_answers):
    """The test above is settled by spelling; this is math-verify's own opinion of everything that is not a plain number."""
    worker = checker._take()
    try:
        for answer in {spelling(answer) for answer in contest_answers if plain_number(spelling(answer)) is None}:
            assert worker.compare(answer, answer, 20)[0] is True, answer
    finally:
        checker._idle.put(worker)


def test_200_random_pairs_of_different_answers_are_different(checker, contest_answers):
    """Equal pairs among the draws are known by hand: the lists −2,1 and 1,−2, spellings of 2√5, and 36 with two units."""
    equal = [{"-2,1", "1,-2"}, {r"2 \sqrt{5}", r"2\sqrt{5}"}, {r"36^\circ", r"\$36"}, {"36", r"36^\circ"}, {"36", r"\$36"}]
    distinct = sorted({checker.canonical(answer): answer for answer in sorted(contest_answers)}.values())
    symbolic = [answer for answer in distinct if plain_number(spelling(answer)) is None]
    rng = random.Random(0)
    pairs: set[tuple[str, str]] = {("5x - 7y + 11z + 4 = 0", "0.0")}
    while len(pairs) < 200:
        # Half of the draws among answers that are no plain numbers, or hardly any pair would reach math-verify.
        a, b = rng.sample(symbolic if len(pairs) % 2 else distinct, 2)
        units = {without_unit(a), without_unit(b)}
        if {a, b} not in equal and len(units) == 2:
            pairs.add((a, b))
    assert [pair for pair in sorted(pairs) if checker.equivalent(*pair)] == []
    assert checker.worker_calls > 100


def without_unit(answer):
    """The answer without a degree sign or a dollar sign: 30 and 30° are numerically equal, so not a pair that must differ."""
    return answer.replace(r"^\circ", "").replace(r"\$", "")
