"""The `context` slot's choice, built."""

from __future__ import annotations

from nemo_opd.config import DataConfig, PeersContext, PrivilegedContext, SamePromptContext, SlotConfig
from nemo_opd.prompts.template import Tokenizer
from nemo_opd.teacher.contexts import SamePrompt, TeacherContext
from nemo_opd.teacher.insertion import ContextRenderer
from nemo_opd.teacher.peers import Peers
from nemo_opd.teacher.privileged import Privileged


def build_context(slot: SlotConfig, tokenizer: Tokenizer, seed: int, data: DataConfig | None = None) -> TeacherContext:
    """The teacher context that a recipe names.

    Args:
        tokenizer: the teacher's; not looked at for `same_prompt`.
        seed: of the run.
        data: the recipe's, for `answer_key` and `template_arguments`; None for their defaults.

    Raises:
        ConfigError: the teacher's tokenizer has no chat template, or none with room for the context.
    """
    data = data or DataConfig()
    if isinstance(slot, PrivilegedContext):
        return Privileged(slot, ContextRenderer(tokenizer, slot.place, data.template_arguments), data.answer_key)
    if isinstance(slot, PeersContext):
        return Peers(slot, ContextRenderer(tokenizer, arguments=data.template_arguments), seed)
    assert isinstance(slot, SamePromptContext), slot
    return SamePrompt()
