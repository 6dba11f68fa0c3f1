"""Answers: finding the one in a completion, and deciding when two are the same.

Whatever a model writes is hostile input. Nothing here evaluates it: extraction is one linear scan, plain numbers are compared as exact
fractions of bounded size, and everything else is compared by math-verify in worker processes with a time and a memory limit
(`answer_worker.py`). A comparison that runs out of either counts as "different" and is counted.

When are two answers equal? In this order:

1. their spellings agree, up to spacing, delimiters and synonyms (`\\dfrac` and `\\frac`, a final full stop, a `$` around it …);
2. both are numbers in digits: `142` = `142.0` = `\\frac{284}{2}`; `58,500` is one number; `40_9` is the number 36. Exact, not rounded;
3. both are words (`\\text{east}`, `east`): only equal when spelt alike, case aside;
4. otherwise math-verify decides, symmetrically, with four rules of ours (`answer_worker.py`). An equation equals only equations, except
   that `name = value` counts as its value next to something that is no equation. `(2,4)` is ordered and never equals the list `2,4`.
   A percent sign is a unit and is dropped. A decimal equals an exact number when both six decimals and five digits agree.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import queue
import re
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from urlvr_fast.errors import ExplainedError

# One token of LaTeX that matters for braces: a box command (a doubled backslash is a slip of escaping), an escaped character, a brace.
BRACE_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])|\\.|[{}]", re.DOTALL)
# `\boxed 5`: a number, a command or a single letter, up to white space or the end of the formula. "the \boxed notation" is none of them.
BARE_BOX = re.compile(r"[ \t]*((?:[-+]?[.0-9]|\\[A-Za-z]|[A-Za-z](?![A-Za-z]))(?:(?!\\[)\]])[^\s$]){0,200})")
MAX_MATH_CHARS = 500  # longer answers are compared as text: parsing time grows faster than length, and no real answer is that long
START_SECONDS = 120.0  # importing sympy on a busy machine
CACHE_SIZE = 65536
PLACES_TRIED = 8  # occurrences of an answer in its completion that are looked at, from the end


class AnswerChecker(Protocol):
    """What rewards and metrics need to know about a kind of answer. An optional `canonical(answer) -> str` merges spellings cheaply."""

    def extract(self, completion: str) -> str | None:
        """The answer a completion gives, or None when it gives none."""
        ...

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two answers are the same. Symmetric."""
        ...


class AnswerWorkerError(ExplainedError, RuntimeError):
    """The worker processes cannot be started. The message says why and what to install."""


