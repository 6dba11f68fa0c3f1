"""Saved rollouts: a JSONL file, one object a rollout, read into the batch that rewards see and the audit map that they do not.

    {"group": 0, "prompt": "17+25=", "completion": "42", "answer": "42", "logp": [-0.1, -0.7], "entropy": [0.3, 0.9], "level": "easy"}

  completion            text; the one key that every rollout must have
  group                 whole number or text: rollouts that share it are compared with each other. Without it `prompt_id` says who belongs
                        together, and without that the text of `prompt`. One of the three, the same in all lines. With a whole number `step`
                        beside it, groups of different steps are different groups
  prompt_id             whole number or text: which prompt; a prompt drawn twice makes two groups. prompt: its text
  answer                the truth, text or a number; one per prompt, which some of its rollouts may leave out. It goes to the audit map
                        and never into the batch
  logp, sampled_logp    (two names of one thing) log-probability of each sampled token under the distribution it was drawn from
  entropy, self_certainty, prob_gap, old_logp, ref_logp
                        one number a token, as in the batch. Each of these and of logp is in all lines or in none
  token_ids, prompt_token_ids, finish_reason ("stop" when left out), temperature (one for the file; 1 when left out)
  train                 false marks a vote that is not trained on
  anything else         a column that rewards may see; None where a line lacks it

What is not in the file is not made up: without `logp`, `sampled_logp` is NaN, so that a reward that reads it fails instead of computing
something (majority voting only breaks ties by it: put zeros there first, as the audit does). A response without `token_ids` has tokens −1,
as many as it has statistics, or one.

`samples.jsonl` of a run is read as well (keys in `logging`). What a run found out about its rollouts (`answer`, which there is the answer
that was given, class, reward, `correct` …) goes into no column, and from `correct` come `Verdicts` in the place of answers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from urlvr_fast.tasks.readers import DataError, as_object, json_name, missing_file
from urlvr_fast.trainer.batch import PER_TOKEN, RolloutBatch
from urlvr_fast.trainer.logging import encode_json, write_atomic

MAX_LINE_BYTES = 64 << 20  # 100 k tokens with six statistics are a fifth of it
MAX_GROUP = 4096  # a vote compares the distinct answers of a group in pairs
MAX_LOGP = 1e-2  # rounding may leave a log-probability a little above 0; more is no logarithm of a probability
NO_TOKEN = -1
LOGP = "logp"
SAMPLE_KEYS = frozenset({"step", "group", "answer", "class", "in_majority", "reward", "advantage", "correct"})  # of a run's samples
DERIVED = frozenset({"answer", "class", "in_majority", "reward", "advantage", "correct", "length"})  # of those, what rewards must not see
OWN_KEYS = frozenset(
    {"completion", "group", "prompt_id", "prompt", "answer", LOGP, *PER_TOKEN}
    | {"token_ids", "prompt_token_ids", "finish_reason", "temperature", "train"}
)

Key = tuple[str, int, int | str]  # where an identity comes from, its step, and its name there


class Verdict(NamedTuple):
    completion: str
    given: str | None  # the answer that the run found in it
    correct: bool | None  # None: the run did not know


@dataclass(frozen=True)
class RolloutFile:
    batch: RolloutBatch
    answers: dict[int, str]  # the audit map, prompt id -> answer
    verdicts: list[Verdict] | None = None  # (B,) of a run's samples, which have verdicts and no answers


@dataclass
class _Line:
    """One rollout, checked."""

    where: str
    group: Key
    prompt: Key
    values: dict[str, Any]
    per_token: dict[str, Tensor]  # field of the batch -> (n,) fp32
    tokens: Tensor  # (n,) int64
    prompt_tokens: Tensor
    columns: dict[str, Any] = field(default_factory=dict)


# ---- reading ---------------------------------------------------------------------------------------------------------------------------


def read_rollouts(path: str | Path) -> tuple[RolloutBatch, dict[int, str]]:
    """The rollouts of a file in its order, and its audit map, prompt id -> answer.

    Whole-number groups and prompt ids keep their numbers; names are numbered in their sorted order, whatever the order of the lines.
    Raises DataError, naming the file and the line, for anything that cannot be used.
    """
    loaded = load_rollouts(path)
    return loaded.batch, loaded.answers


def load_rollouts(path: str | Path) -> RolloutFile:
    """`read_rollouts`, with the verdicts that a run's samples come with. A run directory stands for its samples. Raises DataError."""
    path = Path(path).expanduser()
    if path.is_dir() and (path / "samples.jsonl").is_file():
        path = path / "samples.jsonl"
    if not path.is_file():
        raise DataError(f"{path} is a folder, and no run directory" if path.is_dir() else missing_file(path))
    lines: list[_Line] = []
    verdicts: list[Verdict] = []
    sample = False
    for where, values in _objects(path):
        if not lines:
            sample = values.keys() >= SAMPLE_KEYS
        if sample != (values.keys() >= SAMPLE_KEYS):
            raise DataError(f"{where}: {lines[0].where} is of a run's samples and this line is not, or the other way round")
        if sample:
            verdicts.append(_verdict(values, where))
            values = {key: value for key, value in values.items() if key not in DERIVED}
        lines.append(_line(values, where))
        if lines[-1].group[0] != lines[0].group[0]:
            raise DataError(
                f"{where}: rollouts are grouped by {lines[-1].group[0]!r} here and by {lines[0].group[0]!r} in {lines[0].where}"
            )
    if not lines:
        raise DataError(f"{path} is empty: it has no rollouts")
    _check_groups(lines)
    prompt_ids = _numbered([line.prompt for line in lines])
    return RolloutFile(_batch(lines, prompt_ids), _audit_map(lines, prompt_ids), verdicts if sample else None)


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line is, and its object. A torn last line of a run's samples is left out, as by everyone who reads a run's log."""
    log = False
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB, which no rollout is")
                if not raw.strip():
                    continue
                try:
                    values = _parsed(raw, where)
                except DataError:
                    if log and not raw.endswith(b"\n"):
                        return
                    raise
                log = log or values.keys() >= SAMPLE_KEYS
                yield where, values
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    cut = "" if raw.endswith(b"\n") else "; it is the last one and does not end, so its writer was probably stopped: delete it to go on"
    try:
        values = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _unique(pairs, where))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}){cut}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: not valid JSON ({error.msg}){cut}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply") from None
    except DataError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{where}: {error}") from None
    return as_object(values, where)


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DataError(f"{where}: the key {twice!r:.80} is there twice")
    return values


def _line(values: dict[str, Any], where: str) -> _Line:
    for key in ("completion", "prompt", "finish_reason"):
        if not isinstance(values.get(key, ""), str):
            raise DataError(f"{where}: {key!r} must be text, not {json_name(values[key])}")
    if "completion" not in values:
        raise DataError(f"{where}: no 'completion', the text of the response")
    if not isinstance(values.get("train", True), bool):
        raise DataError(f"{where}: 'train' must be true or false, not {json_name(values['train'])}")
    temperature = values.get("temperature", 1.0)
    if not _finite(temperature) or temperature < 0:
        raise DataError(f"{where}: 'temperature' must be a number from 0, not {temperature!r:.80}")
    group, prompt = _identities(values, where)
    per_token, tokens = _response(values, where)
    prompt_tokens = _token_ids(values, "prompt_token_ids", where)
    return _Line(
        where=where,
        group=group,
        prompt=prompt,
        values={key: values[key] for key in ("completion", "prompt", "answer", "finish_reason", "temperature", "train") if key in values},
        per_token=per_token,
        tokens=tokens,
        prompt_tokens=torch.empty(0, dtype=torch.int64) if prompt_tokens is None else prompt_tokens,
        columns={key: value for key, value in values.items() if key not in OWN_KEYS},
    )


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < torch.finfo(torch.float32).max  # false for NaN, and no int is too large to compare


def _identities(values: dict[str, Any], where: str) -> tuple[Key, Key]:
    """Of the rollout's group and of its prompt."""
    for key in ("group", "prompt_id"):
        name = values.get(key, 0)
        if type(name) not in (int, str) or (isinstance(name, int) and not -(2**63) <= name < 2**63):
            raise DataError(f"{where}: {key!r} must be a whole number of 64 bits or text, not {name!r:.80}")
    present = [key for key in ("group", "prompt_id", "prompt") if key in values]
    if not present:
        raise DataError(f"{where}: nothing says which rollouts belong together: give it 'group', 'prompt_id' or 'prompt'")
    step = values.get("step")
    of_step = step if present[0] == "group" and type(step) is int else 0
    group: Key = (present[0], of_step, values[present[0]])
    known = [key for key in present if key != "group"]
    return group, (known[0], 0, values[known[0]]) if known else group


