"""The `context` slot's choice, built."""

from __future__ import annotations

from nemo_opd.config import PeersContext, PrivilegedContext, SamePromptContext, SlotConfig
from nemo_opd.prompts.template import Tokenizer
from nemo_opd.teacher.contexts import SamePrompt, TeacherContext
from nemo_opd.teacher.insertion import ContextRenderer
from nemo_opd.teacher.peers import Peers
from nemo_opd.teacher.privileged import Privileged


def build_context(slot: SlotConfig, tokenizer: Tokenizer, seed: int, answer_key: str = "answer") -> TeacherContext:
    """The teacher context that a recipe names.

    Args:
        tokenizer: the teacher's; not looked at for `same_prompt`.
        seed: of the run.
        answer_key: `data.answer_key`.

    Raises:
        ConfigError: the teacher's tokenizer has no chat template, or none with room for the context.
    """
    if isinstance(slot, PrivilegedContext):
        return Privileged(slot, ContextRenderer(tokenizer, slot.place), answer_key)
    if isinstance(slot, PeersContext):
        return Peers(slot, ContextRenderer(tokenizer), seed)
    assert isinstance(slot, SamePromptContext), slot
    return SamePrompt()
