"""What is a secret, and in which forms it is found."""

from __future__ import annotations

import base64
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from nemo_opd.reliability import redact as module
from nemo_opd.reliability.redact import HIDDEN, install, names_a_secret, redact, redact_data, redact_values, remember

SECRET = 'v9/Q+"x y\\z_0'


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    factory, hook, thread_hook = logging.getLogRecordFactory(), sys.excepthook, threading.excepthook
    monkeypatch.setenv("HF_TOKEN", SECRET)
    install()
    yield
    logging.setLogRecordFactory(factory)
    sys.excepthook, threading.excepthook = hook, thread_hook


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("HF_TOKEN", True), ("WANDB_API_KEY", True), ("AWS_SECRET_ACCESS_KEY", True), ("PGPASSWORD", True),
        ("SLURM_JWT", True), ("DB_PASSPHRASE", True), ("my-api-key", True), ("hub.token", True), ("clientSecret", True),
        ("PWD", False), ("PATH", False), ("TOKENIZERS_PARALLELISM", False), ("SSH_AUTH_SOCK", False),
        ("key_file", False), ("KEYBOARD", False), ("eos_token", False), ("max_new_tokens", False), ("", False),
    ],
)  # fmt: skip
def test_names(name: str, is_one: bool) -> None:
    assert names_a_secret(name) == is_one


@pytest.mark.parametrize(
    "form",
    [
        str,
        lambda secret: f"a{secret}b",
        json.dumps,
        lambda secret: json.dumps({"text": f"é {secret}"}, ensure_ascii=False),
        lambda secret: quote(secret, safe=""),
        lambda secret: base64.b64encode(secret.encode()).decode(),
        repr,
    ],
    ids=["alone", "inside", "json", "json text", "url", "base64", "repr"],
)
def test_a_value_is_found_in_other_forms(form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for text in (redact_values(form(SECRET)), redact(form(SECRET))):
        assert HIDDEN in text and "v9" not in text and "z_0" not in text


def test_json_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert json.loads(redact_values(json.dumps({"step": 1, "text": SECRET}))) == {"step": 1, "text": HIDDEN}


def test_lines_of_a_long_key_are_found_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
    monkeypatch.setenv("TLS_PRIVATE_KEY", f"-----BEGIN KEY-----\n{line}\n-----END KEY-----")
    assert redact(f"read {line} from it") == f"read {HIDDEN} from it"


def test_short_values_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_KEY", "1")
    assert redact_values("step 1 of 11") == "step 1 of 11"


def test_a_remembered_value_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_remembered", set())
    remember("key from a file")
    assert redact_values("the key from a file.") == f"the {HIDDEN}."


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("api_key=sk-12345 and more", f"api_key={HIDDEN} and more"),
        ('{"password": "hunter22"}', f'{{"password": "{HIDDEN}"}}'),
        ("Authorization: Bearer abcdefgh.ijk", f"Authorization: Bearer {HIDDEN}"),
        ("hf_token: abcdefgh", f"hf_token: {HIDDEN}"),
        ("http://me:hunter22@node1:8000/x", f"http://{HIDDEN}@node1:8000/x"),
        ("servers.key_file: got no file /k/key", "servers.key_file: got no file /k/key"),
        ("eos_token=<eos> response_tokens: 1234", "eos_token=<eos> response_tokens: 1234"),
        ("http://node1:8000/a@b", "http://node1:8000/a@b"),
    ],
)  # fmt: skip
def test_by_name(text: str, left: str) -> None:
    assert redact(text) == left


def test_data_by_its_keys() -> None:
    data = {
        "template_arguments": {"api_key": "short", "n": 3},
        "teacher_key": "task",
        "key_file": "/k",
        "eos_token": "x",
    }
    kept = {
        "template_arguments": {"api_key": HIDDEN, "n": 3},
        "teacher_key": "task",
        "key_file": "/k",
        "eos_token": "x",
    }
    assert redact_data(data) == kept


def test_every_handler_gets_redacted_records(installed: None, tmp_path: Path) -> None:
    """Also one that a library makes by itself, with a formatter of its own."""
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("somebody.else")
    logger.addHandler(handler)
    try:
        logger.warning("got %s", SECRET)
        logger.warning("stack", stack_info=True)
        try:
            raise ValueError(f"could not log in with {SECRET}")
        except ValueError:
            logger.exception("failed")
    finally:
        logger.removeHandler(handler)
        handler.close()
    text = (tmp_path / "log").read_text()
    assert "v9" not in text and text.count(HIDDEN) == 2 and "Traceback" in text and "ValueError" in text


def test_what_nobody_catches(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError(f"no access with {SECRET}")
    sys.excepthook(RuntimeError, error, None)

    def fail() -> None:
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    text = capsys.readouterr().err
    assert "v9" not in text and text.count(f"RuntimeError: no access with {HIDDEN}") == 2