def _response(values: dict[str, Any], where: str) -> tuple[dict[str, Tensor], Tensor]:
    """The rollout's statistics, batch field -> (n,), and its n tokens."""
    if LOGP in values and "sampled_logp" in values:
        raise DataError(f"{where}: 'logp' and 'sampled_logp' are the same thing; give one of them")
    per_token = {("sampled_logp" if key == LOGP else key): _statistic(values, key, where) for key in (LOGP, *PER_TOKEN) if key in values}
    token_ids = _token_ids(values, "token_ids", where)
    lengths = {name: len(numbers) for name, numbers in per_token.items()}
    if token_ids is not None:
        lengths["token_ids"] = len(token_ids)
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: lists of different length: {', '.join(f'{name} {n}' for name, n in lengths.items())}")
    length = next(iter(lengths.values()), 1)
    if length == 0:
        raise DataError(f"{where}: {', '.join(lengths)}: empty, but a response has at least the token that ends it")
    return per_token, torch.full((length,), NO_TOKEN) if token_ids is None else token_ids


def _statistic(values: dict[str, Any], key: str, where: str) -> Tensor:
    numbers = values[key]
    if not isinstance(numbers, list):
        raise DataError(f"{where}: {key!r} must be a list with a number for each token, not {json_name(numbers)}")
    for position, number in enumerate(numbers):
        if not _finite(number):
            raise DataError(f"{where}: {key!r} holds {number!r:.80} at position {position}, which is not a finite number")
        if key.endswith(LOGP) and number > MAX_LOGP:
            raise DataError(f"{where}: {key!r} holds {number!r:.80} at position {position}; a log-probability is not above 0")
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64).float()


