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

from urlvr_fast.report import MOST_POINTS, Axis, ReportError, _smooth, _thin, _x_ticks, number, write_report
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
    assert _x_ticks(300) == [0, 100, 200, 300]
    assert _x_ticks(1) == [0, 1]


def test_thinning_keeps_spikes_and_smoothing_keeps_lines() -> None:
    points = [(step, 1.0) for step in range(20_000)]
    points[12_345] = (12_345, 99.0)
    thin = _thin(points)
    assert len(thin) <= MOST_POINTS
    assert (12_345, 99.0) in thin
    assert [step for step, _ in thin] == sorted(step for step, _ in thin)
    smooth = _smooth([(step, 2.0 * step) for step in range(100)])
    assert smooth[50] == (50, pytest.approx(100.0))  # no lag
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
