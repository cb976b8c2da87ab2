"""A tokenizer that needs no file: one token per byte. For tests and demonstrations."""

from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxinfer.models.tokenizer.tokenizer import Tokenizer

_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(
    *, eos_id: int | None = 0, special_tokens: Mapping[str, str] | None = None
) -> Tokenizer:
    """256 tokens, in the order of byte-level BPE's alphabet.

    Args:
        eos_id: Token that ends a text, or None.
        special_tokens: As in `Tokenizer`.

    >>> byte_tokenizer().decode(byte_tokenizer().encode("héllo"))
    'héllo'
    """
    alphabet: Sequence[str] = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(
        backend,
        eos_ids=() if eos_id is None else (eos_id,),
        chat_template=_TEMPLATE,
        special_tokens=special_tokens,
    )