def _token_ids(values: dict[str, Any], key: str, where: str) -> Tensor | None:
    if key not in values:
        return None
    ids = values[key]
    if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < 2**63 for i in ids):
        raise DataError(f"{where}: {key!r} must be a list of token ids, whole numbers from 0")
    return torch.tensor(ids, dtype=torch.int64)


def _verdict(values: dict[str, Any], where: str) -> Verdict:
    given, right = values["answer"], values["correct"]
    if type(values["step"]) is not int or not isinstance(given, (str, type(None))) or not isinstance(right, (bool, type(None))):
        raise DataError(f"{where}: no line of a run's samples: 'step' is a number, 'answer' text or null, 'correct' true, false or null")
    return Verdict(values.get("completion", ""), given, right)


def _check_groups(lines: list[_Line]) -> None:
    """What the rollouts of a group, and of the file, must have in common. Raises DataError."""
    first, size = {line.group: line for line in reversed(lines)}, Counter(line.group for line in lines)
    text_of: dict[Key, _Line] = {}
    taken, temperature = lines[0], None
    for line in lines:
        head = first[line.group]
        if line.prompt != head.prompt:
            raise DataError(f"{line.where}: of the group of {head.where}, but of another prompt; a group's rollouts answer one prompt")
        if "prompt" in line.values and line.values["prompt"] != text_of.setdefault(line.group, line).values["prompt"]:
            raise DataError(f"{line.where}: the text of the prompt is another one than in {text_of[line.group].where}, of the same group")
        if size[line.group] > MAX_GROUP:
            raise DataError(
                f"{line.where}: its group has {size[line.group]} rollouts, {MAX_GROUP} are the most: comparing answers is quadratic"
            )
        for name in sorted(line.per_token.keys() ^ taken.per_token.keys()):
            has, lacks = (line, taken) if name in line.per_token else (taken, line)
            raise DataError(f"{lacks.where}: no {name!r}, which {has.where} has; a statistic is in all lines or in none")
        if "temperature" in line.values:
            temperature = temperature or line
            if line.values["temperature"] != temperature.values["temperature"]:
                raise DataError(f"{line.where}: another temperature than in {temperature.where}; audit them in two files")


def _numbered(keys: list[Key]) -> list[int]:
    """Whole-number names as they are where each is one key's alone; otherwise the keys' places in sorted order."""
    distinct = set(keys)
    names = {name for *_, name in distinct if isinstance(name, int)}
    if len(names) == len(distinct):
        return [int(name) for *_, name in keys]
    order = sorted(distinct, key=lambda key: (key[0], key[1], isinstance(key[2], str), key[2]))
    place = {key: number for number, key in enumerate(order)}
    return [place[key] for key in keys]


