"""`report.html`: from runs that RunLog wrote, read as HTML and opened in a real browser."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from urlvr_fast.monitor.detectors import Detection
from urlvr_fast.report import ReportError, write_report
from urlvr_fast.report.drawing import MOST_POINTS, Axis, smooth, thin, x_ticks
from urlvr_fast.report.text import number
from urlvr_fast.trainer.logging import RunLog

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\"&\x1b[31m\u202e\udc80"


def make_run(
    path: Path, *, steps: int = 60, reward: str = "majority_voting", labels: bool = True, offset: float = 0.0, seed: int = 0
) -> Path:
    path.mkdir(parents=True)
    config = {"model": "bundled", "data": HOSTILE, "reward": reward, "seed": seed, "trainer": {"steps": steps, "lr": 1e-4}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    with RunLog(path, total_steps=steps, live="off") as log:
        log.warn(0, f"a warning {HOSTILE}")
        for step in range(steps + 1):
            share = 0.5 + 0.4 * step / max(steps, 1)
            values: dict[str, Any] = {"eval/greedy_accuracy": share, "eval/maj@8": share} if step % 20 == 0 else {}
            if step:
                values |= {"reward": share + offset, "majority_ratio": share, "actor_entropy": 1 - share, "response_length": 8.0}
                values |= {"logp_gap_max": 10.0 ** -(5 + step % 3), "grad_norm": math.nan if step == 3 else 0.5, "truncated_rate": 0.0}
                values |= {"rollout_tokens_per_s": 5000.0, "train_tokens_per_s": 8000.0}
            if step and labels:
                values |= {"ground_truth_reward": share / 2, "reward_accuracy": 0.005 if step == 50 else 0.7, "label_accuracy": 0.8}
            log.metrics(step, values)
            if step and step % 10 == 0:
                log.samples(step, [sample(step, b, labels) for b in range(8)])
        log.summary({"before_after": [{"metric": "avg@8", "before": 0.5, "after": 0.75}], "timing": {"training_s": 90.0}})
    return path


FIRED = {  # the last is unknown to this version
    "anchor_drift": Detection(30, "anchor_drift", "stop", 0.2, 0.3, f"anchor_drift: eval/anchored_majority is 0.2, below 0.3 {HOSTILE}"),
    "kl_spike": Detection(20, "kl_spike", "warn", 1.0, 0.1, "kl_spike: kl_start is 1, above 0.1"),
    "not_yet_invented": Detection(10, "not_yet_invented", "pray", 1.0, 0.1, "something rose"),
}


def make_collapsing_run(path: Path, *, steps: int = 40, fall: int = 20, labels: bool = True, continuous: bool = False) -> Path:
    """Reward Accuracy is 0.7 up to step `fall` and 0.2 after it: windowed, it is below 0.25 from step `fall` + 5."""
    path.mkdir(parents=True)
    reward = "self_certainty" if continuous else "majority_voting"
    (path / "config.yaml").write_text(yaml.safe_dump({"reward": reward, "trainer": {"steps": 60}}))
    with RunLog(path, total_steps=60, live="off") as log:
        for step in range(steps + 1):
            values: dict[str, Any] = {"eval/greedy_accuracy": 0.5} if step % 10 == 0 else {}
            if values:
                values |= {"eval/anchor_agreement": 1 - step / 50, "eval/anchored_majority": 0.5 - step / 100}
            if step:
                values |= {"reward": 12.0 if continuous else 0.8, "majority_ratio": 0.6 + step / 100, "top_answer_share": 0.25 + step / 100}
                values |= {"flat_groups": step / 80, "repetition": step / 200, "actor_entropy": 1 / step}
            if step == 1 or (step and step % 10 == 0):
                values["kl_start"] = step / 20
            if step and labels:
                accuracy = 0.7 if step <= fall else 0.2
                values |= {"ground_truth_reward": 0.3, "majority_reward_accuracy": accuracy}
                values |= {} if continuous else {"reward_accuracy": accuracy}
            log.metrics(step, values)
        for detection in FIRED.values():
            log.detect(detection)
        log.status("stopped", f"step {steps}, {FIRED['anchor_drift'].message}")
    return path


def sample(step: int, b: int, labels: bool) -> dict[str, Any]:
    return {
        "prompt_id": b // 4,
        "group": b // 4,
        "prompt": f"prompt of step {step}: 1+1= {HOSTILE}",
        "completion": f"completion {b} {HOSTILE}",
        "answer": HOSTILE if b else None,
        "class": b % 2 if b else None,
        "in_majority": b % 2 == 1,
        "reward": float(b % 2),
        "advantage": 0.25,
        "correct": bool(b % 3) if labels else None,
        "finish_reason": "length" if b == 2 else "stop",
        "length": 7,
    }


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and keeps what the tests ask for."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def titles(self) -> list[str]:
        return re.findall(r"<h3>(.*?)</h3>", self.source)


def test_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = write_report([run])
    assert path == run / "report.html"
    page = Page(path)
    for text in ("Finished at step 60 of 60", "bundled", "0.0001", "5,000 tokens/s", "Model Collapse Step 50", "training 1 min 30 s"):
        assert text in page.text, text
    assert "avg@8 0.500 0.750 ▲ +0.25".replace("0.500", "0.5").replace("0.750", "0.75") in page.text
    assert {"Reward", "Accuracy of the reward", "Evaluation", "Entropy", "Response length", "Log-prob gap", "Gradient norm"} <= set(
        page.titles()
    )
    assert [s for s in re.findall(r"<summary>(Step \d+)</summary>", page.source)] == ["Step 10", "Step 40", "Step 60"]
    assert "majority_voting = majority ratio" in page.text  # equal lines are one, not one hidden under the other
    assert "✓ right" in page.text
    assert "cut off" in page.text
    assert page.text.index("Resolved configuration") > page.text.index("Sampled rollouts")


def test_nothing_is_fetched_and_nothing_hostile_is_markup(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run")]))
    assert not re.search(r"https?://|//[a-z0-9.-]+\.[a-z]{2,}/|@import|url\(", page.source)
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe", "object", "base", "form")
        assert not {"src", "href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["application/json", None]
    assert "&lt;script&gt;window.pwned=1&lt;/script&gt;" in page.source
    assert "\x1b" not in page.source
    assert "\u202e" not in page.source
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_a_hostile_run_name(tmp_path: Path) -> None:
    name = "<script>window.pwned=1<&'\""
    runs = [make_run(tmp_path / name, steps=2), make_run(tmp_path / "b" / name, steps=2)]
    page = Page(write_report(runs, tmp_path / "report.html"))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert f"b/{name}" in page.text


def test_the_paths_are_svg_and_hold_every_point(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run")]))
    drawings = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.source, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert len(drawings) == len(data["charts"]) == page.source.count("<figure>")
    for drawing in drawings:
        paths = [p for p in ElementTree.fromstring(drawing).iter("path") if p.get("class") != "grid"]
        assert paths
        for path in paths:
            assert not re.search(r"nan|inf", path.get("d", ""))
    rewards = data["charts"][0]["series"][0]
    assert data["steps"][rewards["steps"]] == list(range(1, 61))
    assert rewards["values"][-1] == 0.9
    gradient = data["charts"][page.titles().index("Gradient norm")]["series"][0]
    assert 3 not in data["steps"][gradient["steps"]]  # the NaN


def test_two_runs_are_overlaid(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a" / "run", seed=1)
    second = make_run(tmp_path / "b" / "run", steps=40, labels=False, seed=2)
    path = write_report([first, second], tmp_path / "out" / "both.html")
    assert path == tmp_path / "out" / "both.html"
    page = Page(path)
    assert {"Reward: majority_voting", "Reward: ground truth", "Evaluation: greedy accuracy", "Entropy"} <= set(page.titles())
    figures = dict(zip(page.titles(), re.findall(r"<figure>.*?</figure>", page.source, re.DOTALL), strict=False))
    assert figures["Entropy"].count('class="line ') == 2
    assert figures["Reward: ground truth"].count('class="line ') == 1
    assert re.findall(r"<li><i class=\"key c\d\"></i><span>(.*?)</span>", figures["Entropy"]) == ["a/run", "b/run"]
    differences = page.text[page.text.index("Options that differ") :]
    assert "seed 1 2" in differences
    assert "trainer.steps 60 40" in differences


def test_a_proxy_on_another_scale_has_its_own_chart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", reward="self_certainty", offset=12.0, labels=False)
    page = Page(write_report([run]))
    assert "Proxy reward: self_certainty" in page.titles()
    assert "Accuracy of the reward" not in page.titles()  # no labels
    assert "never sees" not in page.text
    assert "Model Collapse Step" not in page.text


def test_runs_without_metrics_and_torn_ones_say_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    with pytest.raises(ValueError, match="boom"), RunLog(empty, total_steps=5, live="off"):
        raise ValueError("boom")
    page = Page(write_report([empty]))
    assert "Failed before the first step: ValueError: boom." in page.text
    assert "nothing to draw" in page.text
    assert "<figure>" not in page.source

    torn = make_run(tmp_path / "torn", steps=10)
    for name in ("metrics.jsonl", "samples.jsonl"):
        data = (torn / name).read_bytes()
        (torn / name).write_bytes(data[: len(data) - 20])
    page = Page(write_report([torn]))
    assert "1 unreadable line(s) of metrics.jsonl" in page.text
    assert "1 unreadable line(s) of samples.jsonl" in page.text
    assert "<figure>" in page.source
    (torn / "metrics.jsonl").unlink()
    assert "nothing to draw" in Page(write_report([torn, empty])).text


def figures_of(page: Page) -> dict[str, str]:
    figures = re.findall(r"<figure>.*?</figure>", page.source, re.DOTALL)
    return {re.findall(r"<h3>(.*?)</h3>", figure)[0]: figure for figure in figures}


def collapse_rows(page: Page) -> dict[str, list[str]]:
    """Threshold or proxy -> the cells of its row in the first table of collapse steps."""
    table = re.search(r'<table class="steps">.*?</table>', page.source, re.DOTALL)
    assert table is not None
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[ >].*?</tr>", table.group())]
    return {re.sub("<.*?>", "", name): cells for name, *cells in rows[1:]}


def test_every_signal_has_a_chart_and_an_explanation(tmp_path: Path) -> None:
    figures = figures_of(Page(write_report([make_collapsing_run(tmp_path / "run")])))
    for title, explanation, last in (
        ("KL to the start model", "k3, nats per token", 2.0),
        ("Anchor agreement", "clear votes that greedy answers still give", 0.2),
        ("Most common answer", "one and the same answer wins", 0.65),
        ("Repetition", "Share of 4-grams", 0.2),
        ("Flat groups", "rewards are all alike", 0.5),
        ("Accuracy of the reward", "Reward Accuracy = that of the majority vote", 0.2),
    ):
        assert explanation in figures[title], title
        assert f"<b>{number(last)}</b>" in figures[title], title
    assert "dots" in figures["KL to the start model"]  # few measurements are marked, not smoothed
    assert "anchor" not in figures["Evaluation"]
    assert "majority_voting" in figures["Reward"]
    assert "ground truth" in figures["Reward"]


def test_the_truth_stands_next_to_a_proxy_on_another_scale(tmp_path: Path) -> None:
    page = Page(write_report([make_collapsing_run(tmp_path / "run", continuous=True)]))
    assert page.titles()[:2] == ["Proxy reward: self_certainty", "Other rewards of the same rollouts"]
    assert "ground truth <b>0.3</b>" in re.sub("</?span>", "", figures_of(page)["Other rewards of the same rollouts"])


def test_the_collapse_step(tmp_path: Path) -> None:
    page = Page(write_report([make_collapsing_run(tmp_path / "run")]))
    never = "not reached by step 40"
    rows = collapse_rows(page)
    assert rows["MCS below 0.01"] == [never] * 3
    assert rows["MCS_0.1 below 0.1"] == [never] * 3
    assert rows["MCS_0.25 below 0.25"] == ["21", "25", "21"]
    assert rows["MCS_half below 0.35"] == ["21", "24", "21"]
    assert rows["Proxy without answers unanimity_step: the winning answers hold 99 % of the rollouts"] == ["39"]
    assert rows["Proxy without answers one_answer_step: one answer wins half of the prompts"] == ["25"]
    assert "Computed from the Reward Accuracy of the reward that is trained on; it needs answers." in page.text
    assert "The charts mark MCS_0.25, windowed, at step 25." in page.text
    for title, figure in figures_of(page).items():  # 25 of 40 steps
        assert figure.count('class="mark alone" style="left:62.50%" title="MCS_0.25 (windowed) at step 25"') == 1, title


def test_the_collapse_step_of_a_continuous_reward_is_the_votes(tmp_path: Path) -> None:
    page = Page(write_report([make_collapsing_run(tmp_path / "run", continuous=True)]))
    assert collapse_rows(page)["MCS_0.25 below 0.25"] == ["21", "25", "21"]
    assert "Computed from the Reward Accuracy of the majority vote on the same rollouts" in page.text


def test_without_answers_there_are_only_proxies(tmp_path: Path) -> None:
    page = Page(write_report([make_collapsing_run(tmp_path / "run", labels=False)]))
    rows = collapse_rows(page)
    assert len(rows) == 2
    assert all(name.startswith("Proxy without answers") for name in rows)
    assert "No answers were logged" in page.text
    assert "MCS" not in page.text
    assert 'class="mark' not in page.source


def test_a_collapse_step_that_cannot_be_told(tmp_path: Path) -> None:
    run = make_collapsing_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    lines[7] |= {"reward_accuracy": None, "majority_reward_accuracy": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report([run]))
    assert "Reward Accuracy was not logged in every step" in page.text
    assert 'class="mark' not in page.source
    lines[7] |= {"reward_accuracy": 7.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "The collapse step cannot be told: Reward Accuracy is a share" in Page(write_report([run])).text


def test_what_the_detectors_found(tmp_path: Path) -> None:
    page = Page(write_report([make_collapsing_run(tmp_path / "run")]))
    listed = re.findall(r"<li>(.*?)</li>", page.source[page.source.index('id="detections"') : page.source.index("Key facts")])
    listed = [re.sub("<.*?>", "", item) for item in listed]
    assert len(listed) == 3
    assert listed[0].startswith("step 30 anchor_drift eval/anchored_majority is 0.2, below 0.3")
    assert listed[0].endswith("→ the run was stopped")
    assert listed[1] == "step 20 kl_spike kl_start is 1, above 0.1 → a warning; the run went on"
    assert listed[2] == "step 10 not_yet_invented something rose → pray"
    figures = figures_of(page)
    for title, figure in figures.items():
        ticks = re.findall(r'<i class="tick alone" style="left:calc\((.*?)%.*?" title="(\w+) at step', figure)
        expected = {"Anchored majority": [("75.00", "anchor_drift")], "KL to the start model": [("50.00", "kl_spike")]}
        assert ticks == expected.get(title, []), title
    assert "kl_spike at step 20</li>" in figures["KL to the start model"]  # legible without a pointer
    assert "detector kl_spike at step 20" in figures["KL to the start model"]


def test_why_a_run_was_stopped_stands_at_its_top(tmp_path: Path) -> None:
    text = Page(write_report([make_collapsing_run(tmp_path / "run")])).text
    reason = "step 40, anchor_drift: eval/anchored_majority is 0.2, below 0.3"
    assert re.search(r"■ stopped Stopped at step 40 of 60 after [\d.]+ s: " + re.escape(reason), text)
    assert text.index(reason) < text.index("Detectors that fired")


def test_collapse_and_detections_of_overlaid_runs(tmp_path: Path) -> None:
    first, second = make_collapsing_run(tmp_path / "first"), make_collapsing_run(tmp_path / "second", fall=10)
    plain, unlabelled = make_run(tmp_path / "plain"), make_run(tmp_path / "unlabelled", labels=False)
    limited = make_collapsing_run(tmp_path / "limited", fall=40)
    info = json.loads((limited / "run.json").read_text())
    (limited / "run.json").write_text(json.dumps(info | {"reason": "trainer.stop_after=40"}))
    page = Page(write_report([first, second, plain, unlabelled, limited], tmp_path / "report.html"))
    facts = page.text[page.text.index("Key facts") : page.text.index("Before and after")]
    assert (
        "Collapse step 25 (MCS_0.25, windowed) 15 (MCS_0.25, windowed) not reached by step 60 unknown: no answers not reached by step 40"
        in facts
    )
    assert "Stopped by anchor_drift anchor_drift – – trainer.stop_after=40" in facts
    figures = figures_of(page)
    entropy = figures["Entropy"]
    marks = re.findall(r'class="mark (c\d)" style="left:(.*?)%" title="(\w+)', entropy)
    assert marks == [("c0", "41.67", "first"), ("c1", "25.00", "second")]
    assert re.findall(r'<i class="tick (c\d)" style', figures["KL to the start model"]) == ["c0", "c1", "c4"]
    assert 'class="tick' not in entropy
    assert "second: kl_spike at step 20</li>" in figures["KL to the start model"]


@pytest.mark.parametrize(
    "damage",
    [
        {"detections": None, "warnings": None, "reason": None},
        {"detections": "no", "warnings": {"step": 1}, "resumed": 3, "versions": [], "command": 7},
        {"detections": [None, 3, {}, {"step": "9", "detector": None, "action": [], "value": "x", "limit": {}, "message": 3}]},
        {"detections": [{"step": 10**9, "detector": "kl_spike"}, {"step": -3, "detector": "kl_spike"}, {"detector": "anchor_drift"}]},
        {"detections": [{"step": True, "detector": "kl_spike", "value": None, "message": None}], "warnings": [None, "x", {}]},
    ],
)
@pytest.mark.parametrize("overlaid", [False, True])
def test_damaged_fields_do_not_break_the_page(tmp_path: Path, damage: dict[str, Any], overlaid: bool) -> None:
    run = make_collapsing_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text()) | damage
    (run / "run.json").write_text(json.dumps(info))
    (run / "summary.json").write_text(json.dumps({"before_after": [None, {"metric": "a", "before": "x", "after": None}], "timing": [1]}))
    with (run / "metrics.jsonl").open("a") as file:
        broken = '"kl_start": NaN, "reward": Infinity, "repetition": "x", "flat_groups": null, "wall_s": []'
        file.write(f'{{"step": 41, {broken}, "actor_entropy": {10**400}}}\n')
    (run / "samples.jsonl").write_text('{"step": [1]}\n{"step": 3}\n')
    page = Page(write_report([run, make_run(tmp_path / "other", steps=3)] if overlaid else [run]))
    assert "KL to the start model" in page.titles()
    assert 'class="tick' not in page.source  # nothing that can be placed is left


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_very_short_runs(tmp_path: Path, steps: int) -> None:
    assert "Evaluation" in Page(write_report([make_run(tmp_path / "run", steps=steps)])).titles()


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no run directory"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(ReportError, match=r"not a run directory: it has no run\.json"):
        write_report([tmp_path])
    with pytest.raises(ReportError, match="1 to 8 runs, not 0"):
        write_report([])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ReportError, match="not valid JSON"):
        write_report([tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_axes() -> None:
    assert Axis.of([0.62, 0.93], "linear").ticks == (0.6, 0.7, 0.8, 0.9, 1.0)
    flat = Axis.of([0.5, 0.5], "linear")
    assert flat.low <= 0.4
    assert flat.high >= 0.6
    gap = Axis.of([0.0, 3e-7, 2e-5], "log")
    assert gap.ticks == pytest.approx((1e-7, 1e-6, 1e-5, 1e-4))
    assert gap.y(0.0) == gap.y(1e-7) == 300
    assert Axis.of([1.0] * 50 + [1000.0], "spiky").log
    assert not Axis.of([1.0] * 50 + [2.0], "spiky").log
    for values in ([0.0], [-5.0, -4.9], [1e9, 2e9], [-0.1, 0.1], [0.0, 0.0]):
        axis = Axis.of(values, "linear")
        assert axis.low <= min(values)
        assert axis.high >= max(values)
        assert 2 <= len(axis.ticks) <= 7
        assert all(0 <= axis.y(v) <= 300 for v in values)
    assert x_ticks(300) == [0, 100, 200, 300]
    assert x_ticks(1) == [0, 1]


def test_thinning_keeps_spikes_and_smoothing_keeps_lines() -> None:
    points = [(step, 1.0) for step in range(20_000)]
    points[12_345] = (12_345, 99.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert (12_345, 99.0) in kept
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    line = smooth([(step, 2.0 * step) for step in range(100)])
    assert line[50] == (50, pytest.approx(100.0))  # no lag
    assert number(1234.5) == "1,234"
    assert number(2e-6) == "2.0e-06"
    assert number(None) == "–"


# ---- in a browser ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
    for switch in (*switches.split(), "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


def open_page(browser: Any, path: Path, width: int) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("runs", [1, 2])
def test_in_a_browser(browser: Any, tmp_path: Path, width: int, runs: int) -> None:
    directories = [make_run(tmp_path / f"run-{i}-with-a-name-that-is-far-too-long-for-a-telephone", seed=i) for i in range(runs)]
    open_page(browser, write_report(directories), width)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.pwned") is None
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => [...s.querySelectorAll('.line')].map(p => p.getTotalLength()))"
    )
    assert boxes
    assert all(lengths and min(lengths) > 0 for lengths in boxes)


def test_reading_values_under_the_pointer(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    open_page(browser, write_report([make_run(tmp_path / "run")]), 1200)
    figures = browser.find_elements(By.TAG_NAME, "figure")
    reward, evaluation = figures[0], next(f for f in figures if f.find_element(By.TAG_NAME, "h3").text == "Evaluation")
    plot = reward.find_element(By.CLASS_NAME, "plot")

    def frame() -> tuple[str, str]:
        browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        return reward.find_element(By.CLASS_NAME, "at").text, reward.find_element(By.CSS_SELECTOR, ".legend b").text

    assert frame() == ("last", "0.9")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    ActionChains(browser).move_to_element(plot).perform()
    assert frame() == ("step 30", "0.7")
    assert evaluation.find_element(By.CLASS_NAME, "at").text in ("step 20", "step 40")  # the measurement nearest to it
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h2")).perform()
    assert frame()[0] == "last"
    plot.send_keys(Keys.ARROW_LEFT)
    plot.send_keys(Keys.ARROW_LEFT)
    assert frame()[0] == "step 59"
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("runs", [1, 8])
def test_markers_can_be_seen(browser: Any, tmp_path: Path, width: int, scheme: str, runs: int) -> None:
    fall = 35 if runs == 1 else 20  # the first marker stands at the right edge, where its label must not leave the chart
    name = "with-a-name-that-is-far-too-long-for-a-telephone"
    directories = [make_collapsing_run(tmp_path / f"run-{i}-{name}", fall=fall) for i in range(runs)]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    open_page(browser, write_report(directories), width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.pwned") is None
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    charts = browser.execute_script(
        """const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]; };
        return [...document.querySelectorAll("figure")].map(figure => {
          const all = query => [...figure.querySelectorAll(query)];
          return {title: figure.querySelector("h3").textContent, figure: box(figure), plot: box(figure.querySelector(".plot")),
            card: getComputedStyle(figure).backgroundColor, xs: all(".x").map(box),
            marks: all(".mark").map(m => [box(m), getComputedStyle(m, "::before").borderLeftWidth, getComputedStyle(m).color]),
            labels: all(".label").map(l => [box(l), l.textContent]),
            ticks: all(".plot .tick").map(t => [box(t), getComputedStyle(t).borderBottomColor])};
        });"""
    )
    for chart in charts:
        left, right, top, bottom = chart["plot"]
        assert len(chart["marks"]) == len(chart["labels"]) == runs
        for (mark_left, mark_right, mark_top, mark_bottom), stroke, colour in chart["marks"]:
            assert (mark_left + mark_right) / 2 == pytest.approx(left + (fall + 5) / 40 * (right - left), abs=1.5)
            assert (mark_top, mark_bottom) == pytest.approx((top, bottom), abs=1)
            assert float(stroke.removesuffix("px")) >= 1
            assert difference(colour, chart["card"]) > 150
        for (label_left, label_right, _, label_bottom), text in chart["labels"]:
            assert text == "MCS_0.25"
            assert left < label_left < label_right < chart["figure"][1]
            assert label_bottom < bottom
        assert len({label[0][2] for label in chart["labels"]}) == runs  # none lies on another
        watched = {"KL to the start model": 0.5, "Anchored majority": 0.75}
        assert len(chart["ticks"]) == (runs if chart["title"] in watched else 0)
        for index, ((tick_left, tick_right, tick_top, tick_bottom), colour) in enumerate(chart["ticks"]):
            assert tick_left + 5 == pytest.approx(left + watched[chart["title"]] * (right - left) + 4 * index, abs=1.5)
            assert tick_right - tick_left == pytest.approx(10, abs=1)
            assert bottom - 1 <= tick_top < tick_bottom <= min(label[2] for label in chart["xs"]) + 1  # between the axis and its labels
            assert difference(colour, chart["card"]) > 150
    table = browser.execute_script(
        "const b = document.querySelector('table.steps').getBoundingClientRect(); return [b.width, b.right, window.innerWidth]"
    )
    assert table[0] > 200
    assert table[1] <= table[2]  # the table of collapse steps needs no scrolling


def difference(colour: str, background: str) -> int:
    """How far apart two opaque CSS colours are, from 0 to 765."""
    (a, b) = ([int(part) for part in re.findall(r"\d+", one)] for one in (colour, background))
    assert len(a) == len(b) == 3
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def test_markers_say_what_they_are_and_let_the_pointer_through(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    open_page(browser, write_report([make_collapsing_run(tmp_path / "run")]), 1200)
    figure = next(f for f in browser.find_elements(By.TAG_NAME, "figure") if f.find_element(By.TAG_NAME, "h3").text == "Entropy")
    mark = figure.find_element(By.CLASS_NAME, "mark")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", mark)
    ActionChains(browser).move_to_element(mark).perform()
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert figure.find_element(By.CLASS_NAME, "at").text == "step 25"
    hit = "const b = arguments[0].getBoundingClientRect(); return document.elementFromPoint((b.left + b.right) / 2, b.bottom - 2)?.title"
    assert browser.execute_script(hit, mark) == "MCS_0.25 (windowed) at step 25"
    tick = browser.find_element(By.CSS_SELECTOR, ".plot .tick[title^=kl_spike]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", tick)
    assert browser.execute_script(hit, tick) == "kl_spike at step 20: kl_start is 1, above 0.1"
    assert browser.get_log("browser") == []


def test_dark_and_light(browser: Any, tmp_path: Path) -> None:
    path = write_report([make_run(tmp_path / "run", steps=2)])
    seen = {}
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        open_page(browser, path, 1200)
        colours = browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        seen[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert seen["light"][0] > 700 > 200 > seen["light"][1]
    assert seen["dark"][0] < 100 < 600 < seen["dark"][1]
