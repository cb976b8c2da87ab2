"""Every value that makes no sense is refused by the name of its field."""

import math
from fractions import Fraction

import numpy as np
import pytest

from jaxinfer.sampling_params import SamplingParams

NAN, INF = math.nan, math.inf
OUT_OF_RANGE = [
    ("n", 0, "at least 1"), ("n", -1, "at least 1"),
    ("temperature", NAN, "finite; got nan"), ("temperature", INF, "finite; got inf"),
    ("temperature", -0.1, r"between 0 and 1e\+06; got -0.1"),
    ("temperature", 1e39, r"between 0 and 1e\+06"), ("temperature", 10**400, "between 0 and 1e"),
    ("top_p", 0.0, "more than 0; got 0"), ("top_p", 1.01, "between 0 and 1; got 1.01"),
    ("top_p", NAN, "got nan"), ("top_p", -0.5, "got -0.5"),
    ("top_k", -2, "at least 0; got -2"),
    ("min_p", -0.1, "between 0 and 1"), ("min_p", 1.1, "between 0 and 1"), ("min_p", NAN, "nan"),
    ("seed", -1, "between 0 and 9223372036854775807; got -1"), ("seed", 2**63, "between 0 and 92"),
    ("presence_penalty", 2.1, "between -2 and 2"), ("presence_penalty", NAN, "got nan"),
    ("frequency_penalty", -2.1, "between -2 and 2"), ("frequency_penalty", INF, "got inf"),
    ("repetition_penalty", 0.0, r"between 1e-06 and 1e\+06; got 0"),
    ("repetition_penalty", -1.0, "got -1"), ("repetition_penalty", 1e39, "between 1e-06 and 1e"),
    ("repetition_penalty", NAN, "got nan"),
    ("stop", "", "non-empty strings; got ''$"), ("stop", ["a", ""], "non-empty strings; got ''$"),
    ("stop_token_ids", [-1], r"token ids; got -1$"),
    ("max_tokens", 0, "at least 1; got 0"), ("min_tokens", -1, "at least 0"),
    ("logprobs", -1, "between 0 and 20"), ("logprobs", 21, "between 0 and 20"),
    ("prompt_logprobs", 21, "between 0 and 20"),
]  # fmt: skip
OF_ANOTHER_TYPE = [
    ("temperature", "hot", "a number; got 'hot'"), ("temperature", None, "a number; got None"),
    ("temperature", True, "a number; got True"), ("top_p", [1], "a number"),
    ("n", 1.0, "an integer; got 1.0"), ("n", True, "an integer"), ("n", None, "an integer"),
    ("top_k", 2.5, "an integer"), ("max_tokens", "9", "an integer"), ("seed", 1.5, "an integer"),
    ("stop", 5, "a list; got 5"), ("stop_token_ids", 5, "a list; got 5"),
    ("stop_token_ids", "ab", "a list; got 'ab'"),
    ("temperature", np.True_, "a number"), ("n", np.True_, "an integer"),
    ("n", np.float32(1), "an integer"), ("temperature", 1j, "a number; got 1j"),
    ("logprobs", True, "an integer"), ("min_tokens", None, "an integer"),
]  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "value", "match"), OUT_OF_RANGE)
def test_out_of_range(name, value, match):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{match}"):
        SamplingParams(**{name: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "value", "match"), OF_ANOTHER_TYPE)
def test_of_another_type(name, value, match):
    with pytest.raises(TypeError, match=rf"^{name} must be {match}"):
        SamplingParams(**{name: value})


@pytest.mark.usefixtures("unchecked")
def test_lists_of_the_wrong_things():
    with pytest.raises(ValueError, match="stop must be non-empty strings; got 1"):
        SamplingParams(stop=[1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="stop_token_ids must be token ids"):
        SamplingParams(stop_token_ids=[1.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="stop_token_ids must be token ids"):
        SamplingParams(stop_token_ids=[True])


def test_lengths_that_contradict_each_other():
    with pytest.raises(ValueError, match="min_tokens must not exceed max_tokens; got 5 > 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=5, max_tokens=None).min_tokens == 5


def test_an_unknown_keyword():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'temprature'; did you mean temperature\?"):
        SamplingParams.from_dict({"temprature": 1.0})
    with pytest.raises(TypeError, match="'xyz'; known are n, temperature, top_p"):
        SamplingParams.from_dict({"xyz": 1})


def test_forms_that_mean_the_same():
    assert SamplingParams(stop="a") == SamplingParams(stop=["a"]) == SamplingParams(stop=("a",))
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(stop_token_ids=[3]) == SamplingParams(stop_token_ids=(3,))
    assert SamplingParams(temperature=1) == SamplingParams(temperature=1.0)
    assert SamplingParams.from_dict({"n": 2, "stop": "x"}) == SamplingParams(n=2, stop="x")


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_other_libraries_become_plain():
    params = SamplingParams(
        temperature=np.float32(0.5), top_p=np.float64(0.25), max_tokens=np.int64(3),  # type: ignore[arg-type]
        min_p=Fraction(1, 4), stop_token_ids=[np.int32(7)],  # type: ignore[arg-type, list-item]
    )  # fmt: skip
    assert params == SamplingParams(
        temperature=0.5, top_p=0.25, max_tokens=3, min_p=0.25, stop_token_ids=[7]
    )
    kinds = [type(value) for value in (params.temperature, params.top_p, params.max_tokens)]
    assert kinds == [float, float, int]
    assert [type(token) for token in params.stop_token_ids or ()] == [int]


def test_a_copy_is_checked_again():
    with pytest.raises(ValueError, match="temperature must be"):
        SamplingParams().replace(temperature=NAN)
    with pytest.raises(TypeError, match="heat"):
        SamplingParams().replace(heat=1)


@pytest.mark.parametrize(
    ("fields", "greedy", "filters", "penalties"),
    [
        ({}, False, False, False),
        ({"temperature": 0}, True, False, False),
        ({"temperature": 9e-6, "top_p": 0.5}, True, False, False),
        ({"temperature": 1e-5}, False, False, False),
        ({"temperature": 0, "top_k": 5}, True, False, False),  # the best passes every filter
        ({"top_k": 5}, False, True, False),
        ({"top_p": 0.5}, False, True, False),
        ({"min_p": 0.5}, False, True, False),
        ({"presence_penalty": -1.0}, False, False, True),
        ({"frequency_penalty": 1.0}, False, False, True),
        ({"repetition_penalty": 0.9, "temperature": 0}, True, False, True),
    ],
    ids=str,
)
def test_what_the_sampler_has_to_do(fields, greedy, filters, penalties):
    params = SamplingParams(**fields)
    assert (params.is_greedy, params.has_filters, params.has_penalties) == (
        greedy, filters, penalties
    )  # fmt: skip