def _batch(lines: list[_Line], prompt_ids: list[int]) -> RolloutBatch:
    lengths = torch.tensor([0] + [len(line.prompt_tokens) + len(line.tokens) for line in lines], dtype=torch.int64)
    statistics = {name: torch.cat([line.per_token[name] for line in lines]) for name in lines[0].per_token}
    if "sampled_logp" not in statistics:
        statistics["sampled_logp"] = torch.full((sum(len(line.tokens) for line in lines),), math.nan)
    train = torch.tensor([line.values.get("train", True) for line in lines])
    return RolloutBatch(
        tokens=torch.cat([tokens for line in lines for tokens in (line.prompt_tokens, line.tokens)]),
        cu_seqlens=lengths.cumsum(0),
        prompt_lens=torch.tensor([len(line.prompt_tokens) for line in lines], dtype=torch.int64),
        group_ids=torch.tensor(_numbered([line.group for line in lines]), dtype=torch.int64),
        prompt_ids=prompt_ids,
        prompts=[line.values.get("prompt", "") for line in lines],
        completions=[line.values["completion"] for line in lines],
        finish_reasons=[line.values.get("finish_reason", "stop") for line in lines],
        temperature=next((float(line.values["temperature"]) for line in lines if "temperature" in line.values), 1.0),
        columns={name: [line.columns.get(name) for line in lines] for name in dict.fromkeys(n for line in lines for n in line.columns)},
        train_mask=train if any("train" in line.values for line in lines) else None,
        **statistics,
    )


def _audit_map(lines: list[_Line], prompt_ids: list[int]) -> dict[int, str]:
    answers: dict[int, str] = {}
    told: dict[int, str] = {}
    for line, prompt_id in zip(lines, prompt_ids, strict=True):
        answer = line.values.get("answer")
        if answer is None:
            continue
        if not isinstance(answer, str):
            if not _finite(answer):
                raise DataError(f"{line.where}: 'answer' must be text or a finite number, not {answer!r:.80}")
            answer = str(answer)
        if answers.setdefault(prompt_id, answer) != answer:
            raise DataError(f"{line.where}: the answer is {answer!r:.80} here and {answers[prompt_id]!r:.80} in {told[prompt_id]}")
        told.setdefault(prompt_id, line.where)
    return answers


# ---- writing ---------------------------------------------------------------------------------------------------------------------------


def write_rollouts(path: str | Path, batch: RolloutBatch, answers: Mapping[int, str] | None = None) -> None:
    """Write a file that `read_rollouts` reads back as this batch and, of `answers`, those of its prompts. It appears whole or not at all.

    Columns must be what JSON has (a tuple comes back as a list, NaN as None). Raises ValueError for a column with the name of a key above
    and for statistics that are not finite, TypeError for a column that is not JSON's.
    """
    if taken := sorted(OWN_KEYS & batch.columns.keys()):
        raise ValueError(f"columns named {', '.join(taken)} would be read back as something else: rename them")
    known = {name: values for name in PER_TOKEN if (values := getattr(batch, name)) is not None}
    if bool(batch.sampled_logp.isnan().all()):
        del known["sampled_logp"]
    for name, values in known.items():
        if not bool(values.isfinite().all()):
            raise ValueError(f"batch.{name} is not finite everywhere, so it could not be read back")
    write_atomic(Path(path), (encode_json(row) + b"\n" for row in _rows(batch, known, answers or {})))


def _rows(batch: RolloutBatch, known: Mapping[str, Tensor], answers: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    starts, responses = batch.cu_seqlens.tolist(), batch.response_cu_seqlens.tolist()
    for b, group in enumerate(batch.group_ids.tolist()):
        split = starts[b] + int(batch.prompt_lens[b])
        prompt_tokens, tokens = batch.tokens[starts[b] : split].tolist(), batch.tokens[split : starts[b + 1]].tolist()
        row: dict[str, Any] = {"group": group, "prompt_id": batch.prompt_ids[b], "prompt": batch.prompts[b]}
        row |= {"completion": batch.completions[b]}
        if batch.prompt_ids[b] in answers:
            row["answer"] = answers[batch.prompt_ids[b]]
        row |= {"finish_reason": batch.finish_reasons[b], "temperature": batch.temperature}
        if batch.train_mask is not None:
            row["train"] = bool(batch.train_mask[b])
        if prompt_tokens:
            row["prompt_token_ids"] = prompt_tokens
        if NO_TOKEN not in tokens:
            row["token_ids"] = tokens
        for name, values in known.items():
            row[LOGP if name == "sampled_logp" else name] = values[responses[b] : responses[b + 1]].tolist()
        yield row | {name: values[b] for name, values in batch.columns.items()}
