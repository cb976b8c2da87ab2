"""The sampler against plain numpy, and the statistics of its draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxinfer.engine.request import request_key
from jaxinfer.engine.sampler import NOT_FINITE, lowest_kept, sample
from jaxinfer.engine.sampling_state import Row, SamplingFlags, SamplingState, sampling_arrays
from jaxinfer.sampling_params import SamplingParams

V = 24
SAMPLE = jax.jit(sample, static_argnames="flags")
LOWEST_KEPT = jax.jit(lowest_kept)
EVERYTHING = SamplingFlags(random=True, filters=True, penalties=True, min_tokens=True)


def logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, V)).astype(np.float32)


def row(params: SamplingParams, *, key=(1, 2), prompt=(), output=(), stop=()) -> Row:
    return Row(params=params, key=key, stop_ids=stop, prompt_ids=prompt, output_ids=output)


def state_of(rows: list[Row | None], *, penalties: bool = True, size: int = V) -> SamplingState:
    arrays = sampling_arrays(rows, vocab_size=size, stop_width=8, penalties=penalties)
    return SamplingState(**jax.device_put(arrays))


def draw(scores: np.ndarray, rows: list[Row | None], flags: SamplingFlags = EVERYTHING):
    tokens, state, _ = SAMPLE(scores, state_of(rows, penalties=flags.penalties), flags)
    return np.asarray(tokens), state


def adjusted(scores: np.ndarray, made: Row) -> np.ndarray:
    """Penalties and ruled-out stop tokens of one row, token by token."""
    p, out = made.params, scores.astype(np.float64)
    for token in range(V):
        count = list(made.output_ids).count(token)
        if count or token in made.prompt_ids:
            out[token] *= (1 / p.repetition_penalty) if out[token] > 0 else p.repetition_penalty
        out[token] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        if token in made.stop_ids and len(made.output_ids) < p.min_tokens:
            out[token] = -np.inf
    return out


def distribution(scores: np.ndarray, made: Row) -> np.ndarray:
    """Probabilities after temperature, min-p, then top-k, then top-p of the rest, by sorting."""
    p = made.params
    scaled = adjusted(scores, made) / p.temperature
    whole = np.exp(scaled - scaled.max())
    whole /= whole.sum()
    kept = np.argsort(-scaled, kind="stable")
    kept = kept[whole[kept] >= p.min_p * whole.max()]
    kept = kept[: p.top_k] if p.top_k else kept
    share, chosen = whole[kept] / whole[kept].sum(), []
    for token, before in zip(kept, np.cumsum(share) - share, strict=True):
        if not chosen or before < p.top_p or p.top_p == 1:
            chosen.append(token)
    out = np.zeros(V)
    out[chosen] = whole[chosen] / whole[chosen].sum()
    return out


FILTERS = [
    {"top_k": 1}, {"top_k": 5}, {"top_k": 1000}, {"top_p": 0.3}, {"top_p": 0.9}, {"min_p": 0.1},
    {"min_p": 1.0}, {"top_k": 6, "top_p": 0.7, "min_p": 0.05}, {},
    {"top_k": 4, "top_p": 1e-9}, {"top_p": 0.7, "min_p": 0.3}, {"top_k": 3, "min_p": 0.1},
]  # fmt: skip


@functools.cache
def many_draws(fields: tuple, rows: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Tokens drawn with as many keys, and the distribution they should have."""
    params = SamplingParams(**{"temperature": 0.9, **dict(fields)})
    scores = logits(1, seed=5)
    made = [row(params, key=request_key(3, i)) for i in range(rows)]
    tokens, _ = draw(np.repeat(scores, rows, axis=0), [*made])
    return tokens, distribution(scores[0], made[0])


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_draws_have_the_distribution(fields):
    """Chi-squared over 4096 draws. Keys are fixed, so that the test always gives the same."""
    tokens, want = many_draws(tuple(fields.items()))
    counts = np.bincount(tokens, minlength=V)
    assert not counts[want == 0].any(), "a token that was ruled out"
    likely = want * len(tokens) >= 5
    assert counts[likely].all()
    if likely.sum() > 1:
        # The rare ones together, so that every cell expects five.
        seen = np.append(counts[likely], counts[~likely].sum())
        expected = np.append(want[likely], want[~likely].sum()) * len(tokens)
        full = expected > 0
        assert stats.chisquare(seen[full], expected[full]).pvalue > 1e-3


def test_the_test_would_notice_another_temperature():
    tokens, _ = many_draws(())
    made = row(SamplingParams(temperature=1.0))
    expected = distribution(logits(1, seed=5)[0], made) * len(tokens)
    counts = np.bincount(tokens, minlength=V)
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue < 1e-3


