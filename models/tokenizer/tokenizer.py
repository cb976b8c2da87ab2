"""The tokenizer that engine and command line use, on top of the `tokenizers` library."""

import functools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex

import tokenizers

from jaxinfer.models.tokenizer.chat_template import render_chat

_FEWEST = 3 / 4  # of a model's vocabulary
NO_CHAT_TEMPLATE = "the model has no chat template (a base model?)"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        bos_id: Token put before a text, or None.
        eos_ids: Tokens that end a text.
        chat_template: Jinja source, or None if the model has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        add_bos: bool = False,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Wrap a backend whose own post-processing is off.

        Args:
            backend: Does the work.
            bos_id: Token that begins a text.
            add_bos: Whether `encode` puts it there by default.
            eos_ids: Tokens that end a text.
            chat_template: Jinja source.
            special_tokens: Names that the template may use, such as `bos_token`.
        """
        self._backend = backend
        self.bos_id, self.add_bos = bos_id, add_bos
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def check_fits(self, vocab_size: int) -> None:
        """Refuse a tokenizer that cannot be the model's.

        Models round their vocabulary up: 151,936 for the 151,665 tokens of Qwen2.5. Where more than
        a quarter has no token, the two do not belong together.

        Args:
            vocab_size: V of the model.

        Raises:
            ValueError: it has more tokens than the model, or far fewer.
        """
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens, the model only {vocab_size}"
            )
        if self.vocab_size < vocab_size * _FEWEST:
            raise ValueError(
                f"the tokenizer has only {self.vocab_size} tokens, the model {vocab_size}: more "
                "than padding explains, so it is another model's"
            )

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text; names of special tokens in it become those tokens.

        Args:
            text: Any text.
            add_bos: Whether to begin with `bos_id`; None: as the model was trained.

        Raises:
            ValueError: half of a surrogate pair, which is no character.
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            _check_characters(text)
            raise
        wanted = self.add_bos if add_bos is None else add_bos
        if wanted and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that form no character become U+FFFD."""
        return self._backend.decode([*map(operator.index, ids)], skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str:
        """The text of one token, for people to look at."""
        return self.decode([token_id], skip_special=False)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: Each with `role` and `content`.
            add_generation_prompt: End with the start of the assistant's answer.

        Raises:
            ValueError: the model has no template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(f"{NO_CHAT_TEMPLATE}; use generate with a plain prompt")
        text = render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._special_tokens,
        )
        return self.encode(text, add_bos=False)

    def stream(self, prefix: Sequence[int] = (), *, skip_special: bool = True) -> "DecodeStream":
        """Decode one token at a time, as if after `prefix`."""
        return DecodeStream(self, prefix, skip_special=skip_special)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        # Not with the backend's own method, which raises a bare Exception where a disk is full.
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        config = {
            "bos_id": self.bos_id,
            "add_bos_token": self.add_bos,
            "eos_ids": list(self.eos_ids),
            "chat_template": self.chat_template,
            **self._special_tokens,
        }
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2), encoding="utf-8"
        )


def _check_characters(text: str) -> None:
    """Say what the backend's TypeError does not: which character of a text is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: it holds U+{ord(text[error.start]):04X}, half of a "
            "surrogate pair, as Python makes of bytes that are not UTF-8"
        ) from None


class DecodeStream:
    """Text of a growing sequence, without half characters.

    A token may hold a part of a character only, and how a token is written may depend on the one
    before it (a leading space). So a few tokens are decoded together, and text is given out when
    it ends in a whole character.
    """

    def __init__(
        self, tokenizer: Tokenizer, prefix: Sequence[int] = (), *, skip_special: bool = True
    ):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        # Tokens before `_read` have been given out; those from `_context` on are decoded again.
        self._ids = list(prefix[-4:])
        self._context = 0
        self._read = len(self._ids)

    def step(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        self._ids.append(token_id)
        return self._take(final=False)

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not final):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)