def extract_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{…}`, `\\fbox{…}` or `\\boxed 5` in `text`, stripped; None when there is none or it is empty.

    Last is the one that opens last, so of a box in a box the inner one counts. Braces nest, escaped braces are text, and a box that never
    closes (a response cut off) is passed over. Linear in the length of `text`.
    """
    last: tuple[int, int] | None = None  # span of the content
    last_opened = -1
    open_braces: list[tuple[int, int]] = []  # of each open brace: where its content starts, and where its box command is (or -1)
    box, after_box = -1, -1
    for token in BRACE_TOKEN.finditer(text):
        word, start = token.group(), token.start()
        if word == "{":
            belongs = box >= 0 and not text[after_box:start].strip()
            open_braces.append((token.end(), box if belongs else -1))
            box = -1
        elif word == "}":
            content, opened = open_braces.pop() if open_braces else (0, -1)
            if opened > last_opened:
                last_opened, last = opened, (content, start)
        elif word.endswith(("boxed", "fbox")):
            box, after_box = start, token.end()
            bare = BARE_BOX.match(text, after_box)
            if bare:
                content_text = bare.group(1).rstrip(".,;:")
                if content_text and balanced(content_text):
                    last_opened, last = start, (bare.start(1), bare.start(1) + len(content_text))
    return (text[last[0] : last[1]].strip() or None) if last else None


def balanced(text: str) -> bool:
    """Whether the unescaped braces of `text` close in order."""
    depth = 0
    for token in BRACE_TOKEN.finditer(text):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth < 0:
            return False
    return depth == 0


# Rewrites that never change what an answer says, applied in order. A space after a comma stays: `3, 500` is a list, `3,500` a number.
SPELLING = [
    (re.compile(r"\u2212"), "-"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|bigl|bigr)(?![A-Za-z])"), ""),
    (re.compile(r",\\!\s*|\{,\}"), ","),  # 10,\!080 and 10{,}080
    (re.compile(r"\\[!,;:]|(?<!\\)\\ |~|\\(?:quad|qquad)(?![A-Za-z])"), " "),
    (re.compile(r"\s+"), " "),
    (re.compile(r" ?([-+=<>(){}\[\]^_/|*]) ?"), r"\1"),
]
OUTER_DELIMITERS = [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")]
INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
DECIMAL = re.compile(rf"([-+]?)({INTEGER})?(?:\.([0-9]*))?")
FRACTION = re.compile(r"([-+]?)(?:\\frac\{?([-+]?[0-9]+)\}?\{([0-9]+)\}|\\frac([0-9])([0-9])|([0-9]+)/([0-9]+))")
BASED = re.compile(r"([-+]?)([0-9]+)_\{?([0-9]{1,2})\}?")
WORD = re.compile(r"[A-Za-z]+(?:[ '-][A-Za-z]+)*")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox|mathbf)\{([^{}\\]*)\}")


@lru_cache(maxsize=256)  # an answer of 100 kB takes 20 ms, and is compared with every other one of its group
def spelling(answer: str) -> str:
    """`answer` without the differences in LaTeX spelling that mean nothing. Linear time."""
    text = answer.strip()
    for opening, closing in OUTER_DELIMITERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if opening not in inner and not inner.endswith("\\"):
                text = inner
    for pattern, replacement in SPELLING:
        text = pattern.sub(replacement, text)
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("\\.") else text


def both_words(a: str, b: str) -> tuple[str, str] | None:
    """The two as bare words if they are words: letters only, and one of them `\\text{…}` or of four letters or more. Else None.

    math-verify reads letters without `\\text` as a product of symbols, in which `seat` equals `east`.
    """
    x, y = (match.group(1).strip() if (match := TEXT_COMMAND.fullmatch(text)) else text for text in (a, b))
    if not (WORD.fullmatch(x) and WORD.fullmatch(y)):
        return None
    return (x, y) if (x, y) != (a, b) or max(len(x), len(y)) >= 4 else None


def plain_number(text: str) -> Fraction | None:
    """The exact value of a number in ASCII digits: integer, decimal, thousands groups, simple fraction, digits with a base. Else None."""
    if len(text) > MAX_MATH_CHARS or not text:
        return None
    if (match := DECIMAL.fullmatch(text)) and (match[2] or match[3]):
        fraction_digits = match[3] or ""
        digits = (match[2] or "").replace(",", "") + fraction_digits
        return Fraction(int(match[1] + digits), 10 ** len(fraction_digits))
    if match := FRACTION.fullmatch(text):
        top, bottom = (part for part in match.groups()[1:] if part is not None)
        return None if int(bottom) == 0 else Fraction(int(top), int(bottom)) * (-1 if match[1] == "-" else 1)
    if match := BASED.fullmatch(text):
        base = int(match[3])
        if 2 <= base <= 36 and all(int(digit) < base for digit in match[2]):
            return Fraction(int(match[1] + match[2], base))
    return None


class Worker:
    """One process of `answer_worker.py`. Not thread-safe: it belongs to whoever took it from the pool."""

    def __init__(self, memory_mb: int) -> None:
        script = Path(__file__).with_name("answer_worker.py")
        # A fresh interpreter, not a fork: this process may hold torch threads and an inference engine. Its own session: Ctrl-C is ours.
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(memory_mb << 20)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.replies.fileno(), False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.replies, selectors.EVENT_READ)
        self.unread = b""
        first = self.receive(time.monotonic() + START_SECONDS)
        if first != "ready":
            self.kill()
            reason = first["error"] if isinstance(first, dict) else f"it ended with code {self.process.returncode} before it was ready"
            raise AnswerWorkerError(
                f"cannot start a process that compares answers: {reason}. It needs math-verify "
                f"(pip install 'math-verify[antlr4_13_2]') and {memory_mb} MB of address space (memory_mb)"
            )

    def receive(self, deadline: float) -> Any:
        """The next reply; None when the process ended; raises TimeoutError at the deadline (time.monotonic)."""
        while b"\n" not in self.unread:
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            received = os.read(self.replies.fileno(), 65536)
            if not received:
                return None
            self.unread += received
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def compare(self, a: str, b: str, timeout_s: float) -> tuple[bool | None, str, bool]:
        """(verdict or None, the stage it stopped in, whether it timed out). After a None the process is of no further use."""
        stage, deadline = "start", time.monotonic() + timeout_s
        try:
            self.requests.write(json.dumps([a, b, timeout_s]).encode() + b"\n")  # under a pipe's capacity, so it never blocks
            self.requests.flush()
            while isinstance(reply := self.receive(deadline), str):
                stage = reply
        except TimeoutError:
            return None, stage, True
        except OSError:
            return None, stage, False
        return reply, stage, False

    def kill(self) -> None:
        self.process.kill()
        self.selector.close()
        with contextlib.suppress(OSError):
            self.requests.close()
        self.replies.close()
        self.process.wait()


_checkers: weakref.WeakSet[MathAnswers] = weakref.WeakSet()


class MathAnswers:
    """Answers in `\\boxed{}`, compared as mathematics. The rules are at the top of this file.

    timeout_s: longest time for one comparison. memory_mb: address space of each worker process. workers: most processes at once; they
    start when first needed, are replaced after a timeout or a crash, and end with `close()`, with the context, or with the interpreter.

    `timeouts` and `crashes` count the comparisons that were cut off; each counts as "different". An answer that cannot be parsed in time,
    or that was cut off in two comparisons, is compared by spelling alone from then on, so a hostile answer costs two timeouts, not one
    with every other answer. Usable from any thread.
    """

    def __init__(self, timeout_s: float = 5.0, memory_mb: int = 1024, workers: int = 1) -> None:
        if timeout_s <= 0 or workers < 1 or memory_mb < 128:
            raise ValueError(
                f"timeout_s={timeout_s} must be above 0, workers={workers} at least 1, memory_mb={memory_mb} at least 128 (sympy takes 80)"
            )
        self.timeout_s, self.memory_mb, self.workers = timeout_s, memory_mb, workers
        self.timeouts = self.crashes = self.worker_calls = 0
        self._cache: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._strikes: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._reset_pool()
        _checkers.add(self)

    def extract(self, completion: str) -> str | None:
        return extract_boxed(completion)

    def canonical(self, answer: str) -> str:
        """One string for all spellings that are known to be equal without asking a worker."""
        text = spelling(answer)
        number = plain_number(text)
        return text if number is None else str(number)

    def equivalent(self, a: str, b: str, timeout_s: float | None = None) -> bool:
        """Whether two answers are the same, by the rules at the top of this file. `timeout_s` overrides the checker's own."""
        a, b = sorted((spelling(a), spelling(b)))
        if a == b:
            return True
        p, q = plain_number(a), plain_number(b)
        if p is not None and q is not None:
            # A decimal next to a fraction may be a rounded one (0.333333): that is math-verify's to judge. Everything else is exact.
            if p == q or ("." in a) == ("." in b) or 1 in (p.denominator, q.denominator):
                return p == q
        elif words := both_words(a, b):
            return words[0].casefold() == words[1].casefold()
        if max(len(a), len(b)) > MAX_MATH_CHARS or not (balanced(a) and balanced(b)):
            return False
        with self._lock:
            if (a, b) in self._cache:
                self._cache.move_to_end((a, b))
                return self._cache[a, b]
            if max(self._strikes.get(a, 0), self._strikes.get(b, 0)) >= 2:
                return False
        return self._ask(a, b, self.timeout_s if timeout_s is None else timeout_s)

    def _ask(self, a: str, b: str, timeout_s: float) -> bool:
        """Have a worker compare the two; remember its verdict, or, when it was cut off, who was to blame."""
        worker = self._take()
        verdict: bool | None = None
        try:
            verdict, stage, timed_out = worker.compare(a, b, timeout_s)
        finally:
            if verdict is None:
                worker.kill()
            self._idle.put(None if verdict is None else worker)
        with self._lock:
            self.worker_calls += 1
            if verdict is not None:
                self._cache[a, b] = verdict
                if len(self._cache) > CACHE_SIZE:
                    self._cache.popitem(last=False)
                return verdict
            self.timeouts += timed_out
            self.crashes += not timed_out
            guilty = {"a": [(a, 2)], "b": [(b, 2)]}.get(stage, [(a, 1), (b, 1)])
            for answer, strikes in guilty:
                if plain_number(answer) is None:  # a number is never what made it slow
                    self._strikes[answer] = self._strikes.get(answer, 0) + strikes
            while len(self._strikes) > CACHE_SIZE:
                self._strikes.popitem(last=False)
        return False

    def _take(self) -> Worker:
        """An idle worker, started if need be; waits when all are busy. Whoever takes one puts it, or None for a dead one, back."""
        if self._owner != os.getpid():  # forked: the pipes are the parent's
            self._reset_pool()
        worker = self._idle.get()
        if worker is not None and worker.process.poll() is None:
            return worker
        if worker is not None:
            worker.kill()
        try:
            return Worker(self.memory_mb)
        except BaseException:
            self._idle.put(None)
            raise

    def _reset_pool(self) -> None:
        # Last in, first out: a process that runs already is taken before a second one is started.
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._idle.put(None)
        self._owner = os.getpid()

    def close(self) -> None:
        """End the idle workers. Safe to call twice, and the checker can be used again: workers start anew."""
        if self._owner != os.getpid():
            return
        slots = []
        with contextlib.suppress(queue.Empty):
            while True:
                slots.append(self._idle.get_nowait())
        for worker in slots:
            if worker is not None:
                worker.kill()
            self._idle.put(None)

    def __enter__(self) -> MathAnswers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ExactAnswers:
    """Answers of the procedural tasks: the whole completion, stripped, must match `pattern`, whose first group is the answer.

    Two answers are equal when they are the same string, after `canonical` if that is given (say, to drop leading zeros).
    """

    def __init__(self, pattern: str, canonical: Callable[[str], str] | None = None) -> None:
        self.pattern = re.compile(pattern)
        if self.pattern.groups < 1:
            raise ValueError(f"the pattern {pattern!r} has no group: put parentheses around the part that is the answer")
        self._canonical = canonical

    def extract(self, completion: str) -> str | None:
        match = self.pattern.fullmatch(completion.strip())
        return match.group(1) if match else None

    def canonical(self, answer: str) -> str:
        return self._canonical(answer) if self._canonical else answer

    def equivalent(self, a: str, b: str) -> bool:
        return self.canonical(a) == self.canonical(b)


def equivalence_classes(answers: Sequence[str | None], checker: AnswerChecker) -> list[int]:
    """The class of each answer, numbered by first appearance; −1 for None.

    Equal strings, and strings with one `checker.canonical` form, share a class without a comparison. The D distinct ones that remain are
    compared pairwise, at most D(D − 1)/2 times; pairs that are already connected are skipped. Equivalence need not be transitive
    (0.333333 and 0.3333333 both equal 1/3, not each other): classes are the connected components, which no order of rollouts can change.
    """
    canonical: Callable[[str], str] = getattr(checker, "canonical", str.strip)
    forms = [None if answer is None else canonical(answer) for answer in answers]
    spelt = {
        form: answer for form, answer in zip(reversed(forms), reversed(answers), strict=True) if form is not None and answer is not None
    }
    parent = {form: form for form in spelt}

    def root(form: str) -> str:
        while parent[form] != form:
            form = parent[form] = parent[parent[form]]
        return form

    for a, b in itertools.combinations(sorted(spelt), 2):
        if root(a) != root(b) and checker.equivalent(spelt[a], spelt[b]):
            parent[root(b)] = root(a)
    numbers: dict[str, int] = {}
    return [-1 if form is None else numbers.setdefault(root(form), len(numbers)) for form in forms]


def answer_characters(completion: str, answer: str, checker: AnswerChecker) -> tuple[int, int] | None:
    """Where the answer that `checker` extracted stands in the completion: characters [start, end). None when it is not there verbatim.

    The last occurrence without which the checker would not find that answer: in `\\boxed{4}. So there are 4.` the boxed one. When there
    is none among the last PLACES_TRIED (the completion says it twice over), the last occurrence of all.
    """
    last, end = None, len(completion)
    for _ in range(PLACES_TRIED):
        start = completion.rfind(answer, 0, end) if answer else -1
        if start < 0:
            break
        here = (start, start + len(answer))
        last = last or here
        if checker.extract(completion[: here[0]] + completion[here[1] :]) != answer:
            return here
        end = here[1] - 1
    return last


@atexit.register
def close_all() -> None:
    """End every idle worker process of this interpreter."""
    for checker in list(_checkers):
        checker.close()


_shared: MathAnswers | None = None
_shared_lock = threading.Lock()


def equivalent(a: str, b: str, timeout_s: float = 5.0) -> bool:
    """`MathAnswers.equivalent` on a checker that the whole process shares."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = MathAnswers()
    return _shared.equivalent(a, b, timeout_s=timeout_s)