def test_successive_draws_of_a_row_are_independent():
    """The same key with another length of the answer: other random numbers."""
    rows, state = 512, state_of([row(SamplingParams(), key=request_key(1, i)) for i in range(512)])
    flat = jnp.zeros((rows, V))
    drawn = []
    for _ in range(6):
        tokens, state, _ = SAMPLE(flat, state, SamplingFlags(random=True, penalties=True))
        drawn.append(np.asarray(tokens))
    counts = np.bincount(np.concatenate(drawn), minlength=V)
    assert stats.chisquare(counts).pvalue > 1e-3
    pairs = np.bincount(drawn[0] * V + drawn[1], minlength=V * V)
    assert pairs.max() <= 8  # 512 / 576 expected in each


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 8])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.2, 0.5])
def test_filters_come_one_after_the_other(min_p, top_k, top_p):
    """min-p, then top-k, then top-p of the probabilities that are left, as vLLM has it."""
    scores = logits(16, seed=7)
    made = row(SamplingParams(min_p=min_p, top_k=top_k, top_p=top_p))
    kept = scores >= np.asarray(LOWEST_KEPT(scores, state_of([made] * 16)))[:, None]
    want = np.stack([distribution(row_scores, made) > 0 for row_scores in scores])
    np.testing.assert_array_equal(kept, want)


def test_top_p_follows_what_min_p_left():
    """0.5 is 5/7 of the two that min-p keeps, so that top-p keeps it alone."""
    scores = np.log(np.array([[0.5, 0.2, 0.1, 0.1, 0.1]], np.float32))
    for fields, kept in (({}, 2), ({"min_p": 0.3}, 1)):
        state = state_of([row(SamplingParams.from_dict({"top_p": 0.6, **fields}))], size=5)
        assert (scores >= np.asarray(LOWEST_KEPT(scores, state))[:, None]).sum() == kept


def test_without_top_p_no_token_is_cut():
    """Sums of float32 probabilities reach 1 long before the last of many tokens."""
    size = 151_936
    scores = np.random.default_rng(0).normal(0, 3, (1, size)).astype(np.float32)
    state = state_of([row(SamplingParams())], penalties=False, size=size)
    assert LOWEST_KEPT(scores, state)[0] <= scores.min()


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-30, 1e-37, 1e-39, 5e-324])
@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}])
def test_small_temperatures_take_the_best(temperature, fields):
    scores = np.full((64, V), -50.0, np.float32)
    scores[:, [2, 7, 9]] = [80, 99, 98]
    params = SamplingParams(temperature=temperature, **fields)
    rows = [row(params, key=request_key(i)) for i in range(64)]
    assert set(draw(scores, [*rows])[0].tolist()) == {7}


@pytest.mark.parametrize("temperature", [9e-6, 1e-30, 5e-324])
def test_what_counts_as_greedy_is_zero_on_the_device(temperature):
    """Temperatures that float32 cannot hold, or only without full precision, never get there."""
    rows: list[Row | None] = [row(SamplingParams(temperature=t)) for t in (temperature, 1e-5)]
    assert state_of(rows).temperature.tolist() == [0, np.float32(1e-5)]


def test_quotients_do_not_overflow():
    """Whatever temperature the device is given, the best stays ahead of the second."""
    scores = np.full((64, V), -50.0, np.float32)
    scores[:, [2, 7]] = [98, 99]
    state = state_of([row(SamplingParams(), key=request_key(i)) for i in range(64)])
    state = dataclasses.replace(state, temperature=jnp.full(64, 1e-37, jnp.float32))
    tokens, _, _ = SAMPLE(scores, state, SamplingFlags(random=True))
    assert set(tokens.tolist()) == {7}


def test_a_constant_on_all_scores_changes_no_draw():
    """A large quotient would have no bits left for the random numbers."""
    scores = (logits(512) * 16).round() / 4096  # exact in float32 with the constant, too
    params = SamplingParams(temperature=0.0025)
    rows = [row(params, key=request_key(i)) for i in range(512)]
    want, _ = draw(scores, [*rows])
    np.testing.assert_array_equal(draw(scores + 2048, [*rows])[0], want)


# As plain values: rows are made of them in the tests, where they are checked.
ROWS = st.fixed_dictionaries(
    {
        "params": st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]),
                "top_k": st.integers(0, V),
                "top_p": st.floats(0.01, 1),
                "min_p": st.floats(0, 1),
                "presence_penalty": st.floats(-2, 2),
                "frequency_penalty": st.floats(-2, 2),
                "repetition_penalty": st.floats(0.25, 4),
                "min_tokens": st.integers(0, 4),
            }
        ),
        "key": st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
        "prompt": st.lists(st.integers(0, V - 1), max_size=6),
        "output": st.lists(st.integers(0, V - 1), max_size=6),
        "stop": st.lists(st.integers(0, V - 1), max_size=3, unique=True).map(tuple),
    }
)


def rows_of(values: list[dict]) -> list[Row]:
    return [row(**(fields | {"params": SamplingParams(**fields["params"])})) for fields in values]


