"""Style and script of the page. Both are named by hash in its Content-Security-Policy."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5d6670; --back: #ffffff; --card: #f6f8fa; --rule: #d5dbe1;
  --c0: #0969da; --c1: #cf222e; --c2: #1a7f37; --c3: #9a6700; --c4: #8250df; --c5: #0a7d86; --c6: #bf3989;
  --c7: #57606a }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9aa5b1; --back: #0d1117; --card: #161b22;
  --rule: #30363d; --c0: #58a6ff; --c1: #ff7b72; --c2: #56d364; --c3: #e3b341; --c4: #bc8cff; --c5: #39c5cf;
  --c6: #f778ba; --c7: #8b949e } }
body { margin: 0; font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back) }
header, main { max-width: 1240px; margin: 0 auto; padding: 0 20px }
h1 { font-size: 24px; margin: 24px 0 0 } h2 { font-size: 18px; margin: 28px 0 8px }
header p, .note, .readout, .tick { color: var(--soft); font-size: 12px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
th, td { text-align: left; vertical-align: top; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 600 } td { overflow-wrap: anywhere; min-width: 3em }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px }
summary { cursor: pointer; padding: 4px 0; font-weight: 600 }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 12px }
figure { margin: 0; padding: 8px 10px 2px; background: var(--card); border: 1px solid var(--rule); border-radius: 6px }
figcaption { font-size: 13px; font-weight: 600; overflow-wrap: anywhere }
svg { width: 100%; height: auto; display: block }
svg .dashed { stroke-dasharray: 5 3 }
.tick { font-size: 10px; fill: var(--soft) } .grid { stroke: var(--rule) } .cursor { stroke: var(--soft) }
.readout { margin: 0; min-height: 1.5em }
.run0 { stroke: var(--c0); fill: var(--c0); background: var(--c0) }
.run1 { stroke: var(--c1); fill: var(--c1); background: var(--c1) }
.run2 { stroke: var(--c2); fill: var(--c2); background: var(--c2) }
.run3 { stroke: var(--c3); fill: var(--c3); background: var(--c3) }
.run4 { stroke: var(--c4); fill: var(--c4); background: var(--c4) }
.run5 { stroke: var(--c5); fill: var(--c5); background: var(--c5) }
.run6 { stroke: var(--c6); fill: var(--c6); background: var(--c6) }
.run7 { stroke: var(--c7); fill: var(--c7); background: var(--c7) }
path[class] { fill: none; stroke-width: 1.6 } path.raw { stroke-width: 1; opacity: .3 }
.rollout { border-bottom: 1px solid var(--rule) } .rollout summary { font-weight: 400; font-size: 13px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; padding: 8px; background: var(--card);
  border-radius: 6px; font: 13px/1.7 ui-monospace, monospace }
.prompt { color: var(--soft) }
.untrained { opacity: .55 } .teacher { border-bottom: 2px solid var(--c4) }
.dataset { border-bottom: 2px solid var(--c3) } .tool { border-bottom: 2px solid var(--c5) }
#colouring { font-size: 13px; color: var(--soft) } #colouring select { font: inherit }
"""

