"""The process in which two answers are parsed and compared. `answers.MathAnswers` runs this file as a script; nothing imports it.

It loads math-verify and sympy and nothing of this package, so that it starts fast and holds no model. Requests come as one JSON array
`[a, b, seconds]` per line on standard input. The replies, one JSON value per line, are the stages `"a"`, `"b"`, `"compare"` as each begins
(a reader that runs out of patience then knows which answer was to blame) and last `true` or `false`. The first line of all is `"ready"`, or
`{"error": …}` when a library is missing. End of input ends the process, and so does a request that outlives its limit (a kernel timer: this
process dies by itself even when its parent is gone).

What it reads was written by a language model. Only the LaTeX grammar of math-verify is used, which builds sympy objects without `eval`;
sympy's own way with strings, which is `eval`, is replaced by a parser that knows a single number or name; and an audit hook refuses to
start processes, to open connections and to write files.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
REFUSED_EVENTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
    "socket.bind",
)
RELATIVE_TOLERANCE = 1e-5  # of a decimal against an exact number, beside math-verify's six decimals: 0.0 is not 1/3000000


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints must not end up among the replies
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    del sys.path[0]  # this file's folder: its modules are not top-level ones

    def reply(message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        load_libraries()
    except (ImportError, MemoryError) as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    sys.addaudithook(refuse)
    reply("ready")
    for line in sys.stdin:
        a, b, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 5)  # no handler: the kernel ends the process
        try:
            reply("a")
            parse(a)
            reply("b")
            parse(b)
            reply("compare")
            verdict = equal(a, b)
        except MemoryError:
            raise  # this process has had it; the parent starts another and counts a crash
        except Exception:  # noqa: BLE001  sympy may raise anything on what a model wrote; it then has not shown that they are equal
            verdict = False
        reply(verdict)
        signal.setitimer(signal.ITIMER_REAL, 0)


def load_libraries() -> None:
    import sympy.parsing.sympy_parser  # type: ignore[import-untyped]

    # Number("12") goes through sympify, whose way with strings is eval. Put a parser without it in its place before anyone binds the name.
    sympy.parsing.sympy_parser.parse_expr = number_or_symbol
    sympy.parsing.parse_expr = number_or_symbol
    import math_verify  # noqa: F401


def number_or_symbol(text: str, *args: Any, **kwargs: Any) -> Any:
    from sympy import Float, Integer, Symbol

    if NUMBER.fullmatch(text):
        return Float(text) if "." in text else Integer(int(text))
    if NAME.fullmatch(text):  # sympy makes symbols this way too: sympify("x")
        return Symbol(text)
    raise ValueError(f"neither a number nor a name: {text[:40]!r}")


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in REFUSED_EVENTS:
        raise PermissionError(f"comparing answers may not {event}")


@lru_cache(maxsize=512)
def parse(text: str) -> tuple[Any, ...]:
    """What math-verify reads in a LaTeX answer: sympy object and normalised text, or the text alone when it does not parse."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_latex
    from sympy import Basic, Rational, UnevaluatedExpr

    # The default targets include plain expressions, which go through sympy's parse_expr: LaTeX only. The parent keeps the time.
    latex_only = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = parse_latex("\\boxed{" + text + "}", latex_only, parsing_timeout=None)
    # A percent sign is a unit and is dropped like one. math-verify lets 50% equal both 50 and 0.5, which would make those two one class.
    percent = UnevaluatedExpr(Rational(1, 100))
    return tuple(part.xreplace({percent: Rational(1)}) if isinstance(part, Basic) else part for part in parsed)


def equal(a: str, b: str) -> bool:
    """Symmetric: two answers are equal when math-verify says so with either one as the reference, within the rules of `same_kind`."""
    from math_verify import verify

    left, right = parse(a), parse(b)
    if not left or not right:
        return False
    if isinstance(left[0], str) or isinstance(right[0], str):
        return isinstance(left[0], str) and left[0] == right[0]
    x, y = unwrap_assignment(left[0], right[0]), unwrap_assignment(right[0], left[0])
    if not same_kind(x, y):
        return False
    verdict = any(bool(verify(g, t, timeout_seconds=None, strict=True)) for g, t in ((x, y), (y, x)))
    return verdict and relatively_close(x, y)


def unwrap_assignment(expression: Any, other: Any) -> Any:
    """The right-hand side of `name = value` when `other` is no equation. A name is a symbol, a product of them (a length AB) or f(x)."""
    from math_verify.grader import is_equation, take_first_relation, take_last_relation
    from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]

    if not is_equation(expression) or is_equation(other):
        return expression
    left = take_first_relation(expression).lhs
    is_name = left.is_Symbol or isinstance(left, AppliedUndef) or (left.is_Mul and all(factor.is_Symbol for factor in left.args))
    return take_last_relation(expression).rhs if is_name else expression


def same_kind(x: Any, y: Any) -> bool:
    """Where math-verify is too lenient. An equation that is not an assignment equals equations only (else 5x - 7y + 4 = 0 would equal 0),
    and a parenthesised pair or tuple is ordered, so it never equals an unordered list (else (2, 4) = {2, 4} = (4, 2))."""
    from math_verify.grader import is_equation
    from sympy import FiniteSet, Interval, Tuple

    if is_equation(x) != is_equation(y):
        return False
    return not any(isinstance(one, FiniteSet) and isinstance(other, (Tuple, Interval)) for one, other in ((x, y), (y, x)))


def relatively_close(x: Any, y: Any) -> bool:
    """True unless both are real numbers, one of them a decimal, and they differ by more than RELATIVE_TOLERANCE of the larger."""
    if not (getattr(x, "is_number", False) and getattr(y, "is_number", False) and (x.is_Float or y.is_Float)):
        return True
    p, q = complex(x.evalf()), complex(y.evalf())
    return abs(p - q) <= RELATIVE_TOLERANCE * max(abs(p), abs(q))


if __name__ == "__main__":
    main()
