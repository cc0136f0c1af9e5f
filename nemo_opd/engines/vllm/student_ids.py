"""Run in vLLM's workers: a teacher's probabilities are over the student's ids.

A teacher's vocabulary may be padded further than its student's (Qwen2.5: 152,064 and 151,936 ids). Both distributions
must live on the same ids, so the logits of those that only the teacher has are -inf before anything is normalised. They
stay where they are: a context may use them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor


class StudentIds:
    """Part of vLLM's worker (``worker_extension_cls``)."""

    model_runner: Any

    def keep_ids(self, count: int) -> None:
        """Ids from `count` on have probability 0 from now on."""
        makers = [module for module in self.model_runner.get_model().modules() if isinstance(module, LogitsProcessor)]
        if len(makers) != 1:
            raise RuntimeError(f"the model makes logits in {len(makers)} places; expected one")

        def mask(module: nn.Module, arguments: object, logits: Tensor | None) -> None:
            if logits is not None:  # ranks that hold no logits
                logits[..., count:] = -float("inf")

        makers[0].register_forward_hook(mask)
