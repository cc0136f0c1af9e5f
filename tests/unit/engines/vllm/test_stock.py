"""Stock vLLM servers that answer badly: a stand-in over HTTP, since the real one (tests/reliability) answers well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from nemo_opd.engines.vllm.client import ServerGone, ServerRefused
from nemo_opd.engines.vllm.settings import TEACHER, WRITER
from nemo_opd.engines.vllm.stock import Stock, StockClient
from nemo_opd.engines.vllm.wire import (
    Attach,
    Generate,
    Refit,
    Score,
    WireRequest,
    WireSampling,
    WireScore,
    unpacked,
)

PLAIN = WireSampling(1.0, 1.0, 0, False)
WARM = WireSampling(0.5, 1.0, 0, False)
EOS = 9
Best = tuple[float, float]
PROCESSED, RAW, LOGITS = (0.0, -9999.0), (-1.5, -1.6), (-0.1, -0.2)
"""What is reported of two ids, of which the sampler keeps the first."""
Change = Callable[[dict[str, Any]], Any]


def same(answer: dict[str, Any]) -> Any:
    return answer


class StandIn:
    """Answers like vLLM 0.32.0 does, as far as we look; `change` spoils an answer about a response."""

    def __init__(self, change: Change = same, managed: bool = True, best: Best = PROCESSED, key: str = "") -> None:
        self.change, self.managed, self.best, self.key = change, managed, best, key
        self.weights, self.loads, self.calls = "default", list[str](), list[str]()
        self.bodies: list[dict[str, Any]] = []
        self.fail_load = self.hangs = self.paused = False
        self.tokens, self.status = 0, 200

    def application(self) -> Starlette:
        routes = {
            "/v1/models": self.models,
            "/version": self.version,
            "/health": self.health,
            "/metrics": self.metrics,
            "/v1/completions": self.completions,
        }
        if self.managed:
            routes |= {
                "/weight_info": self.weight_info,
                "/update_weight_version": self.set_version,
                "/collective_rpc": self.load,
                **dict.fromkeys(("/pause", "/resume", "/reset_prefix_cache"), self.done),
            }
        return Starlette(routes=[Route(path, handler, methods=["GET", "POST"]) for path, handler in routes.items()])

    async def models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return JSONResponse({"data": [{"id": "m", "root": "somewhere/m", "parent": None, "max_model_len": 64}]})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": "0.32.0"})

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("")

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(f'# x\nvllm:generation_tokens_total{{engine="0"}} {float(self.tokens)}\n')

    async def weight_info(self, request: Request) -> Response:
        return JSONResponse({"weight_version": self.weights})

    async def set_version(self, request: Request) -> Response:
        self.weights = (await request.json())["new_version"]
        self.calls.append(self.weights)
        return JSONResponse({"success": True})

    async def load(self, request: Request) -> Response:
        if self.fail_load:
            return JSONResponse({"error": {"message": "shapes differ"}}, 500)
        self.loads.append((await request.json())["kwargs"]["weights_path"])
        self.calls.append("load")
        return JSONResponse({"results": [None]})

    async def done(self, request: Request) -> Response:
        self.calls.append(request.url.path)
        if request.url.path in ("/pause", "/resume"):
            self.paused = request.url.path == "/pause"
        return JSONResponse({"success": True})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        if self.paused:
            await asyncio.sleep(60)
        if body["temperature"] == 2.0:
            return JSONResponse(
                _completion(
                    [3], [self.best[0]], top_logprobs=[{"token_id:3": self.best[0], "token_id:5": self.best[1]}]
                )
            )
        self.bodies.append(body)
        if self.hangs:
            await asyncio.sleep(60)
        if self.status != 200:
            return JSONResponse({"error": {"message": "no"}}, self.status)
        best = {"8": {"logprob": -0.8}} if body.get("prompt_logprobs") else {}
        prompt = [None, *({str(t): {"logprob": -t / 10}, **best} for t in body["prompt"][1:])]
        ids = [2] * (body["max_tokens"] - 1) + [EOS]
        changed = self.change(_completion(ids, [-0.5] * len(ids), prompt_logprobs=prompt))
        return changed if isinstance(changed, Response) else JSONResponse(changed)


def _completion(ids: list[int], logprobs: list[float], prompt_logprobs: Any = None, **more: Any) -> dict[str, Any]:
    choice = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs, **more}, "finish_reason": "stop"}
    return {"choices": [{**choice, "prompt_logprobs": prompt_logprobs}]}


def choice(**changes: Any) -> Change:
    return lambda answer: {"choices": [{**answer["choices"][0], **changes}]}


class InTime(httpx.ASGITransport):
    """With the time limits that a connection has, which ASGITransport does not know."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        limit = request.extensions["timeout"]["read"]
        try:
            async with asyncio.timeout(limit):
                return await super().handle_async_request(request)
        except TimeoutError:
            raise httpx.ReadTimeout(f"no answer within {limit} s", request=request) from None


