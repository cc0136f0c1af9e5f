"""What flows through a step, in the order in which it flows.

    Prompt -> GenerateRequest -> Rollout -> ScoreRequest -> TeacherScores -> PackedRow / TrainBatch -> StepReport

Everything is frozen: a stage makes a new object, it never edits one that it was handed. Tensors live on the CPU
until the trainer moves a packed row to its device. Shapes use these axes:

    response  tokens of one response                 row      positions of one packed row (a micro-batch)
    tokens    trained tokens of one packed row       hidden   width of a model's last hidden state
    k         ids reported per token                 vocab    the model's `vocab_size` (never the tokenizer's length)
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

StopRequested = Callable[[], bool]
"""Asked between tokens: should this stage give up because the run was asked to stop?"""


class Author(enum.IntEnum):
    """Who wrote a response token."""

    STUDENT = 0
    TEACHER = 1
    DATASET = 2
    TOOL = 3


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered and tokenised.

    Example: ``Prompt(index=17, epoch=0, messages=({"role": "user", "content": "12+7="},), token_ids=(5, 9, 3),
    answer="19")``.
    """

    index: int
    """Position in the data set, from 0; with `epoch` it names the prompt for seeds, resume and logs."""
    epoch: int
    messages: tuple[Mapping[str, str], ...]
    """The conversation as read, so that a teacher context can render it again with more in it."""
    token_ids: tuple[int, ...]
    """What the student sees, special tokens and generation prompt included."""
    answer: str | None = None
    """What a verifier compares with; None where the data set has none."""
    response: str | None = None
    """A response written in the data set (SFT, dataset prefixes)."""
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How a generator draws tokens. ``top_k=0`` and ``top_p=1.0`` switch the two filters off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """One response to write. The seed alone decides its random numbers, whatever batch the request lands in."""

    prompt: Prompt
    sample: int
    """Number of this sample among the samples of its prompt, from 0."""
    seed: int
    """64 bits derived from (run seed, epoch, prompt index, sample); see `nemo_opd.rollout.seeds`."""
    prefix_ids: tuple[int, ...] = ()
    """Response tokens already written (by the teacher, a data set, an earlier segment); generation continues them."""
    prefix_author: Author = Author.TEACHER
    max_new_tokens: int | None = None
    """Response tokens, prefix included, after which this one ends; None, or anything above it: the sampling's."""


class Finish(enum.IntEnum):
    """Why a response ended."""

    EOS = 0
    LENGTH = 1
    STOPPED = 2
    """Cut by a stop rule (for example KAT)."""


@dataclass(frozen=True)
class BestIds:
    """What a model held most probable before each of some tokens."""

    ids: Tensor
    """int32 [tokens, k], the most probable first"""
    logprobs: Tensor
    """float32 [tokens, k], nats, at temperature 1, over the whole vocabulary"""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Rollout:
    """One response with, for every token, who wrote it, under which policy version, and whether it is trained on."""

    prompt: Prompt
    sample: int
    response_ids: Tensor
    """int64 [response], the EOS token included when the response ended with one."""
    sampler_logprobs: Tensor
    """float32 [response], nats, of the distribution that was really sampled from (after temperature, top-k, top-p);
    NaN on tokens that the generator did not draw: missing is not zero."""
    author: Tensor
    """int8 [response], values of `Author`."""
    policy_version: Tensor
    """int64 [response], version of the weights that wrote the token; -1 where no policy of ours wrote it."""
    loss_mask: Tensor
    """bool [response], True where the token is trained on."""
    finish: Finish
    decode: Callable[[Tensor], str] | None = None
    """int64 [response] -> text: what a tokenizer does, or the text itself where the response was one."""
    reward: float | None = None
    """The verifier's answer in [0, 1]; None when nothing verified it."""
    best: BestIds | None = None
    """What the student held most probable, with the weights that drew the token, at as many of the last tokens as the
    writer's last call drew. In the process that wrote the response alone, and only where a stop rule wants it."""

    @property
    def text(self) -> str:
        """Decoded anew each time it is asked for: every process holds every response of a step, and few texts are read.
        Empty without `decode`."""
        return "" if self.decode is None else self.decode(self.response_ids)


class Need(enum.IntEnum):
    """What a loss needs of the teacher at a token, from the least to the most."""

    NOTHING = 0
    SAMPLED = 1
    """log q of the sampled token."""
    AT_IDS = 2
    """log q at ids that the student chose."""
    TOP_K = 3
    """the teacher's own k most probable ids with their log q."""
    FULL = 4
    """the whole distribution, carried as the last hidden state."""


@dataclass(frozen=True)
class TeacherNeeds:
    """Derived from the loss, never configured. `k` matters for AT_IDS and TOP_K only."""

    need: Need
    k: int = 0
    entropy: bool = False
    base: bool = False
    """log b of the sampled token besides, b the model that the teacher was trained from"""


@dataclass(frozen=True)
class ScoreRequest:
    """Score `response_ids` as the continuation of `context_ids` (what the *teacher* sees, not what the student saw)."""

    key: int
    """Position of the rollout in the step's global list; answers carry it back."""
    context_ids: tuple[int, ...]
    response_ids: Tensor
    """int64 [response]"""
    consumers: tuple[int, ...] = (0,)
    """Global ranks that want the answer (the last pipeline stage of the replica that trains on this rollout)."""
    at_ids: Tensor | None = None
    """int64 [response, k] for `Need.AT_IDS`"""
    teacher: int = 0
    """Number of the teacher that is asked, where there are several."""


