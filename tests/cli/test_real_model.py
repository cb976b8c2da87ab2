"""The default model through the command line, where its file is here."""

import json
import os
import re
import time

import pytest

from tests.cli.command import run
from tests.models.real import excerpt, tokenizer
from tests.paths import model_path, needs_model

pytestmark = [pytest.mark.model, needs_model("smollm2")]

# What a person waits for at most, and the least speed on two cores.
FIRST_ANSWER_S, TOKENS_PER_S = 60, 15


def model() -> str:
    return str(model_path("smollm2"))


CAPITAL = ("generate", "What is the capital of France?", "--max-tokens", "12", "--model")


@pytest.fixture(scope="module")
def answer() -> tuple[str, float]:
    """To the question for the capital; and the seconds that it took."""
    start = time.monotonic()
    done = run(*CAPITAL, model())
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    return done.stdout, seconds


def test_it_knows_the_capital_of_france(answer):
    said, seconds = answer
    assert "Paris" in said
    assert seconds < FIRST_ANSWER_S


def test_several_at_once_say_the_same():
    prompts = ["What is the capital of France?", "Hi", "What is the capital of France?"]
    done = run("generate", *prompts, "--model", model(), "--max-tokens", "12", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert "Paris" in rows[0]["text"]
    assert rows[0]["text"] == rows[2]["text"]


@pytest.mark.slow
def test_speed():
    """Up to three tries: whatever else runs on the machine only makes it slower."""
    rates = []
    for _ in range(3):
        done = run("generate", "Explain how a bicycle works.", "--model", model(),
                   "--max-tokens", "64", "--ignore-eos")  # fmt: skip
        found = re.search(r"64 tokens, ([\d.]+) tokens/s", done.stderr)
        assert found, done.stderr
        rates.append(float(found[1]))
        if rates[-1] >= TOKENS_PER_S:
            return
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores + 0.5:
        pytest.skip(f"{rates} tokens/s, but others compute here: load {load:.1f} on {cores} cores")
    pytest.fail(f"{rates} tokens/s")


def test_perplexity(tmp_path):
    """Of the committed excerpt: the golden values are an independent implementation's."""
    want = excerpt()
    text = tokenizer("smollm2").decode(want["ids"])
    (tmp_path / "text.txt").write_text(text)
    done = run("eval", "perplexity", model(), "--text", str(tmp_path / "text.txt"), "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["tokens"] == len(want["nll"])
    assert row["nll"] == pytest.approx(float(want["nll"].mean()), abs=2e-4)


def test_a_conversion_answers_the_same(answer, tmp_path):
    out = tmp_path / "converted"
    done = run("convert", model(), str(out), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert run(*CAPITAL, str(out)).stdout == answer[0]
