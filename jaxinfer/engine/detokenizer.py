"""Text of an answer as its tokens come, and the stop strings in it."""

from collections.abc import Sequence

from jaxinfer.models.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Incremental text of one answer.

    Text that could be the beginning of a stop string is held back until it is decided, so that no
    part of a stop string is ever given out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prefix: Sequence[int] = (),
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        skip_special: bool = True,
    ):
        """Begin an answer.

        Args:
            tokenizer: Knows the text of tokens.
            prefix: Tokens before the answer, which may decide about a leading space.
            stop: Strings that end the answer.
            keep_stop: Keep the stop string in the text.
            skip_special: Leave special tokens out of the text.
        """
        self._stream = tokenizer.stream(prefix, skip_special=skip_special)
        self._stop, self._keep_stop = tuple(stop), keep_stop
        self._longest = max((len(text) for text in self._stop), default=1)
        self._may_stop = True
        self._given = 0
        self.text = ""
        self.stop_reason: str | None = None

    def step(self, token: int, *, may_stop: bool = True) -> bool:
        """Take one more token; True if its text completes a stop string.

        Args:
            token: Its id.
            may_stop: Look for stop strings. One that ends in text taken without looking is not
                found later either; one that only begins there is.
        """
        self._may_stop = may_stop
        return self._append(self._stream.step(token))

    def finish(self) -> None:
        """Take what is left of an unfinished character, looking for stop strings as last told."""
        if self.stop_reason is None:
            self._append(self._stream.flush())

    def delta(self, *, finished: bool) -> str:
        """Text not given out before; all of it once the answer is finished."""
        end = len(self.text) if finished else len(self.text) - self._held_back()
        new = self.text[self._given : end]
        self._given = max(self._given, end)
        return new

    def _append(self, text: str) -> bool:
        old = len(self.text)
        self.text += text
        if not text or not self._may_stop:
            return False
        # What ends in the new text begins less than its own length before it.
        found = [(self.text.find(stop, max(old - len(stop) + 1, 0)), stop) for stop in self._stop]
        found = [(place, stop) for place, stop in found if place >= 0]
        if not found:
            return False
        place, self.stop_reason = min(found)
        self.text = self.text[: place + (len(self.stop_reason) if self._keep_stop else 0)]
        return True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0
