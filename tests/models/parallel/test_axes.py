"""Every weight of every family has axes that the rules know."""

import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.models.parallel.axes import (
    PAGES,
    RULES,
    divided_axis,
    logical_axes,
    weight_spec,
)
from jaxinfer.models.weights import weight_shapes
from jaxinfer.sharding.rules import partition_spec
from tests.models.families import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_has_an_axis_for_each_dimension(name):
    for weight, shape in weight_shapes(CONFIGS[name]).items():
        assert len(logical_axes(weight)) == len(shape)
        assert (divided_axis(weight) is None) == ("norm" in weight)


def test_specs():
    assert weight_spec("embed") == P("tensor", None)
    assert weight_spec("layers.3.o_proj") == P("tensor", None)
    assert weight_spec("layers.3.gate_proj") == weight_spec("gate_up_proj") == P(None, "tensor")
    assert weight_spec("layers.3.k_bias") == P("tensor")


def test_pages_are_divided_by_heads_and_by_slots():
    assert partition_spec(PAGES, RULES) == P(None, "tensor", "seq", None)


def test_rules_that_collide():
    """Both dimensions of a page along one mesh axis cannot be."""
    with pytest.raises(ValueError, match=r"seq would divide two dimensions .*heads and slot"):
        partition_spec(PAGES, {**RULES, "heads": "seq"})


def test_a_weight_that_no_decoder_has():
    with pytest.raises(ValueError, match=r"no logical axes are known for weight 'layers\.0\.gate'"):
        logical_axes("layers.0.gate")
