"""Do the servers that the recipe names answer, and can a port be had for those that it starts?"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx

from nemo_opd.config import Config, ServersConfig
from nemo_opd.configuration.server_rules import addresses
from nemo_opd.doctor.finding import Finding, Verdict
from nemo_opd.engines.vllm.settings import read_key

SECONDS = 10.0


def network_findings(config: Config) -> list[Finding]:
    """A row for each server that stands already, and one for the loopback address."""
    found = [loopback()]
    for key, servers in server_sections(config):
        if servers.urls is None:
            continue
        try:
            secret = read_key(Path(servers.key_file) if servers.key_file else None)
        except (OSError, ValueError) as error:
            way_out = "write the key into a file that only you can read"
            found.append(Finding(f"{key}.key_file", Verdict.FAIL, str(error), "a key", way_out))
            continue
        ask = stock_answers if servers.protocol == "openai" else answers
        found += [ask(key, url, secret) for url in addresses(servers.urls)]
    return found


def server_sections(config: Config) -> Iterator[tuple[str, ServersConfig]]:
    """Sections about servers that the run uses, by their key."""
    if config.rollout.engine == "vllm":
        yield "rollout.servers", config.rollout.servers
    for key, teacher in config.every_teacher().items():
        if teacher.engine == "vllm":
            yield f"{key}.servers", teacher.servers


def loopback() -> Finding:
    """torchrun's meeting place and servers of the run's own listen on a free port of 127.0.0.1."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
    except OSError as error:
        way_out = "look at the firewall, or at the limits of this container"
        return Finding("ports: loopback", Verdict.FAIL, str(error), "a free port", way_out)
    return Finding("ports: loopback", Verdict.OK, f"port {port} was free", "a free port")


def answers(key: str, url: str, secret: str | None) -> Finding:
    """Ask a server how it is; that it holds the right model is found when the models are built."""
    name, headers = f"{key}: {url}", {} if secret is None else {"authorization": f"Bearer {secret}"}
    try:
        response = httpx.get(f"{url.rstrip('/')}/health", headers=headers, timeout=SECONDS, trust_env=False)
        said = response.json()
        status = str(said.get("status", said.get("error", "no status")))
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        way_out = f"start it, or correct {key}.urls"
        return Finding(name, Verdict.FAIL, f"{type(error).__name__}: {error}", "an answer", way_out)
    if response.status_code == httpx.codes.OK and status in ("ready", "refusing"):  # a writer refuses without weights
        busy = int(said.get("running") or 0)
        way_out = "somebody uses it: a writer serves one run at a time, and ours would take it away" if busy else ""
        return Finding(name, Verdict.WARN if busy else Verdict.OK, f"{status}, {busy} running", "ready", way_out)
    way_out = f"see its log; {key}.key_file must name the key that it was started with"
    return Finding(name, Verdict.FAIL, f"{response.status_code}: {status}", "ready", way_out)


def stock_answers(key: str, url: str, secret: str | None) -> Finding:
    """Ask a stock vLLM server which model it serves; its /health has no words, and wants no key."""
    name, headers = f"{key}: {url}", {} if secret is None else {"authorization": f"Bearer {secret}"}
    try:
        response = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=SECONDS, trust_env=False)
        served = [str(model["id"]) for model in response.json()["data"]] if response.is_success else []
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        way_out = f"start it, or correct {key}.urls"
        return Finding(name, Verdict.FAIL, f"{type(error).__name__}: {error}", "an answer", way_out)
    if served:
        return Finding(name, Verdict.OK, f"serves {', '.join(served)}", "a model")
    way_out = f"see its log; {key}.key_file must name the key that it was started with"
    return Finding(name, Verdict.FAIL, f"{response.status_code}: {response.text[:80]}", "a model", way_out)
