"""The report: what it shows, and that nothing in a run folder gets out of being text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemo_opd.cli import main
from nemo_opd.reliability.outcome import write_outcome
from nemo_opd.report.look import SCRIPT, STYLE

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;\u2028<!--"
HOSTILE_NAME = "<img src=x onerror=alert(1)>"  # a folder's name holds no slash
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "p", "div", "span"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre", "code", "small", "label", "select"),
    *("figure", "figcaption", "svg", "path", "line", "text", "circle", "script"),
}


class Document(HTMLParser):
    """Everything that a browser would make of the page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "line", "circle"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])


def make_run(folder: Path, steps: int = 30, outcome: str | None = "done", hostile: str = "") -> Path:
    """A run folder as the loop leaves it, with `hostile` text wherever text comes from outside."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "rollouts").mkdir()
    (folder / "config.yaml").write_text(json.dumps({"run": {"dir": str(folder)}, "data": {"system_prompt": hostile}}))
    lines = [
        {"step": step, "policy_version": step, "loss/total": 1 / step, "reward/mean": step / steps, "train/kl": 0.5,
         f"odd/{hostile}": step * 1.0} for step in range(1, steps + 1)
    ]  # fmt: skip
    lines.append({"step": steps, "evaluation": True, "evaluation/avg@1": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(1, steps + 1):
        rollout: dict[str, Any] = {
            "index": step, "sample": 0, "messages": [{"role": "user", "content": f"problem {step} {hostile}"}],
            "answer": f"42{hostile}", "response": f"answer {step} {hostile}", "response_tokens": 3, "finish": "eos",
            "reward": 1.0,
        }  # fmt: skip
        if step % 10 == 1:
            rollout["tokens"] = {
                "id": [4, 5, 6], "text": ["an", f"swer{hostile}", "\n"], "author": ["student", "teacher", hostile],
                "trained": [True, False, True], "kl": [0.1, None, 2.0], "sampler_logprob": [-0.1, -2.0, None],
            }  # fmt: skip
        (folder / "rollouts" / f"step-{step:08d}.jsonl").write_text(json.dumps(rollout) + "\n")
    finding = {
        "sign": f"repetition{hostile}",
        "step": 25,
        "since": 25,
        "action": "stop",
        "message": hostile,
        "advice": hostile,
    }
    (folder / "diagnosis.jsonl").write_text(json.dumps(finding) + "\n")
    if outcome:
        write_outcome(folder, outcome, steps, f"because {hostile}", "attempt")
    return folder


def report(tmp_path: Path, *runs: Path, options: tuple[str, ...] = ()) -> Document:
    out = tmp_path / "report.html"
    assert main(["report", *map(str, runs), "--out", str(out), *options]) == 0
    return Document(out.read_text())


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / HOSTILE_NAME, hostile=HOSTILE))
    assert {tag for tag, _ in page.elements} <= TAGS
    for tag, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on")}, (tag, attributes)
        assert not {"src", "href", "style", "srcdoc", "action"} & set(attributes), (tag, attributes)
    assert page.attributes("script") == [{"type": "application/json", "id": "data"}, {}]
    assert page.texts["script"][1] == SCRIPT
    assert page.texts["style"] == [STYLE]
    assert not re.search(r"url\(|@import|//", STYLE)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|fetch|XMLHttp|import\(|https?:", SCRIPT
    )


def test_the_policy_names_style_and_script_by_hash_and_forbids_the_rest(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run"))
    (meta,) = [a for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(directive.split(" ", 1) for directive in str(meta["content"]).split("; "))

    def expected(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert directives == {
        "default-src": "'none'",
        "style-src": expected(page.texts["style"][0]),
        "script-src": expected(page.texts["script"][1]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    first = [tag for tag, _ in page.elements][:4]
    assert first.index("meta") < 3, "the policy stands before what it governs"


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / HOSTILE_NAME, hostile=HOSTILE))
    shown = "".join(text for tag, texts in page.texts.items() if tag not in ("script", "style") for text in texts)
    for text in (f"problem 21 {HOSTILE}", f"answer 1 {HOSTILE}", f"because {HOSTILE}", f"repetition{HOSTILE}",
                 f"odd/{HOSTILE}", f"42{HOSTILE}"):  # fmt: skip
        assert text in shown
    assert HOSTILE_NAME in shown
    data = page.data
    assert data["runs"] == [HOSTILE_NAME]
    assert f"odd/{HOSTILE}" in data["curves"]
    assert f"swer{HOSTILE}" in data["tokens"][0][0]["text"]
    raw = (tmp_path / "report.html").read_text()
    block = raw.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028") & set(block)


def test_curves_of_several_runs_lie_over_each_other(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", steps) for name, steps in (("a", 30), ("b", 90))]
    shutil.rmtree(runs[0] / "rollouts")
    page = report(tmp_path, *runs)
    figures = page.attributes("figure")
    assert {str(figure["data-metric"]) for figure in figures} == {
        "loss/total",
        "reward/mean",
        "evaluation/avg@1",
        "odd/",
    }
    assert all(figure["data-last"] == "90" for figure in figures if figure["data-metric"] != "evaluation/avg@1")
    paths = [str(attributes["class"]) for attributes in page.attributes("path")]
    assert paths.count("run0") == 3 and paths.count("run1") == 3 and paths.count("run1 raw") == 3
    assert page.data["runs"] == ["a/run", "b/run"]
    assert [line[0] for line in page.data["curves"]["loss/total"]] == [0, 1]
    assert any("train/kl = 0.5" in text for text in page.texts["p"]), "what never changes takes no room"
    assert "run.dir" in page.texts["code"] and "data.system_prompt" not in page.texts["code"]


def test_how_a_run_ended_and_what_the_diagnosis_said(tmp_path: Path) -> None:
    cells = report(tmp_path, make_run(tmp_path / "run", outcome="diagnosed")).texts["td"]
    for text in ("diagnosed", "30", "because ", "1.000", "0.5000", "repetition", "stop", "25"):
        assert text in cells


def test_a_run_that_nobody_looked_at_is_not_called_healthy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "diagnosis.jsonl").unlink()
    assert "No sign of failure was found." not in (said := report(tmp_path, run).texts["p"])
    assert any("Not diagnosed" in text for text in said)
    lines = [{**json.loads(line), "time/diagnosis": 0.001} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "No sign of failure was found." in report(tmp_path, run).texts["p"]


def test_an_unfinished_run_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outcome=None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss/total": NaN}\n[]\n"text"\n{"step": 32, "loss/tot')
    page = report(tmp_path, run)
    assert "no outcome: still running, or killed" in page.texts["td"]
    assert "31" in page.texts["td"]
    assert page.data["curves"]["loss/total"][0][2][-1] is None


def test_a_run_that_did_not_get_to_a_step_has_one_too(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("run: [broken")
    page = report(tmp_path, tmp_path / "run")
    assert "No step was recorded yet." in page.texts["p"]
    assert page.data == {"runs": ["run"], "curves": {}, "tokens": [[]]}


def test_rollouts_are_those_with_tokens_from_first_to_last(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=101)
    page = report(tmp_path, run, options=("--rollout-steps", "3"))
    summaries = [text for text in page.texts["summary"] if "prompt" in text]
    assert [re.findall(r"\d+", text)[0] for text in summaries] == ["1", "51", "101"]
    assert [tokens["kl"] for tokens in page.data["tokens"][0]] == [[0.1, None, 2.0]] * 3
    assert report(tmp_path, run, options=("--rollout-steps", "0")).data["tokens"] == [[]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "error: nowhere: got no such folder; expected a run folder with config.yaml and checkpoints"),
        (["empty"], "error: empty: got none of our folders; expected a run folder"),
        (["run", "--out", "empty"], "error: --out: got empty; expected a file in a folder to write to"),
        (["run", "--out", "no/where.html"], "error: --out: got no/where.html; expected a file"),
        (["run", "--rollout-steps", "-1"], "error: --rollout-steps: got -1; expected at least 0"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", steps=2)
    (tmp_path / "empty").mkdir()
    assert main(["report", *words]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not list(tmp_path.rglob("*.html"))


def test_the_page_goes_into_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=2)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert sorted(path.name for path in run.iterdir() if "html" in path.name) == ["report.html"]


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript engine here")
def test_the_script_parses(tmp_path: Path) -> None:
    (tmp_path / "script.js").write_text(SCRIPT)
    subprocess.run(["node", "--check", str(tmp_path / "script.js")], check=True)