@dataclass(frozen=True)
class TeacherScores:
    """The teacher's answer for one response, aligned by response offset: row t is about response token t.

    Exactly one of the payloads that the need asks for is set, and the base's where it is asked. `valid` is False where
    no score arrived; such a token is removed from the loss and counted, and its payload is never read.
    """

    key: int
    valid: Tensor
    """bool [response]"""
    hidden: Tensor | None = None
    """[response, hidden] in the teacher's dtype, after the final norm: the input of the output layer (`Need.FULL`)"""
    sampled_logprobs: Tensor | None = None
    """float32 [response], nats, at temperature 1"""
    ids: Tensor | None = None
    """int64 [response, k] for AT_IDS and TOP_K"""
    id_logprobs: Tensor | None = None
    """float32 [response, k], nats, at temperature 1"""
    base_logprobs: Tensor | None = None
    """float32 [response], nats, of the sampled token under the teacher's base model"""


@dataclass(frozen=True)
class TokenBatch:
    """The trained tokens of one packed row: everything a loss may look at besides the two distributions.

    ``tokens[i]`` is predicted by the hidden state at row position ``position[i]``.
    """

    position: Tensor
    """int64 [tokens], position in the row whose hidden state predicts this token"""
    ids: Tensor
    """int64 [tokens], the token that was written"""
    sequence: Tensor
    """int64 [tokens], number of the sequence within the row, ascending"""
    offset: Tensor
    """int64 [tokens], response offset of the token within its sequence"""
    author: Tensor
    """int8 [tokens]"""
    policy_version: Tensor
    """int64 [tokens]"""
    sampler_logprobs: Tensor
    """float32 [tokens], NaN where the generator did not draw the token"""
    advantage: Tensor
    """float32 [tokens], from the verifier (zeros without one)"""
    teacher_valid: Tensor
    """bool [tokens]; all True when no teacher is needed"""
    response_key: Tensor | None = None
    """int64 [tokens], 52 bits that name the token's response, the same in every row and layout; with `offset` they
    address random decisions about the token (`nemo_opd.vocab.noise`)"""
    teacher_hidden: Tensor | None = None
    """[tokens, hidden]"""
    teacher_sampled_logprobs: Tensor | None = None
    """float32 [tokens]"""
    teacher_ids: Tensor | None = None
    """int64 [tokens, k]"""
    teacher_id_logprobs: Tensor | None = None
    """float32 [tokens, k]"""
    teacher_base_logprobs: Tensor | None = None
    """float32 [tokens]"""

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def select(self, rows: Tensor | slice) -> TokenBatch:
        """The same batch restricted to some tokens (a chunk, or a mask)."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> TokenBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        fields: dict[str, Tensor | None] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{n: change(t) for n, t in fields.items() if t is not None})


@dataclass(frozen=True)
class PackedRow:
    """Several sequences laid end to end: one micro-batch of the trainer.

    Example: two sequences of 5 and 3 positions give ``cu_seqlens = [0, 5, 8]`` and ``position_ids = 0 1 2 3 4 0 1 2``.
    Positions after ``cu_seqlens[-1]`` are padding.
    """

    input_ids: Tensor
    """int64 [row]"""
    position_ids: Tensor
    """int64 [row], restarting at 0 for every sequence"""
    cu_seqlens: Tensor
    """int32 [sequences + 1], bounds of the sequences in the row"""
    tokens: TokenBatch
    keys: tuple[int, ...] = ()
    """Position of each sequence's rollout in the step's global list"""
    teacher: int = 0
    """Number of the teacher that scored the row's sequences, where there are several."""


TOKEN_SCORES = ("teacher_logprob", "sampled_kl", "kl", "student_entropy", "weight")
"""Metrics of a loss that are also kept token by token, as far as it reports them."""


@dataclass(frozen=True)
class TrainBatch:
    """What one data-parallel replica trains on in one step; every rank of the replica holds the same one."""

    rows: tuple[PackedRow, ...]
    """Micro-batches. Never empty: a replica without work gets one row without trained tokens."""
    normalisers: Mapping[str, float]
    """Global token count of each loss component, over all replicas and micro-batches; at least 1."""


@dataclass(frozen=True)
class TrainStats:
    """What the trainer says of one step, equal on every rank."""

    losses: Mapping[str, float]
    """Each component's global mean per token."""
    metrics: Mapping[str, float]
    """Global token means of what the loss measured (kl, entropy, importance ratio, ...)."""
    grad_norm: float
    learning_rate: float
    skipped: bool = False
    """True when the update was left out: its numbers were not finite, or it was not accepted."""
    broken: str = ""
    """Of an update that was left out, what of this rank's own was not finite before ranks added anything up: loss,
    gradient, or nothing."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """This rank's wall time by part: ``forward_backward`` (gradient reduction included; ``own`` is the time until that
    begins) and ``optimizer``."""
    token_scores: Sequence[Mapping[str, Tensor]] = ()
    """Of this rank's replica alone, on the ranks that compute its loss: for each row of the batch, by name those of
    `TOKEN_SCORES` that were measured, float32 [tokens] on the trainer's device, NaN where a token does not count."""


@dataclass(frozen=True)
class StepReport:
    """One line of `metrics.jsonl`."""

    step: int
    policy_version: int
    metrics: Mapping[str, float]
    """Flat names such as ``loss/kl``, ``reward/mean``, ``time/rollout``."""
    seconds: float
