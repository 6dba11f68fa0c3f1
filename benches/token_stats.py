"""The measures of token_stats: forward of several sets of statistics, backward in place and into a new tensor, one thread and all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benches import exact
from benches.data import STATISTICS, Rows, Scenario
from benches.measure import Case, Target
from benches.peers import Provider

FORWARDS = (STATISTICS, ("logp", "entropy"), ("logp",))
BACKWARDS = (STATISTICS, ("logp", "entropy"))
SHORT = {"logp": "logp", "entropy": "entropy", "self_certainty": "SC"}


def label(names: Sequence[str]) -> str:
    return " + ".join(SHORT[name] for name in names)


FORWARD = f"forward, {label(STATISTICS)}"
OP = f"{FORWARD}, torch.ops"
KERNEL = f"{FORWARD}, kernel alone"
IN_PLACE = f"backward in place, {label(STATISTICS)}"
NEW = f"backward, {label(STATISTICS)}"


def _forward_case(rows: Rows, provider: Provider, names: tuple[str, ...], size: int) -> Case:
    def load() -> Callable[[Any], Any]:
        run = provider.statistics(names, False)
        return torch.no_grad()(lambda _: run(rows.logits, rows.ids, rows.mask))

    def check(values: Sequence[Tensor]) -> dict[str, float]:
        return exact.statistics_errors(rows, names, values)

    return Case(f"forward, {label(names)}", provider.name, load, size, check=check)


def _backward_case(rows: Rows, provider: Provider, names: tuple[str, ...], inplace: bool, size: int) -> Case:
    upstream = [rows.upstream[name] for name in names]

    def prepare(run: Callable) -> Callable[[], Tensor]:
        logits = rows.overwritable() if inplace else rows.leaf()
        values = run(logits, rows.ids, rows.mask)
        by = [gradient.to(value.dtype) for gradient, value in zip(upstream, values, strict=True)]
        return lambda: torch.autograd.grad(values, logits, by)[0]

    def check(gradient: Tensor) -> dict[str, float]:
        return exact.gradient_error(rows, names, gradient)

    measure = f"backward{' in place' if inplace else ''}, {label(names)}"
    return Case(measure, provider.name, lambda: provider.statistics(names, inplace), size, prepare, check)


def _op_case(rows: Rows, provider: Provider, size: int) -> Case:
    """The registered op alone, without the checks and the unpacking of the public function."""

    def load() -> Callable[[Any], Any]:
        from urlvr_fast.ops.spec import RowSpec

        backend, columns = provider.name.split()[-1], rows.logits.shape[-1]
        spec = RowSpec(frozenset(STATISTICS), ids=rows.ids, mask=rows.mask, backend=backend)
        arguments = (*spec.arguments(columns), columns, spec.flags, backend)
        return torch.no_grad()(lambda _: torch.ops.urlvr_fast.token_stats(rows.logits, None, *arguments))

    def check(stats: Tensor) -> dict[str, float]:
        from urlvr_fast.ops.spec import STATISTICS as LINES

        return exact.statistics_errors(rows, STATISTICS, [stats[LINES.index(name)] for name in STATISTICS])

    return Case(OP, provider.name, load, size, check=check)


def _kernel_case(rows: Rows, provider: Provider, size: int) -> Case:
    """The kernel itself, into memory that it is given: what the threads share out."""

    def load() -> Callable[[Any], Any]:
        from urlvr_fast.ops.backend import kernels
        from urlvr_fast.ops.layout import STATS
        from urlvr_fast.ops.spec import RowSpec

        backend, (n, columns) = provider.name.split()[-1], rows.logits.shape
        spec = RowSpec(frozenset(STATISTICS), ids=rows.ids, mask=rows.mask, backend=backend)
        out = torch.empty(STATS, n)
        call = (rows.logits.view(1, n, columns), None, *spec.arguments(columns), spec.flags, out)
        statistics = kernels(backend).statistics

        def run(_: Any) -> Tensor:
            statistics(*call)
            return out

        return run

    def check(stats: Tensor) -> dict[str, float]:
        from urlvr_fast.ops.spec import STATISTICS as LINES

        return exact.statistics_errors(rows, STATISTICS, [stats[LINES.index(name)] for name in STATISTICS])

    return Case(KERNEL, provider.name, load, size, check=check)


def _threads(cases: list[Case], scenario: Scenario) -> list[Case]:
    """Each case with one thread and with all, and what the latter must gain."""
    reach = {1: 1.4, 3: 1.6}[scenario.rows]
    out = []
    for case in cases:
        alone = Case(f"{case.measure}, one thread", case.provider, case.load, case.bytes, case.prepare, case.check, threads=1)
        case.targets = (Target(alone.measure, reach, faster=True),) if scenario.columns == 151936 else ()
        out += [case, alone]
    return out


def _set_targets(case: Case, rows: Rows) -> None:
    """What the design asks for, on the shape it asks it for."""
    s, gpu = rows.scenario, rows.device.type == "cuda"
    if (s.rows, s.columns, s.dtype, s.data, s.masked) != (8192 if gpu else 512, 151936, "bf16", "random", 0.0):
        return
    if case.measure == FORWARD:
        floor = Target("copy_", 1.08, factor=0.5) if gpu else Target("copy_", 1.3)
        speed = (1.0, 1.0) if gpu else (25.0, 3.5)
        case.targets = (floor, Target("torch eager", speed[0], faster=True), Target("torch.compile", speed[1], faster=True))
    elif case.measure == IN_PLACE:
        case.targets = (Target("copy_", 1.08 if gpu else 1.2),)
    elif case.measure == NEW and not gpu:
        case.targets = (Target("clone()", 1.3),)


def cases(rows: Rows, providers: Sequence[Provider]) -> list[Case]:
    """Everything that these providers can do on these rows."""
    row = rows.logits.shape[-1] * rows.logits.element_size()
    read, written = rows.live * row, rows.logits.shape[0] * row
    out = []
    for provider in (p for p in providers if p.statistics is not None):
        offered = [names for names in FORWARDS[: 1 if provider.brief else None] if set(names) <= set(provider.names)]
        mine = [_forward_case(rows, provider, names, read) for names in offered]
        if rows.scenario.rows in (1, 3) and provider.ours and rows.device.type == "cpu" and provider.name != "urlvr_fast torch":
            levels = [mine[0], _op_case(rows, provider, read), _kernel_case(rows, provider, read)]
            mine = [*_threads(levels, rows.scenario), *mine[1:]]
        for names in [n for n in BACKWARDS[: 1 if provider.brief else None] if set(n) <= set(provider.names) and provider.differentiable]:
            mine.append(_backward_case(rows, provider, names, False, read + written))
        if provider.inplace and provider.names == STATISTICS and not provider.brief:
            mine.append(_backward_case(rows, provider, STATISTICS, True, read + written))
        for case in mine if provider.ours and provider.name != "urlvr_fast torch" else []:
            _set_targets(case, rows)
        out += mine
    return out
