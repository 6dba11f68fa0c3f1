"""The Triton kernels, compiled ahead of time for sm_80, sm_90 and sm_100 just as the host functions would launch them: no GPU is needed.

No register may spill and nothing may live in local memory; rows that start on a vector boundary must be read 16 bytes at a time, others
never so. `python tests/test_kernels_triton_compile.py` prints registers, shared memory and compile time of every specialisation.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

if __name__ != "__main__":
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler; run this file without it", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[1]))

from urlvr_fast.kernels import group_advantages, policy_loss, policy_loss_from_logits, scale_rows, token_stats

from benches.compiled import binary_of, cuobjdump, hot_launches, hot_loop, specialisation
from urlvr_fast.ops.layout import ENTROPY_ON_KEEP, GRADS, HAS_OLD, LOSS_LINES, METRICS, RAW, STATS, Stat, Weighing

ARCHITECTURES = (80, 90, 100)
COLUMNS = (32000, 151936)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROCESSES = 2

LOGP, T = 1 << Stat.LOGP, 1 << Stat.ENTROPY
TOTAL, RARE = 1 << Stat.SELF_CERTAINTY | 1 << Stat.MEAN_LOGIT, 1 << Stat.PROB_GAP | 1 << Stat.SUM_P2 | 1 << Stat.ARGMAX
EVERYTHING = LOGP | 1 << Stat.LSE | T | TOTAL | 1 << Stat.MAX_PROB | RARE
G_LOGP, G_ENTROPY, G_SC = (1 << stat for stat in (Stat.LOGP, Stat.ENTROPY, Stat.SELF_CERTAINTY))
FEW, MANY = 2, 4096  # rows: split over programs, or a program each


def rows_of(n, columns, dtype, *options, stride=None):
    """`row_arguments` of tensors without memory, of which only shape, dtype and strides count."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    logits = torch.empty_strided((1, n, columns), (0, stride or columns, 1), dtype=dtype, device="meta")
    mask = meta(n, dtype=torch.bool) if "mask" in options else None
    crow, col = (meta(n + 1, dtype=torch.int64), meta(20 * n, dtype=torch.int64)) if "keep" in options else (None, None)
    bias, temperatures = meta(columns) if "bias" in options else None, meta(n) if "temperatures" in options else None
    softcap, scale = 30.0 if "softcap" in options else 0.0, -1.5 if "scale" in options else 1.0
    return token_stats.row_arguments(
        logits, bias, meta(n, dtype=torch.int64), mask, temperatures, crow, col, 0.7, softcap, scale, 0, columns
    )


def of_statistics(n, columns, dtype, flags, *options, stride=None):
    rows = rows_of(n, columns, dtype, *options, stride=stride)
    return token_stats.plan_statistics(rows, flags, torch.empty(STATS, n, device="meta"))


def of_gradient(n, columns, dtype, given, *options, flags=EVERYTHING, stride=None):
    rows = rows_of(n, columns, dtype, *options, stride=stride)
    stats, upstream = torch.empty(STATS, n, device="meta"), torch.empty(GRADS, n, device="meta")
    bias_grad = torch.empty(columns, device="meta") if "bias" in options else None
    return token_stats.plan_gradient(rows, flags, stats, upstream, given, rows["logits"], bias_grad)


def of_policy(n, columns, dtype, given, *options, stride=None):
    rows = rows_of(n, columns, dtype, *options, stride=stride)
    numbers = [0.8, 1.28, float("inf"), 0.1, 0.01 * bool(given & G_ENTROPY), 0.01 * bool(given & G_SC), 5.0, 1.0, 1.05, 3.0, 0.0]
    row_scale = torch.empty(n, device="meta") if dtype == torch.float16 else None
    stats, loss = torch.empty(STATS, n, device="meta"), torch.empty(LOSS_LINES, n, device="meta")
    flags = LOGP | T | (TOTAL if given & G_SC else 0)
    return policy_loss_from_logits.plan_policy(rows, flags, loss, 1, 1, 3, 1, numbers, stats, rows["logits"], row_scale)


