"""Loading prompts from files and data sets, and turning them into token ids. Bad input must say where and what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from urlvr_fast.rewards.answers import ExactAnswers, MathAnswers
from urlvr_fast.tasks import countdown
from urlvr_fast.tasks.arithmetic import IntegerAnswers
from urlvr_fast.tasks.countdown import CountdownAnswers
from urlvr_fast.tasks.prompt_set import DataError, PromptSet, load_prompts
from urlvr_fast.trainer.base_model import BOS, EOS, character_tokenizer
from urlvr_fast.trainer.prompts import encode_prompts

ROWS: list[dict[str, Any]] = [
    {"prompt": "one plus one?", "answer": "2", "source": "a"},
    {"prompt": "half of five?", "answer": 2.5, "source": "b"},
    {"prompt": "pi?", "answer": None, "source": "c"},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(rows: list[dict[str, Any]], folder: Path, kind: str) -> Path:
    """The rows as `kind` of data; Parquet-like kinds need one type per column, so there the answers are floats."""
    if kind == "jsonl":
        return write_jsonl(folder / "rows.jsonl", rows)
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        return folder / "rows.json"
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["answer"] = [None if answer is None else float(answer) for answer in columns["answer"]]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
        return folder / "rows.parquet"
    import datasets

    data = datasets.Dataset.from_dict(columns)
    (datasets.DatasetDict({"train": data, "dev": data.select([1])}) if kind == "dataset_dict" else data).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset", "dataset_dict"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, kind: str) -> None:
    prompts = load_prompts(write(ROWS, tmp_path, kind))
    assert prompts.prompts == ["one plus one?", "half of five?", "pi?"]
    assert prompts.answers == ({0: "2", 1: "2.5"} if kind in ("jsonl", "json") else {0: "2.0", 1: "2.5"})
    assert prompts.columns == {"source": ["a", "b", "c"]}  # the answer is not among the columns
    assert prompts.ids == [0, 1, 2]
    assert isinstance(prompts.checker, MathAnswers)


def test_split_of_a_saved_dataset(tmp_path: Path) -> None:
    path = write(ROWS, tmp_path, "dataset_dict")
    assert load_prompts(path, split="dev").prompts == ["half of five?"]
    with pytest.raises(DataError, match=r"saved has no split 'test'; it has train, dev"):
        load_prompts(path, split="test")


def test_parquet_with_chat_messages_and_nulls(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "system", "content": "Be short.", "name": None}, {"role": "user", "content": "1+1?", "name": "u"}]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [messages]}), tmp_path / "p.parquet")
    loaded = load_prompts(tmp_path / "p.parquet")
    assert loaded.prompts == [[{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?", "name": "u"}]]
    assert loaded.answers == {}


def test_limit_stops_the_reading(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text() + "{broken", encoding="utf-8")
    assert len(load_prompts(path, limit=3)) == 3
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4, column 2: not valid JSON"):
        load_prompts(path)


def test_other_columns_and_answers_by_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"q": "1+1", "gold": 2, "answer": "see gold"}, {"q": "2+2", "numbers": [2, 2]}])
    prompts = load_prompts(path, prompt_column="q", answer_column="gold", answers="exact")
    assert prompts.answers == {0: "2"}
    assert prompts.columns == {"answer": ["see gold", None], "numbers": [None, [2, 2]]}
    assert isinstance(prompts.checker, ExactAnswers)
    assert prompts.checker.extract(" two\nlines ") == "two\nlines"


def test_procedural_task() -> None:
    train, test = load_prompts("arithmetic", limit=200, seed=1), load_prompts("arithmetic", split="test", limit=200, seed=1)
    assert len(train) == len(test) == len(train.answers) == 200
    assert not set(map(str, train.prompts)) & set(map(str, test.prompts))
    assert isinstance(train.checker, IntegerAnswers)
    for id, prompt in zip(train.ids, train.prompts, strict=True):
        left, operation, right = next(str(prompt)[:-1].partition(o) for o in "+*-" if o in str(prompt))
        result = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operation](int(left), int(right))
        assert train.answers[id] == str(result)
        assert train.columns["operation"][id] == operation
    with pytest.raises(DataError, match="no split 'dev'"):
        load_prompts("arithmetic", split="dev")
    assert isinstance(load_prompts("arithmetic", limit=1, answers="math").checker, MathAnswers)


def test_a_task_with_a_verifier() -> None:
    prompts = load_prompts("countdown", split="test", limit=30, seed=4, options={"numbers": 3, "style": "words"})
    assert prompts.name == "countdown [test]"
    assert set(prompts.columns) == {"numbers", "target", "style"}
    assert prompts.verdicts == ("True", "False")
    solutions = {id: problem.solution for id, problem in enumerate(countdown.draw("test", limit=30, seed=4, numbers=3, style="words"))}
    chosen = prompts.select([7, 2])
    assert chosen.verdicts == ("True", "False")
    for loaded in (prompts, chosen):
        assert loaded.verify is not None
        assert loaded.verification_prompt is not None
        for position, id in enumerate(loaded.ids):
            row = {name: values[position] for name, values in loaded.columns.items()}
            assert len(row["numbers"]) == 3
            assert loaded.verify(f"<answer>{solutions[id]}</answer>", row) == 1.0
            assert loaded.verify(f"<answer>{solutions[id]}-1</answer>", row) == 0.0
            assert str(loaded.prompts[position]) in loaded.verification_prompt(str(loaded.prompts[position]), "x", row)
            assert isinstance(loaded.checker, CountdownAnswers)
            assert loaded.checker.correct(solutions[id], loaded.answers[id])
    assert load_prompts("countdown", limit=1).verdicts == ("T", "F")


def test_no_column_holds_an_answer_or_a_solution() -> None:
    for task in ("arithmetic", "countdown", "factoring", "modular", "reversal", "sorting"):
        prompts = load_prompts(task, limit=200)
        assert set(prompts.columns) <= {"operation", "difficulty", "numbers", "target", "style", "number", "modulus"}
        assert len(prompts.answers) == 200
    assert set(load_prompts("next_token", limit=2).columns) == {"continuation"}  # the text is its own target


def test_a_task_without_a_verifier(tmp_path: Path) -> None:
    for prompts in (load_prompts("arithmetic", limit=3), load_prompts(write_jsonl(tmp_path / "r.jsonl", ROWS))):
        assert prompts.verify is prompts.verification_prompt is None
        assert prompts.verdicts == ("True", "False")


def test_options_of_a_task(tmp_path: Path) -> None:
    prompts = load_prompts("arithmetic", limit=50, options={"kinds": ["long_product"]})
    assert set(prompts.columns["operation"]) == {"*"}
    assert set(prompts.columns["difficulty"]) == {3}
    with pytest.raises(
        DataError,
        match=r"countdown has no option 'number'; did you mean 'numbers'\? It has: numbers, largest, largest_target, operators, style",
    ):
        load_prompts("countdown", options={"number": 3})
    for reserved in ("limit", "seed", "split"):
        with pytest.raises(DataError, match=f"has no option {reserved!r}"):
            load_prompts("countdown", options={reserved: 3})
    with pytest.raises(DataError, match=r"countdown: numbers=9; valid is a count from 2 to 6"):
        load_prompts("countdown", options={"numbers": 9})
    with pytest.raises(DataError, match=r"r\.jsonl takes no options \(numbers\): only procedural tasks do"):
        load_prompts(write_jsonl(tmp_path / "r.jsonl", ROWS), options={"numbers": 3})
    assert len(load_prompts(tmp_path / "r.jsonl", options={})) == 3


def test_select_keeps_ids_and_answers(tmp_path: Path) -> None:
    chosen = load_prompts(write_jsonl(tmp_path / "r.jsonl", ROWS)).select([2, 1])
    assert (chosen.prompts, chosen.ids, chosen.answers) == (["pi?", "half of five?"], [2, 1], {1: "2.5"})
    assert chosen.columns == {"source": ["c", "b"]}
    assert chosen.select([1]).ids == [1]
    assert len(chosen.select([])) == 0


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, r"rows\.jsonl, line 2: no 'prompt'"),
        ({"prompt": None}, r"line 2: no 'prompt'"),
        ({"prompt": "  "}, r"line 2: 'prompt' is empty"),
        ({"prompt": 7}, r"line 2: 'prompt' must be text or a list of chat messages, not a number"),
        ({"prompt": []}, r"line 2: 'prompt' is an empty list of messages"),
        ({"prompt": ["hi"]}, r"line 2: 'prompt', message 0: must be \{\"role\": …, \"content\": …\}, not text"),
        ({"prompt": [{"role": "user"}]}, r"message 0: 'content' must be text, not null"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": 1, "content": "b"}]}, r"message 1: 'role' must be text, not a number"),
        ({"prompt": [{"role": "", "content": "b"}]}, r"message 0: 'role' is empty"),
        ({"prompt": "a", "answer": [1]}, r"line 2: 'answer' must be text or a finite number, not \[1\]"),
        ({"prompt": "a", "answer": True}, r"line 2: 'answer' must be text or a finite number, not True"),
        ({"prompt": "a", "answer": float("nan")}, r"must be text or a finite number, not nan"),
        ([1], r"line 2: must be an object such as \{\"prompt\": …\}, not a list"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "fine"}, row]))


def test_missing_file_lists_near_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"there is no file .*promts\.jsonl; near it in .*: prompts\.jsonl$"):
        load_prompts(tmp_path / "promts.jsonl")
    with pytest.raises(DataError, match=r"no file .*zzz\.parquet; data files in .*: prompts\.jsonl$"):
        load_prompts(tmp_path / "zzz.parquet")
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        load_prompts(tmp_path / "nowhere" / "a.jsonl")


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no task, file or folder 'arithmetik'; did you mean 'arithmetic'\?"):
        load_prompts("arithmetik")


@pytest.mark.parametrize(("name", "text"), [("e.jsonl", ""), ("e.jsonl", "\n\n"), ("e.json", "[]")])
def test_empty_data(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"e\.jsonl? is empty"):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.json", b'{"prompt": "a"}', r"b\.json: must hold a list of objects, not an object"),
        ("b.json", b'[{"prompt": "a"},\n {"prompt" "b"}]', r"b\.json, line 2, column 12: not valid JSON"),
        ("b.json", b'{"prompt": "a"}\n{"prompt": "b"}', r"one object per line must be named \.jsonl"),
        ("b.json", b"[1]", r"b\.json, row 0: must be an object"),
        ("b.json", b'[{"prompt": "\xff"}]', r"b\.json: not UTF-8"),
        ("b.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"b\.jsonl, line 2: not UTF-8"),
        ("b.parquet", b"not parquet at all", r"b\.parquet: cannot be read as Parquet"),
        ("b.csv", b"prompt\na\n", r"b\.csv: cannot tell the format; a data file ends in \.jsonl, \.json, \.parquet"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_prompts(tmp_path / name)


def test_unknown_column_lists_what_there_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no column 'promt' \(prompt_column\); did you mean 'prompt'\? It has: prompt, answer, source"):
        load_prompts(path, prompt_column="promt")
    with pytest.raises(DataError, match=r"no column 'gold' \(answer_column\).* It has: prompt, answer, source"):
        load_prompts(path, answer_column="gold")


def test_a_folder_that_is_no_saved_dataset(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "r.jsonl", ROWS)
    with pytest.raises(DataError, match=r"not one that `Dataset\.save_to_disk` wrote; name one of its files: r\.jsonl"):
        load_prompts(tmp_path)


def test_a_hub_name_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no-such-owner/no-such-name:main is neither a file or folder here nor a data set"):
        load_prompts("no-such-owner/no-such-name:main")


@pytest.mark.parametrize(
    ("option", "message"), [({"answers": "fuzzy"}, "valid are auto, math, exact"), ({"limit": 0}, "at least one prompt")]
)
def test_bad_options(option: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts("arithmetic", **option)


@pytest.mark.parametrize(("name", "rows"), [("aime", 30), ("amc", 83), ("math", 500)])
def test_real_problems(contest_data: Path, name: str, rows: int) -> None:
    prompts = load_prompts(contest_data / f"{name}.json")
    assert len(prompts) == len(prompts.answers) == rows
    assert all(isinstance(answer, str) and answer for answer in prompts.answers.values())
    assert set(prompts.columns) == {"source", "id"}


# --- token ids --------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def prompt_set(*prompts: Any) -> PromptSet:
    return PromptSet(name="p.jsonl", prompts=list(prompts), checker=MathAnswers(), ids=[10 * i for i in range(len(prompts))])


def test_plain_text_gets_one_bos_and_no_eos() -> None:
    tokenizer = character_tokenizer()
    encoded = encode_prompts(prompt_set("1+1=", "22"), tokenizer)
    assert encoded.token_ids == [[BOS, *map(tokenizer.convert_tokens_to_ids, "1+1=")], [BOS, *map(tokenizer.convert_tokens_to_ids, "22")]]
    assert (encoded.texts, encoded.ids, encoded.skipped) == (["1+1=", "22"], [0, 10], 0)
    assert encoded.select([1]).texts == ["22"]


def test_a_tokenizer_that_appends_eos_and_text_that_begins_with_bos() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tokenizer.split_special_tokens = False
    assert tokenizer("<bos>1").input_ids[:2] == [BOS, BOS]  # what a tokenizer does by itself
    (tokens,) = encode_prompts(prompt_set("<bos>1"), tokenizer).token_ids
    assert tokens == [BOS, tokenizer.convert_tokens_to_ids("1")]


def test_a_tokenizer_without_bos() -> None:
    from transformers import PreTrainedTokenizerFast

    backend = character_tokenizer().backend_tokenizer
    backend.post_processor = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert encode_prompts(prompt_set("1"), tokenizer).token_ids == [[tokenizer.convert_tokens_to_ids("1")]]


def test_chat_template() -> None:
    tokenizer = character_tokenizer()
    tokenizer.split_special_tokens = False  # a template writes its special tokens as text
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    encoded = encode_prompts(prompt_set("hello", messages), tokenizer, suffix="!")
    assert encoded.texts == ["<bos>[user]hello!\n[assistant]", "<bos>[system]S\n[user]Q!\n[assistant]A\n[assistant]"]
    assert [tokens.count(BOS) for tokens in encoded.token_ids] == [1, 1]
    assert tokenizer.decode(encoded.token_ids[0], skip_special_tokens=True) == "[user]hello!\n[assistant]"
    assert messages[1]["content"] == "Q"  # the data set is not changed
    plain = encode_prompts(prompt_set("hello", messages[:2]), tokenizer, suffix="!", template="plain")
    assert plain.texts == ["hello!", "S\n\nQ!"]


def test_no_chat_template() -> None:
    tokenizer = character_tokenizer()
    assert encode_prompts(prompt_set([{"role": "user", "content": "Q"}]), tokenizer, suffix="?").texts == ["Q?"]
    with pytest.raises(DataError, match="no chat template; use template=plain"):
        encode_prompts(prompt_set("a"), tokenizer, template="chat")
    with pytest.raises(DataError, match=r"p\.jsonl, row 0: there is no user message that the suffix"):
        encode_prompts(prompt_set([{"role": "system", "content": "Q"}]), tokenizer, suffix="?")


def test_a_template_that_refuses_names_the_row() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"p\.jsonl, row 0: .*roles must alternate"):
        encode_prompts(prompt_set("a"), tokenizer)


def test_overlong_prompts() -> None:
    tokenizer = character_tokenizer()
    prompts = prompt_set("12345", "1", "123456")  # 6, 2 and 7 tokens with <bos>
    encoded = encode_prompts(prompts, tokenizer, max_prompt_tokens=6)
    assert (encoded.texts, encoded.ids, encoded.skipped) == (["12345", "1"], [0, 10], 1)
    with pytest.raises(DataError, match=r"p\.jsonl, row 20: the prompt has 7 tokens, 6 fit"):
        encode_prompts(prompts, tokenizer, max_prompt_tokens=6, overlong="refuse")
    with pytest.raises(DataError, match=r"none of the 3 prompts is short enough: 1 tokens fit, the longest has 7"):
        encode_prompts(prompts, tokenizer, max_prompt_tokens=1)


def test_bad_encoding_options() -> None:
    with pytest.raises(DataError, match=r"template='jinja': valid are auto, chat, plain"):
        encode_prompts(prompt_set("a"), character_tokenizer(), template="jinja")
    with pytest.raises(DataError, match=r"overlong='cut': valid are skip, refuse"):
        encode_prompts(prompt_set("a"), character_tokenizer(), overlong="cut")
