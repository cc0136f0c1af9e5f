"""The schema of a recipe. Every default of the project stands here or in an algorithm's record, nowhere else.

Imports neither torch nor NeMo, so that a typing error in a recipe is refused in well under a second. Loading and
merging is in `nemo_opd.configuration.load`, rules between fields are in `nemo_opd.configuration.check`.
`None` means "not set"; sizes are counts, times are seconds, learning rates are per step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

MISSING: Any = "???"
"""OmegaConf's mark of a field that the recipe must fill in."""


@dataclass
class RunConfig:
    """Where a run lives and how it is named."""

    dir: str = MISSING
    """Run folder: created when absent, resumed when it holds a checkpoint."""
    seed: int = 0
    accept_changes: bool = False
    """Go on from a checkpoint although recipe, models or data make it another run; what changed is said."""
    restarts: int = 2
    """So often a run of several processes, started without a launcher, is started again after a failure without a new
    checkpoint in between."""
    time_limit: float | None = None
    """Seconds after which an attempt stops by itself, with a checkpoint (the time of a save is kept free); the end of a
    SLURM job counts as well."""


FP8_MULTIPLES: dict[str, int] = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""By recipe, what a matrix's sides must be multiples of: rows of tokens (of each process) and weights alike."""
FP8_SINCE: dict[str, tuple[int, int]] = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Compute capability from which Transformer Engine runs a recipe: 8.9 Ada, 9.0 Hopper (blockwise there besides wants
CUDA 12.9, which torch's CUDA 13 build is beyond), 10.0 Blackwell."""


@dataclass
class FP8Config:
    """Matrix products of a Megatron model's layers in FP8, by Transformer Engine; see docs/fp8.md.

    Norms, attention, the output layer and the loss keep bf16 and fp32.
    """

    recipe: str = "none"
    """How scaling factors are found: none (no FP8), delayed (of a tensor, from earlier steps), tensorwise (of a tensor,
    now), blockwise (of 128 x 128 weights and 1 x 128 activations), mxfp8 (of 32 numbers; Blackwell only)"""
    format: str = "hybrid"
    """hybrid: e4m3 forward, e5m2 for gradients; e4m3: for everything"""
    bf16_layers_at_start: int | None = None
    """First layers that stay in bf16; null: 1, but 0 with delayed, for which Megatron refuses it."""
    bf16_layers_at_end: int | None = None
    """Last layers that stay in bf16; null: 1, but 0 with delayed."""
    amax_history: int = 1024
    """Of delayed: steps whose largest value decides the scaling factor."""
    param_gather: bool = False
    """Of the student with the distributed optimizer: weights are kept, and gathered, in FP8."""

    def bf16_layers(self) -> tuple[int, int]:
        """How many layers at the start and at the end stay in bf16."""
        otherwise = 0 if self.recipe in ("none", "delayed") else 1
        start, end = self.bf16_layers_at_start, self.bf16_layers_at_end
        return (otherwise if start is None else start), (otherwise if end is None else end)


@dataclass
class LayoutConfig:
    """How one model is spread over processes, and what its layers compute in."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Of the student: chunks of layers on each pipeline stage, which every row passes in turn (interleaved stages), so
    that the pipeline fills and drains sooner; null or 1: one (`chunks`)"""
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    """So many ranks share out the positions of every sequence, for long responses."""
    expert_model_parallel_size: int = 1
    """Of a mixture of experts: so many ranks of a pipeline stage share out the experts of each layer."""
    fp8: FP8Config = field(default_factory=FP8Config)

    @property
    def chunks(self) -> int:
        """Of layers on each pipeline stage."""
        return self.virtual_pipeline_model_parallel_size or 1


@dataclass
class StudentConfig(LayoutConfig):
    """The model that is trained: a folder in Hugging Face format."""

    model: str = MISSING
    dtype: str = "bfloat16"
    """Of the weights in forward and backward: bfloat16 or float32 (float64 in tests). Master weights are fp32."""
    recompute: str = "none"
    """What the backward pass computes once more instead of keeping it: none, selective (the attention of each layer) or
    full (whole layers: one hidden state is kept for each)"""
    vocab_padding_multiple: int = 1
    """The vocabulary is padded to a multiple of this times the tensor-parallel size; padding is -inf, never 0."""


@dataclass
class ServersConfig:
    """vLLM servers: processes of their own, started by the run or by somebody else."""

    urls: str | None = None
    """Of servers that stand already, as in "http://node1:8000,http://node2:8000"; null: the run starts `count` of its
    own on this machine, and ends them."""
    protocol: str = "own"
    """What those at `urls` are: own (`nemo_opd.engines.vllm.server`), or openai (stock vLLM servers)"""
    count: int = 1
    tensor_parallel_size: int = 1
    """Processes (GPUs) of one server of our own."""
    devices: str | None = None
    """GPUs for servers of our own, as in "4,5,6,7"; null: those that the run sees, and on a node that serves alone
    (`cluster`) for each server the next ones."""
    memory_share: float = 0.9
    """Of a GPU's memory, for a server of our own."""
    quantization: str = "none"
    """Of a server of our own: none, or fp8 (vLLM scales the weights as it loads them; needs a GPU)"""
    cpu_cache_gib: int = 1
    """Keys and values of a server of our own, where there is no GPU."""
    key_file: str | None = None
    """File with the key that requests carry; servers that others can reach need one. null: servers that a run starts
    get a new key each time, and to standing ones none is sent."""
    placement: str = "separate"
    """Of writers. separate: GPUs of their own; colocated: the trainer's, whose memory they give up while it trains"""
    transport: str = "disk"
    """How weights reach writers: disk (a folder), nccl (broadcast to other GPUs), ipc (from the same GPUs) or gloo
    (broadcast, where there is no GPU)"""
    weights_dir: str | None = None
    """Folder through which weights go with transport disk, the same for all servers and the run: shared memory on one
    node, a shared file system beyond; null: one in shared memory, for servers of our own."""
    start_seconds: float = 600.0
    """In which servers of our own must listen."""
    restarts: int = 3
    """So often a server of our own that ended is started again. A writer joins with the next weights, a teacher at
    once."""
    load_seconds: float = 600.0
    """In which a server must have taken a set of weights."""
    stuck_seconds: float = 300.0
    """A server whose engine makes no step for so long, while it has work, is given up."""


@dataclass
class FidelityConfig:
    """What a teacher in FP8 may differ from itself in bf16; compared once, before the first step."""

    max_kl: float = 0.005
    """Mean KL(bf16 || FP8) in nats per token above which the run is refused."""
    tokens: int = 4096
    """Response tokens of the first step that are compared."""
    k: int = 64
    """The KL is that of the bf16 teacher's k best ids and one bucket for the rest."""


@dataclass
class TeacherConfig(LayoutConfig):
    """The model that scores. `engine: none` for objectives without a teacher.

    A teacher whose `source` is the student itself lives on the student's layout and has its dtype.
    """

    engine: str = "megatron"
    """megatron (own layout over the same processes), hf (dense, whole in every process), vllm (servers) or none"""
    servers: ServersConfig = field(default_factory=ServersConfig)
    """Of engine vllm."""
    source: str = "external"
    """Whose weights: external (those of `model`), or the student's own: current, frozen (as at the start of the run)
    or ema (moving average, part of the checkpoint)"""
    model: str | None = None
    """Folder in Hugging Face format of an external teacher."""
    base_model: str | None = None
    """The model that the teacher was trained from, in the teacher's layout and dtype; for loss extrapolated."""
    decay: float = 0.95
    """Of ema: after each step the teacher is decay * teacher + (1 - decay) * student."""
    dtype: str = "bfloat16"
    """Of an external teacher."""
    micro_batch_tokens: int = 4096
    """Positions of one scoring micro-batch, in a process or in a server of our own."""
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    """Of an external teacher with `fp8`."""


@dataclass
class OneOfSeveral(TeacherConfig):
    """A teacher among others (`teachers.NAME`)."""

    weight: float = 1.0
    """Share in a mixture, where `data.teacher_key` is not set; weights are divided by their sum."""


@dataclass
class DataConfig:
    """Where prompts come from."""

    path: str = MISSING
    """A .jsonl or .parquet file, or a folder saved by `datasets`."""
    prompt_key: str = "prompt"
    """A text, or a list of {role, content} messages."""
    answer_key: str = "answer"
    response_key: str = "response"
    """Read only where an objective uses written responses (SFT)."""
    teacher_key: str | None = None
    """Field that names which of `teachers` scores the record; null: all of them do, mixed by weight."""
    chat_template: bool = True
    """Render through the tokenizer's chat template; False feeds the text as it is."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """What else the chat template reads, by name, as in ``{enable_thinking: false}`` (Qwen3); the teacher's template is
    given the same where it renders a context of its own."""
    system_prompt: str | None = None
    shuffle: bool = True
    max_prompt_tokens: int = 1024
    on_malformed: str = "error"
    """error (name file and line) or skip (and count)"""


@dataclass
class RolloutConfig:
    """How the student writes."""

    engine: str = "hf"
    """hf (in the trainer's processes) or vllm (servers)"""
    servers: ServersConfig = field(default_factory=ServersConfig)
    """Of engine vllm."""
    samples_per_prompt: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64
    """Sequences that are written at a time by one process (hf), or one server (vllm)."""
    dtype: str = "float32"
    refit_every: int = 1
    """Steps between two refits of the generator. An evaluation, a checkpoint and a resume refit as well."""
    staleness: int = 0
    """Rollouts of the next so many steps are written while a step trains (engine vllm); 0: first the one, then the
    other. A token is at most staleness + refit_every - 1 optimizer steps old."""


@dataclass
class SlotConfig:
    """A choice for one slot of an algorithm; `name` picks the dataclass with the parameters."""

    name: str = MISSING

    reads_responses: ClassVar[bool] = False
    """Of prefixes: True where records of the data set must hold a response."""
    needs_teacher: ClassVar[bool] = True
    """Of losses: False where no teacher is asked."""
    needs_base: ClassVar[bool] = False
    """Of losses: True where the teacher is compared with the model that it was trained from."""
    reads_whole_teacher: ClassVar[bool] = True
    """Of losses: False where less than the teacher's whole distribution is asked."""
    needs_sampler_logprobs: ClassVar[bool] = False
    """Of losses, rewards and weights: True where every token must come with the probability that it was drawn with."""


@dataclass
class StudentPrefix(SlotConfig):
    """The student writes every token."""

    name: str = "student"


@dataclass
class DatasetPrefix(SlotConfig):
    """The data set's response is the whole response: nothing is generated (SFT)."""

    name: str = "dataset"
    reads_responses: ClassVar[bool] = True


@dataclass
class TeacherPrefix(SlotConfig):
    """The teacher writes the first tokens, the student goes on; ever fewer of them (arXiv 2606.01249)."""

    name: str = "teacher"
    max_tokens: int | None = None
    """The largest prefix at the first step; None: `rollout.max_new_tokens`. It falls to 0 along a cosine."""
    anneal_steps: int | None = None
    """Steps until it is 0; None: `train.steps`."""
    length: str = "uniform"
    """uniform: drawn for each response between 0 and the largest; largest: always that"""
    loss: str = "cross_entropy"
    """Of the teacher's tokens: cross_entropy, or same (as of the student's, a loss of whole distributions)"""
    loss_weight: float = 0.001


@dataclass
class MixedPrefix(SlotConfig):
    """Some prompts get the data set's response, the others the student's (GKD, arXiv 2306.13649)."""

    name: str = "mixed"
    reads_responses: ClassVar[bool] = True
    on_policy_share: float = 0.5
    """Share of prompts to which the student writes (lambda)."""
    loss: str = "same"
    """Of the data set's tokens: same (as of the student's) or cross_entropy (SFT mixed in)"""
    loss_weight: float | None = None
    """Factor on the data set's loss beside the student's; None: the shares, lambda L_student + (1 - lambda) L_data."""


@dataclass
class TeacherMixedPrefix(SlotConfig):
    """Every token is drawn from a mixture of the two models' distributions (MiniLLM, arXiv 2306.08543)."""

    name: str = "teacher_mixed"
    teacher_share: float = 0.2
    """Weight of the teacher in the mixture (alpha)."""


@dataclass
class DefaultStop(SlotConfig):
    """A rollout ends at EOS or at `rollout.max_new_tokens`."""

    name: str = "default"


@dataclass
class TrapStop(SlotConfig):
    """The low-divergence rule of KAT (arXiv 2606.09471); formula in nemo_opd/stop/rule.py. Sizes are in tokens."""

    window: int = 64
    """W: a window's value is its mean divergence."""
    consecutive: int = 4
    """C: so many windows in a row below the threshold cut the rollout at the start of the first."""
    threshold_quantile: float = 0.7
    """1 - eta: this quantile of the last rollouts' lowest windows is the threshold; reconstructed."""
    history: int = 4096
    """Rollouts whose lowest window is remembered."""
    warmup_samples: int = 512
    """Nothing is cut before so many are remembered ..."""
    warmup_steps: int = 30
    """... and before so many steps were made."""
    grace: int | None = None
    """Windows that end before this token are not tested, so grace - window tokens are kept. None: the window."""
    stride: int = 1
    """Tokens between two tested windows."""
    divergence: str = "tail"
    """tail: k ids and one bucket for the rest; full: the whole vocabulary (every process holds both output layers)"""
    k: int = 64
    """Of tail."""
    support: str = "student"
    """Of tail: whose k most probable ids, student or teacher"""


@dataclass
class KatStop(TrapStop):
    """Ends a rollout where the teacher has agreed with it for too long (KAT, arXiv 2606.09471)."""

    name: str = "kat"
    form: str = "segments"
    """segments: the rule ends rollouts while they are written; after: they are written whole and cut then"""
    segment_tokens: int = 256
    """Tokens written between two looks of the rule (segments); each look reads the response again from its start."""


@dataclass
class FixedStop(SlotConfig):
    """A control: every rollout ends after `length` tokens."""

    name: str = "fixed"
    length: int = MISSING


@dataclass
class LengthMatchedStop(TrapStop):
    """A control: KAT's own cut lengths, dealt out at random to rollouts that are long enough."""

    name: str = "length_matched"
    tolerance: float = 0.02
    """Share by which the tokens that stay may differ from KAT's, in each step."""


@dataclass
class SamePromptContext(SlotConfig):
    """The teacher sees the prompt that the student saw."""

    name: str = "same_prompt"


@dataclass
class PrivilegedContext(SlotConfig):
    """The teacher alone reads privileged information in its prompt (OPSD, arXiv 2605.11182).

    Set one of `field` (an *instance*: this record's hint, solution or answer) and `text` (a *rule* shared by all).
    What is shared can be learnt by a student that never sees it; what belongs to one record leaves a plateau.
    """

    name: str = "privileged"
    field: str | None = None
    """Key of the record that holds the information; `data.answer_key` names the reference answer."""
    text: str | None = None
    """The information itself, the same for every prompt."""
    place: str = "user"
    """user: after the last user message; system: in the system message, made where there is none"""
    template: str = "{privileged}"
    """The words around it; `{privileged}` stands once for the information."""
    max_tokens: int = 10240
    """Tokens of the information beyond which it is cut."""
    fallback: str = "mask"
    """For a record without the field. mask: no teacher signal (counted); plain_prompt: what the student saw"""


@dataclass
class PeersContext(SlotConfig):
    """The teacher reads other attempts at the same prompt, sorted by the verifier (arXiv 2605.12652)."""

    name: str = "peers"
    variant: str = "contrastive"
    """contrastive (successes and failures), successes, or a control: random_peer, unrelated_prompt,
    success_only_matched; see nemo_opd/teacher/peers.py"""
    success_threshold: float = 1.0
    """A rollout with at least this reward is a success."""
    successes: int = 2
    """How many are shown at most."""
    failures: int = 1
    """How many are shown at most (contrastive); one is shown whenever there is one."""
    hide_success_from_success: bool = False
    """A rollout that succeeded itself is shown no success."""
    max_tokens: int = 10240
    """Tokens of all that is inserted, labels included; longer peers are cut, the longest first."""
    fallback: str = "mask"
    """For a rollout without a usable peer. mask: no teacher signal (counted); plain_prompt: what the student saw"""


@dataclass
class ReverseKLLoss(SlotConfig):
    """KL(p || q) over the full vocabulary, exact at every position."""

    name: str = "reverse_kl"


@dataclass
class PolicyGradientLoss(SlotConfig):
    """Sampled-token policy gradient with advantage -sg[log p - log q] (see nemo_opd/algorithms)."""

    name: str = "policy_gradient"
    reads_whole_teacher: ClassVar[bool] = False
    needs_sampler_logprobs: ClassVar[bool] = True
    clip_ratio: float | None = None
    """PPO clipping of the importance ratio to [1 - c, 1 + c]; None multiplies by the plain ratio."""
    importance_ratio: str = "sampler"
    """sampler: p(y) over the probability it was sampled with; none: 1 (for a correction in the weight slot)"""
    advantage: str = "sampled_reverse_kl"
    """A number of the sampled token; divergences of whole distributions are refused."""
    advantage_clip: float | None = None
    """Bound on the advantage's absolute value, nats."""
    advantage_floor: float | None = None
    """REOPOLD's lambda: the advantage is at least log(lambda / (1 - lambda))."""
    discount: float = 0.0
    """Discount of the return over later tokens of the response; 0 is the token's own advantage alone."""
    length_normalised: bool = False
    """Divide the return by the (discounted) number of its terms."""


@dataclass
class CrossEntropyLoss(SlotConfig):
    """-log p of the written token (SFT)."""

    name: str = "cross_entropy"
    reads_whole_teacher: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False


@dataclass
class ForwardKLLoss(SlotConfig):
    """KL(q || p) over the full vocabulary."""

    name: str = "forward_kl"


@dataclass
class JSDLoss(SlotConfig):
    """Generalised Jensen-Shannon divergence over the full vocabulary (GKD, arXiv 2306.13649)."""

    name: str = "jsd"
    beta: float = 0.5
    """Share of the teacher in the mixture; 0 is forward KL, 1 is reverse KL."""


@dataclass
class SkewForwardKLLoss(SlotConfig):
    """KL(q || a q + (1 - a) p) over the full vocabulary (DistiLLM)."""

    name: str = "skew_forward_kl"
    alpha: float = 0.1


@dataclass
class SkewReverseKLLoss(SlotConfig):
    """KL(p || (1 - a) q + a p) over the full vocabulary, p constant inside the mixture (DistiLLM-2)."""

    name: str = "skew_reverse_kl"
    alpha: float = 0.1


@dataclass
class StopGradientLoss(SlotConfig):
    """Top-k reverse KL, sum over S of p (sg[log p] - log q) (arXiv 2605.11182)."""

    name: str = "stop_gradient"
    k: int = 20
    support: str = "student"
    """Whose k most probable ids: student, teacher, union or intersection"""
    teacher: str = "full"
    """full: both models' logits; scores: what a served teacher reports (no union)"""


@dataclass
class TailLoss(SlotConfig):
    """Top-k with one more bucket for everything else (arXiv 2605.11182)."""

    name: str = "tail"
    k: int = 20
    support: str = "student"
    teacher: str = "full"
    divergence: str = "reverse"
    """reverse, forward or jsd"""
    beta: float = 0.5
    """Of jsd."""


@dataclass
class RenormalisedLoss(SlotConfig):
    """Top-k with both distributions renormalised on the support (arXiv 2605.11182)."""

    name: str = "renormalised"
    k: int = 20
    support: str = "student"
    teacher: str = "full"
    divergence: str = "reverse"
    beta: float = 0.5


@dataclass
class HeadPlusSampleLoss(SlotConfig):
    """Top-k reverse KL made unbiased by the sampled token (arXiv 2605.11182)."""

    name: str = "head_plus_sample"
    needs_sampler_logprobs: ClassVar[bool] = True
    k: int = 20
    support: str = "student"


@dataclass
class K2Loss(SlotConfig):
    """(log p - log q)^2 / 2 of the sampled token: in expectation the gradient of reverse KL."""

    name: str = "k2"
    reads_whole_teacher: ClassVar[bool] = False


@dataclass
class TrustRegionLoss(SlotConfig):
    """Policy gradient on tokens that the teacher accepts, another loss on those it rejects (arXiv 2606.01249)."""

    name: str = "trust_region"
    needs_sampler_logprobs: ClassVar[bool] = True
    trust: str = "sampled"
    """sampled: a token is accepted with probability min(q/p, 1); expected: it counts with this factor"""
    outlier: str = "forward_kl"
    """Of rejected tokens. forward_kl on the teacher's k best ids; clip: bounded policy gradient; mask: nothing"""
    k: int = 64
    tail: bool = False
    """Of forward_kl: one more bucket for the mass outside the k ids."""
    outlier_clip: float = 1.0
    """Of clip: the advantage of a rejected token is at least minus this, nats."""
    importance_ratio: str = "sampler"
    """sampler: p(y) over the probability it was sampled with; none: 1 (for a correction in the weight slot)"""


@dataclass
class EntropyAwareLoss(SlotConfig):
    """Policy gradient, and forward KL besides where the teacher hesitates (arXiv 2603.07079)."""

    name: str = "entropy_aware"
    needs_sampler_logprobs: ClassVar[bool] = True
    entropy_threshold: float = 0.8
    """Entropy of the teacher, nats, above which the forward KL is added."""
    k: int = 16
    """The forward KL looks at the teacher's k best ids..."""
    outside: str = "tail"
    """...and at the rest as one more bucket (tail), or only within the k (renormalised)."""
    importance_ratio: str = "sampler"


@dataclass
class MiniLLMLoss(SlotConfig):
    """Exact single-step term and policy gradient on the return of later tokens (arXiv 2306.08543)."""

    name: str = "minillm"
    needs_sampler_logprobs: ClassVar[bool] = True
    discount: float = 1.0
    length_normalised: bool = True
    """Divide the return by the (discounted) number of its terms."""
    clip_ratio: float | None = 0.2
    """PPO clipping of the importance ratio in the policy gradient to [1 - c, 1 + c]; None does not clip."""


@dataclass
class ExtrapolatedLoss(SlotConfig):
    """Policy gradient on what the teacher gained over its base model, times more than 1 (ExOPD, arXiv 2602.12125)."""

    name: str = "extrapolated"
    reads_whole_teacher: ClassVar[bool] = False
    needs_sampler_logprobs: ClassVar[bool] = True
    needs_base: ClassVar[bool] = True
    extrapolation: float = 1.25
    """Factor on log(teacher / base); 1 is plain on-policy distillation."""
    low_entropy: float | None = None
    """Where the teacher's entropy, nats, is below this, the factor is at most 1; null never caps."""
    clip_ratio: float | None = None
    importance_ratio: str = "sampler"
    advantage_clip: float | None = None


@dataclass
class VerifierPolicyGradientLoss(SlotConfig):
    """The policy gradient of the `reward` slot, and nothing besides: reinforcement learning from verifiable rewards."""

    name: str = "verifier_policy_gradient"
    needs_teacher: ClassVar[bool] = False
    reads_whole_teacher: ClassVar[bool] = False


@dataclass
class NoReward(SlotConfig):
    """The verifier's reward is logged and sorts peers; nothing is learnt from it directly."""

    name: str = "none"


@dataclass
class GroupRelativeReward(SlotConfig):
    """Policy gradient on the verifier's reward, relative to the prompt's other responses (GRPO, arXiv 2402.03300).

    It stands beside any loss as a component with a token count of its own, and alone with
    loss=verifier_policy_gradient.
    """

    name: str = "group_relative"
    needs_sampler_logprobs: ClassVar[bool] = True
    weight: float = 1.0
    """Factor on the policy gradient."""
    loss_weight: float = 1.0
    """Factor on the loss beside it: small where that only holds the student near a model (a KL coefficient)."""
    clip_low: float | None = 0.2
    """The importance ratio is clipped to [1 - clip_low, 1 + clip_high]; null: no such bound."""
    clip_high: float | None = 0.2
    divide_by_std: bool = False
    """Divide a group's advantages by its standard deviation."""
    std_eps: float = 1e-6
    """Added to that deviation."""
    average: str = "tokens"
    """tokens: every token of the step weighs the same; responses: every response does"""
    equal_groups: str = "drop"
    """A prompt whose responses all have the same reward. keep: advantage 0, its tokens count; drop: not counted;
    redraw: replaced by the next prompts of the stream"""
    redraws: int = 3
    """Times that a step may go on to further prompts (redraw); what is still missing then is left out."""


@dataclass
class UnitWeight(SlotConfig):
    """Every trained token counts once."""

    name: str = "unit"


@dataclass
class TruncatedImportanceWeight(SlotConfig):
    """Importance ratio of trainer over sampler, at most `clamp` (truncated importance sampling)."""

    name: str = "tis"
    needs_sampler_logprobs: ClassVar[bool] = True
    clamp: float = 2.0


@dataclass
class IcePopWeight(SlotConfig):
    """Importance ratio of trainer over sampler, 0 outside [low, high]."""

    name: str = "icepop"
    needs_sampler_logprobs: ClassVar[bool] = True
    low: float = 0.5
    high: float = 5.0


@dataclass
class SequenceImportanceWeight(SlotConfig):
    """Drops responses whose geometric-mean importance ratio is outside [low, high]."""

    name: str = "sequence"
    needs_sampler_logprobs: ClassVar[bool] = True
    low: float = 0.5
    high: float = 2.0


@dataclass
class PrefixWeight(SlotConfig):
    """1 + gamma (1 - share of the response's |log q - log p| that lies before the token) (arXiv 2606.22600)."""

    name: str = "prefix"
    gamma: float = 0.5


@dataclass
class EntropyWeight(SlotConfig):
    """Keeps the tokens of a response at which the entropy is highest (REOPOLD, arXiv 2603.11137)."""

    name: str = "entropy"
    keep: float = 0.5
    """Share of a response's tokens; their factors make up for the others, which get 0."""
    of: str = "student"
    """Whose entropy: student or teacher"""


SLOTS: dict[str, dict[str, type[SlotConfig]]] = {
    "prefix": {
        "student": StudentPrefix,
        "dataset": DatasetPrefix,
        "teacher": TeacherPrefix,
        "teacher_mixed": TeacherMixedPrefix,
        "mixed": MixedPrefix,
    },
    "stop": {
        "default": DefaultStop,
        "kat": KatStop,
        "fixed": FixedStop,
        "length_matched": LengthMatchedStop,
    },
    "context": {"same_prompt": SamePromptContext, "privileged": PrivilegedContext, "peers": PeersContext},
    "loss": {
        "reverse_kl": ReverseKLLoss,
        "forward_kl": ForwardKLLoss,
        "jsd": JSDLoss,
        "skew_forward_kl": SkewForwardKLLoss,
        "skew_reverse_kl": SkewReverseKLLoss,
        "stop_gradient": StopGradientLoss,
        "tail": TailLoss,
        "renormalised": RenormalisedLoss,
        "head_plus_sample": HeadPlusSampleLoss,
        "policy_gradient": PolicyGradientLoss,
        "k2": K2Loss,
        "trust_region": TrustRegionLoss,
        "entropy_aware": EntropyAwareLoss,
        "minillm": MiniLLMLoss,
        "extrapolated": ExtrapolatedLoss,
        "cross_entropy": CrossEntropyLoss,
        "verifier_policy_gradient": VerifierPolicyGradientLoss,
    },
    "reward": {"none": NoReward, "group_relative": GroupRelativeReward},
    "weight": {
        "unit": UnitWeight,
        "tis": TruncatedImportanceWeight,
        "icepop": IcePopWeight,
        "sequence": SequenceImportanceWeight,
        "prefix": PrefixWeight,
        "entropy": EntropyWeight,
    },
}
"""For every slot, its choices by name. `slot=name` on the command line is sugar for `slot.name=name`."""

REFUSED_LOSSES: dict[str, tuple[str, str]] = {
    "naive": (
        "a top-k loss whose gradient is that of a divergence; cut down to k ids the plain sum pushes probability out "
        "of the set even where student and teacher agree",
        "use stop_gradient, tail, renormalised or head_plus_sample (or reverse_kl, which is exact)",
    ),
    "k1": (
        "a loss with a gradient; that of log p - log q on sampled tokens is zero in expectation",
        "use policy_gradient or k2, whose expected gradient is that of reverse KL",
    ),
    "k3": (
        "a loss that does what its name says; the gradient of k3 on sampled tokens is that of the forward KL",
        "use policy_gradient or k2 for reverse KL, forward_kl for forward KL",
    ),
}
"""Names that people will try and that are refused: what was expected instead, and the way out."""


@dataclass
class VerifyConfig:
    """Which verifier turns a response into a reward."""

    name: str = "none"
    """none, exact, integer, math, choice, tool_call or code; see docs/verification.md"""
    answer_pattern: str | None = None
    """Literal marker after which the final answer stands, e.g. "#### "; None: each verifier's own way of finding it."""
    time_limit: float = 1.0
    """CPU seconds for one answer (math, code); beyond them it counts as wrong."""


@dataclass
class OptimizerConfig:
    """Adam with Megatron's schedule."""

    lr: float = 1e-6
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"
    """constant, linear or cosine, down to `min_lr` at the last step"""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""
    distributed: bool | None = None
    """Megatron's distributed optimizer; None: where Transformer Engine is present."""
    overlap_grad_reduce: bool = False
    """Gradients are reduced over replicas while the last row's backward pass still runs. A rank whose gradient is not
    finite is then not named: the update is left out, and the sum of all ranks is all that is known."""
    overlap_param_gather: bool = False
    """Updated parameters are gathered from the replicas while the next step begins, which gains something in steps
    without a refit. For the distributed optimizer."""


@dataclass
class TrainConfig:
    """Steps and batch."""

    steps: int = MISSING
    prompts_per_step: int = 32
    """Over all data-parallel replicas."""
    micro_batch_tokens: int = 4096
    """Positions of one packed row; a longer sequence gets a row of its own."""
    packing: bool = True
    """False puts one sequence in each row."""
    loss_chunk_tokens: int = 256
    """Tokens whose logits exist at the same time."""
    processes: int | None = None
    """Processes when no launcher started any; None: the smallest number that fits student and teacher."""


EXPORT_FOLDER = "model"
"""Below the run folder: the trained student in Hugging Face format."""


@dataclass
class CheckpointConfig:
    """When to save and how much to keep."""

    every: int = 100
    """Steps between checkpoints; the last step and a stop request always save."""
    keep: int = 2
    asynchronous: bool = False
    """Write in the background: training waits until model and optimizer are copied to host memory, and goes on. The
    last save, and that of a stop request, are waited for."""
    export_at_end: bool = True
    """After the last step, write the student in Hugging Face format to `<run.dir>/model`."""


@dataclass
class EvaluateConfig:
    """Evaluation on held-out problems during the run and by `nemo-opd eval`."""

    path: str | None = None
    every: int = 0
    """Steps between evaluations; 0: only at the end, when `path` is set."""
    problems: int | None = None
    """The first so many of the file; None: all."""
    samples_per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    max_new_tokens: int | None = None
    """None: as in the rollouts."""


@dataclass
class ObserveConfig:
    """What a run writes down."""

    rollouts_per_step: int = 4
    """Rollouts written to rollouts/*.jsonl each step."""
    token_scores: int = 10
    """On the first step and every so many after it these come with their tokens: text, author, log-probabilities of
    sampler and teacher, KL, entropy, as far as the loss knows them; 0: never."""
    tensorboard: bool = True
    progress: bool = True


@dataclass
class SignConfig:
    """One sign that a run goes wrong."""

    action: str = "warn"
    """ignore; warn; or stop: save a checkpoint and end the run"""
    threshold: float = MISSING


@dataclass
class DiagnoseConfig:
    """Signs that a run goes wrong, what is measured for each, and what is done about it; see docs/diagnosis.md."""

    window: int = 20
    """Last steps that a rule looks at."""
    start_steps: int = 10
    """First steps of the run, with which it compares them."""
    warmup_steps: int = 30
    """Steps before anything is compared with the run's start."""
    repeat_every: int = 100
    """A sign that holds on is said again after so many steps."""
    stop: bool = True
    """False: a sign whose action is stop only warns."""
    length_inflation: SignConfig = field(default_factory=lambda: SignConfig("warn", 3.0))
    """Growth of the response length, where it gains nothing."""
    repetition: SignConfig = field(default_factory=lambda: SignConfig("stop", 0.5))
    """Share of the distinct 3-grams of the start that now repeat."""
    entropy_collapse: SignConfig = field(default_factory=lambda: SignConfig("warn", 0.1))
    """Student's entropy over the lesser of its own and its teacher's at the start, from above."""
    mass_collapse: SignConfig = field(default_factory=lambda: SignConfig("warn", 0.5))
    """Student's or teacher's mass on the support over that at the start, from above."""
    truncation: SignConfig = field(default_factory=lambda: SignConfig("warn", 0.5))
    """Share of the responses that ended at the start and are now cut off."""
    agreement_trap: SignConfig = field(default_factory=lambda: SignConfig("warn", 0.5))
    """KL over that at the start, from above, while reward falls or repetition rises (arXiv 2606.09471)."""
    divergence: SignConfig = field(default_factory=lambda: SignConfig("stop", 10.0))
    """KL or gradient norm over that at the start."""
    degradation: SignConfig = field(default_factory=lambda: SignConfig("warn", 0.7))
    """Reward over the best it was, from above."""
    dropped_scores: SignConfig = field(default_factory=lambda: SignConfig("stop", 0.2))
    """Share of the tokens whose teacher score did not arrive."""
    importance_weights: SignConfig = field(default_factory=lambda: SignConfig("warn", 0.1))
    """Share of the tokens whose importance ratio is out of bounds."""


@dataclass
class GuardConfig:
    """Updates that are left out, on all ranks, and when that ends the run; see docs/guards.md."""

    spikes: bool = True
    """False: only what is not finite is rejected."""
    window: int = 128
    """Last accepted updates with which one is compared."""
    min_history: int = 32
    """Accepted updates before any is compared."""
    sigmas: float = 6.0
    """Standard deviations above the window's mean from which a loss or gradient norm is a spike."""
    least_spread: float = 0.1
    """A standard deviation below this share of the mean counts as this share."""
    least_loss: float = 0.1
    """A smaller loss is no spike."""
    least_grad_norm: float = 1.0
    """A smaller gradient norm is no spike."""
    max_in_a_row: int | None = 5
    """So many rejected updates in a row save a checkpoint and end the run; null: none do."""


@dataclass
class StragglerConfig:
    """A rank that is slower than the others at its own work, step after step, is named; see docs/guards.md."""

    factor: float = 1.5
    """Times the median of the others."""
    steps: int = 8
    """So many slow steps ..."""
    window: int = 10
    """... among the last so many."""
    least_seconds: float = 0.05
    """Shorter work is not judged."""


@dataclass
class LimitsConfig:
    """Seconds for which a rank may be in a section of the run; beyond them the watchdog names it and ends the run (see
    docs/guards.md). null: the section is not watched."""

    start: float | None = 3600.0
    """Reading models and starting servers."""
    load: float | None = 1800.0
    """Reading a checkpoint."""
    rollout: float | None = 3600.0
    context: float | None = 600.0
    """What the teacher reads before a response."""
    stop: float | None = 1800.0
    """A stop rule that cuts responses when they are written."""
    score: float | None = 1800.0
    pack: float | None = 600.0
    train: float | None = 1800.0
    refit: float | None = 1800.0
    record: float | None = 600.0
    measure: float | None = 600.0
    save: float | None = 1800.0
    evaluate: float | None = 7200.0
    export: float | None = 3600.0
    """Writing the trained student at the end."""
    between: float | None = 600.0
    """All that lies between these: decisions of all ranks, metrics."""


SIGNS: tuple[str, ...] = tuple(name for name, kind in DiagnoseConfig.__annotations__.items() if kind == "SignConfig")


@dataclass
class ClusterConfig:
    """What slurm/opd.sh does with the nodes of its job. `plan` and `doctor` count with it; a run does not read it."""

    rollout_nodes: int = 0
    """Nodes that run rollout servers alone, `rollout.servers.count` on each; 0: the run starts those that it needs."""
    teacher_nodes: int = 0
    """Nodes that run teacher servers alone, `teacher.servers.count` on each; several teachers take them in turn."""
    starts: int = 3
    """A run that fails is started again until so many starts came no further than the same checkpoint."""


@dataclass
class Config:
    """A whole recipe."""

    algorithm: str = "opd"
    """Named record that fills the slots below; see nemo_opd/algorithms."""
    run: RunConfig = field(default_factory=RunConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, OneOfSeveral] = field(default_factory=dict)
    """In the place of `teacher`, several by name."""
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    prefix: SlotConfig = field(default_factory=StudentPrefix)
    stop: SlotConfig = field(default_factory=DefaultStop)
    context: SlotConfig = field(default_factory=SamePromptContext)
    loss: SlotConfig = field(default_factory=ReverseKLLoss)
    reward: SlotConfig = field(default_factory=NoReward)
    weight: SlotConfig = field(default_factory=UnitWeight)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    diagnose: DiagnoseConfig = field(default_factory=DiagnoseConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    straggler: StragglerConfig = field(default_factory=StragglerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def every_teacher(self) -> dict[str, TeacherConfig]:
        """Teachers by the key of their section: ``teacher``, or ``teachers.NAME`` for each of several."""
        if not self.teachers:
            return {"teacher": self.teacher}
        return {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}
