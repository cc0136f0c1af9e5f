"""A writer's side of weights that come straight from a trainer, through a weight-transfer engine of vLLM's kind.

The trainer connects, then sends set after set: start, update (in one or several parts), finish. From start to finish
the engine makes no step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.engine.llm_engine import LLMEngine

from nemo_opd.engines.vllm import gloo_transfer
from nemo_opd.engines.vllm.engine import EngineThread
from nemo_opd.engines.vllm.handles import from_json
from nemo_opd.engines.vllm.wire import CONNECT, FINISH, START, TRANSFERS, UPDATE, BadMessage

_METHODS = dict(
    zip(
        TRANSFERS,
        ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"),
        strict=True,
    )
)


class ReceivingWorker:
    """Part of a writer's workers (``worker_extension_cls``), which thereby import the engine `gloo` too."""

    transfers = gloo_transfer.NAME
    weight_transfer_engine: Any
    _weight_update_active: bool

    def forget_update(self) -> None:
        """An update that nobody will finish is none, and its trainer is let go of."""
        if self.weight_transfer_engine is not None:
            self._weight_update_active = False
            self.weight_transfer_engine.reset_weight_update_target()
            self.weight_transfer_engine.shutdown()


class Receiver:
    """What a writer does for `Transfer` messages, in its engine's thread."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self.expects = CONNECT
        """The next step; after a failure, and in a new session, a trainer connects again."""

    def check(self, action: str) -> None:
        """Raises BadMessage for a step that is none, or comes too early."""
        if action not in TRANSFERS:
            raise BadMessage(f"action: got {action[:40]}; expected one of {', '.join(TRANSFERS)}")
        may = {CONNECT: (), START: (START,), UPDATE: (UPDATE, FINISH)}[self.expects]
        if action != CONNECT and action not in may:
            raise BadMessage(f"action: got {action}; expected {' or '.join((CONNECT, *may))}")

    def do(self, engine: LLMEngine, action: str, info: Mapping[str, Any]) -> None:
        """One step that was checked. What it raises leaves the weights half-way."""
        self.expects = CONNECT
        if action == CONNECT:
            self.forget(engine)
        if action == START:
            self._thread.held = True
        arguments = (from_json(info),) if info else ()
        engine.collective_rpc(_METHODS[action], args=arguments)
        self.expects = START if action in (CONNECT, FINISH) else UPDATE

    def forget(self, engine: LLMEngine) -> None:
        """Whoever was connected is not any more."""
        engine.collective_rpc("forget_update")
        self._thread.held, self.expects = False, CONNECT