def launches(columns, dtype):
    """Every flag set on plain rows; the other options with all flags."""
    for n in (MANY, FEW):
        for flags in (LOGP | a | b | c for a in (0, T) for b in (0, TOTAL) for c in (0, RARE)):
            yield from of_statistics(n, columns, dtype, flags)
        yield from of_statistics(n, columns, dtype, LOGP | T, stride=columns + 1)
        yield from of_statistics(n, columns, dtype, EVERYTHING, stride=columns + 1)
        yield from of_statistics(n, columns, dtype, EVERYTHING | RAW, "mask", "keep", "temperatures")
        yield from of_statistics(n, columns, dtype, EVERYTHING, "mask", "bias", "scale", "temperatures")
        yield from of_statistics(n, columns, dtype, EVERYTHING | ENTROPY_ON_KEEP, "keep", "bias", "softcap")
    for given in (G_LOGP, G_LOGP | G_ENTROPY, G_LOGP | G_SC, G_LOGP | G_ENTROPY | G_SC):
        yield from of_gradient(MANY, columns, dtype, given)
        yield from of_policy(MANY, columns, dtype, given)
    for of in (of_gradient, of_policy):
        yield from of(MANY, columns, dtype, G_LOGP, stride=columns + 1)
        yield from of(MANY, columns, dtype, G_LOGP | G_ENTROPY | G_SC, stride=columns + 1)
        yield from of(MANY, columns, dtype, G_LOGP | G_ENTROPY | G_SC, "mask", "temperatures", "keep")
        yield from of(MANY, columns, dtype, G_LOGP | G_ENTROPY | G_SC, "mask", "bias", "softcap", "scale", "temperatures")

    for stride in (columns, columns + 1):
        for row_scale in (None, torch.empty(MANY, device="meta")):
            gradient = rows_of(MANY, columns, dtype, stride=stride)["logits"]
            yield scale_rows.plan_scale(gradient, torch.empty((), device="meta"), row_scale)


def advantages(dtype, rows=512, ids=torch.int64, eps=1e-6):
    """Every option of the kernel over rollouts."""
    mask = torch.empty(rows, dtype=torch.bool, device="meta")
    rewards, group_ids = torch.empty(rows, dtype=dtype, device="meta"), torch.empty(rows, dtype=ids, device="meta")
    for scale, baseline, masked in itertools.product(("group", "batch", "none"), ("mean", "leave_one_out"), (None, mask)):
        yield group_advantages.plan_advantages(rewards, group_ids, masked, scale, baseline, eps, rewards)


def losses(rows=MANY, sequences=32):
    """Every set of tensors that the kernels around a policy loss are compiled for."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    out = meta(LOSS_LINES, rows), meta(rows, dtype=torch.bool), meta(2)
    for mask, cu_seqlens, denominator in itertools.product((False, True), repeat=3):
        given = meta(rows, dtype=torch.bool) if mask else None, meta(sequences + 1, dtype=torch.int64) if cu_seqlens else None
        optional = meta(rows), None, None, meta(()) if denominator else None
        weighings = (0, Weighing.JOINED) if cu_seqlens else (0,)
        for weighing in weighings:
            divisors = optional[-1], 1.0, optional[-1], 1.0
            yield from policy_loss.plan_loss_rows(meta(rows), *given, *optional[:-1], *divisors, weighing, *out)
    numbers = [0.8, 1.28, float("inf"), 0.1, 0.01, 0.0, 5.0, 1.0, 1.05, 3.0, 0.0]
    for logp, which, product in ((True, True, False), (True, True, True), (False, True, True), (False, False, True)):
        given = meta(rows) if logp else None, meta(sequences + 1, dtype=torch.int64), meta(rows, dtype=torch.bool) if which else None
        yield from policy_loss.plan_join(*given, HAS_OLD, 1, 0, product, numbers, out[0])
    for entropy, self_certainty, upstream in itertools.product((False, True), repeat=3):
        given = meta(rows), meta(rows) if entropy else None, meta(rows) if self_certainty else None
        kinds = HAS_OLD, 1, 0, 0, numbers
        yield from policy_loss.plan_objective(*given, *out, *kinds, meta(METRICS), meta(GRADS, rows) if upstream else None)


def specialisations():
    """Without repetition: lengths are runtime values, so V = 32000 and V = 151936 share nearly all."""
    of_rows = (launches(columns, dtype) for columns in COLUMNS for dtype in DTYPES)
    of_rollouts = (advantages(torch.float32), advantages(torch.float64), itertools.islice(advantages(torch.bfloat16, ids=torch.int32), 1))
    entries = [specialisation(launch) for launch in itertools.chain(*of_rows, *of_rollouts, losses())]
    return list({json.dumps(entry): entry for entry in entries}.values())


def compile_one(entry, architecture):
    """Registers, bytes spilled, local memory, shared memory and widest load of one binary."""
    start = time.perf_counter()
    binary = binary_of(entry, architecture)
    seconds = time.perf_counter() - start
    _, name, signature, constants, _, _ = entry
    usage = cuobjdump(binary, "--dump-resource-usage")
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    ptx, ir = binary.asm["ptx"], binary.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", ir, re.M))
    return {
        **{"kernel": name, "architecture": architecture, "constants": constants, "signature": signature, "seconds": seconds},
        **{"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"], "shared": binary.metadata.shared},
        "local_accesses": len(re.findall(r"\b(?:ld|st)\.local", ptx)),
        "tiles": sorted({f"{s} {layouts[n]}" for s, n in re.findall(r"tt\.load .*tensor<(\d+x\d+x[48])x!tt\.ptr<\w+>, (#\w+)>", ir)}),
        "full_vectors": len(re.findall(r"\b(?:ld|st)\.global\S*\.v4\.b32", ptx)),
        "vectors": len(re.findall(r"\b(?:ld|st)\.global\S*\.v[248]\.", ptx)),
    }


def compile_all(folder: Path, architectures=ARCHITECTURES):
    """In a few processes, as scripts: pytest imports test files under names that a spawned process does not know."""
    work = [(entry, architecture) for entry in specialisations() for architecture in architectures]
    processes = []
    for i in range(PROCESSES):
        (folder / f"{i}.json").write_text(json.dumps(work[i::PROCESSES]))
        processes.append(subprocess.Popen([sys.executable, __file__, str(folder / f"{i}.json")], stderr=subprocess.PIPE, text=True))
    results = []
    for i, process in enumerate(processes):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        results += json.loads((folder / f"{i}.out").read_text())
    return results


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    return compile_all(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(binaries, architecture):
    mine = [b for b in binaries if b["architecture"] == architecture]
    assert {b["kernel"] for b in mine} >= {"statistics_kernel", "segments_kernel", "merge_kernel", "gradient_kernel", "policy_kernel"}
    assert {b["kernel"] for b in mine} >= {"lengths_kernel", "loss_rows_kernel", "objective_kernel", "metrics_kernel", "advantages_kernel"}
    assert [b for b in mine if b["stack"] or b["local"] or b["local_accesses"]] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligned_rows_are_read_in_vectors(binaries, architecture):
    """16 bytes at a time. An unaligned row read in vectors of any width would be a misaligned address."""
    walks = [b for b in binaries if b["architecture"] == architecture and "VECTORS" in b["constants"]]
    assert {b["constants"]["VECTORS"] for b in walks} == {True, False}
    for binary in walks:
        assert binary["full_vectors"] > 0 if binary["constants"]["VECTORS"] else binary["vectors"] == 0, binary


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lanes_hold_the_same_columns_in_every_kernel(binaries, architecture):
    """Or a row's bits would depend on whether it is aligned, or split over programs."""
    of = {}
    for binary in binaries:
        if binary["architecture"] == architecture and "DEPTH" in binary["constants"]:
            kernel = "policy" if binary["kernel"] == "policy_kernel" else "statistics"
            tile = (kernel, binary["constants"]["VECTOR"], binary["constants"]["DEPTH"])
            of.setdefault(tile, set()).add(tuple(binary["tiles"]))
    assert len(of) == 2 + 2  # two sizes of logits
    for tile, layouts in of.items():
        assert len(layouts) == 1, (tile, layouts)
        assert len(next(iter(layouts))) == 2, (tile, layouts)  # whole tiles, and a vector a lane where some x may be −inf
        for layout in next(iter(layouts)):
            assert f"sizePerThread = [1, 1, {tile[1]}]" in layout


