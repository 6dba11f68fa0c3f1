"""The checks under compute-sanitizer and Nsight Compute, as far as a machine without a GPU can tell: what the tools look at launches every
kernel, with right results, what the tools print is understood, and what is missing is said. The texts have the tools' documented form.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benches.gpu_check import FOUND_WRONG, UNCHECKED, counters, sanitized

ROOT = Path(__file__).resolve().parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

# ---- what the tools look at -------------------------------------------------------------------------------------------------------------

# The emulated machine's `launch`, which notes the name of each kernel and what the function that launches it is an instance of.
NOTING = r"""
#define URLVR_CUDA_ON_CPU
#include "csrc/cuda/device.cuh"
#include <set>
namespace urlvr::cuda {
static std::set<std::string> noted;
template <class... A>
void launch_noted(const char* where, const char* text, const A&... arguments) {
  noted.insert(std::string(text) + " in " + where);
  launch(arguments...);
}
}  // namespace urlvr::cuda
#define launch(...) launch_noted(__PRETTY_FUNCTION__, #__VA_ARGS__, __VA_ARGS__)
#include "harness.cpp"
extern "C" const char* launches_noted() {
  static std::string all;
  all.clear();
  for (const std::string& one : urlvr::cuda::noted) all += one + "\n";
  return all.c_str();
}
"""
SIMULATED = """
import ctypes, importlib, os, subprocess, sys

folder, module, *arguments = sys.argv[1:]
sys.path[:0] = [".", "tests"]
import simulated_gpu

add_kernels = simulated_gpu._add_kernels

def add_noting_kernels(device):
    import cuda_on_cpu  # imports torch

    def build(_):
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-w", "-I.", "-Itests/cuda_on_cpu"]
        if not os.path.exists(out := folder + "/noting.so"):
            subprocess.run(["g++", *flags, folder + "/noting.cpp", "-o", out], check=True)
        return out

    machine = cuda_on_cpu.machine
    cuda_on_cpu.build_harness = build
    cuda_on_cpu.machine = lambda: machine(multiprocessors=4, clusters=1)  # with a Hopper's shared memory
    add_kernels(device)

simulated_gpu._add_kernels = add_noting_kernels
simulated_gpu.install()
import contextlib
import torch

