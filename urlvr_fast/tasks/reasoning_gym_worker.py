"""The process in which reasoning-gym scores answers. `reasoning_gym.Worker` runs this file as a script; nothing imports it.

Standard input is a sequence of pickles from the parent: first (class of the data set, its configuration, the entries), then requests
(answer, number of the entry, seconds). Replies are one JSON value per line: `"ready"`, then a score for each request. End of input ends the
process, and so does a request that outlives its time (a kernel timer), or one that takes too much memory.

The answers were written by a language model, and several of the scoring functions give them to `eval` or to sympy's `parse_expr`, which is
`eval`. Both are replaced: plain arithmetic over numbers and a few names is evaluated, for anything else `eval` reads a literal and
`parse_expr` refuses. Beneath that, an audit hook refuses to start processes, to connect and to write files.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import pickle
import re
import resource
import signal
import sys
from typing import Any

MAX_CHARS = 10_000
# A number, an operator, a bracket, or one of these names. No attribute, no string, no keyword, no underscore. One space at a time, since
# `\s+` in a repetition takes exponential time.
ARITHMETIC = re.compile(
    r"(?:[ \t\r\n]|(?:0[xX][0-9a-fA-F]+|0[bB][01]+|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?![\w.])|[-+*/%()\[\],<>&|^~]"
    r"|(?:[a-zA-Z]|sin|cos|tan|sec|csc|cot|exp|log|ln|sqrt|asin|acos|atan|sinh|cosh|tanh|pi|Abs)(?!\w))*"
)
# fmt: off
REFUSED_EVENTS = (
    "subprocess.", "socket.", "ctypes.", "pty.", "shutil.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
    "os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.putenv",
)
# fmt: on
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def is_arithmetic(text: str) -> bool:
    return len(text) <= MAX_CHARS and ARITHMETIC.fullmatch(text) is not None


def guarded_eval(source: str) -> Any:
    """What reasoning-gym's modules call as `eval`: the value of arithmetic, and of other text only if it is a literal."""
    return eval(source, {"__builtins__": {}}) if is_arithmetic(source) else ast.literal_eval(source)


def guarded(parse: Any) -> Any:
    """sympy's `parse_expr`, for arithmetic only."""

    def parse_expr(text: str, *arguments: Any, **options: Any) -> Any:
        if not is_arithmetic(text):
            raise ValueError("not arithmetic")
        return parse(text, *arguments, **options)

    return parse_expr


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or event.startswith(REFUSED_EVENTS):
        raise PermissionError(event)


def load_libraries() -> None:
    """Import sympy and reasoning-gym, whose modules then hold the guarded functions."""
    import sympy  # type: ignore[import-untyped]
    import sympy.parsing.sympy_parser as parser  # type: ignore[import-untyped]

    sympy.parse_expr = parser.parse_expr = sympy.parsing.parse_expr = guarded(parser.parse_expr)
    importlib.import_module("reasoning_gym")

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "reasoning_gym":
            vars(module)["eval"] = guarded_eval  # a global of the module goes before the builtin; other libraries keep theirs


def main() -> None:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # neither a library nor an answer must reach the two pipes
    os.dup2(0, 1)
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True  # a late import must not run into `refuse`
    del sys.path[0]  # this file's folder: its reasoning_gym.py is not the package
    load_libraries()
    dataset_class, config, entries = pickle.load(requests)
    dataset = dataset_class(config=config)
    sys.addaudithook(refuse)
    print(json.dumps("ready"), file=replies, flush=True)
    while True:
        try:
            answer, entry, seconds = pickle.load(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds + 5)  # no handler: the kernel ends the process
        print(json.dumps(score(dataset, answer, entries[entry])), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


def score(dataset: Any, answer: str, entry: Any) -> float:
    try:
        value = float(dataset.score_answer(answer=answer, entry=entry))
    except MemoryError:
        raise  # this process has had it; the parent starts another
    except Exception:  # noqa: BLE001  a scoring function may raise anything on what a model wrote
        return 0.0
    return value if math.isfinite(value) else 0.0


if __name__ == "__main__":
    main()
