"""docs/paper.md: each claim with its rule, its verdict, its numbers and its plots, all from results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from experiments.matrix import MACHINE, Result, Spec
from experiments.verdict import Verdict

INTRODUCTION = """# The paper's findings, repeated on small models

Made by `make paper`; every number below comes from the runs in `experiments/results/`. The models have 0.95 M parameters and do two-digit
arithmetic or Countdown, so what is *seen* here is seen at this scale, and what is *not seen* may appear at a larger one. Each claim was
written down with the rule that judges it before its runs were made (its file in `experiments/`; (i) says how its rule was made stricter
before all of its runs were in). Learning rate and length were chosen on seed 100, and the Countdown model of (g) was pre-trained until it
judged better than it solved, before any of its runs. Every configuration has three seeds: 0, 1 and 2.

An evaluation is 128 prompts × 4 samples: if those were 512 independent ones, the standard error of an accuracy of one half would be 0.022.
A best is the highest of some thirty such figures, so read rises and falls of 0.02 or 0.03 as noise, whatever a rule says of them.

"""


def write(
    folder: Path, claims: Mapping[str, ModuleType], verdicts: Mapping[str, Verdict], results: Mapping[Spec, Result], results_folder: Path
) -> None:
    """Write `paper.md` and its plots, in `folder`/paper. results_folder: where the results came from."""
    from matplotlib import pyplot

    (folder / "paper").mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION, "| | claim | verdict |\n|---|---|---|\n"]
    parts += [f"| {name} | [{claims[name].TITLE}](#{anchor(name, claims[name])}) | **{verdicts[name].verdict}** |\n" for name in claims]
    parts.append("\n" + cost(results, results_folder) + "\n")
    for name, claim in claims.items():
        verdict = verdicts[name]
        parts.append(f"\n## {heading(name, claim)}\n\n{(claim.__doc__ or '').strip()}\n\n**{verdict.verdict}.** {verdict.numbers}\n\n")
        for file, draw in verdict.plots.items():
            figure = draw()
            figure.savefig(folder / "paper" / file, metadata={"Date": None})
            pyplot.close(figure)
            parts.append(f"![{claim.TITLE}](paper/{file})\n\n")
        if verdict.rows:
            parts.append("<details><summary>Every run</summary>\n\n")
            parts += ["| " + " | ".join(row) + " |\n" for row in (verdict.header, ("---",) * len(verdict.header), *verdict.rows)]
            parts.append("\n</details>\n")
    (folder / "paper.md").write_text("".join(parts), encoding="utf-8")


def heading(name: str, claim: ModuleType) -> str:
    return f"({name}) {claim.TITLE}"


def anchor(name: str, claim: ModuleType) -> str:
    """What GitHub makes of the heading."""
    kept = "".join(c for c in heading(name, claim).lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def cost(results: Mapping[Spec, Result], folder: Path) -> str:
    minutes = sum(result.cpu_s for result in results.values()) / 60
    tokens = sum(result.tokens for result in results.values()) / 1e6
    made_on = json.loads((folder / MACHINE).read_text(encoding="utf-8"))
    return (
        f"{len(results)} runs, {minutes:.0f} minutes of one core, {tokens:.1f} M sampled tokens. {made_on['machine']}, "
        f"torch {made_on['versions']['torch']}, Python {made_on['versions']['python']}."
    )