torch.cuda.profiler.profile = contextlib.nullcontext
status = importlib.import_module(module).main(arguments)
library = ctypes.CDLL(folder + "/noting.so")
library.launches_noted.restype = ctypes.c_char_p
open(folder + "/launches", "wb").write(library.launches_noted())
sys.exit(status)
"""


@pytest.fixture(scope="module")
def on_simulated_gpu(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Runs a module's main and returns its JSON and the instances of kernels that were launched: {(name, T, GENERAL)}."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on the PATH: the device cannot be built")

    folder = tmp_path_factory.mktemp("simulated")
    (folder / "noting.cpp").write_text(NOTING)

    def run(module: str, *arguments: str) -> tuple[dict, set[tuple[str, ...]]]:
        (folder / "launches").unlink(missing_ok=True)
        command = [sys.executable, "-c", SIMULATED, str(folder), module, "--run", "--out", str(folder / "out.json"), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        instance = re.compile(r"op, (\w+_kernel)<([^>]*)>(?:.* \[with T = (\w+)(?:; bool GENERAL = (\w+))?)?")
        found = [instance.match(line) for line in (folder / "launches").read_text().splitlines()]
        launched = {(m[1], *(value for part, value in (("T", m[3]), ("GENERAL", m[4])) if part in m[2].split(", "))) for m in found if m}
        return json.loads((folder / "out.json").read_text()), launched

    return run


@pytest.mark.timeout(900)
def test_every_kernel_is_launched_in_every_kind_and_is_right(on_simulated_gpu) -> None:
    found, launched = on_simulated_gpu("benches.gpu_check.sanitized", "--bare")
    assert found["cases"] == found["compared"] == found["of"] == len(list(sanitized.cases()))
    assert found["wrong"] == []
    by_name = {name: {tuple(kind) for other, *kind in launched if other == name} for name, *_ in launched}
    assert list(sanitized.cases())[sanitized.LEAST - 1].columns == sanitized.TOO_LONG
    assert {name: len(kinds) for name, kinds in by_name.items()} == sanitized.kernel_names(["cuda"])
    assert by_name["cluster_kernel"] == {(t, general) for t in ("Bf16", "Fp16", "float") for general in ("true", "false")}


def test_no_kernel_of_the_sources_is_overlooked() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    assert sanitized.kernel_names(["cuda"]).keys() == set(re.findall(r"ROW_KERNEL\([^)]*\)\s*(\w+)\(", sources))
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert sanitized.kernel_names(["triton"]).keys() == set(re.findall(r"def (\w+_kernel)\(", sources))
    assert set().union(*(names for _, _, names in counters.ROWS.values())) <= sanitized.kernel_names(["cuda", "triton"]).keys()


@pytest.mark.timeout(900)
def test_what_takes_place_however_late_it_is_has_every_kernel(on_simulated_gpu) -> None:
    found, launched = on_simulated_gpu("benches.gpu_check.sanitized", "--until", "0")
    assert found["cases"] == sanitized.LEAST < found["of"]
    assert {name: len([one for one in launched if one[0] == name]) for name, *_ in launched} == sanitized.kernel_names(["cuda"])


@pytest.mark.timeout(900)
def test_the_rows_of_the_counters_run(on_simulated_gpu) -> None:
    found, launched = on_simulated_gpu("benches.gpu_check.counters", "--backends", "cuda", "--rows", "8", "--columns", "20003")
    assert [(entry["row"], entry["error"]) for entry in found] == [(row, "") for row in counters.ROWS]
    assert {name for name, *_ in launched} >= {"statistics_kernel", "gradient_kernel", "cluster_kernel", "scale_kernel"}
    assert {name for name, *_ in launched} <= set().union(*(names for _, _, names in counters.ROWS.values()))


CASE = sanitized.Case(torch.float32, 270, (2, 3), True, True)


def right() -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in sanitized.exact(CASE).items()}


def test_a_wrong_number_is_noticed() -> None:
    assert sanitized.differences(CASE, right()) == []
    of_loss = ("lines", "live", "counts", "metrics", "metrics_alone", "row_gradients")
    for name in ("stats", "sums", "policy_stats", "gradient", "gradient_in_place", "policy", "bias_grad", *of_loss):
        for wrong in (0.01, float("nan")):
            got = right()
            got[name].view(-1)[0] += wrong
            assert [line.partition(":")[0] for line in sanitized.differences(CASE, got)] == [name]


def test_a_write_beside_the_rows_is_noticed() -> None:
    got = right()
    view = sanitized.placed(tuple(got["policy"].shape), torch.float32, False)
    got["policy"] = view.copy_(got["policy"])
    assert sanitized.differences(CASE, got) == []
    got = right()
    got["policy"] = view.copy_(got["policy"])
    sanitized.memory_of(view)[0] = 1
    assert sanitized.differences(CASE, got) == ["policy: what lies between the rows was written to"]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", sanitized.DTYPES, ids=str)
def test_memory_of_rows_ends_with_their_last_16_bytes(dtype: torch.dtype, aligned: bool) -> None:
    for shape in ((1, 1, 1), (2, 3, 7), (1, 2, 4099)):
        view = sanitized.placed(shape, dtype, aligned)
        memory = sanitized.memory_of(view)
        view.fill_(1)
        end = int((memory == 1).nonzero()[-1]) + 1
        assert memory.nbytes % 16 == 0
        assert 0 <= len(memory) - end < 16 // dtype.itemsize
        starts = [view[a, b].storage_offset() * dtype.itemsize % 16 for a in range(shape[0]) for b in range(shape[1])]
        assert any(starts) is not aligned


# ---- compute-sanitizer ------------------------------------------------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void urlvr::cuda::gradient_kernel<urlvr::cuda::Bf16, (bool)0>(urlvr::cuda::Rows, urlvr::cuda::GradientPlan)+0x9d0
=========     by thread (37,0,0) in block (2,0,0)
=========     Access to 0x7f1c5be01c40 is out of bounds
=========     and is 49 bytes after the nearest allocation at 0x7f1c5be00000 of size 7,184 bytes
=========
========= Invalid __global__ read of size 16 bytes
=========     at void urlvr::cuda::gradient_kernel<urlvr::cuda::Bf16, (bool)0>(urlvr::cuda::Rows, urlvr::cuda::GradientPlan)+0x9d0
=========     by thread (38,0,0) in block (2,0,0)
=========
========= ERROR SUMMARY: 1,234 errors
========= ERROR SUMMARY: 1214 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void urlvr::cuda::cluster_kernel<float, (bool)0>(urlvr::cuda::Rows)+0x550
=========     and Read access at void urlvr::cuda::cluster_kernel<float, (bool)0>(urlvr::cuda::Rows)+0x580 [32 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
KILLED = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void urlvr::cuda::merge_kernel<float, (bool)1>(urlvr::cuda::Rows, int, urlvr::cuda::Scratch, float *)+0x2a0
=========     by thread (0,0,0) in block (0,0,0)
=========
"""
USAGE = (
    "Usage: compute-sanitizer [options]\n  --tool arg (=memcheck)\n  --kernel-name arg\n  --padding arg (=0)\n  --print-limit arg (=100)\n"
)


