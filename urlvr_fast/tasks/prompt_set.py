"""A set of prompts, with the answers where no reward can see them, and the one function that loads it from anywhere."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from urlvr_fast.rewards.answers import AnswerChecker, ExactAnswers, MathAnswers
from urlvr_fast.tasks import arithmetic, countdown, factoring, modular, next_token, reasoning_gym, reversal, sorting
from urlvr_fast.tasks.readers import FILE_SUFFIXES, HUB_NAME, DataError, Row, json_name, read_rows

Messages = list[dict[str, Any]]  # [{"role": "user", "content": "…"}, …]

# A procedural task is a module with
#   draw(split, *, limit, seed, **options)  -> problems, which have `prompt`, `answer` (audit map only; may be None) and `columns` (public);
#                                              ValueError says what is valid
#   checker()                               -> AnswerChecker; it may have `correct(given, answer)`, which metrics prefer to `equivalent`
# and optionally
#   verify(completion, columns)             -> 1.0 or 0.0, exact, from the public columns alone; raises on no text
#   verification_prompt(prompt, completion, columns), verdicts(**options)
#                                           -> what self-verification asks the policy, and what it writes for right and for wrong
PROCEDURAL_TASKS: dict[str, ModuleType] = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "factoring": factoring,
    "modular": modular,
    "next_token": next_token,
    "reversal": reversal,
    "sorting": sorting,
}


def is_procedural(spec: str | Path) -> bool:
    """Whether prompts of `spec` are drawn, so that it has a `train` and a `test` split and an order per seed: tasks and reasoning-gym."""
    return str(spec) in PROCEDURAL_TASKS or str(spec).startswith(reasoning_gym.PREFIX)


@dataclass
class PromptSet:
    """Prompts of a data set. Position i of `prompts`, `columns` and `ids` is one prompt; `ids` survive `select`, positions do not."""

    name: str
    prompts: list[str | Messages]
    checker: AnswerChecker  # how a completion is compared with an answer, and completions with one another
    columns: dict[str, list[Any]] = field(default_factory=dict)  # the other columns; never the answer
    answers: dict[int, str] = field(default_factory=dict)  # the audit map, id -> answer, for metrics and the oracle only
    ids: list[int] = field(default_factory=list)  # row in the data set, from 0; filled in when not given
    verify: Callable[[str, Mapping[str, Any]], float] | None = None  # (completion, columns of its prompt) -> 1.0 or 0.0; needs no answer
    verification_prompt: Callable[[str, str, Mapping[str, Any]], str] | None = None  # (prompt, completion, columns of the prompt)
    verdicts: tuple[str, str] = ("True", "False")  # what the policy writes, asked that, for a right and for a wrong completion

    def __post_init__(self) -> None:
        self.ids = self.ids or list(range(len(self.prompts)))

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: list[int]) -> PromptSet:
        """The prompts at these positions, in this order, each with its id."""
        ids = [self.ids[row] for row in rows]
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            answers={id: self.answers[id] for id in ids if id in self.answers},
            ids=ids,
        )


def load_prompts(
    spec: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    answers: str = "auto",
    timeout_s: float = 5.0,
    options: Mapping[str, Any] | None = None,
) -> PromptSet:
    """Load prompts from a procedural task, a file or a data set.

    spec: a task (`arithmetic`, `countdown`, …) or one of reasoning-gym (`reasoning_gym:NAME`); a .jsonl, .json (a list of objects) or
        .parquet file; a directory saved by `datasets`; or a hub data set `owner/name[:config]`.
    split: of a task (`train` or `test`) or of a data set that has splits; a file is one split.
    limit: keep the first so many; a task draws 4096 when it is None.
    seed: order of a procedural task. Files keep theirs.
    answers: `math` (\\boxed{}, compared by math-verify within `timeout_s`), `exact` (the completion itself), `auto` (`math` for
        data, the task's own checker for procedural tasks).
    options: of a procedural task: the keyword arguments of its module's `draw`; of reasoning-gym: fields of the configuration.

    Raises DataError, which names the file and the row, for anything that cannot be used.
    """
    spec = str(spec)
    if answers not in ("auto", "math", "exact"):
        raise DataError(f"answers={answers!r}: valid are auto, math, exact")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: at least one prompt is needed")
    if spec in PROCEDURAL_TASKS:
        return _procedural(spec, split, limit, seed, answers, timeout_s, options or {})
    if spec.startswith(reasoning_gym.PREFIX):
        return _reasoning_gym(spec, split, limit, seed, answers, timeout_s, options or {})
    _refuse_unknown_task(spec)
    if options:
        raise DataError(f"{spec} takes no options ({', '.join(options)}): only procedural tasks do")
    rows = list(islice(read_rows(spec, split), limit))
    if not rows:
        raise DataError(f"{spec} is empty: it has no prompts")
    _check_columns(spec, rows, prompt_column, answer_column)
    audit = {id: answer for id, row in enumerate(rows) if (answer := _answer(row, answer_column)) is not None}
    others = [name for name in _column_names(rows) if name not in (prompt_column, answer_column)]
    return PromptSet(
        name=spec,
        prompts=[_prompt(row, prompt_column) for row in rows],
        checker=ExactAnswers(r"(?s)(.+)") if answers == "exact" else MathAnswers(timeout_s=timeout_s),
        columns={name: [row.values.get(name) for row in rows] for name in others},
        answers=audit,
    )


def _procedural(
    name: str, split: str, limit: int | None, seed: int, answers: str, timeout_s: float, options: Mapping[str, Any]
) -> PromptSet:
    task = PROCEDURAL_TASKS[name]
    _check_options(name, task, options)
    try:
        problems = task.draw(split, limit=limit, seed=seed, **options)
    except ValueError as error:
        raise DataError(str(error)) from None
    columns = list(dict.fromkeys(column for problem in problems for column in problem.columns))
    return PromptSet(
        name=f"{name} [{split}]",
        prompts=[problem.prompt for problem in problems],
        checker=MathAnswers(timeout_s=timeout_s) if answers == "math" else task.checker(),
        columns={column: [problem.columns.get(column) for problem in problems] for column in columns},
        answers={id: str(problem.answer) for id, problem in enumerate(problems) if problem.answer is not None},
        verify=getattr(task, "verify", None),
        verification_prompt=getattr(task, "verification_prompt", None),
        verdicts=task.verdicts(**options) if hasattr(task, "verdicts") else PromptSet.verdicts,
    )


def _reasoning_gym(
    spec: str, split: str, limit: int | None, seed: int, answers: str, timeout_s: float, options: Mapping[str, Any]
) -> PromptSet:
    if answers == "math":
        raise DataError(f"answers='math' with {spec}: its data set scores the answers; use auto")
    for reserved in {"name", "split", "limit", "seed", "size"} & set(options):
        raise DataError(f"{spec} takes no option {reserved!r}: prompts, seed and split have their own")
    drawn = reasoning_gym.draw(spec.removeprefix(reasoning_gym.PREFIX), split, limit=limit, seed=seed, **options)
    drawn.checker.timeout_s = timeout_s
    return PromptSet(name=f"{spec} [{split}]", prompts=list(drawn.questions), checker=drawn.checker, answers=dict(enumerate(drawn.answers)))


def _check_options(name: str, task: ModuleType, options: Mapping[str, Any]) -> None:
    valid = [parameter for parameter in inspect.signature(task.draw).parameters if parameter not in ("split", "limit", "seed")]
    for option in options:
        if option not in valid:
            near = difflib.get_close_matches(str(option), valid, 1, 0.5)
            raise DataError(
                f"{name} has no option {option!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + (f" It has: {', '.join(valid)}" if valid else " It has none")
            )


def _refuse_unknown_task(spec: str) -> None:
    """A bare word that is no path can only be meant as a task."""
    if Path(spec).expanduser().exists() or Path(spec).suffix.lower() in FILE_SUFFIXES or "/" in spec or HUB_NAME.fullmatch(spec):
        return
    near = difflib.get_close_matches(spec, PROCEDURAL_TASKS, 1, 0.5)
    raise DataError(
        f"there is no task, file or folder {spec!r}"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + f" Data is a procedural task ({', '.join(PROCEDURAL_TASKS)}, {reasoning_gym.PREFIX}NAME), a {', '.join(FILE_SUFFIXES)} file, "
        "a directory saved by `datasets`, or a hub data set owner/name"
    )


def _column_names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _check_columns(spec: str, rows: list[Row], prompt_column: str, answer_column: str) -> None:
    present = _column_names(rows)
    # The default answer column is optional; one that somebody named must be there.
    for column, option in ((prompt_column, "prompt_column"), (answer_column, "answer_column")):
        if column not in present and (option == "prompt_column" or column != "answer"):
            near = difflib.get_close_matches(column, present, 1, 0.5)
            raise DataError(
                f"{spec} has no column {column!r} ({option})"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" It has: {', '.join(present) or 'none'}"
            )


def _prompt(row: Row, column: str) -> str | Messages:
    if (prompt := row.values.get(column)) is None:
        raise DataError(f"{row.where}: no {column!r}")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{row.where}: {column!r} is empty")
        return prompt
    if not isinstance(prompt, list):
        raise DataError(f"{row.where}: {column!r} must be text or a list of chat messages, not {json_name(prompt)}")
    if not prompt:
        raise DataError(f"{row.where}: {column!r} is an empty list of messages")
    return [_message(message, f"{row.where}: {column!r}, message {number}") for number, message in enumerate(prompt)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f'{where}: must be {{"role": …, "content": …}}, not {json_name(message)}')
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise DataError(f"{where}: {key!r} must be text, not {json_name(message.get(key))}")
    if not message["role"]:
        raise DataError(f"{where}: 'role' is empty")
    # Parquet fills the keys that a message lacks with null; chat templates test for the key itself.
    return {key: value for key, value in message.items() if value is not None}


def _answer(row: Row, column: str) -> str | None:
    answer = row.values.get(column)
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, (int, float)) or not math.isfinite(answer):
        raise DataError(f"{row.where}: {column!r} must be text or a finite number, not {answer!r}")
    return str(answer)
