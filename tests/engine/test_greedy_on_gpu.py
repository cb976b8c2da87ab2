"""On a GPU, real models answer as they do in plain JAX, or part at a tie."""

import jax
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.outputs import CompletionOutput, Logprob
from jaxinfer.pallas_kernels.device import current_device
from tests.paths import model_path, needs_model

MODELS = ("smollm2", "gemma3", "qwen25")
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "List five ways to save energy at home:\n1.",
)
TOKENS = 256
CANDIDATES = 5  # log-probabilities per token: the two that a tie is between, and some more
LEAST_ROUNDING = 2**-5  # bfloat16 has 8 bits: of a logit between 8 and 16, half of the last one


@pytest.mark.gpu
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_model(name)) for name in MODELS])
def test_256_greedy_tokens(name):
    if current_device().platform != "gpu":
        pytest.skip("needs a GPU: on a CPU there is plain JAX alone")
    ours, plain = answers(name, None), answers(name, "xla")
    for prompt, one, other in zip(PROMPTS, ours, plain, strict=True):
        complaint = parting(one, other)
        assert complaint is None, f"{name}, {prompt!r}: {complaint}"


def answers(name: str, implementation: str | None) -> list[CompletionOutput]:
    """Greedy answers in bfloat16 with the log-probabilities of the best tokens."""
    path = model_path(name)
    assert path is not None
    llm = LLM(
        path, dtype="bfloat16", implementation=implementation, max_model_len=512, max_num_seqs=8,
        num_gpu_blocks_override=64,
    )  # fmt: skip
    params = SamplingParams(
        temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=CANDIDATES
    )
    outputs = llm.generate(list(PROMPTS), params)
    del llm
    jax.clear_caches()
    return [output.outputs[0] for output in outputs]


def parting(one: CompletionOutput, other: CompletionOutput) -> str | None:
    """Why two answers may not differ as they do; None if they are equal or part at a tie.

    A tie: each side's choice is, on the other side, no further below that side's own choice than
    twice what rounding does to a log-probability. That was seen on the tokens before, whose texts
    are equal; what comes after are different texts.
    """
    assert one.logprobs is not None
    assert other.logprobs is not None
    rounding = LEAST_ROUNDING
    for step, (token, choice) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
        here, there = one.logprobs[step], other.logprobs[step]
        common = here.keys() & there.keys()
        if token == choice:
            differences = (abs(here[t].logprob - there[t].logprob) for t in common)
            rounding = max(rounding, *differences)
            continue
        if not {token, choice} <= common:
            return f"token {step}: {token} against {choice}, not among each other's best"
        gap = max(
            here[token].logprob - here[choice].logprob, there[choice].logprob - there[token].logprob
        )
        if gap > 2 * rounding:
            return f"token {step}: gap {gap:.3f}, rounding {rounding:.3f}"
        return None
    return None


def test_equal_answers_and_ties_are_no_complaint_and_other_partings_are():
    def answer(tokens, *steps):
        logprobs = [
            {t: Logprob(logprob=value, rank=1) for t, value in step.items()} for step in steps
        ]
        return CompletionOutput(index=0, text="", token_ids=tokens, logprobs=logprobs)

    same = answer([1, 2], {1: -0.1, 3: -2.0}, {2: -0.70, 4: -0.72})
    tie = answer([1, 4], {1: -0.12, 3: -2.0}, {2: -0.72, 4: -0.70})
    wrong = answer([1, 4], {1: -0.12, 3: -2.0}, {2: -1.5, 4: -0.70})
    unknown = answer([1, 9], {1: -0.12, 3: -2.0}, {9: -0.1, 4: -0.70})
    assert parting(same, same) is None
    assert parting(same, tie) is None
    assert "gap" in str(parting(same, wrong))
    assert "best" in str(parting(same, unknown))
