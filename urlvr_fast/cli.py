"""`urlvr`: train · eval · audit · mcs · ttt · make-base · report · doctor.

Heavy imports wait until a command needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from urlvr_fast.errors import ExplainedError

TRAINING_PACKAGES = ("transformers", "tokenizers", "safetensors", "numpy", "yaml", "rich", "datasets", "pyarrow")  # of the extra `train`
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 (it failed), 2 (it was asked for something impossible), 130 (interrupted)."""
    options = parse(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in TRAINING_PACKAGES:
            raise
        print(f"urlvr {options.command} needs {error.name}; `pip install 'urlvr_fast[train]'` adds it", file=sys.stderr)
        return 1
    except ExplainedError as error:
        print(f"\nurlvr {options.command}: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"\nurlvr {options.command}: {error}", file=sys.stderr)
        return 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """argparse stops taking words at the first flag between them, but `urlvr train c.yaml --overwrite trainer.steps=3` should work."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if rest and (options.command not in ("train", "ttt", "mcs") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        (options.models if options.command == "mcs" else options.words).extend(rest)
    return options


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="urlvr", description="Train language models without labels, and see what it does to them.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train a model", description="urlvr train configs/quickstart.yaml trainer.steps=300 run_dir=runs/x"
    )
    train.add_argument("words", nargs="*", metavar="CONFIG.yaml | a.b=c", help="one YAML file, and options that override it")
    how = train.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in run_dir")
    how.add_argument("--overwrite", action="store_true", help="delete the run in run_dir first")
    train.add_argument("--options", action="store_true", help="list every option with its default, and end")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="avg@k, unbiased pass@k and maj@k of a run or a model")
    evaluate.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run directory (its newest checkpoint), a model directory, a hub id, or `bundled`"
    )
    evaluate.add_argument("--data", help="prompts with answers, as for `urlvr train`; a run's own evaluation prompts when left out")
    evaluate.add_argument("--split", help="split of the data (default: eval.split, which is test)")
    evaluate.add_argument("--limit", type=_count, help="only the first so many prompts")
    evaluate.add_argument("--k", type=_ks, default=[1, 8], metavar="1,8,32", help="the ks; max(k) completions are sampled (default: 1,8)")
    evaluate.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="options of `urlvr train`, such as eval.temperature=0.6")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    evaluate.add_argument("--rollouts", type=Path, metavar="FILE.jsonl", help="write the sampled rollouts there, for `urlvr audit`")
    evaluate.set_defaults(run=_eval)

    audit = commands.add_parser("audit", help="every reward on saved rollouts, and how well each agrees with the answers")
    audit.add_argument("rollouts", type=Path, metavar="ROLLOUTS.jsonl", help="of `urlvr eval --rollouts`, or samples.jsonl of a run")
    audit.add_argument("--answers", choices=("auto", "math", "exact"), default="auto", help="how answers are read and compared")
    audit.add_argument("--task", help="the procedural task that the prompts are of, whose checker and verifier are used then")
    audit.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    audit.set_defaults(run=_audit)

    mcs = commands.add_parser("mcs", help="rank base models by their Model Collapse Step")
    mcs.add_argument(
        "models", nargs="+", metavar="MODEL | a.b=c", help="model directories, hub ids, bundled:NAME; and options of `urlvr train`"
    )
    mcs.add_argument("--config", type=Path, metavar="FILE.yaml", help="the setting (default: one for the bundled models)")
    mcs.add_argument("--seeds", type=_count, default=3, metavar="N", help="runs per model (default: %(default)s)")
    mcs.add_argument(
        "--out", type=Path, default=Path("runs/mcs"), help="where runs and ranking go; run again to go on (default: %(default)s)"
    )
    mcs.set_defaults(run=_mcs)

    ttt = commands.add_parser("ttt", help="test-time training: train on the prompts that are to be answered, without labels")
    ttt.add_argument("words", nargs="+", metavar="PROMPTS | a.b=c", help="a file of prompts, and options of `urlvr train`")
    ttt.add_argument("--model", help="what to start from (default: what the configuration says, which is the bundled model)")
    ttt.add_argument("--config", type=Path, metavar="FILE.yaml", help="options of `urlvr train`")
    ttt.add_argument("--overwrite", action="store_true", help="delete the run in run_dir first")
    ttt.set_defaults(run=_ttt)

    base = commands.add_parser("make-base", help="pre-train the small models that are bundled")
    base.add_argument("--out", type=Path, default=Path("runs/base"), help="where to (default: %(default)s)")
    base.add_argument(
        "--task", choices=("arithmetic", "countdown"), default="arithmetic", help="which of the bundled models (default: %(default)s)"
    )
    base.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    base.add_argument("--seed", type=int, default=0)
    base.add_argument("--snapshots", type=int, default=0, metavar="N", help="also keep N graded checkpoints of the run, weak to strong")
    base.set_defaults(run=_make_base)

    report = commands.add_parser("report", help="write report.html for one run, or overlay several")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="file to write (default: report.html in the first run)")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="versions, backends in use, what is missing and the command that adds it")
    doctor.set_defaults(run=_doctor)
    return top


def _train(options: argparse.Namespace) -> int:
    from urlvr_fast.trainer import config as configuration
    from urlvr_fast.trainer.run_dir import CONFIG_FILE, default_run_dir

    if options.options:
        print(configuration.documentation())
        return 0
    yaml_file, overrides = _split(options.words)
    if options.resume and yaml_file is None:
        named = next((o.partition("=")[2] for o in overrides if o.startswith("run_dir=")), None)
        if named is None:
            raise configuration.ConfigError("--resume needs to know which run: run_dir=…")
        saved = Path(named) / CONFIG_FILE
        yaml_file = str(saved) if saved.is_file() else None
    config = configuration.load(yaml_file, overrides)
    if config.run_dir is None:
        if options.resume:
            raise configuration.ConfigError("--resume needs to know which run: run_dir=…")
        config.run_dir = default_run_dir(Path(yaml_file).stem if yaml_file else "run")
    from urlvr_fast.trainer.loop import train

    status = train(config, resume=options.resume, overwrite=options.overwrite)
    _show_end(Path(config.run_dir), status)
    return INTERRUPTED if status == "interrupted" else 0


def _eval(options: argparse.Namespace) -> int:
    from urlvr_fast.monitor.pass_at_k import bootstrap_interval
    from urlvr_fast.trainer.evaluate import evaluate_model

    _check_folders(json=options.json, rollouts=options.rollouts)
    found, prompts = evaluate_model(
        options.model,
        data=options.data,
        split=options.split,
        limit=options.limit,
        ks=options.k,
        overrides=options.set,
        statistics=options.rollouts is not None,
    )
    intervals = {name: bootstrap_interval(values) for name, values in found.per_prompt.items()}
    rows = [(name, f"{value:.4f}", "[{:.4f}, {:.4f}]".format(*intervals[name])) for name, value in found.figures.items()]
    _table(f"{options.model}, {len(prompts)} prompts", ("metric", "value", "95 % over prompts"), rows)
    if options.json:
        record = found.figures | {"intervals": intervals}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.rollouts:
        from urlvr_fast.trainer.rollout_file import write_rollouts

        write_rollouts(options.rollouts, found.sampled[0][0], prompts.answers)
        print(f"wrote {options.rollouts}")
    return 0


def _audit(options: argparse.Namespace) -> int:
    from urlvr_fast.trainer.audit import audit_file, table

    _check_folders(json=options.json)
    rows = audit_file(options.rollouts, answers_kind=options.answers, data_task=options.task)
    header, cells = table([row for row in rows if row.missing is None])
    _table(f"{options.rollouts}: what each reward says, and whether that is right", header, cells)
    for row in rows:
        if row.missing is not None:
            print(f"not computed: {row.name} ({row.missing})")
    if options.json:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0


def _mcs(options: argparse.Namespace) -> int:
    from urlvr_fast.trainer.mcs import rank_models, summary, table

    models = [word for word in options.models if "=" not in word]
    overrides = [word for word in options.models if "=" in word]
    ranking = rank_models(
        models, out=options.out, seeds=range(options.seeds), config_file=options.config, overrides=["log.live=off", *overrides]
    )
    _table("Model Collapse Step: median over seeds [earliest, latest]", *table(ranking))
    for name, value in summary(ranking).items():
        print(f"{name}: {value}")
    print(f"wrote {options.out / 'mcs.json'}, {options.out / 'mcs.svg'}")
    return 0


def _ttt(options: argparse.Namespace) -> int:
    from urlvr_fast.trainer.config import ConfigError
    from urlvr_fast.trainer.ttt import configure, train_at_test_time

    prompts = [word for word in options.words if "=" not in word]
    if len(prompts) != 1:
        raise ConfigError(f"one file of prompts, not {len(prompts)}")
    config = configure(
        prompts[0], model=options.model, config_file=options.config, overrides=[word for word in options.words if "=" in word]
    )
    status, found = train_at_test_time(config, overwrite=options.overwrite)
    changed = [answer for answer in found if answer.before != answer.after]
    shown = [
        (a.prompt[-40:], str(a.before), f"{a.share_before:.2f}", str(a.after), f"{a.share_after:.2f}") for a in (changed or found)[:20]
    ]
    assert config.run_dir is not None
    if found:
        _table(f"{len(changed)} of {len(found)} answers changed", ("prompt", "before", "share", "after", "share"), shown)
        print(f"answers:     {Path(config.run_dir) / 'answers.jsonl'}")
    else:
        print(f"no votes after training; `urlvr train run_dir={config.run_dir} --resume` goes on")
    _show_end(Path(config.run_dir), status)
    return INTERRUPTED if status == "interrupted" else 0


def _check_folders(**files: Path | None) -> None:
    """Find out before anything slow that there is nowhere to write."""
    from urlvr_fast.trainer.config import ConfigError

    for name, file in files.items():
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"--{name} {file}: there is no folder {file.parent}")


def _make_base(options: argparse.Namespace) -> int:
    from urlvr_fast.trainer.base_model import make_base

    chosen: dict[str, Any] = {} if options.steps is None else {"steps": options.steps}
    if options.task == "countdown":
        from urlvr_fast.trainer.config import ConfigError
        from urlvr_fast.trainer.countdown_base import make_countdown_base

        if options.snapshots:
            raise ConfigError("--snapshots is for --task arithmetic")
        make_countdown_base(options.out, seed=options.seed, **chosen)
        print(f"wrote {options.out}")
        return 0
    make_base(options.out, seed=options.seed, snapshots=options.snapshots, **chosen)
    print(f"wrote {options.out}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from urlvr_fast.report import write_report

    print(f"wrote {write_report(options.runs, options.out)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from urlvr_fast.doctor import main as doctor

    return doctor()


def _show_end(run_dir: Path, status: str) -> None:
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    print(f"{status} after {summary['timing']['training_s']:.0f} s of training")
    print(f"report:      {run_dir / 'report.html'}")
    print(f"checkpoints: {run_dir / 'checkpoints'}")


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: square brackets in a completion or a model's name are no markup
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a pipe or a file has no width of its own


def _split(words: list[str]) -> tuple[str | None, list[str]]:
    """The one YAML file among the words, and the overrides."""
    from urlvr_fast.trainer.config import ConfigError

    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one configuration file at most, not {len(files)}: {', '.join(files)}")
    return (files[0] if files else None), [word for word in words if "=" in word]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _ks(text: str) -> list[int]:
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,8,32") from None
    if ks[0] < 1:
        raise argparse.ArgumentTypeError("k must be at least 1")
    return ks


if __name__ == "__main__":
    sys.exit(main())
