"""A server: python -m nemo_opd.engines.vllm.server SETTINGS.json

Our own small application around vLLM's engine. It has the routes of `wire` that its role needs and no others; without a
key it listens on the loopback address alone. It ends with SIGTERM, with the process that started it, or when the engine
fails.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nemo_opd.engines.vllm.settings import TEACHER, WRITER, ServerSettings, read_key
from nemo_opd.engines.vllm.wire import (
    Attach,
    BadMessage,
    EngineFailed,
    Form,
    Generate,
    Refit,
    Refused,
    Score,
    Sleep,
    Transfer,
)
from nemo_opd.foreign import refuse_code
from nemo_opd.reliability import redact
from nemo_opd.reliability.child import end_with_parent
from nemo_opd.reliability.files import replace_private

log = logging.getLogger(__name__)

BODY_BYTES = 256 << 20
"""The largest request that is read."""

Handler = Callable[[Request], Awaitable[Response]]

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process; see `engine`
    "VLLM_PLUGINS": "",  # what other packages would like to be run in here
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}


def environment(settings: ServerSettings, gpu: bool) -> dict[str, str]:
    """What is set before vLLM is imported, unless the caller has set it."""
    chosen = {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_cache_gib)}
    # A writer draws in a logits processor, which is V1's; a teacher scores ids that are given, which is V2's, on GPUs.
    chosen["VLLM_USE_V2_MODEL_RUNNER"] = "1" if gpu and settings.role == TEACHER else "0"
    if not gpu:
        chosen["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than it wins
    return chosen


def application(served: Any, key: str | None) -> Starlette:
    """The routes, behind the key where there is one."""

    def route(path: str, method: str, handler: Handler) -> Route:
        async def guarded(request: Request) -> Response:
            if key is not None and not _has_key(request, key):
                return JSONResponse({"error": "no key, or another one"}, 401)
            try:
                return await handler(request)
            except Refused as error:
                return JSONResponse({"error": str(error)}, error.status)
            except EngineFailed as error:
                return JSONResponse({"error": str(error)}, 500)
            except (BadMessage, json.JSONDecodeError, RecursionError) as error:
                return JSONResponse({"error": str(error)}, 400)

        return Route(path, guarded, methods=[method])

    async def health(request: Request) -> Response:
        return JSONResponse(served.health())

    async def attach(request: Request) -> Response:
        await served.attach(Attach.read(await _body(request)))
        return JSONResponse(served.description(_vllm_version()).to_dict())

    async def refit(request: Request) -> Response:
        message = Refit.read(await _body(request))
        await served.refit(message)
        return JSONResponse({"version": message.version})

    async def transfer(request: Request) -> Response:
        message = Transfer.read(await _body(request))
        await served.transfer(message)
        return JSONResponse({"version": message.version})

    async def sleep(request: Request) -> Response:
        await served.sleep(Sleep.read(await _body(request)))
        return JSONResponse({})

    def streaming(form: type[Form], call: Callable[[Any], AsyncGenerator[Mapping[str, Any], None]]) -> Handler:
        async def handle(request: Request) -> Response:
            lines = call(form.read(await _body(request)))
            first = await anext(lines)  # what fails at once is refused before the stream begins
            return StreamingResponse(_encoded(first, lines), media_type="application/x-ndjson")

        return handle

    handlers: dict[str, Handler] = {"/attach": attach}
    if served.settings.role == WRITER:
        handlers |= {Generate.path: streaming(Generate, served.generate), "/refit": refit}
        handlers |= {"/transfer": transfer, "/sleep": sleep}
    else:
        handlers |= {Score.path: streaming(Score, served.score)}
    posts = [route(path, "POST", handler) for path, handler in handlers.items()]
    return Starlette(routes=[route("/health", "GET", health), *posts])


def _has_key(request: Request, key: str) -> bool:
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {key}".encode())


async def _body(request: Request) -> object:
    """Raises BadMessage for a body that is too large."""
    parts, size = [], 0
    with suppress(ClientDisconnect):
        async for part in request.stream():
            size += len(part)
            if size > BODY_BYTES:
                raise BadMessage(f"the request is larger than {BODY_BYTES} bytes")
            parts.append(part)
    return json.loads(b"".join(parts))


async def _encoded(
    first: Mapping[str, Any], lines: AsyncGenerator[Mapping[str, Any], None]
) -> AsyncGenerator[bytes, None]:
    try:
        yield json.dumps(first).encode() + b"\n"
        async for line in lines:
            yield json.dumps(line).encode() + b"\n"
    finally:
        await lines.aclose()  # at once, so that the engine drops what nobody waits for


def _vllm_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return "unknown"


def main() -> int:
    settings = ServerSettings.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    end_with_parent(signal.SIGTERM)
    redact.install()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name, value in environment(settings, torch.cuda.is_available()).items():
        os.environ.setdefault(name, value)
    key = read_key(settings.key_file)
    refuse_code(Path(settings.model), "model")
    from nemo_opd.engines.vllm.engine import EngineThread, make_engine  # late: vLLM reads the environment at import
    from nemo_opd.engines.vllm.teacher import Teacher
    from nemo_opd.engines.vllm.writer import Writer

    listener = socket.create_server((settings.host, settings.port))
    engine = EngineThread(make_engine(settings))
    engine.start()
    served = Writer(settings, engine) if settings.role == WRITER else Teacher(settings, engine)
    asyncio.run(_serve(settings, engine, application(served, key), listener))
    engine.stop()
    return 1 if engine.failure is not None else 0


async def _serve(settings: ServerSettings, engine: Any, app: Starlette, listener: socket.socket) -> None:
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    _announce(Path(settings.ready_file), f"http://{f'[{host}]' if ':' in host else host}:{port}")
    while not serving.done():
        if engine.failure is not None:
            server.should_exit = True
        await asyncio.wait([serving], timeout=0.5)
    await serving


def _announce(path: Path, url: str) -> None:
    replace_private(path, json.dumps({"url": url}))


if __name__ == "__main__":
    sys.exit(main())
