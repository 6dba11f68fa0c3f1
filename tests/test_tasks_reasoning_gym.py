"""The adapter of reasoning-gym, with the real package: its own scores, in a process that a hostile answer cannot leave."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from urlvr_fast.tasks import reasoning_gym as adapter
from urlvr_fast.tasks.prompt_set import DataError, is_procedural, load_prompts
from urlvr_fast.tasks.reasoning_gym_worker import guarded, guarded_eval, is_arithmetic, score


def oracle(audit: str) -> str:
    return str(json.loads(audit)["answer"])


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("reasoning_gym")

    # countdown gives its scores through sympy's parse_expr, n_queens and string_insertion through eval, spell_backward compares text
    @pytest.mark.parametrize("name", ["countdown", "n_queens", "string_insertion", "polynomial_multiplication", "spell_backward"])
    def test_the_data_set_s_own_score(self, name: str) -> None:
        prompts = load_prompts(f"reasoning_gym:{name}", limit=4, seed=2)
        checker = prompts.checker
        assert isinstance(checker, adapter.GymAnswers)
        for id in prompts.ids:
            audit = prompts.answers[id]
            assert checker.correct(oracle(audit), audit)
            assert not checker.correct("no idea", audit)
            assert not checker.correct(oracle(audit) + "1", audit)
        assert prompts.columns == {}
        assert prompts.verify is None
        assert not any(prompt == audit for prompt, audit in zip(prompts.prompts, prompts.answers.values(), strict=True))

    def test_any_right_answer_counts_and_a_shaped_score_does_not(self) -> None:
        prompts = load_prompts("reasoning_gym:countdown", limit=1, options={"min_numbers": 2, "max_numbers": 2, "operators": ("+",)})
        (audit,) = prompts.answers.values()
        checker = prompts.checker
        assert isinstance(checker, adapter.GymAnswers)
        a, b = oracle(audit).split(" + ")
        assert checker.correct(f"{b}+{a}", audit)
        assert 0 < checker.score(f"{a}*{b}", 0) < 1
        assert not checker.correct(f"{a}*{b}", audit)

    def test_answers_between_tags(self) -> None:
        checker = adapter.draw("spell_backward", limit=1).checker
        assert checker.extract("hm <answer>a</answer> no <answer> cba\n</answer>") == "cba"
        assert checker.extract(" cba ") == "cba"
        assert checker.extract("  ") is checker.extract("<answer> </answer>") is None
        assert checker.equivalent("cba", " cba")
        assert not checker.equivalent("cba", "CBA")

    def test_draws_and_splits(self) -> None:
        train = load_prompts("reasoning_gym:spell_backward", limit=60, seed=1)
        assert train.name == "reasoning_gym:spell_backward [train]"
        assert load_prompts("reasoning_gym:spell_backward", limit=60, seed=1).prompts == train.prompts
        assert load_prompts("reasoning_gym:spell_backward", limit=20, seed=1).prompts == train.prompts[:20]
        assert load_prompts("reasoning_gym:spell_backward", limit=60, seed=2).prompts != train.prompts
        test = load_prompts("reasoning_gym:spell_backward", limit=60, seed=1, split="test")
        assert len(test) == len(train) == len({str(prompt) for prompt in train.prompts}) == 60
        assert not {str(prompt) for prompt in train.prompts} & {str(prompt) for prompt in test.prompts}

    def test_select_keeps_each_prompt_s_entry(self) -> None:
        prompts = load_prompts("reasoning_gym:spell_backward", limit=5)
        chosen = prompts.select([3])
        assert isinstance(chosen.checker, adapter.GymAnswers)
        assert chosen.checker.correct(oracle(chosen.answers[3]), chosen.answers[3])
        assert not chosen.checker.correct(oracle(prompts.answers[1]), chosen.answers[3])

    def test_a_hostile_answer_neither_acts_nor_hangs(self, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        attacks = [f"__import__('os').system('touch {mark}')", f"open('{mark}', 'w')", f"[open('{mark}', 'w')]", "[].__class__", "(" * 9000]
        for name in ("countdown", "n_queens"):
            checker = adapter.draw(name, limit=1).checker
            assert all(checker.score(attack, 0) < 1 for attack in attacks)
            assert checker.cut_off == 0
            assert not mark.exists()

    def test_a_slow_answer_is_cut_off_once_and_the_next_is_scored(self) -> None:
        drawn = adapter.draw("countdown", limit=1)
        checker = drawn.checker
        checker.score("1", 0)  # starts the process
        checker.timeout_s = 0.5
        start = time.monotonic()
        assert checker.score("9**9**9**9", 0) == checker.score("9**9**9**9", 0) == 0.0
        assert time.monotonic() - start < 30
        assert checker.cut_off == 1
        checker.timeout_s = 30
        assert checker.correct(oracle(drawn.answers[0]), drawn.answers[0])

    def test_the_worker_ends_with_its_checker(self) -> None:
        drawn = adapter.draw("spell_backward", limit=1)
        drawn.checker.score("x", 0)
        worker = drawn.checker._worker
        assert worker is not None
        process = worker.process
        del worker, drawn
        assert process.poll() is not None

    def test_errors(self) -> None:
        with pytest.raises(DataError, match=r"has no data set 'countdwn'; did you mean 'countdown'\? It has \d+, such as"):
            load_prompts("reasoning_gym:countdwn")
        with pytest.raises(DataError, match=r"has no option 'min_number'; did you mean 'min_numbers'\?"):
            load_prompts("reasoning_gym:countdown", options={"min_number": 3})
        with pytest.raises(DataError, match=r"refuses its options .*min_numbers must be greater than 1"):
            load_prompts("reasoning_gym:countdown", options={"min_numbers": -3})
        with pytest.raises(DataError, match="takes no option 'seed'"):
            load_prompts("reasoning_gym:countdown", options={"seed": 3})
        with pytest.raises(DataError, match="no split 'dev'"):
            load_prompts("reasoning_gym:countdown", split="dev")
        with pytest.raises(DataError, match="its data set scores the answers"):
            load_prompts("reasoning_gym:countdown", answers="math")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"needs the package reasoning-gym .*pip install reasoning-gym"):
        load_prompts("reasoning_gym:countdown")


def test_what_counts_as_procedural() -> None:
    assert is_procedural("countdown")
    assert is_procedural("reasoning_gym:countdown")
    assert not is_procedural("reasoning_gym")
    assert not is_procedural("owner/name")


@pytest.mark.parametrize("text", ["1+2*(3-4)", "0x1f << 2", "6*x**2 - 3.5*y", "sin(x)/2", "[[1, 2], [3, 4]]", "3*exp(2*x)", ""])
def test_arithmetic(text: str) -> None:
    assert is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "x.real",
        "(1).real",
        "1 .real",
        "__import__",
        "'a'",
        '"a"',
        "lambda: 1",
        "xy",
        "sinx",
        "f_",
        "x if x else y",
        "{1}",
        "x=1",
        "x:=1",
        "1;2",
        "@x",
        "`x`",
        "é",
        "٣",
        "\\x",
        "x!",
        "1" * 10001,
    ],
)
def test_what_is_not_plain_arithmetic(text: str) -> None:
    assert not is_arithmetic(text)


@pytest.mark.parametrize("text", [" " * 5000 + "!", "1 " * 4000 + "!", "1" * 9000 + "!", "x" * 9000, "\n" * 9000 + "_"], ids=range(5))
def test_the_check_takes_linear_time(text: str) -> None:
    start = time.perf_counter()
    assert not is_arithmetic(text)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "action",
    [
        "open({mark!r}, 'w')",
        "import os; os.open({mark!r}, os.O_CREAT)",
        "import os; os.system('touch {mark}')",
        "import subprocess; subprocess.run(['touch', {mark!r}])",
        "import socket; socket.socket()",
        "import os; os.mkdir({mark!r})",
    ],
    ids=range(6),
)
def test_beneath_the_guard_the_worker_refuses_to_act(action: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = str(Path(adapter.__file__).parent)
    program = f"import sys; sys.path.insert(0, {folder!r}); from reasoning_gym_worker import refuse\n"
    program += "sys.addaudithook(refuse); open('/dev/null')\n"  # reading is allowed
    done = subprocess.run([sys.executable, "-c", program + action.format(mark=str(mark))], capture_output=True, text=True)
    assert "PermissionError" in done.stderr
    assert not mark.exists()


def test_the_guarded_eval() -> None:
    assert guarded_eval("(0x10 + 2) << 1") == 36
    assert guarded_eval("['A', 'B']") == ["A", "B"]
    assert guarded_eval("[[1, 2]]") == [[1, 2]]
    for text in ("__import__('os')", "open('x')", "().__class__", "exit()"):
        with pytest.raises((ValueError, SyntaxError, NameError)):
            guarded_eval(text)


def test_sympy_parses_nothing_but_arithmetic() -> None:
    parsed: list[str] = []
    parse = guarded(parsed.append)
    parse("6*x**2 + 1")
    for text in ("__import__('os')", "open('x')", "().__class__", "'a'"):
        with pytest.raises(ValueError, match="not arithmetic"):
            parse(text)
    assert parsed == ["6*x**2 + 1"]


@pytest.mark.parametrize(("returned", "expected"), [(1, 1.0), (0.5, 0.5), (float("nan"), 0.0), ("x", 0.0), (None, 0.0)])
def test_scores_are_finite_numbers(returned: object, expected: float) -> None:
    class DataSet:
        def score_answer(self, answer: str, entry: object) -> object:
            return returned

    assert score(DataSet(), "a", {}) == expected