@settings(max_examples=60, deadline=None)
@given(values=st.lists(ROWS, min_size=4, max_size=4), seed=st.integers(0, 10**6))
def test_only_allowed_tokens_are_drawn(values, seed):
    """Any mixture of parameters in one batch: each row obeys its own."""
    scores, rows = logits(4, seed), rows_of(values)
    tokens, _ = draw(scores, [*rows])
    for i, made in enumerate(rows):
        after = adjusted(scores[i], made)
        if made.params.is_greedy:
            assert after[tokens[i]] >= after.max() - 1e-4
        else:
            # Rounding may decide at the very border of a filter.
            border = [dataclasses.replace(made, params=p) for p in nearly(made.params)]
            assert any(distribution(scores[i], b)[tokens[i]] > 0 for b in border)


def nearly(params: SamplingParams) -> list[SamplingParams]:
    tops = (params.top_p, min(params.top_p + 1e-5, 1.0))
    mins = (params.min_p, max(params.min_p - 1e-5, 0.0))
    return [params.replace(top_p=t, min_p=m) for t in tops for m in mins]


@settings(max_examples=40, deadline=None)
@given(values=st.lists(ROWS, min_size=4, max_size=4), place=st.integers(0, 3))
def test_other_rows_change_nothing(values, place):
    """Same logits, same parameters, same key: same token, wherever it is and whoever is there."""
    scores, (mine, *others) = logits(4), rows_of(values)
    want, _ = draw(np.repeat(scores[:1], 4, axis=0), [mine, None, None, None])
    batch = np.roll(scores, place, axis=0)
    got, _ = draw(batch, [*others[:place], mine, *others[place:]])
    assert got[place] == want[0]


def test_what_no_row_needs_may_be_left_out():
    """The flags are an economy: with all of them on, plain rows give the same."""
    scores = logits(4)
    greedy = [row(SamplingParams(temperature=0))] * 4
    drawn = [row(SamplingParams(), key=request_key(i)) for i in range(4)]
    for rows, flags in ((greedy, SamplingFlags()), (drawn, SamplingFlags(random=True))):
        np.testing.assert_array_equal(draw(scores, [*rows], flags)[0], draw(scores, [*rows])[0])


def test_greedy_takes_the_first_of_equals():
    scores = np.zeros((1, V), np.float32)
    scores[0, [7, 9]] = 3
    assert draw(scores, [row(SamplingParams(temperature=0))])[0].tolist() == [7]


def test_tokens_that_are_impossible_are_never_drawn():
    scores = np.full((64, V), -np.inf, np.float32)
    scores[:, 5] = -1000.0
    for fields in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.5}, {"temperature": 1e-4}):
        rows = [row(SamplingParams.from_dict(fields), key=request_key(i)) for i in range(64)]
        assert set(draw(scores, [*rows])[0].tolist()) == {5}


def test_counts_follow_the_answer():
    """After each step the state is that of a row built with the longer answer."""
    params = SamplingParams(temperature=0, frequency_penalty=2.0, presence_penalty=1.0)
    made, scores = row(params, prompt=[1, 1], output=[3]), logits(1)
    state, output = state_of([made]), [3]
    for _ in range(8):
        tokens, state, _ = SAMPLE(scores, state, EVERYTHING)
        output.append(int(tokens[0]))
        fresh = state_of([row(params, prompt=[1, 1], output=output)])
        for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
            np.testing.assert_array_equal(got, want)
    assert len(set(output)) > 3  # the best token tires


def test_stop_tokens_wait_for_min_tokens():
    scores = np.zeros((1, V), np.float32)
    scores[0, [4, 6]] = [9, 8]
    params = SamplingParams(temperature=0, min_tokens=2)
    state, seen = state_of([row(params, stop=(4,))]), []
    for _ in range(3):
        tokens, state, _ = SAMPLE(scores, state, EVERYTHING)
        seen.append(int(tokens[0]))
    assert seen == [6, 6, 4]


def test_keys_are_well_mixed():
    keys = {request_key(1, seed, index) for seed in range(100) for index in range(100)}
    assert len(keys) == 10_000
    first = np.array([key[0] for key in keys], np.float64) / 2**32
    assert stats.kstest(first, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("flags", [SamplingFlags(), EVERYTHING, SamplingFlags(logprobs=5)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_give_no_token(flags, value):
    """Wherever in the row; other rows are unaffected."""
    scores = logits(5)
    scores[1, 0], scores[2, V - 1], scores[3] = value, value, np.nan
    rows: list[Row | None] = [
        row(SamplingParams(temperature=0)),
        row(SamplingParams(seed=1)),
        row(SamplingParams(temperature=0)),
        None,
        row(SamplingParams(temperature=0)),
    ]
    tokens, _ = draw(scores, rows, flags)
    assert tokens[1:4].tolist() == [NOT_FINITE] * 3
    assert tokens[[0, 4]].tolist() == scores[[0, 4]].argmax(1).tolist()


def test_one_token_that_is_ruled_out_by_the_model_is_no_defect():
    scores = logits(1)
    scores[0, 3] = -np.inf
    assert draw(scores, [row(SamplingParams(temperature=0))])[0][0] == scores[0].argmax()
