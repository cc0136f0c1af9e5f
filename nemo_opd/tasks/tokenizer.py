"""A character-level tokenizer for the generated tasks, saved in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
"""Ids 0 to 5. Padding and end are two tokens: with one for both, masking the padding would mask every end."""

CHARACTERS = "0123456789+-*/=(),.:;#?!' \nabcdefghijklmnopqrstuvwxyz"
"""Ids 6 to 58; any other character becomes <unk>."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}{{ eos_token }}"
    "{% else %}<user>{{ message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""``<bos><user>7+5=<assistant>``; a system message reads like a user's."""

VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)
"""59: prime, so that splitting it over tensor-parallel ranks always exercises the padding of the vocabulary."""


def write_tokenizer(folder: Path) -> None:
    """Save tokenizer.json, tokenizer_config.json and the chat template into `folder`, which is made when absent."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    assert len(vocabulary) == VOCAB_SIZE, "a character stands twice in CHARACTERS"
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    folder.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(folder)
