"""The report as a reader has it: opened in Chromium from its file, pointed at and clicked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from nemo_opd.cli import main
from tests.unit.report.test_page import make_run

NAMES = ("chromium", "google-chrome")
MARKUP = '<script>window.ran = 1</script>"><img src="ran.png" onerror="window.ran = 1">'
"""Says in the page that it ran, and fetches."""
MARKUP_NAME = '"><img onerror=alert(1) src=ran.png>'  # a folder's name holds no slash
FULL, FAINT, NONE = "rgba(220, 38, 38, 0.75)", "rgba(220, 38, 38, 0.04)", "rgba(0, 0, 0, 0)"
NARROW = 320
"""CSS pixels: the narrowest telephones."""


def _missing(reason: str) -> NoReturn:
    """Without a browser the tests are skipped; where changes are judged they fail."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    raise AssertionError


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser; its sandbox needs rights that a root user in a container has not."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("no playwright: it is in the extra `dev`")
    with sync_playwright() as playwright:
        downloaded = playwright.chromium.executable_path
        found = downloaded if Path(downloaded).exists() else next(filter(None, map(shutil.which, NAMES)), None)
        if not found:
            _missing(
                f"no browser: `make test` installs it as root on Debian; else put {' or '.join(NAMES)} on the path"
            )
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


class Reader:
    """An open page, with everything that it did besides being shown."""

    def __init__(self, chromium: Any, file: Path, width: int = 1280, **options: Any) -> None:
        self.url = file.as_uri()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme="light", **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.goto(self.url)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def open_everything(self) -> None:
        for details in self.page.locator("details").all():
            if details.get_attribute("open") is None:
                details.locator("summary").click()

    def sees(self, selector: str) -> list[str]:
        """The texts of what is visible."""
        return [item.inner_text() for item in self.page.locator(selector).all() if item.is_visible()]

    def colours(self) -> list[str]:
        """The tokens' backgrounds in the rollout that is open."""
        return self.page.eval_on_selector_all(
            "details[open] .response span", "spans => spans.map(span => getComputedStyle(span).backgroundColor)"
        )

    def point_at(self, metric: str, share: float) -> str:
        """What stands below a curve when the pointer is at a share of its width between the axis' ends."""
        svg = self.page.locator(f'figure[data-metric="{metric}"] svg')
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        x = (52 + share * (380 - 52 - 10)) / 380
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + box["height"] / 2)
        return self.page.locator(f'figure[data-metric="{metric}"] .readout').inner_text()


def written(tmp_path: Path, *runs: Path) -> Path:
    out = tmp_path / "report.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of 30 steps, without hostile text, and one of 90, full of it."""
    folder = tmp_path_factory.mktemp("runs")
    return written(folder, make_run(folder / "short"), make_run(folder / MARKUP_NAME, 90, "diagnosed", MARKUP))


@pytest.mark.parametrize("width", [1280, NARROW])
def test_the_page_is_quiet_fetches_nothing_and_fits(chromium: Any, two_runs: Path, width: int) -> None:
    with Reader(chromium, two_runs, width) as reader:
        reader.open_everything()
        reader.point_at("loss/total", 0.5)
        assert reader.complaints == []
        assert reader.requests == [reader.url]
        assert reader.page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("options", [{}, {"bypass_csp": True}], ids=["as it is", "without its policy"])
def test_markup_in_a_run_is_text(chromium: Any, two_runs: Path, options: dict[str, Any]) -> None:
    with Reader(chromium, two_runs, **options) as reader:
        reader.open_everything()
        shown = reader.page.locator("body").inner_text()
        for text in (MARKUP_NAME, f"problem 81 {MARKUP}", f"swer{MARKUP}", f"42{MARKUP}", f"repetition{MARKUP}",
                     f"because {MARKUP}", f"odd/{MARKUP}"):  # fmt: skip
            assert text in shown
        assert reader.page.locator("img").count() == 0
        assert reader.page.locator("script").count() == 2
        assert reader.page.evaluate("window.ran") is None
        assert reader.requests == [reader.url]
        assert reader.complaints == []


