"""`LLM`: text in, text out; names as in vLLM."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.sizing import choose_sizes
from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from jaxinfer.outputs import CompletionOutput, RequestOutput
from jaxinfer.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Progress = Callable[[str, int, int], None]


class LLM:
    """A model that answers.

    Attributes:
        engine: What computes the answers.
        tokenizer: Of the model; None if it was made from a decoder alone.
    """

    def __init__(
        self,
        model: str | Path | tuple[Decoder, Tokenizer | None] = "default",
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int = 64,
        gpu_memory_utilization: float = 0.9,
        num_gpu_blocks_override: int | None = None,
        steps_per_sync: int | None = None,
        seed: int = 0,
        implementation: str | None = None,
        batch_invariant: bool = False,
        progress: Progress | None = None,
    ):
        """Load a model and set up its KV cache.

        Args:
            model: `"default"` (SmolLM2-135M-Instruct), a GGUF file, a Hugging Face or converted
                directory, a hub id, or a decoder with its tokenizer.
            dtype: Of the weights; `"auto"`: bfloat16, and float32 on a CPU.
            max_model_len: Longest prompt plus answer, tokens; default: the model's, at most 32768.
            max_num_seqs: Most requests that decode together; default 64, on a CPU 8.
            max_num_batched_tokens: Most tokens of one prefill call; default 4096, on a CPU 512.
            block_size: Tokens per KV-cache page: 16, 32, 64 or 128.
            gpu_memory_utilization: Share of the GPU's memory for weights and cache.
            num_gpu_blocks_override: Pages in the KV cache; default: what memory allows.
            steps_per_sync: Decode steps dispatched together; default 8, on a CPU 2. Streamed text
                comes in pieces of this many tokens.
            seed: For requests without their own.
            implementation: Use this implementation of every op that has it, such as `"xla"`.
            batch_invariant: Compute in the same shapes whatever shares the batch, so that an
                answer is the same to the bit. Slower for small batches.
            progress: Called with (weight name, weights read, weights in all).

        Raises:
            CheckpointError: the model's files are missing or damaged.
            UnsupportedModelError: its architecture or quantisation is not implemented.
            KVCacheFullError: no memory is left for the cache.
            ValueError: a size or dtype out of range.
        """
        decoder, self.tokenizer = _load(model, dtype, progress)
        if self.tokenizer is not None and self.tokenizer.vocab_size > decoder.config.vocab_size:
            raise ValueError(
                f"tokenizer does not match the model: it has {self.tokenizer.vocab_size} tokens, "
                f"the model {decoder.config.vocab_size}"
            )
        sizes = choose_sizes(
            decoder,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            gpu_memory_utilization=gpu_memory_utilization,
            num_gpu_blocks_override=num_gpu_blocks_override,
            steps_per_sync=steps_per_sync,
            seed=seed,
            implementation=implementation,
            batch_invariant=batch_invariant,
        )
        self.engine = Engine(decoder, self.tokenizer, sizes)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Progress = False,
    ) -> list[RequestOutput]:
        """Continue prompts, all together.

        Args:
            prompts: A text, a list of token ids, or a list of either.
            sampling_params: For all prompts, or one for each; default: `SamplingParams()`.
            use_tqdm: True shows progress on standard error; a function is called with
                ("generate", answers finished, answers in all).

        Returns:
            One output per prompt, in order.

        Raises:
            ValueError: an empty prompt, or numbers of prompts and parameters that differ. Nothing
                is generated then, for any prompt.
            ContextLengthError: a prompt that leaves no room for an answer.
            KVCacheFullError: a request that could never run.
        """
        batch = _as_batch(prompts)
        params = _one_each(sampling_params, len(batch))
        names: list[str] = []
        with _reporting(use_tqdm, sum(p.n for p in params)) as progress:
            try:
                for prompt, param in zip(batch, params, strict=True):
                    names.append(self._add(prompt, param))
                return self._run(names, progress)
            except BaseException:
                self._abandon(names)
                raise

    def chat(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool | Progress = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several.

        Args:
            messages: Each with `role` and `content`; or a list of such conversations.
            sampling_params: For all; default: `SamplingParams()`.
            use_tqdm: As in `generate`.

        Raises:
            ValueError: no messages, no chat template, or a template that refuses the messages.
        """
        if not messages:
            raise ValueError("messages is empty; give at least one message")
        single = isinstance(messages[0], Mapping)
        conversations = [messages] if single else messages
        prompts = [
            self._tokenizer().apply_chat_template(cast("Sequence[Mapping[str, str]]", c))
            for c in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Continue one prompt, giving out what is new as it comes.

        Args:
            prompt: A text or a list of token ids.
            sampling_params: Default: `SamplingParams()`.

        Yields:
            Outputs that hold only new text and tokens; the last one has `finished`. Closing the
            iterator ends the request.

        Raises:
            ValueError, ContextLengthError, KVCacheFullError: as in `generate`, at once.
        """
        name = self._add(prompt, sampling_params or SamplingParams())
        return self._stream(name)

    def _stream(self, name: str) -> Iterator[RequestOutput]:
        try:
            while True:
                for output in self.engine.step():
                    if output.request_id == name:
                        yield output
                        if output.finished:
                            return
        finally:
            self._abandon([name])

    def _add(self, prompt: Prompt, params: SamplingParams) -> str:
        if not isinstance(prompt, str):
            return self.engine.add_request(prompt, params)
        if not prompt:
            raise ValueError("prompt is empty; give at least one character")
        return self.engine.add_request(self._tokenizer().encode(prompt), params, prompt=prompt)

    def _run(self, names: list[str], progress: Progress) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        waiting, done = set(names), 0
        while waiting:
            for delta in self.engine.step():
                if delta.request_id not in waiting:
                    continue
                _merge(outputs, delta)
                done += sum(part.finish_reason is not None for part in delta.outputs)
                progress("generate", done, 0)
                if delta.finished:
                    waiting.discard(delta.request_id)
        return [outputs[name] for name in names]

    def _abandon(self, names: list[str]) -> None:
        """End requests that nobody waits for, and let the engine forget them."""
        for name in names:
            self.engine.abort(name)
        self.engine.discard(names)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this LLM has no tokenizer; give prompts as token ids")
        return self.tokenizer


def _load(
    model: str | Path | tuple[Decoder, Tokenizer | None], dtype: str, progress: Progress | None
) -> tuple[Decoder, Tokenizer | None]:
    if isinstance(model, tuple):
        if dtype != "auto":
            raise ValueError("dtype applies to a model that is loaded; this one is a decoder")
        return model
    # Downloading needs modules that a local model does not.
    from jaxinfer.hub import resolve_model

    checkpoint = open_checkpoint(resolve_model(str(model)))
    tokenizer = checkpoint.tokenizer()
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16; got {dtype!r}")
    return load_model(checkpoint, dtype=jnp.dtype(dtype), progress=progress), tokenizer


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and all(isinstance(item, int) for item in prompts):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(
            f"sampling_params must be one, or one per prompt; got {len(params)} for {count} prompts"
        )
    return list(params)


def _merge(outputs: dict[str, RequestOutput], delta: RequestOutput) -> None:
    """Add what is new to what came before."""
    whole = outputs.get(delta.request_id)
    if whole is None:
        parts = delta.outputs
        delta.outputs = []
        whole = outputs[delta.request_id] = delta
    else:
        parts = delta.outputs
        whole.finished = delta.finished
    known = {part.index: part for part in whole.outputs}
    for part in parts:
        if part.index in known:
            _extend(known[part.index], part)
        else:
            whole.outputs.append(part)
    whole.outputs.sort(key=lambda part: part.index)


def _extend(whole: CompletionOutput, part: CompletionOutput) -> None:
    whole.text += part.text
    whole.token_ids += part.token_ids
    if part.logprobs is not None:
        whole.logprobs = (whole.logprobs or []) + part.logprobs
        whole.cumulative_logprob = (whole.cumulative_logprob or 0.0) + (
            part.cumulative_logprob or 0.0
        )
    whole.finish_reason, whole.stop_reason = part.finish_reason, part.stop_reason


def _reporting(wanted: bool | Progress, total: int) -> Any:
    """A context that gives a progress function."""
    if wanted is True:
        from jaxinfer.progress import Reporter

        @contextlib.contextmanager
        def shown() -> Iterator[Progress]:
            with Reporter().task("generate", unit="answers") as progress:
                yield lambda name, done, _: progress(name, done, total)

        return shown()
    if wanted is False:
        return contextlib.nullcontext(lambda *_: None)
    return contextlib.nullcontext(lambda name, done, _: wanted(name, done, total))