def talk(
    stand_in: StandIn,
    folder: Path,
    what: Callable[[StockClient], Awaitable[Any]],
    role: str = WRITER,
    key: str | None = None,
    stuck_seconds: float = 30.0,
) -> Any:
    """What `what` makes of a client of the stand-in."""
    (folder / "config.json").write_text(json.dumps({"vocab_size": 10}))

    async def run() -> Any:
        client = StockClient("http://stock", key, stuck_seconds, 5.0, Stock(folder, role), folder / "weights")
        headers = client._http.headers
        await client.close()
        transport = InTime(stand_in.application())
        client._http = httpx.AsyncClient(transport=transport, base_url="http://stock", headers=headers)
        try:
            return await what(client)
        finally:
            await client.close()

    return asyncio.run(run())


def generate(sampling: WireSampling = PLAIN, count: int = 1, tokens: int = 4) -> Generate:
    requests = tuple(WireRequest(key, (1, 2), (3,), key + 5, tokens) for key in range(count))
    return Generate(requests, "s", sampling, (EOS,))


async def ask(client: StockClient, form: Any) -> list[dict[str, Any]]:
    return [line async for line in client.ask(form)]


async def write(client: StockClient, form: Generate | None = None) -> list[dict[str, Any]]:
    await client.attach(Attach("s", reload=True), 5.0)
    return await ask(client, form or generate())


