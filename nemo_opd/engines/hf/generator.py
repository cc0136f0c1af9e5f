"""Rollouts by transformers in this process: the embedded default, no server.

A loop of our own rather than `model.generate`, because finished sequences must free their slot at once, random numbers
must not depend on the batch, and a stop request must be able to interrupt between two tokens.

A request's tokens depend on its seed and the weights alone, up to the floating-point rounding of the model's forward:
matrix kernels may add in another order for another batch size, which moves logits by about 1e-6 in float32 and can
turn a draw only where two perturbed logits are that close. In bfloat16 the same holds with larger rounding.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_opd.engines.generation import check_generate_request, context_of, is_over, nothing_drawn, rollout_of
from nemo_opd.engines.hf.decode import DecodeBatch
from nemo_opd.engines.hf.model import check_dense, eos_ids_of, load_model, longest_sequence, named_weights
from nemo_opd.engines.hf.reader import CachedModel, Reader
from nemo_opd.engines.hf.slots import ATTENTION
from nemo_opd.refit.manifest import WeightCheck
from nemo_opd.types import GenerateRequest, Rollout, Sampling, StopRequested
from nemo_opd.vocab.sampling import check_sampling

log = logging.getLogger(__name__)

MakeReader = Callable[[PreTrainedModel, int, int], Reader]

_REFILL_SHARE = 8
"""Waiting requests enter when 1/8 of the slots is free: a prefill for each single free slot costs more than it wins."""


class HFGenerator:
    """`nemo_opd.engines.protocols.Generator` on a transformers model.

    * `sampling.max_new_tokens`, or less where a request says so, limits the whole response, prefix included: a response
      that is written in segments has one limit, and its last segment ends where a single call would have ended.
    * Prefix tokens keep `request.prefix_author`, policy version -1 and a NaN log-probability; they are in the loss
      mask, for whether a prefix is trained on is the algorithm's choice and not the generator's.
    * The EOS token is part of the response and in the loss mask. No padding id exists, so none can be mistaken for it.
    * Each token carries the version that the generator held when it was drawn. Weights may be loaded between two
      rollouts of a running `generate`; later tokens then carry the new version (on keys and values of the old one).
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        batch_size: int = 64,
        eos_ids: Sequence[int] | None = None,
        decode: Callable[[Tensor], str] | None = None,
        dtype: str | torch.dtype = "float32",
        device: torch.device | str | None = None,
        read_weights: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            model: a folder in Hugging Face format, or a model, which is owned and changed from now on.
            batch_size: sequences decoded at a time; the key-value cache grows with it.
            eos_ids: ids that end a response; None takes those that the folder names.
            decode: makes `Rollout.text` of response ids, int64 [response]; None leaves it empty.
            dtype, device: of a model read from a folder; None is this process's GPU, or the CPU where there is none.
            vocab_size: only ids below it are drawn: the student's, where a teacher that knows more ids writes for it.
                None: the model's.
            read_weights: False reads the folder's configuration alone, and refuses to generate until `load_weights`.

        Raises: ValueError for a folder without a model, an unsupported architecture, a batch size below 1 or an EOS id
        outside the vocabulary.
        """
        if batch_size < 1:
            raise ValueError(f"rollout.batch_size: got {batch_size}; expected at least 1")
        if not isinstance(model, PreTrainedModel):
            model = load_model(model, dtype, device, read_weights)
        check_dense(model.config)
        self.vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
        if not 1 <= self.vocab_size <= model.config.vocab_size:
            raise ValueError(f"vocab_size: got {vocab_size}; expected 1 to the model's {model.config.vocab_size}")
        self._eos_ids = eos_ids_of(model) if eos_ids is None else tuple(eos_ids)
        if outside := [i for i in self._eos_ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"eos ids: got {outside}; expected ids below the model's {self.vocab_size}")
        model.set_attn_implementation(ATTENTION)
        self._model: PreTrainedModel | None = model.eval().requires_grad_(False)
        self._batch_size, self._decode = batch_size, decode
        self._refusal = "" if read_weights else "it has no weights yet"
        self.version = -1

    @property
    def model(self) -> PreTrainedModel:
        """The model that writes: a scorer of it sees each set of weights that `load_weights` takes."""
        if self._model is None:
            raise RuntimeError("generator: got a call after close; make a new one")
        return self._model

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        """Yield each rollout as it finishes; see `Generator.generate`.

        Raises, at the call: ValueError for bad sampling values or a request that does not fit the model.
        RuntimeError when the generator is closed or holds an incomplete set of weights.
        """
        return self.generate_through(self._cached, requests, sampling, stop_requested)

    def generate_through(
        self, read: MakeReader, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        """`generate`, drawing from the reader that `read` makes of (this generator's model, slots, columns)."""
        model = self._ready_model()
        check_sampling(sampling)
        for request in requests:
            check_generate_request(request, sampling, model.config.vocab_size, longest_sequence(model.config))
        return self._run(partial(read, model), requests, sampling, stop_requested)

    def _cached(self, model: PreTrainedModel, slots: int, columns: int) -> Reader:
        return CachedModel(model, slots, columns, self.vocab_size)

    def _run(
        self,
        read: Callable[[int, int], Reader],
        requests: Sequence[GenerateRequest],
        sampling: Sampling,
        stop: StopRequested,
    ) -> Iterator[Rollout]:
        waiting: deque[GenerateRequest] = deque()
        # Longest contexts first: neighbours in length share a prefill, and memory peaks at the start, not at the end.
        for request in sorted(requests, key=lambda r: (-len(context_of(r)), context_of(r))):
            if is_over(request, sampling, self._eos_ids):
                yield rollout_of(nothing_drawn(request), self._eos_ids, self._decode)
            else:
                waiting.append(request)
        if not waiting:
            return
        slots = min(self._batch_size, len(waiting))
        columns = max(len(r.prompt.token_ids) for r in waiting) + sampling.max_new_tokens
        batch = DecodeBatch(read(slots, columns), sampling, slots, self._eos_ids)
        while (waiting or batch.count) and not stop():
            self._ready_model()
            free = slots - batch.count
            if waiting and free >= max(1, slots // _REFILL_SHARE):
                batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
            # Not under inference mode here: it would leak to the consumer at a yield.
            finished = batch.draw(self.version)
            batch.advance()
            for sequence in finished:
                yield rollout_of(sequence, self._eos_ids, self._decode)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy `weights` into the model in place, one at a time, cast to its dtype; no second copy of the model.

        What is being overwritten cannot be restored, so "none" means refusing: from the first tensor until the last
        the generator does not generate, and when the stream breaks off or is wrong it stays so until a complete load.
        A tied output layer may come or stay away; when it comes it must equal the embedding.

        Raises: ValueError when the version does not grow (nothing is touched then) or a tensor is missing, unknown,
        doubled or of another shape; and whatever `weights` raises.
        """
        model = self._model
        if model is None:
            raise RuntimeError("generator: got load_weights after close; make a new one")
        if version <= self.version:
            raise ValueError(f"policy version: got {version} after {self.version}; expected a larger one")
        own = named_weights(model)
        tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
        check = WeightCheck({name: tuple(p.shape) for name, p in own.items()}, optional=tied)
        self._refusal = f"the load of policy version {version} did not complete"
        written: set[int] = set()
        with torch.no_grad():
            for name, tensor in weights:
                check.see(name, tensor)
                _copy_once(own[name], tensor, written, name)
        check.finish()
        self.version, self._refusal = version, ""
        log.debug("generator holds policy version %d", version)

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._model = None

    def _ready_model(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("generator: got generate after close; make a new one")
        if self._refusal:
            raise RuntimeError(f"generator refuses to generate: {self._refusal}; load a complete set of weights first")
        return self._model


def _copy_once(target: Tensor, tensor: Tensor, written: set[int], name: str) -> None:
    """Copy into a parameter; one that was written under its other name must get the same values again."""
    if id(target) in written:
        if not torch.equal(target, tensor.to(target)):
            raise ValueError(f"weights: got {name} with other values than the tensor it is tied to; expected the same")
        return
    target.copy_(tensor)
    written.add(id(target))