@pytest.mark.parametrize("options", [{}, {"bypass_csp": True}], ids=["as it is", "without its policy"])
def test_the_policy_stops_markup_that_slipped_through(chromium: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    page = written(tmp_path, make_run(tmp_path / "run"))
    page.write_text(page.read_text().replace("problem 21 ", MARKUP))
    with Reader(chromium, page, **options) as reader:
        reader.page.locator("img").first.wait_for(state="attached")
        ran = reader.page.evaluate("window.ran") == 1
        assert ran == bool(options), "without the policy it runs, so the test would see it"


def test_every_run_has_its_curve_and_its_values_under_the_pointer(chromium: Any, two_runs: Path) -> None:
    with Reader(chromium, two_runs) as reader:
        figure = reader.page.locator('figure[data-metric="loss/total"]')
        for curve in (".run0", ".run1:not(.raw)"):
            assert figure.locator(f"path{curve}").is_visible()
            assert figure.locator(f"path{curve}").bounding_box()["height"] > 50
        strokes = [figure.locator(f"path.run{i}").last.evaluate("e => getComputedStyle(e).stroke") for i in (0, 1)]
        keys = [reader.page.locator(f"#runs .key.run{i}").evaluate("e => getComputedStyle(e).backgroundColor")
                for i in (0, 1)]  # fmt: skip
        assert strokes == keys == ["rgb(9, 105, 218)", "rgb(207, 34, 46)"]
        assert reader.point_at("loss/total", 0) == f"step 1: short 1 · {MARKUP_NAME} 1"
        assert reader.point_at("loss/total", 15 / 89) == f"step 16: short 0.0625 · {MARKUP_NAME} 0.0625"
        assert reader.point_at("loss/total", 1) == f"step 90: short 0.03333 (step 30) · {MARKUP_NAME} 0.01111"
        assert figure.locator(".cursor").get_attribute("x1") == "370"
        reader.page.mouse.move(1, 1)
        assert figure.locator(".readout").inner_text() == ""


def test_how_runs_ended_and_what_was_seen_in_them(chromium: Any, two_runs: Path) -> None:
    with Reader(chromium, two_runs) as reader:
        rows = [row.split("\t") for row in reader.sees("#runs tbody tr")]
        assert [(row[0].strip(), row[1], row[2]) for row in rows] == [
            ("short", "done", "30"), (MARKUP_NAME, "diagnosed", "90")
        ]  # fmt: skip
        findings = [row.split("\t") for row in reader.sees("#diagnosis tbody tr")]
        assert [row[0].strip() for row in findings] == ["short", MARKUP_NAME]
        assert [row[1] for row in findings] == ["repetition", f"repetition{MARKUP}"]
        assert {(row[2], row[3]) for row in findings} == {("stop", "25")}


def test_a_rollout_shows_its_tokens_and_their_numbers(chromium: Any, two_runs: Path) -> None:
    with Reader(chromium, two_runs) as reader:
        assert reader.sees(".response") == []
        reader.page.locator("details.rollout > summary", has_text="short step 1,").click()
        tokens = reader.page.locator("details[open] .response span")
        assert tokens.all_text_contents() == ["an", "swer", "\n"]
        assert reader.sees("details[open] .prompt") == ["user: problem 1 "]
        title = "token 0\nid 4\nauthor student\ntrained true\nkl 0.1\nsampler_logprob -0.1"
        assert tokens.nth(0).get_attribute("title") == title
        looks = [tokens.nth(i).get_attribute("class") for i in range(3)]
        assert looks == [None, "untrained teacher", None]
        assert reader.sees("#colouring span") == ["red: student and teacher disagree (KL, nats); full colour from 2"]
        assert reader.colours() == [FAINT, NONE, FULL]
        reader.page.locator("#colouring select").select_option("sampler_logprob")
        assert reader.sees("#colouring span") == ["red: unlikely when it was drawn (log μ); full colour from 2"]
        assert reader.colours() == [FAINT, FULL, NONE]


def test_without_scripts_curves_and_texts_are_there(chromium: Any, two_runs: Path) -> None:
    with Reader(chromium, two_runs, java_script_enabled=False) as reader:
        curves = reader.page.locator("figure path.run0").all()
        assert [curve.is_visible() for curve in curves] == [True, True, False], "that of another group is folded away"
        reader.page.locator("details.rollout > summary", has_text="short step 1,").click()
        assert reader.sees(".response") == ["answer 1 "]
        assert reader.sees("#colouring") == []
