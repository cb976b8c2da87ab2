"""Decode steps as the host dispatches them: what it sends, when it waits, how many are a call."""

import numpy as np

from jaxinfer.engine.engine import Engine
from tests.engine.small import GREEDY, compilations, engine, generate, prompts


def test_steps_in_one_program(monkeypatch):
    """Fewer calls, the same answers; the last program runs whole."""

    def answer(made: Engine) -> list[list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for prompt in prompts(3):
            made.add_request(prompt, GREEDY.replace(max_tokens=30, logprobs=0))
        while made.has_work:
            for output in made.step():
                part = output.outputs[0]
                entries = zip(part.token_ids, part.logprobs or [], strict=True)
                new = [(token, entry[token].logprob) for token, entry in entries]
                found.setdefault(output.request_id, []).extend(new)
        return list(found.values())

    made = engine(steps_per_sync=4, steps_per_program=4)
    calls = []
    call = made.runner._decode

    def counted(*args, **more):
        calls.append(len(calls))
        return call(*args, **more)

    monkeypatch.setattr(made.runner, "_decode", counted)
    got, want = answer(made), answer(engine())
    assert [[token for token, _ in row] for row in got] == [[t for t, _ in row] for row in want]
    np.testing.assert_allclose(
        [x for row in got for _, x in row], [x for row in want for _, x in row], atol=1e-5
    )
    assert len(calls) == 8
    # For 29 tokens: the first is the prompt's.
    assert (made.metrics.decode_steps, made.metrics.idle_steps) == (32, 3)
    known = made.runner.programs
    with compilations() as count:
        assert [[t for t, _ in row] for row in answer(made)] == [[t for t, _ in r] for r in got]
    assert (made.runner.programs, count) == (known, [0])


def test_steady_decoding_moves_only_tables(monkeypatch):
    """Between the start of a batch and its end the host sends page tables, and only new ones."""
    made = engine(steps_per_sync=4)
    sent = {"rows": 0, "tables": 0}
    for name, key in (("set_rows", "rows"), ("set_tables", "tables")):
        method = getattr(made.runner, name)

        def counted(*args, key=key, method=method, **kwargs):
            sent[key] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(made.runner, name, counted)
    generate(made, prompts(3), [GREEDY.replace(max_tokens=90)] * 3)
    assert made.metrics.decode_steps == 89
    assert sent["rows"] == 1
    # Rows of different lengths cross page borders at different times: up to 6 borders each.
    assert sent["tables"] <= 3 * 6


def test_the_host_stays_one_group_behind(monkeypatch):
    """Each group of steps is dispatched before the tokens of the one before are fetched."""
    made = engine(steps_per_sync=3)
    made.add_request([1, 2, 3], GREEDY.replace(max_tokens=31))
    made.step()  # prefill
    made.step()
    lengths = []
    while made.has_work:
        lengths.append(len(made._in_flight))
        made.step()
    assert lengths[:9] == [1] * 9


def test_ended_rows_stay_until_a_narrower_step_pays():
    made = engine(max_num_seqs=8, num_pages=64)
    rows = []
    decode = made.runner.decode

    def spy(steps, **kwargs):
        assert made.runner._state is not None
        rows.append(made.runner._state.token.shape[0])
        return decode(steps, **kwargs)

    made.runner.decode = spy  # type: ignore[method-assign]
    lengths = [20, 4, 4, 4, 12, 12, 12, 12]
    params = [GREEDY.replace(max_tokens=n) for n in lengths]
    first = generate(made, prompts(8), params)
    # Five of eight rows: a step of 8 goes on. One: a step of 1 is compiled.
    assert sorted(set(rows)) == [1, 8]
    assert [len(tokens) for tokens in first] == lengths
    rows.clear()
    made.runner._decoders |= {(4, *key[1:]) for key in made.runner._decoders}
    assert generate(made, prompts(8), params) == first
