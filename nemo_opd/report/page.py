"""The page itself: one file that loads nothing, runs only its own script, and shows text as text.

Run names, metric names, settings, prompts and responses are written by models and by strangers. In HTML they pass
through `html.escape`; for the script they lie in a JSON block in which no ``<`` survives, and the script puts them on
the page as text nodes. A Content-Security-Policy names script and style by hash and forbids everything else, so that
even markup that slipped through could neither run nor fetch.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from nemo_opd.report.chart import COLOURS, Line, chart, thin
from nemo_opd.report.look import SCRIPT, STYLE
from nemo_opd.report.read import RunData

GROUPS = ("reward", "evaluation", "loss", "train", "response", "tokens", "optimizer", "diagnosis", "speed", "time")
"""Order of the curves; other groups follow."""
SUMMARY = (
    ("reward", "reward/mean", "{:.3f}"),
    ("KL", "train/kl", "{:.4f}"),
    ("loss", "loss/total", "{:.4f}"),
    ("length", "response/length", "{:.0f}"),
    ("repeated 3-grams", "response/repeated_3grams", "{:.3f}"),
    ("accuracy", "evaluation/avg@1", "{:.3f}"),
)
"""Last values in the table of runs."""
OPEN_CURVES = ("reward", "evaluation", "loss", "train", "response", "diagnosis")
"""Groups whose curves are shown at once."""


def page(runs: Sequence[RunData]) -> str:
    """The whole document."""
    curves = {name: [thin(i, run.curves[name]) for i, run in enumerate(runs) if name in run.curves]
              for name in _ordered({name for run in runs for name in run.curves})}  # fmt: skip
    title = "nemo_opd: " + ", ".join(run.label for run in runs)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy()}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<header><h1>Report</h1><p>Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p></header>\n<main>",
            _runs(runs),
            _diagnosis(runs),
            _settings(runs),
            _curves(curves),
            _rollouts(runs),
            "</main>",
            f'<script type="application/json" id="data">{safe_json(_data(runs, curves))}</script>',
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def policy() -> str:
    """The Content-Security-Policy: our style and our script, by hash, and nothing else."""
    return (
        f"default-src 'none'; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; base-uri 'none'; "
        f"form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def safe_json(value: Any) -> str:
    """JSON that ends no script block and starts no comment in one, whatever text is in it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _ordered(names: set[str]) -> list[str]:
    def rank(name: str) -> tuple[int, str]:
        group = name.split("/")[0]
        return (GROUPS.index(group) if group in GROUPS else len(GROUPS), name)

    return sorted(names, key=rank)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead><tbody>{body}</tbody></table>"


def _key(number: int) -> str:
    return f'<span class="key run{number % COLOURS}{" dashed" if number >= COLOURS else ""}"></span>'


def _name(runs: Sequence[RunData], number: int) -> str:
    return f"{_key(number)}{html.escape(runs[number].label)}"


def _runs(runs: Sequence[RunData]) -> str:
    shown = [item for item in SUMMARY if any(item[1] in run.curves for run in runs)]
    rows = []
    for i, run in enumerate(runs):
        outcome = run.outcome
        status = "no outcome: still running, or killed" if outcome is None else outcome.status.value
        cells = [_name(runs, i), html.escape(status), str(run.steps), html.escape(outcome.reason if outcome else "")]
        for _, name, form in shown:
            value = run.last(name)
            cells.append("" if value is None else form.format(value))
        rows.append([*cells, f"<code>{html.escape(str(run.path))}</code>"])
    head = ["run", "status", "step", "reason", *(label for label, _, _ in shown), "folder"]
    return f'<section id="runs"><h2>Runs</h2><div class="wide">{_table(head, rows)}</div></section>'


