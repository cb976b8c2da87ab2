"""`LLM`: text in, text out; names as in vLLM."""

import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.calibration import softmax_of_layers
from jaxinfer.engine.admission import about, plain_tokens
from jaxinfer.engine.config import check_sizes
from jaxinfer.engine.delivery import merge
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.replicas import Replicas
from jaxinfer.engine.room import room_for
from jaxinfer.engine.sharing import Inbox, SharedEngine, Ticket
from jaxinfer.engine.sizing import choose_sizes
from jaxinfer.errors import NonFiniteScoresError
from jaxinfer.loading import load_pair
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from jaxinfer.outputs import RequestOutput
from jaxinfer.progress import Progress, Reporter
from jaxinfer.sampling_params import SamplingParams

Prompt = str | Sequence[SupportsIndex] | np.ndarray | jax.Array


class _Asked(NamedTuple):
    """A prompt of a call: what it is called in errors, its text, if it came as one, its tokens."""

    name: str
    text: str | None
    ids: Sequence[int]


class LLM:
    """A model that answers.

    Streams and calls of `generate` and `chat` may be interleaved in one thread, and come from
    several threads at once; they share the batch.

    Attributes:
        engine: What computes the answers.
        engines: With copies of the model (`mesh`) one for each; the first is `engine`.
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
        softmax: str | Path = "online",
        batch_invariant: bool = False,
        mesh: str | Mesh | None = None,
        progress: Progress | None = None,
    ):
        """Load a model and set up its KV cache.

        Args:
            model: `"default"` (SmolLM2-135M-Instruct), a GGUF file, a Hugging Face or converted
                directory, a hub id, or a decoder with its tokenizer.
            dtype: Of the weights; `"auto"`: bfloat16, and float32 on a CPU.
            max_model_len: Longest prompt plus answer, tokens; default: the model's, at most 32768.
            max_num_seqs: Most requests that decode together; default 64, on a CPU 8.
            max_num_batched_tokens: Most tokens of one prefill call; default 8192, on a CPU 512, and
                along `seq` n times that.
            block_size: Tokens per KV-cache page on each device: 16, 32, 64 or 128.
            gpu_memory_utilization: Share of the GPU's memory for weights and cache.
            num_gpu_blocks_override: Pages in the KV cache; default: what memory allows.
            steps_per_sync: Decode steps dispatched together; default 8, on a CPU 2. Streamed text
                comes in pieces of this many tokens. On one GPU they are one program, which runs
                whole: new requests wait for it, and the last steps of the longest answer may be
                for nothing (`metrics.idle_steps`). Fewer suit answers of a few tokens.
            seed: For requests without their own; 0 or more.
            implementation: Use this implementation of every op that has it: `"xla"`, or on a GPU
                `"cudnn"`. Or of single ops, as in `"matmul=xla,decode_attention=xla"`.
            softmax: Of decode attention: `"online"`, `"unified"` (one reference instead of a
                running maximum, and a fallback; see docs/kernels/decode_attention.md), or the file
                that `jaxinfer calibrate softmax` wrote: unified where the references in it fit.
            batch_invariant: Compute in the same shapes whatever shares the batch, so that the
                answer of a request that is never preempted is the same to the bit. Slower.
            mesh: Devices that share the work, as in `"data=1,seq=4,tensor=2"`, or a
                `jax.sharding.Mesh` with these axes. Along `tensor`, each has a part of the heads,
                of the feed-forward, of the vocabulary and of the cache; along `seq`, of the tokens
                of every prompt and of its cache; along `data` there are copies of model and
                cache, each for `max_num_seqs` requests of its own. Default: one device, or those
                of a decoder that is divided.
            progress: Called with (what is fetched or read, units done, units in all).

        Raises:
            CheckpointError: the model's files are missing or damaged.
            UnsupportedModelError: its architecture or quantisation is not implemented.
            DownloadError: it has to be fetched, and that failed.
            KVCacheFullError: no memory is left for the cache.
            ValueError: a size, dtype, mesh, implementation or softmax that does not exist here, a
                calibration that is none or another model's, or a negative seed.
            OSError: the file of a calibration cannot be read.
            TypeError: a model that is neither a name, a path nor a pair, or a size that is no
                integer.
        """
        # Before anything is fetched or read.
        check_sizes(
            max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, block_size=block_size,
            gpu_memory_utilization=gpu_memory_utilization,
            num_gpu_blocks_override=num_gpu_blocks_override, steps_per_sync=steps_per_sync,
            seed=seed,
        )  # fmt: skip
        decoder, self.tokenizer = load_pair(
            model, dtype, implementation, progress, mesh, max_model_len
        )
        if self.tokenizer is not None:
            self.tokenizer.check_fits(decoder.config.vocab_size)
        modes, phi = softmax_of_layers(softmax, len(decoder.layers), decoder.embed[...].dtype)
        if any(mode != "online" for mode in modes):
            decoder = decoder.with_softmax(modes, phi)
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
        arrivals = itertools.count()
        shares = 1 if decoder.parallel is None else decoder.parallel.seq
        with room_for(sizes, decoder.part, decoder.devices, shares=shares):
            self.engines = [
                Engine(copy, self.tokenizer, sizes, arrivals=arrivals)
                for copy in decoder.replicas()
            ]
        self.engine = self.engines[0]
        self._requests = SharedEngine(
            self.engine if len(self.engines) == 1 else Replicas(self.engines)
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Progress = False,
    ) -> list[RequestOutput]:
        """Continue prompts, all together.

        Args:
            prompts: A text, a list or array (NumPy's or JAX's) of token ids, or a list of either.
            sampling_params: For all prompts, or one for each; default: `SamplingParams()`.
            use_tqdm: True shows progress on standard error; a function is called with
                ("generate", answers finished, answers in all).

        Returns:
            One output per prompt, in order.

        Raises:
            ValueError: an empty prompt, a token that the model does not have, or numbers of
                prompts and parameters that differ.
            TypeError: a prompt that is neither text nor token ids, or parameters of another type.
            ContextLengthError: a prompt that leaves no room for an answer.
            KVCacheFullError: a request that could never run.
            NonFiniteScoresError: the model's scores are NaN or infinite.

        Errors of one of several prompts name it: `prompts[1]: prompt is empty; …`. After an error
        nothing of this call is generated; after an interrupt nothing of it goes on.
        """
        named = _as_batch(prompts)
        batch = []
        for name, prompt in named:
            with about(name if len(named) > 1 else ""):
                batch.append(_Asked(name, *self._encode(prompt, name)))
        return self._answer(batch, sampling_params, use_tqdm)

    def _answer(
        self,
        batch: Sequence[_Asked],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | Progress,
    ) -> list[RequestOutput]:
        """Generate for prompts that are tokens already."""
        params = _one_each(sampling_params, len(batch))
        for (name, _, ids), param in zip(batch, params, strict=True):
            with about(name if len(batch) > 1 else ""):
                self._requests.check_request(ids, param)
        inbox: Inbox = deque()
        tickets: list[Ticket] = []
        outputs: dict[str, RequestOutput] = {}
        done = waiting = 0
        with _reporting(use_tqdm, sum(p.n for p in params)) as progress:
            try:
                for (_, text, ids), param in zip(batch, params, strict=True):
                    tickets.append(self._requests.add(ids, param, text, inbox))
                waiting = len(tickets)
                while waiting:
                    self._requests.advance(inbox)
                    while inbox:
                        delta = _next(inbox, tickets)
                        merge(outputs, delta)
                        waiting -= delta.finished
                        ended = sum(part.finish_reason is not None for part in delta.outputs)
                        if ended:
                            done += ended
                            progress("generate", done, 0)
            finally:
                self._requests.forget(tickets)
        return [outputs[cast(str, ticket.name)] for ticket in tickets]

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
            TypeError: messages, or one of several conversations, that are no list, or content that
                is not text.
        """
        form = "{'role': …, 'content': …}"
        if not _is_list(messages):
            raise TypeError(f"messages must be a list of {form}; got {messages!r:.80}")
        if not messages:
            raise ValueError("messages is empty; give at least one message")
        single = isinstance(messages[0], Mapping)
        conversations = [messages] if single else messages
        for i, conversation in enumerate(conversations):
            if not _is_list(conversation):
                raise TypeError(
                    f"messages must be a list of {form}, or a list of such lists; "
                    f"got {conversation!r:.80} as messages[{i}]"
                )
        batch = []
        for i, conversation in enumerate(
            cast("Sequence[Sequence[Mapping[str, str]]]", conversations)
        ):
            name = f"messages[{i}]"
            with about(name if len(conversations) > 1 else ""):
                ids = self._tokenizer().apply_chat_template(conversation)
            batch.append(_Asked(name, None, ids))
        return self._answer(batch, sampling_params, use_tqdm)

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

        The request begins with the first `next`.

        Raises:
            ValueError, TypeError: as in `generate`, at once.
            NonFiniteScoresError: as in `generate`, at the piece that would hold the token.
        """
        [params] = _one_each(sampling_params, 1)
        text, ids = self._encode(prompt, "prompt")
        self._requests.check_request(ids, params)
        return self._stream(text, ids, params)

    def _stream(
        self, text: str | None, ids: Sequence[int], params: SamplingParams
    ) -> Iterator[RequestOutput]:
        inbox: Inbox = deque()
        ends = sys.is_finalizing  # the module's own name may be gone by then
        ticket = self._requests.add(ids, params, text, inbox)
        try:
            while True:
                self._requests.advance(inbox)
                while inbox:
                    output = _next(inbox, [ticket])
                    yield output
                    if output.finished:
                        return
        finally:
            if not ends():
                self._requests.forget([ticket])

    def _encode(self, prompt: Prompt, name: str) -> tuple[str | None, Sequence[int]]:
        """A prompt's text, if it is one, and its tokens; `name` is for messages."""
        if not isinstance(prompt, str):
            try:
                return None, plain_tokens(prompt)
            except TypeError:
                raise TypeError(
                    f"{name} must be text or a list of token ids (integers); got {prompt!r:.80}"
                ) from None
        if not prompt:
            raise ValueError("prompt is empty; give at least one character")
        return prompt, self._tokenizer().encode(prompt)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this LLM has no tokenizer; give prompts as token ids")
        return self.tokenizer