def test_lengths_and_numbers_are_not_compiled_in():
    """The specialisations of two lengths and two temperatures are the same."""
    for of, flags in ((of_statistics, EVERYTHING), (of_gradient, G_LOGP | G_ENTROPY), (of_policy, G_LOGP | G_ENTROPY)):
        one, other = (
            [specialisation(launch) for launch in of(n, columns, torch.bfloat16, flags)] for n, columns in ((4096, 151936), (999, 32008))
        )
        assert one == other
    short, long = (
        [specialisation(launch) for launch in advantages(torch.float32, rows, eps=eps)] for rows, eps in ((1, 1e-6), (4096, 0.1))
    )
    assert short == long
    for kernel in {launch.kernel for launch in launches(32000, torch.bfloat16)}:
        assert {p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize} <= {"bias"}


def test_rows_without_minus_infinity_have_a_short_loop():
    """Self-certainty costs a sum beside log-prob and entropy, and no test of every logit. With more than 15 instructions a logit an H200
    would be busy for longer than its memory."""
    each = {}
    for what, launch, elements, writes in hot_launches():
        each[what] = hot_loop(cuobjdump(binary_of(specialisation(launch), 90), "-sass"), elements, writes)
    assert len(each) == 5
    for what, (instructions, names) in each.items():
        assert 6 < instructions <= 15, (what, instructions)
        assert names.get("FSEL", 0) <= 4, (what, names)


def report(results):
    for b in sorted(results, key=lambda b: (b["kernel"], b["architecture"], b["signature"].get("logits", ""))):
        flags = " ".join(name for name, value in b["constants"].items() if value is True)
        options = " ".join(
            name for name in ("bias", "mask", "temperatures", "crow") if b["signature"].get(name, "constexpr") != "constexpr"
        )
        print(
            f"{b['kernel']:22} sm_{b['architecture']:<4}{b['signature'].get('logits', ''):6} {b['registers']:4} regs {b['stack']:3} stack "
            f"{b['shared']:6} B shared {b['full_vectors']:3} vectors {b['seconds']:5.1f} s  {flags} | {options}"
        )


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        given = Path(sys.argv[1])
        given.with_suffix(".out").write_text(json.dumps([compile_one(*job) for job in json.loads(given.read_text())]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(compile_all(Path(folder), tuple(map(int, sys.argv[1:])) or ARCHITECTURES))