def test_every_request_is_asked_for_in_token_ids_and_with_every_setting(tmp_path: Path) -> None:
    server = StandIn()
    lines = talk(server, tmp_path, lambda client: write(client, generate(WARM, count=3)))
    assert sorted(line["key"] for line in lines) == [0, 1, 2]
    line = lines[0]
    assert line["ids"] == [2, 2, 2, EOS] and line["logprobs"] == [-0.5] * 4 and line["versions"] == [[-1, 0]]
    body = server.bodies[0]
    assert body["prompt"] == [1, 2, 3], "a prefix is continued"
    settings = {"temperature": 0.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {name: body[name] for name in settings} == settings, "what is left out comes from generation_config.json"
    assert body["stop_token_ids"] == [EOS] and body["ignore_eos"]
    assert len({body["seed"] for body in server.bodies}) == 3
    assert all(0 <= body["seed"] < 2**63 for body in server.bodies)


def test_noise_does_not_come_twice_when_a_response_is_continued(tmp_path: Path) -> None:
    server = StandIn()
    begun, continued = WireRequest(0, (1,), (), 7, 4), WireRequest(1, (1,), (2,), 7, 4)
    talk(server, tmp_path, lambda client: write(client, Generate((begun, continued), "s", PLAIN, (EOS,))))
    assert server.bodies[0]["seed"] != server.bodies[1]["seed"]


BAD = {
    "no_ids": (choice(token_ids=None), ServerRefused, "no token ids"),
    "no_logprobs": (choice(logprobs=None), ServerRefused, "no log-probability for each token"),
    "too_few_logprobs": (choice(logprobs={"token_logprobs": [-0.5]}), ServerRefused, "no log-probability for each"),
    "logits": (choice(logprobs={"token_logprobs": [3.5] * 4}), ServerRefused, "log-probabilities that are none"),
    "ends_early": (
        choice(token_ids=[2, 2], logprobs={"token_logprobs": [-0.5] * 2}),
        ServerRefused,
        "expected 4 tokens, or one that ends in \\[9\\]; start the server with --generation-config vllm",
    ),
    "aborted": (choice(finish_reason="abort"), ServerGone, "it broke a response off"),
    "no_choice": (lambda answer: {"choices": []}, ServerRefused, "an answer that is none"),
    "no_json": (lambda answer: PlainTextResponse("<html>"), ServerGone, "JSONDecodeError"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_response_that_is_not_what_was_asked_for(name: str, tmp_path: Path) -> None:
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        talk(StandIn(change), tmp_path, write)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(400, ServerRefused, "HTTP 400: no"), (401, ServerRefused, "HTTP 401"), (503, ServerGone, "HTTP 503: no")],
)
def test_what_http_says(status: int, error: type[Exception], message: str, tmp_path: Path) -> None:
    server = StandIn()
    server.status = status
    with pytest.raises(error, match=message):
        talk(server, tmp_path, write)


def test_one_request_that_fails_costs_that_request_while_the_server_lives(tmp_path: Path) -> None:
    server = StandIn()
    server.status = 500
    assert talk(server, tmp_path, write) == [{"key": 0, "error": "http://stock: HTTP 500: no"}]


def test_the_key_is_carried(tmp_path: Path) -> None:
    with pytest.raises(ServerRefused, match="HTTP 401: Unauthorized"):
        talk(StandIn(key="secret"), tmp_path, write)
    assert len(talk(StandIn(key="secret"), tmp_path, write, key="secret")) == 1


def test_logprobs_of_another_distribution_are_refused_where_it_matters(tmp_path: Path) -> None:
    raw = StandIn(best=RAW)
    assert len(talk(raw, tmp_path, write)) == 1, "at temperature 1 they are the same"
    assert len(talk(raw, tmp_path, lambda client: write(client, generate(WireSampling(0.5, 0.9, 3, True))))) == 1
    for sampling in (WARM, WireSampling(1.0, 0.9, 0, False), WireSampling(1.0, 1.0, 3, False)):
        with pytest.raises(ServerRefused, match="--logprobs-mode processed_logprobs"):
            talk(raw, tmp_path, partial(write, form=generate(sampling)))


@pytest.mark.parametrize("best", [LOGITS, (4.0, -9999.0)])
def test_logits_are_no_logprobs(best: Best, tmp_path: Path) -> None:
    with pytest.raises(ServerRefused, match="expected --logprobs-mode"):
        talk(StandIn(best=best), tmp_path, write)


async def train(client: StockClient) -> list[dict[str, Any]]:
    await client.attach(Attach("s", reload=False), 5.0)
    await client.refit(Refit("s", 3, "version-3"), 5.0)
    return await ask(client, generate())


def test_weights_go_through_the_management_routes(tmp_path: Path) -> None:
    server = StandIn()
    (line,) = talk(server, tmp_path, train)
    assert line["versions"] == [[3, 0]]
    assert server.loads == [str(tmp_path / "weights" / "version-3")]
    assert server.calls[2:] == ["/pause", "s:loading", "load", "/reset_prefix_cache", "s:3", "/resume"]


def test_a_server_without_management_routes_is_for_evaluation(tmp_path: Path) -> None:
    server = StandIn(managed=False)
    (line,) = talk(server, tmp_path, write)
    assert line["versions"] == [[-1, 0]]
    with pytest.raises(ServerRefused, match="start it with VLLM_SERVER_DEV_MODE=1, or a server of nemo_opd"):
        talk(server, tmp_path, train)


def test_nothing_is_written_without_a_whole_set_of_weights(tmp_path: Path) -> None:
    async def too_early(client: StockClient) -> None:
        await client.attach(Attach("s", reload=False), 5.0)
        await ask(client, generate())

    with pytest.raises(ServerGone, match="no whole set of weights"):
        talk(StandIn(), tmp_path, too_early)

    broken = StandIn()
    broken.fail_load = True
    with pytest.raises(ServerGone, match="shapes differ"):
        talk(broken, tmp_path, train)
    with pytest.raises(ServerGone, match="no whole set of weights"):
        talk(broken, tmp_path, lambda client: ask(client, generate()))


def test_a_server_that_was_left_paused_is_woken(tmp_path: Path) -> None:
    server = StandIn()
    server.paused, server.weights = True, "killed:loading"
    assert talk(server, tmp_path, train, stuck_seconds=5.0)[0]["versions"] == [[3, 0]]


def test_versions_only_grow(tmp_path: Path) -> None:
    async def back(client: StockClient) -> None:
        await train(client)
        await client.refit(Refit("s", 3, "again"), 5.0)

    with pytest.raises(ServerRefused, match="policy version: got 3 after 3"):
        talk(StandIn(), tmp_path, back)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [("default", ServerGone, "it was started again"), ("other:3", ServerRefused, "another session has this server")],
)
def test_weights_that_changed_meanwhile_are_noticed(
    weights: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    server = StandIn()

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        server.weights = weights
        return answer

    server.change = change
    with pytest.raises(error, match=message):
        talk(server, tmp_path, train)


def test_a_session_that_evaluates_goes_back_to_the_servers_own_weights(tmp_path: Path) -> None:
    server = StandIn()
    server.weights = "earlier:8"
    (line,) = talk(server, tmp_path, write)
    assert server.loads == ["somewhere/m"] and line["versions"] == [[-1, 0]]


def test_an_engine_that_gets_nowhere_is_given_up(tmp_path: Path) -> None:
    server = StandIn()
    server.hangs = True
    with pytest.raises(ServerGone, match="its engine made no token"):
        talk(server, tmp_path, write, stuck_seconds=0.1)


async def score(client: StockClient, need: str, k: int) -> list[dict[str, Any]]:
    await client.attach(Attach("s", reload=False), 5.0)
    return await ask(client, Score((WireScore(4, (1, 2), (3, 8, 5), ""),), need, k))


def test_scores_are_about_the_response_alone(tmp_path: Path) -> None:
    server = StandIn(managed=False)
    (line,) = talk(server, tmp_path, lambda client: score(client, "sampled", 0), TEACHER)
    found = unpacked(line["numbers"], {"logprobs": (torch.float32, (3, 1))})
    assert line["key"] == 4 and torch.equal(found["logprobs"], torch.tensor([[-0.3], [-0.8], [-0.5]]))
    assert server.bodies[0]["max_tokens"] == 1 and server.bodies[0]["prompt"] == [1, 2, 3, 8, 5]


def test_the_written_token_is_not_among_the_best_unless_it_is(tmp_path: Path) -> None:
    (line,) = talk(StandIn(), tmp_path, lambda client: score(client, "top_k", 1), TEACHER)
    found = unpacked(line["numbers"], {"logprobs": (torch.float32, (3, 1)), "ids": (torch.int64, (3, 1))})
    assert found["ids"].tolist() == [[8], [8], [8]]


def test_minus_infinity_is_no_number(tmp_path: Path) -> None:
    rows = [None, {"2": {"logprob": -1.0}}, *({str(t): {"logprob": -9999.0}} for t in (3, 8, 5))]
    server = StandIn(choice(prompt_logprobs=rows))
    (line,) = talk(server, tmp_path, lambda client: score(client, "sampled", 0), TEACHER)
    assert unpacked(line["numbers"], {"logprobs": (torch.float32, (3, 1))})["logprobs"].isneginf().all()


@pytest.mark.parametrize("rows", [None, [None], [None, *[{"0": {"logprob": -1.0}}] * 4], [None, *[{"3": 1}] * 4]])
def test_scores_that_are_none(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ServerRefused, match="no log-probabilit"):
        server = StandIn(choice(prompt_logprobs=rows))
        talk(server, tmp_path, lambda client: score(client, "sampled", 0), TEACHER)


def test_ids_that_are_given_are_not_scored(tmp_path: Path) -> None:
    with pytest.raises(ServerRefused, match="serve the teacher with protocol own"):
        talk(StandIn(), tmp_path, lambda client: score(client, "at_ids", 2), TEACHER)


def test_a_teacher_that_was_given_other_weights_is_refused(tmp_path: Path) -> None:
    server = StandIn()
    server.weights = "run:12"
    with pytest.raises(ServerRefused, match="other weights than those it was started with"):
        talk(server, tmp_path, lambda client: score(client, "sampled", 0), TEACHER)
