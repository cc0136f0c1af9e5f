"""The teacher reads what the student must do without (`context: privileged`).

On-policy self-distillation, arXiv 2605.11182: the student sees x alone, the teacher x with information I in its prompt,
and both are compared on the student's own tokens, aligned by response offset. The best student that never sees I is
the normalised geometric mean of the teachers over I, p* ~ exp(E_I log q(y | x, I)) for reverse KL: a rule that all
prompts share can be learnt, this problem's answer cannot, and the loss stops at a plateau.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from nemo_opd.config import PrivilegedContext
from nemo_opd.errors import ConfigError
from nemo_opd.teacher.contexts import Reads
from nemo_opd.teacher.insertion import ContextRenderer, Rendered
from nemo_opd.types import Prompt, Rollout

log = logging.getLogger(__name__)

PLACEHOLDER = "{privileged}"


class Privileged:
    """A `TeacherContext` with a field of the record, or one text for all, in the teacher's prompt.

    Args:
        slot: the recipe's choice.
        renderer: of the teacher, with the slot's place.
        answer_key: `data.answer_key`, whose value a prompt holds apart from its other fields.
    """

    reads = Reads.ITSELF

    def __init__(self, slot: PrivilegedContext, renderer: ContextRenderer, answer_key: str) -> None:
        self._slot, self._renderer, self._answer_key = slot, renderer, answer_key
        self._left, _, self._right = slot.template.partition(PLACEHOLDER)
        self._found = slot.text is not None
        self._told_of_cut = False

    def context_ids(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...] | None]:
        """See `TeacherContext.context_ids`.

        Raises:
            ConfigError: no record has had the field so far, so its name must be wrong.
        """
        return [None if rendered is None else rendered.ids for rendered in self.rendered(rollouts)]

    def rendered(self, rollouts: Sequence[Rollout]) -> list[Rendered | None]:
        """The prompts in their parts, one per rollout; all samples of a prompt share one."""
        prompts = {(r.prompt.epoch, r.prompt.index): r.prompt for r in rollouts}
        self._check_field(list(prompts.values()))
        rendered = {key: self._of(prompt) for key, prompt in prompts.items()}
        return [rendered[r.prompt.epoch, r.prompt.index] for r in rollouts]

    def _of(self, prompt: Prompt) -> Rendered | None:
        text = self._information(prompt)
        ids = self._renderer.encode([text.strip()])[0] if text is not None else ()
        if not ids:
            return self._renderer.plain(prompt.messages) if self._slot.fallback == "plain_prompt" else None
        if len(ids) > self._slot.max_tokens and not self._told_of_cut:
            self._told_of_cut = True
            log.warning(
                "context.max_tokens: the privileged information of record %d has %d tokens and is cut to %d; "
                "others are cut without a word", prompt.index, len(ids), self._slot.max_tokens,
            )  # fmt: skip
        return self._renderer.render(prompt.messages, ids[: self._slot.max_tokens], self._left, self._right)

    def _information(self, prompt: Prompt) -> str | None:
        field = self._slot.field
        if field is None:
            return self._slot.text
        return prompt.answer if field == self._answer_key else prompt.meta.get(field)

    def _check_field(self, prompts: Sequence[Prompt]) -> None:
        """A wrong name would mask everything, for ever; a record without the field now and then is ordinary."""
        self._found = self._found or any(self._information(prompt) is not None for prompt in prompts)
        if prompts and not self._found:
            keys = sorted({self._answer_key, *(key for prompt in prompts for key in prompt.meta)})
            raise ConfigError(
                "context.field", self._slot.field, f"a field of the records (they have {', '.join(keys)})",
                "name one of these, or set context.text",
            )  # fmt: skip