def _diagnosis(runs: Sequence[RunData]) -> str:
    rows = []
    for i, run in enumerate(runs):
        for sign in dict.fromkeys(finding["sign"] for finding in run.findings):
            last = [finding for finding in run.findings if finding["sign"] == sign][-1]
            held = run.last(f"diagnosis/{sign}")
            fields = (last.get(name, "") for name in ("since", "action", "message", "advice"))
            since, action, message, advice = (html.escape(str(field)) for field in fields)
            rows.append([_name(runs, i), html.escape(sign), action, since, f"{held or 0:.0f}", message, advice])
    text = ""
    if unwatched := [_name(runs, i) for i, run in enumerate(runs) if "time/diagnosis" not in run.curves]:
        text += f"<p>Not diagnosed (written before runs were, or not a step yet): {', '.join(unwatched)}.</p>"
    if len(unwatched) < len(runs) and not rows:
        text += "<p>No sign of failure was found.</p>"
    if rows:
        head = ("run", "sign", "action", "since step", "steps in all", "what was seen last", "what helps")
        text += f'<div class="wide">{_table(head, rows)}</div>'
    return f'<section id="diagnosis"><h2>Diagnosis</h2>{text}</section>'


def _settings(runs: Sequence[RunData]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    if len(runs) > 1:
        keys = {key: None for key in keys if len({run.settings.get(key) for run in runs}) > 1}
    title = "Settings" if len(runs) == 1 else "Settings that differ"
    rows = [
        [f"<code>{html.escape(key)}</code>", *(html.escape(run.settings.get(key, "")) for run in runs)] for key in keys
    ]
    table = _table(["key", *(_name(runs, i) for i in range(len(runs)))], rows) if rows else "<p>None.</p>"
    body = f'<details><summary>{len(rows)} keys</summary><div class="wide">{table}</div></details>'
    return f'<section id="settings"><h2>{title}</h2>{body}</section>'


def _curves(curves: dict[str, list[Line]]) -> str:
    if not curves:
        return '<section id="curves"><h2>Curves</h2><p>No step was recorded yet.</p></section>'
    parts = ['<section id="curves"><h2>Curves</h2>']
    for group in dict.fromkeys(name.split("/")[0] for name in curves):
        figures, constants = [], []
        for name, lines in curves.items():
            if name.split("/")[0] != group:
                continue
            values = {value for line in lines for value in line.values}
            if len(values) == 1 and len(lines[0].values) > 1:
                constants.append(f"{html.escape(name)} = {next(iter(values))}")
            else:
                figures.append(chart(name, lines))
        note = f'<p class="note">Constant: {"; ".join(constants)}</p>' if constants else ""
        state = " open" if group in OPEN_CURVES else ""
        parts.append(f"<details{state}><summary>{html.escape(group)}</summary>")
        parts.append(f'<div class="figures">{"".join(figures)}</div>{note}</details>')
    return "".join([*parts, "</section>"])


def _rollouts(runs: Sequence[RunData]) -> str:
    parts = ['<section id="rollouts"><h2>Rollouts</h2>']
    if not any(run.rollouts for run in runs):
        return "".join([*parts, "<p>None was saved.</p></section>"])
    parts.append('<p id="colouring" hidden><label>Colour of the tokens: <select></select></label> <span></span></p>')
    for i, run in enumerate(runs):
        for number, rollout in enumerate(run.rollouts):
            reward = "" if rollout["reward"] is None else f", reward {rollout['reward']:g}"
            about = f"step {rollout['step']}, prompt {rollout['index']}, sample {rollout['sample']}"
            about += f": {rollout['length']} tokens, ended by {rollout['finish']}{reward}"
            parts.append(
                f'<details class="rollout" data-run="{i}" data-number="{number}">'
                f"<summary>{_name(runs, i)} {html.escape(about)}</summary>"
                f'<pre class="prompt">{html.escape(rollout["prompt"])}</pre>'
                f'<pre class="response">{html.escape(rollout["response"])}</pre>'
                f'<p class="note">Reference answer: {html.escape(rollout["answer"])}</p></details>'
            )
    return "".join([*parts, "</section>"])


def _data(runs: Sequence[RunData], curves: dict[str, list[Line]]) -> dict[str, Any]:
    """What the script works on."""
    return {
        "runs": [run.label for run in runs],
        "curves": {
            name: [
                [line.run, line.steps, [None if v is None else float(f"{v:.5g}") for v in line.values]] for line in ls
            ]
            for name, ls in curves.items()
        },
        "tokens": [[rollout["tokens"] for rollout in run.rollouts] for run in runs],
    }
