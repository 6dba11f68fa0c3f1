"""The style sheet and the script of the page."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --text: #1d1d1b; --dim: #63635e; --rule: #e3e2dd; --grid: #ecece7;
  --good: #0a6b2d; --bad: #b3261e; --warn-edge: #d99100; --warn: #fff8e6;
  --c0: #2a78d6; --c1: #d9571c; --c2: #12906a; --c3: #b98000; --c4: #c8528a; --c5: #3f7d00; --c6: #5b48c2; --c7: #cf3a3a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #141413; --card: #1d1d1b; --text: #ecebe6; --dim: #a3a29a; --rule: #34342f; --grid: #2b2b27;
  --good: #62c98a; --bad: #ff8f85; --warn-edge: #d99100; --warn: #2a2313;
  --c0: #5b9df0; --c1: #f0854f; --c2: #3fc195; --c3: #dba935; --c4: #e884b4; --c5: #8bc34a; --c6: #a799f5; --c7: #f27a7a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1, h2, h3, p, ul, dl, dd, figure { margin: 0; padding: 0; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; } h3 { font-size: 15px; font-weight: 600; overflow-wrap: anywhere; }
.over { font-size: 13px; color: var(--dim); margin-bottom: 4px; }
.dim { color: var(--dim); font-size: 13px; font-weight: 400; }
.status { margin-top: 10px; overflow-wrap: anywhere; }
.pill { display: inline-block; border: 1px solid currentColor; border-radius: 999px; padding: 0 10px; font-size: 13px; font-weight: 600;
  margin-right: 4px; white-space: nowrap; }
.finished { color: var(--good); } .failed { color: var(--bad); } .running { color: var(--c0); } .interrupted, .stopped { color: var(--c3); }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-edge); border-radius: 6px; padding: 12px 16px; margin-top: 20px; }
.warnings h2 { margin: 0 0 4px; font-size: 15px; } .warnings ul { list-style: none; }
.warnings li { overflow-wrap: anywhere; unicode-bidi: isolate; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.facts div { outline: 1px solid var(--rule); padding: 10px 14px; } .facts dt { font-size: 13px; color: var(--dim); }
.facts dd { font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } .tables { display: flex; flex-wrap: wrap; gap: 24px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; font-weight: 400; }
tr:first-child > th { color: var(--dim); font-size: 13px; } td { overflow-wrap: anywhere; }
.numbers td, .numbers tr:first-child > th:not(:first-child) { text-align: right; white-space: nowrap; padding: 6px 0 6px 28px; }
.numbers td:nth-child(3) { font-weight: 600; }
details { margin-top: 12px; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); padding: 0 16px; }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; font-size: 14px; } details[open] { padding-bottom: 14px; }
pre { margin: 0; overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px 10px; min-width: 0;
  display: flex; flex-direction: column; }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
.head { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; } .at { white-space: nowrap; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 6px; font-size: 13px; color: var(--dim); }
.legend li { overflow-wrap: anywhere; } .legend b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums; }
figcaption { flex: 1; }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: currentColor; vertical-align: middle;
  margin-right: 6px; }
.plot { position: relative; height: 190px; margin: 14px 6px 24px 42px; outline-offset: 6px; touch-action: pan-y; cursor: crosshair; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; stroke: currentColor; }
.grid { stroke: var(--grid); stroke-width: 1; } .raw { stroke-width: 1; opacity: .35; } .line { stroke-width: 2; }
.dots { stroke-width: 7; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.plot span { position: absolute; font-size: 12px; line-height: 1; color: var(--dim); font-variant-numeric: tabular-nums;
  pointer-events: none; }
.y { right: 100%; margin-right: 8px; transform: translateY(-50%); white-space: nowrap; }
.x { top: 100%; margin-top: 8px; transform: translateX(-50%); }
.cursor { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--dim); pointer-events: none; }
.cursor i { position: absolute; width: 9px; height: 9px; margin: -5px 0 0 -5px; border-radius: 50%; background: currentColor;
  border: 1px solid var(--card); }
.mark { position: absolute; top: 0; bottom: 0; width: 9px; margin-left: -4px; }
.mark::before { content: ""; position: absolute; top: 0; bottom: 0; left: 4px; border-left: 1.5px dashed currentColor; }
.plot .label { left: 9px; color: inherit; background: var(--card); padding: 1px 2px; white-space: nowrap; opacity: .9; }
.plot .label.left { left: auto; right: 9px; }
.tick { display: inline-block; width: 0; height: 0; border: solid transparent;
  border-width: 0 5px 8px; border-bottom-color: currentColor; }
.plot .tick { position: absolute; top: 100%; margin-left: -5px; }
.alone.mark { color: var(--bad); } .alone.tick { color: var(--warn-edge); }
.events { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--dim); }
.events li { overflow-wrap: anywhere; } .events .tick { margin-right: 6px; } .done { white-space: normal; font-style: italic; }
.tables > div { max-width: 100%; min-width: 0; } .steps td:not([colspan]) { min-width: 84px; } .steps .dim { display: block; }
.tables > div > h3, .tables > div > p, #collapse > p { margin: 4px 0; }
.group { margin-top: 14px; padding-top: 10px; border-top: 1px solid var(--rule); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 12em; overflow-y: auto;
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.prompt { background: var(--page); border-radius: 6px; padding: 8px 10px; margin: 4px 0 6px; }
.samples { width: 100%; } .samples td:first-child { width: 45%; } .samples td { padding-right: 14px; }
.samples td:nth-child(n+3) { white-space: nowrap; } .right { color: var(--good); } .wrong { color: var(--bad); }
@media (max-width: 760px) { main { padding: 20px 14px 48px; } h1 { font-size: 24px; } details { padding: 0 12px; }
  .charts { grid-template-columns: minmax(0, 1fr); } .facts { grid-template-columns: 1fr 1fr; }
  .numbers { font-size: 13px; } .numbers th:first-child { padding-right: 0; }
  .numbers td, .numbers tr:first-child > th:not(:first-child) { padding-left: 10px; }
  .compare td { min-width: 112px; }
  .steps { font-size: 13px; } .steps td, .steps th { padding-right: 10px; } .steps td:not([colspan]) { min-width: 72px; }
  /* A rollout becomes a card: the completion, and below it the rest with its column's name. */
  .samples, .samples tbody { display: block; } .samples tr:first-child { display: none; }
  .samples tr { display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 8px 0; border-bottom: 1px solid var(--rule); }
  .samples td { border: 0; padding: 0; max-width: 100%; } .samples td:first-child { width: 100%; }
  .samples td:not(:first-child)::before { content: attr(data-name) " "; color: var(--dim); font-size: 13px; }
  .samples td:nth-child(2) .text { display: inline; } }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const number = v => Math.abs(v) >= 1000 ? v.toLocaleString("en", {maximumFractionDigits: 0})
  : v && Math.abs(v) < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(4));
const nearest = (steps, target) => {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] < target) low = middle; else high = middle; }
  return Math.abs(steps[low] - target) <= Math.abs(steps[high] - target) ? low : high;
};
const charts = [...document.querySelectorAll("figure")].map((figure, index) => {
  const chart = data.charts[index], plot = figure.querySelector(".plot"), cursor = figure.querySelector(".cursor");
  const at = figure.querySelector(".at"), readings = figure.querySelectorAll(".legend b");
  const dots = chart.series.map(series => {
    const dot = document.createElement("i"); dot.className = "c" + series.colour; cursor.append(dot); return dot;
  });
  const height = v => {
    const f = chart.log ? Math.log(Math.max(v, chart.y[0])) : v, g = chart.log ? chart.y.map(Math.log) : chart.y;
    return 100 * (1 - (f - g[0]) / (g[1] - g[0]));
  };
  const show = target => {
    cursor.hidden = target === null;
    // The chart's cursor stands at the step, of any of its lines, that is nearest; a line without that step shows its own nearest.
    let step = null;
    for (const series of target === null ? [] : chart.series) {
      const steps = data.steps[series.steps], candidate = steps[nearest(steps, target)];
      if (step === null || Math.abs(candidate - target) < Math.abs(step - target)) step = candidate;
    }
    at.textContent = step === null ? "last" : "step " + step.toLocaleString("en");
    if (step !== null) cursor.style.left = 100 * step / chart.x + "%";
    chart.series.forEach((series, i) => {
      const steps = data.steps[series.steps], place = step === null ? steps.length - 1 : nearest(steps, step);
      readings[i].textContent = number(series.values[place]);
      dots[i].hidden = steps[place] !== step;
      dots[i].style.top = height(series.values[place]) + "%";
    });
    return step;
  };
  return {chart, plot, show};
});
let at = null, waiting = false;
const move = target => {  // all charts read the same step, once per frame
  at = target;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; for (const c of charts) c.show(at); });
};
for (const c of charts) {
  const follow = event => {
    const box = c.plot.getBoundingClientRect();
    move(Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * c.chart.x);
  };
  c.plot.addEventListener("pointermove", follow);
  c.plot.addEventListener("pointerdown", follow);
  c.plot.addEventListener("pointerleave", () => move(null));
  c.plot.addEventListener("blur", () => move(null));
  c.plot.addEventListener("keydown", event => {
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!way) return;
    event.preventDefault();
    const steps = data.steps[c.chart.series[0].steps], here = at === null ? steps.length - 1 : nearest(steps, at) + way;
    move(steps[Math.min(Math.max(here, 0), steps.length - 1)]);
  });
}
"""