def _next(inbox: Inbox, tickets: Sequence[Ticket]) -> RequestOutput:
    """The oldest output of an inbox, or its error raised; `tickets` are those of the call."""
    ticket, output = inbox.popleft()
    if isinstance(output, Exception):
        raise output
    if any(part.finish_reason == "error" for part in output.outputs):
        index = next(i for i, other in enumerate(tickets) if other is ticket)
        if ticket.text is None:
            raise NonFiniteScoresError("a prompt of tokens", index=index)
        raise NonFiniteScoresError.of_prompt(ticket.text, index=index)
    return output


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[tuple[str, Prompt]]:
    """Prompts, each with its name in the call."""
    if isinstance(prompts, str):
        return [("prompts", prompts)]
    no_batch = isinstance(prompts, bytes | bytearray) or _is_scalar(prompts)
    if no_batch or not isinstance(prompts, Sequence | np.ndarray | jax.Array):
        raise TypeError(f"prompts must be text, token ids or a list of either; got {prompts!r:.80}")
    if isinstance(prompts, jax.Array):
        prompts = np.asarray(prompts)
    is_array = isinstance(prompts, np.ndarray)  # of nothing: a prompt without tokens
    if (len(prompts) or is_array) and all(map(_is_token, prompts)):
        return [("prompts", cast("Sequence[int]", prompts))]
    return [(f"prompts[{i}]", prompt) for i, prompt in enumerate(cast("Sequence[Prompt]", prompts))]


