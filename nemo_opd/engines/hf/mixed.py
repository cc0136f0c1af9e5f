"""Rollouts from a mixture of student and teacher (MiniLLM, arXiv 2306.08543, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from nemo_opd.engines.hf.generator import HFGenerator
from nemo_opd.engines.hf.model import check_dense, load_model
from nemo_opd.engines.hf.reader import CachedModel, Mixture
from nemo_opd.engines.hf.slots import ATTENTION
from nemo_opd.engines.protocols import NamedTensor
from nemo_opd.types import GenerateRequest, Rollout, Sampling, StopRequested


class TeacherMixedGenerator:
    """`nemo_opd.engines.protocols.Generator` that draws each token from ``a q + (1 - a) p``.

    The student is another generator's and stays usable by itself (for evaluation): weights and versions are its own.
    Tokens count as the student's; `sampler_logprobs` are those of the mixture, which they were drawn from. Temperature,
    top-k and top-p act on the mixture. Both models run at every token, and the teacher is whole in this process.
    """

    def __init__(
        self,
        student: HFGenerator,
        teacher: str | Path | PreTrainedModel,
        teacher_share: float,
        *,
        dtype: str | torch.dtype = "float32",
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            student: gives p, its weights, batch size and end tokens.
            teacher: gives q; a folder in Hugging Face format, or a model.
            teacher_share: a, from 0 up to but not including 1 (importance weights p / mu need p to be in mu).
            dtype, device: of a teacher read from a folder.

        Raises: ValueError for a share out of range, an unsupported architecture or a teacher with fewer ids.
        """
        if not 0.0 <= teacher_share < 1.0:
            raise ValueError(f"prefix.teacher_share: got {teacher_share}; expected at least 0 and below 1")
        model = teacher if isinstance(teacher, PreTrainedModel) else load_model(teacher, dtype, device)
        check_dense(model.config)
        if model.config.vocab_size < student.vocab_size:
            raise ValueError(
                f"teacher.model: got {model.config.vocab_size} ids; expected at least the student's "
                f"{student.vocab_size}; choose a teacher that knows every token of the student"
            )
        model.set_attn_implementation(ATTENTION)
        self._student, self._share = student, teacher_share
        self._teacher: PreTrainedModel | None = model.eval().requires_grad_(False)

    @property
    def version(self) -> int:
        return self._student.version

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, stop_requested: StopRequested
    ) -> Iterator[Rollout]:
        """See `Generator.generate`."""
        if self._teacher is None:
            raise RuntimeError("generator: got generate after close; make a new one")
        return self._student.generate_through(self._reader, requests, sampling, stop_requested)

    def _reader(self, student: PreTrainedModel, slots: int, columns: int) -> Mixture:
        assert self._teacher is not None
        p, q = (CachedModel(m, slots, columns, self._student.vocab_size) for m in (student, self._teacher))
        return Mixture(p, q, self._share)

    def load_weights(self, weights: Iterable[NamedTensor], version: int) -> None:
        """The student's new weights; see `Generator.load_weights`."""
        self._student.load_weights(weights, version)

    def close(self) -> None:
        """Free the teacher. Idempotent; the student belongs to whoever made it."""
        self._teacher = None