def test_logs_are_understood() -> None:
    clean, memcheck, racecheck, killed = map(sanitized.parse_log, (CLEAN, MEMCHECK, RACECHECK, KILLED))
    assert (clean["summary"], clean["errors"], clean["reports"]) == (True, 0, [])
    assert (memcheck["summary"], memcheck["errors"], len(memcheck["reports"])) == (True, 1234, 2)
    assert memcheck["reports"][0].startswith("========= Invalid __global__ read")
    assert memcheck["reports"][0].endswith("of size 7,184 bytes")
    assert (racecheck["errors"], racecheck["warnings"], len(racecheck["reports"])) == (2, 1, 1)
    assert (killed["summary"], killed["errors"]) == (False, 1)
    assert (
        sanitized.parse_log("========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
        == clean
    )
    assert sanitized.parse_log("")["summary"] is False


def test_options_that_a_version_does_not_have_are_left_out() -> None:
    assert sanitized.known_options(USAGE, {"--padding": "256", "--launch-timeout": "60"}) == ["--padding", "256"]
    assert sanitized.known_options("", {"--padding": "256"}) == ["--padding", "256"]  # no help to be had: hope


# In the place of Python, what the child would report; in that of compute-sanitizer, a log, after the child.
FAKE_PYTHON = """#!{python}
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
bare = "--bare" in sys.argv
assert bare or os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
kernels = {{"0": ["cluster_kernel<Bf16, false>", "scale_kernel<Bf16>"], "1": ["twice_kernel<float, true>"]}} if bare else {{}}
json.dump({{"of": 2, "cases": 2, "kernels": kernels, "wrong": {wrong} if bare else [], "compared": 2}}, open(out, "w"))
"""
FAKE_SANITIZER = """#!{python}
import subprocess, sys, time
if sys.argv[1:] in (["--help"], ["--version"]):
    sys.exit(print({usage!r}))
tool = sys.argv[sys.argv.index("--tool") + 1]
assert sys.argv.index("--kernel-name") and "kns=urlvr" in sys.argv and "--launch-timeout" not in sys.argv
assert ("--padding" in sys.argv) == (tool == "memcheck")
log = {logs!r}.get(tool, {clean!r})
if log == "hang":
    time.sleep(60)
if log != "refused":
    subprocess.run(sys.argv[next(i for i, word in enumerate(sys.argv) if word.endswith("python")):], check=True)
open(sys.argv[sys.argv.index("--log-file") + 1], "w").write("========= Device not supported\\n" if log == "refused" else log)
"""


@pytest.fixture
def sanitize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """main() with a compute-sanitizer that gives these logs by tool: (exit status, JSON, text)."""

    def run(logs: dict[str, str] | None = None, wrong: tuple[str, ...] = (), seconds: float = 60.0) -> tuple[int, dict, str]:
        (tmp_path / "python").write_text(FAKE_PYTHON.format(python=sys.executable, wrong=list(wrong)))
        fake = FAKE_SANITIZER.format(python=sys.executable, usage=USAGE, logs=logs or {}, clean=CLEAN)
        (tmp_path / "compute-sanitizer").write_text(fake)
        for name in ("python", "compute-sanitizer"):
            (tmp_path / name).chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
            patch.setattr(sanitized.sys, "executable", str(tmp_path / "python"))
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(sanitized, "available_backends", lambda: {"cuda": "available"})
            status = sanitized.main(["--out", str(tmp_path / "out.json"), "--seconds", str(seconds)])
        return status, json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return run


def test_a_clean_run(sanitize) -> None:
    status, found, text = sanitize()
    assert status == 0
    assert [run["tool"] for run in found["runs"]] == ["bare", "memcheck", "racecheck", "initcheck", "synccheck"]
    assert all(run["ran"] and run["errors"] == 0 and not run["reason"] and len(run["kernels_seen"]) == 3 for run in found["runs"])
    assert "merge_kernel" in found["never_launched"]
    assert "cluster_kernel" not in found["never_launched"]
    assert "never launched: bias_gradient_kernel" in text


def test_what_tools_report_is_counted_and_shown(sanitize) -> None:
    status, found, text = sanitize({"memcheck": MEMCHECK, "racecheck": RACECHECK})
    assert status == FOUND_WRONG
    assert [run["errors"] for run in found["runs"]] == [0, 1234, 2, 0, 0]
    assert "gradient_kernel<urlvr::cuda::Bf16" in text
    status, found, text = sanitize(wrong=("cuda, 1 × 3 × 7: stats: off",))
    assert (status, found["runs"][0]["errors"]) == (FOUND_WRONG, 1)
    assert "stats: off" in text


def test_what_a_tool_known_for_false_alarms_reports_is_not_called_wrong(sanitize) -> None:
    status, found, _ = sanitize({"racecheck": RACECHECK})
    assert (status, found["runs"][2]["errors"]) == (UNCHECKED, 2)
    assert sanitized.exit_status(found | {"version": "Compute Sanitizer\nVersion 2026.1.0.0 (build 1)"}) == FOUND_WRONG
    assert sanitized.exit_status(found | {"version": "Compute Sanitizer\nVersion 2025.3.1.0 (build 1)"}) == UNCHECKED


def test_a_tool_that_is_refused_or_hangs_is_no_clean_tool(sanitize) -> None:
    status, found, text = sanitize(dict.fromkeys(sanitized.TOOLS, "refused"))
    assert status == 2
    assert not any(run["ran"] for run in found["runs"][1:])
    assert "NOT CHECKED: no tool could run: compute-sanitizer refuses this device" in text
    status, found, _ = sanitize(
        {"synccheck": CLEAN[:29] + "========= Target application returned an error\n" + CLEAN[29:].replace("0", "1")}
    )
    assert (status, found["runs"][4]["errors"]) == (UNCHECKED, 1)
    begin = time.monotonic()
    status, found, _ = sanitize({"racecheck": "hang"}, seconds=6)
    assert time.monotonic() - begin < 20
    assert (status, found["runs"][2]["ran"], "--seconds" in found["runs"][2]["reason"]) == (UNCHECKED, False, True)
    assert found["runs"][3]["ran"]


@no_gpu
@pytest.mark.parametrize("tool", [sanitized, counters], ids=["sanitized", "counters"])
def test_what_is_missing_is_said(tool, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "new" / "out.json"
    assert tool.main(["--out", str(out)]) == 2
    assert "NOT" in (said := capsys.readouterr().out)
    assert "nvidia-smi" in said
    assert "nvidia-smi" in json.loads(out.read_text())["reason"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool, "available_backends", lambda: {"cuda": "available", "triton": "available"})
    monkeypatch.setattr(tool, "find_tool", lambda name: None)
    assert tool.main(["--out", str(out)]) == 2
    assert "neither on the PATH" in capsys.readouterr().out
    monkeypatch.setattr(tool, "available_backends", lambda: {"cuda": "not in this build", "triton": "not in this build"})
    assert tool.main(["--out", str(out)]) == 2
    monkeypatch.setattr(tool, "find_tool", lambda name: "/bin/true")
    assert tool.main(["--out", str(out)]) == 2
    assert "not in this build" in capsys.readouterr().out


# ---- Nsight Compute ---------------------------------------------------------------------------------------------------------------------

LOGITS = 8192 * 151936 * 2
HEAD = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size", "Device", "CC"]
COLUMNS = {
    "gpu__time_duration.sum": "ns", "dram__bytes_read.sum": "byte", "dram__bytes_write.sum": "Mbyte",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "%", "sm__warps_active.avg.pct_of_peak_sustained_active": "%",
    "lts__t_sectors_srcunit_tex.sum": "sector", "lts__t_sectors_srcunit_tex_lookup_hit.sum": "sector",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "%", "sm__cycles_elapsed.avg.per_second": "Ghz",
    "launch__registers_per_thread": "register/thread", "launch__shared_mem_per_block": "Kbyte/block",
}  # fmt: skip
# seconds in ns, bytes read, megabytes written, …
CUDA = "void urlvr::cuda::%s<urlvr::cuda::Bf16, 0>(urlvr::cuda::Rows, urlvr::cuda::Plan)"
LAUNCHES = [
    ("statistics_kernel", "600,000", f"{LOGITS:,}", "1.5", "91.25", "60.0", "1,000", "10", "58.5", "1.755", "80", "33.0"),
    ("gradient_kernel", "1,200,000", f"{LOGITS:,}", f"{LOGITS / 1e6:,.6f}", "90.0", "50.0", "1,000", "10", "30.0", "1.7", "96", "0"),
    ("policy_kernel", "1,500,000", f"{1.5 * LOGITS:,.0f}", f"{LOGITS / 1e6:.6f}", "85.0", "25", "1,000", "400", "50", "n/a", "128", "1"),
    ("scale_kernel", "10,000", "4,096", "0", "0.1", "10.0", "1,000", "900", "0.0", "1.7", "24", "0"),
    (CUDA % "statistics_kernel", "590,000", f"{LOGITS:,}", "1.5", "92.0", "60.0", "1,000", "10", "58.5", "1.7", "80", "33.0"),
    (CUDA % "gradient_kernel", "1,190,000", f"{LOGITS:,}", "2,489.3", "90.0", "50.0", "1,000", "10", "30.0", "1.7", "96", "0"),
    (CUDA % "cluster_kernel", "1,210,000", f"{LOGITS:,}", "2,489.3", "89.0", "37.5", "1,000", "10", "50.0", "1.7", "80", "72.7"),
    (CUDA % "scale_kernel", "10,000", "4,096", "0", "0.1", "10.0", "1,000", "900", "0.0", "1.7", "24", "0"),
]  # fmt: skip


def ncu_csv(launches: list[tuple[str, ...]]) -> str:
    def line(values) -> str:
        return ",".join(f'"{value}"' for value in values)

    rows = [line([*HEAD, *COLUMNS]), line([""] * len(HEAD) + list(COLUMNS.values()))]
    for i, (kernel, *values) in enumerate(launches):
        rows.append(line([i, 77, "python3", "127.0.0.1", kernel, 1, 7, "(256, 1, 1)", "(8192, 1, 1)", 0, "9.0", *values]))
    return '==PROF== Connected to process 77 (/usr/bin/python3)\n==PROF== Profiling "x": 0%....100% - 5 passes\n' + "\n".join(rows) + "\n"


def entries(**changed: dict) -> list[dict]:
    found = [{"backend": b, "row": row, "error": ""} for b in ("triton", "cuda") for row in counters.ROWS]
    return [entry | changed.get(entry["backend"], {}) for entry in found]


def test_the_csv_is_understood() -> None:
    launches = counters.parse_csv(ncu_csv(LAUNCHES))
    assert [launch["kernel"] for launch in launches] == [launch[0] for launch in LAUNCHES]
    first = launches[0]
    assert (first["seconds"], first["read"], first["written"]) == pytest.approx((6e-4, LOGITS, 1.5e6))
    assert (first["dram"], first["xu"], first["registers"], first["shared"]) == (91.25, 58.5, 80, 33e3)
    assert launches[2]["clock"] is None
    assert counters.parse_csv("==ERROR== nothing") == counters.parse_csv("") == []


def test_launches_find_their_rows() -> None:
    launches = counters.parse_csv(ncu_csv(LAUNCHES))
    rows = counters.by_row(launches, entries(), LOGITS)
    assert [[one["kernel"] for one in row["kernels"]] for row in rows[2::3]] == [
        ["policy_kernel", "scale_kernel"],
        [CUDA % "cluster_kernel", CUDA % "scale_kernel"],
    ]
    assert rows[0]["bandwidth"] == pytest.approx((LOGITS + 1.5e6) / 6e-4)
    assert rows[2]["seconds"] == pytest.approx(1.51e-3)
    assert rows[2]["read"] / rows[2]["floor_read"] == pytest.approx(1.5, rel=1e-4)
    assert not any(row["error"] for row in rows)
    # What a backend has not done is not taken from the other.
    rows = counters.by_row(launches[4:], entries(triton={"error": "it broke"}), LOGITS)
    assert [row["error"] for row in rows] == ["it broke"] * 3 + [""] * 3
    assert counters.by_row(launches[:4], entries(), LOGITS)[3]["error"] == "ncu has no launch of it"


FAKE_NCU = """#!{python}
import json, sys
word = lambda option: sys.argv[sys.argv.index(option) + 1]
assert (word("--clock-control"), word("--page"), word("--profile-from-start")) == ("none", "raw", "off")
metrics = word("--metrics").split(",")
json.dump({entries!r}, open(word("--out"), "w"))
missing = [metric for metric in {missing!r} if metric in metrics]
open(word("--log-file"), "w").write("==ERROR== Failed to find metric " + missing[0] if missing else {log!r})
"""


@pytest.fixture
def count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def run(log: str, missing: tuple[str, ...] = ()) -> tuple[int, dict, str]:
        fake = tmp_path / "ncu"
        fake.write_text(FAKE_NCU.format(python=sys.executable, entries=entries(), missing=missing, log=log))
        fake.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(counters, "available_backends", lambda: {"cuda": "available", "triton": "available"})
            status = counters.main(["--out", str(tmp_path / "out.json")])
        return status, json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return run


def test_counters_become_a_table(count) -> None:
    status, found, text = count(ncu_csv(LAUNCHES))
    assert (status, len(found["rows"]), len(found["launches"])) == (0, 6, 8)
    line = next(line for line in text.splitlines() if line.startswith("triton: policy loss"))
    assert line.split()[-14:-10] == ["1.510", "1.500", "1.000", f"{(2.5 * LOGITS + 4096) / 1.51e-3 / 1e12:.2f}"]
    assert line.split()[-10:] == ["85", "25", "–", "50", "–", "–", "–", "40", "128", "1"]


def test_one_metric_that_is_not_there_does_not_cost_the_others(count) -> None:
    gone = "lts__t_sectors_srcunit_tex.sum"
    status, found, _ = count(ncu_csv(LAUNCHES), (gone,))
    assert status == 0
    assert gone not in found["metrics"]
    assert len(found["metrics"]) == len(counters.METRICS) - 1


def test_counters_that_cannot_be_read_are_said(count) -> None:
    status, _, text = count("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n")
    assert status == 2
    assert "NOT READ: no permission for the counters (ERR_NVGPUCTRPERM): run as root" in text
    status, _, text = count("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n")
    assert (status, "LibraryNotLoaded" in text) == (2, True)
    status, _, text = count("==ERROR== An error nobody knows\n")
    assert (status, "An error nobody knows" in text) == (2, True)
    status, _, text = count(ncu_csv(LAUNCHES[:7]).replace("cluster_kernel", "x_kernel"))
    assert status == 1
    assert "ncu has no launch of it" in text