def _is_list(value: object) -> bool:
    """Whether messages or conversations may be in it: texts and bytes are sequences too."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_scalar(value: object) -> bool:
    """Whether it is an array of a single number, without an axis."""
    return isinstance(value, np.ndarray | jax.Array) and value.ndim == 0


def _is_token(item: object) -> bool:
    """Whether it is an integer: Python's, NumPy's, or what a list of JAX's array holds."""
    if isinstance(item, np.ndarray | jax.Array):
        return item.ndim == 0 and np.issubdtype(item.dtype, np.integer)
    return isinstance(item, int | np.integer)


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise TypeError(
            "sampling_params must be SamplingParams, or a list of them with one per prompt; "
            f"got {params!r:.80}"
        )
    if len(params) != count:
        raise ValueError(
            f"sampling_params must be one, or one per prompt; got {len(params)} for {count} prompts"
        )
    return list(params)


def _reporting(wanted: bool | Progress, total: int) -> Any:
    """A context that gives a progress function."""
    if wanted is True:

        @contextlib.contextmanager
        def shown() -> Iterator[Progress]:
            with Reporter().task("generate", unit="answers") as progress:
                yield lambda name, done, _: progress(name, done, total)

        return shown()
    if wanted is False:
        return contextlib.nullcontext(lambda *_: None)
    return contextlib.nullcontext(lambda name, done, _: wanted(name, done, total))