SCRIPT = r"""
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const has = (object, key) => Object.prototype.hasOwnProperty.call(object, key);

  // --- curves: the values under the pointer
  const LEFT = 52, RIGHT = 10, WIDTH = 380;
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };
  const number = (value) => value === null ? "none" : String(Number(value.toPrecision(4)));
  for (const figure of document.querySelectorAll("figure")) {
    const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor");
    const readout = figure.querySelector(".readout"), name = figure.dataset.metric;
    if (!has(data.curves, name)) continue;
    const first = Number(figure.dataset.first), last = Number(figure.dataset.last);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * WIDTH;
      const share = Math.min(1, Math.max(0, (x - LEFT) / (WIDTH - LEFT - RIGHT)));
      const wanted = first + share * (last - first);
      const points = data.curves[name].map(([run, steps, values]) => {
        const i = nearest(steps, wanted);
        return {run, step: steps[i], value: values[i]};
      });
      const away = ({step}) => Math.abs(step - wanted);
      const shown = points.reduce((best, point) => away(point) < away(best) ? point : best).step;
      const parts = points.map(({run, step, value}) => (data.runs.length > 1 ? data.runs[run] + " " : "") +
        number(value) + (step === shown ? "" : " (step " + step + ")"));
      const at = LEFT + (shown - first) / (last - first) * (WIDTH - LEFT - RIGHT);
      cursor.setAttribute("x1", String(at));
      cursor.setAttribute("x2", String(at));
      readout.textContent = "step " + shown + ": " + parts.join(" · ");
    });
    svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("x1", "-9");
      cursor.setAttribute("x2", "-9");
      readout.textContent = "";
    });
  }

  // --- tokens: coloured by one of their numbers
  const NOT_COLOURS = new Set(["id", "text", "author", "trained"]);
  const SIGNED = {sampled_kl: 1, advantage: -1};  // the sign that is shown in red
  const WORDS = {
    kl: "red: student and teacher disagree (KL, nats)",
    sampled_kl: "red: the teacher likes the token less than the student; blue: more (log p − log q)",
    teacher_logprob: "red: unlikely to the teacher (log q)",
    sampler_logprob: "red: unlikely when it was drawn (log μ)",
    student_entropy: "red: the student was uncertain (nats)",
    advantage: "blue: rewarded, red: punished",
    weight: "red: counts less than 1 in the loss",
  };
  const lists = data.tokens.flat();
  const fields = [...new Set(lists.flatMap((tokens) => Object.keys(tokens)))].filter((f) => !NOT_COLOURS.has(f));
  const distance = (field, value) => field === "weight" ? 1 - value : Math.abs(value);
  const scales = new Map(fields.map((field) => {
    const values = lists.flatMap((tokens) => has(tokens, field) ? tokens[field] : [])
      .filter((value) => typeof value === "number").map((value) => distance(field, value)).sort((a, b) => a - b);
    return [field, Math.max(1e-6, values.length ? values[Math.floor(0.95 * (values.length - 1))] : 1)];
  }));
  const colour = (field, value) => {
    if (typeof value !== "number") return "";
    const strength = Math.min(1, Math.max(0, distance(field, value) / scales.get(field)));
    const red = !has(SIGNED, field) || value * SIGNED[field] > 0;
    return (red ? "rgba(220, 38, 38, " : "rgba(37, 99, 235, ") + (0.75 * strength).toFixed(3) + ")";
  };
  const panel = document.getElementById("colouring");
  if (!panel || !fields.length) return;
  const select = panel.querySelector("select"), legend = panel.querySelector("span");
  for (const field of fields) {
    const option = document.createElement("option");
    option.value = option.textContent = field;
    select.append(option);
  }
  const preferred = ["kl", "sampled_kl", "teacher_logprob"].find((field) => fields.includes(field));
  if (preferred) select.value = preferred;
  panel.hidden = false;

  const describe = (tokens, i) => {
    const parts = ["token " + i];
    for (const field of Object.keys(tokens)) {
      if (field !== "text") parts.push(field + " " + tokens[field][i]);
    }
    return parts.join("\n");
  };
  const build = (details) => {
    const tokens = data.tokens[Number(details.dataset.run)][Number(details.dataset.number)];
    const texts = tokens.text || tokens.id;
    const response = details.querySelector(".response");
    if (!texts || response.dataset.built) return;
    const spans = texts.map((text, i) => {
      const span = document.createElement("span");
      span.textContent = String(text);
      span.title = describe(tokens, i);
      if (tokens.trained && tokens.trained[i] === false) span.classList.add("untrained");
      const author = tokens.author ? tokens.author[i] : "";
      if (["teacher", "dataset", "tool"].includes(author)) span.classList.add(author);
      return span;
    });
    response.replaceChildren(...spans);
    response.dataset.built = "yes";
  };
  const paint = (details) => {
    const tokens = data.tokens[Number(details.dataset.run)][Number(details.dataset.number)];
    const values = has(tokens, select.value) ? tokens[select.value] : [];
    details.querySelectorAll(".response span").forEach((span, i) => {
      span.style.backgroundColor = colour(select.value, values[i]);
    });
  };
  const rollouts = [...document.querySelectorAll("details.rollout")];
  const repaint = () => {
    const words = has(WORDS, select.value) ? WORDS[select.value] + "; " : "";
    legend.textContent = words + "full colour from " + number(scales.get(select.value));
    for (const details of rollouts) if (details.open) paint(details);
  };
  for (const details of rollouts) {
    details.addEventListener("toggle", () => {
      if (!details.open) return;
      build(details);
      paint(details);
    });
  }
  select.addEventListener("change", repaint);
  repaint();
})();
"""
