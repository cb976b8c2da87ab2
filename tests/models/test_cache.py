"""The paged cache as a pytree, and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.models.cache import PAGE_SIZES, PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.errors import ContextLengthError
from jaxinfer.models.functions import check_capacity

CONFIG = DecoderConfig.tiny()


def create(**fields) -> PagedKVCache:
    sizes: dict[str, Any] = {"batch_size": 3, "max_len": 40}
    return PagedKVCache.create(CONFIG, **(sizes | fields))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_shapes(page_size):
    cache = create(page_size=page_size, max_len=130)
    pages = -(-130 // page_size)
    assert (cache.page_size, cache.num_pages, cache.max_len) == (
        page_size, 3 * pages, pages * page_size
    )  # fmt: skip
    assert len(cache.k_pages) == len(cache.v_pages) == CONFIG.num_layers
    for array in (*cache.k_pages, *cache.v_pages):
        assert array.shape == (3 * pages, 2, page_size, 16)
        assert array.dtype == jnp.bfloat16
    assert cache.page_table.tolist() == np.arange(3 * pages).reshape(3, pages).tolist()
    assert cache.lengths.tolist() == [0, 0, 0]


def test_a_pool_of_another_size():
    """Larger: the rest is free. Smaller: the caller gives out pages; the table stays in range."""
    assert create(page_size=16, num_pages=20).num_pages == 20
    small = create(page_size=16, num_pages=4)
    assert int(small.page_table.max()) < 4


def test_specs_in_place_of_arrays():
    """Any leaves may stand in the fields: shardings are built by a map over the cache."""
    cache = create()
    specs = jax.tree.map(lambda _: PartitionSpec(), cache)
    assert isinstance(specs, PagedKVCache)
    assert specs.k_pages[1] == specs.lengths == PartitionSpec()
    by_path = jax.tree_util.tree_map_with_path(
        lambda path, _: PartitionSpec(None, "x") if "pages" in path[0].name else PartitionSpec(),
        cache,
    )
    assert by_path.v_pages[0] == PartitionSpec(None, "x")
    assert by_path.page_table == PartitionSpec()
    mesh = jax.make_mesh((1,), ("x",))
    placed = jax.device_put(cache, jax.tree.map(lambda s: NamedSharding(mesh, s), by_path))
    assert placed.k_pages[0].sharding.spec == PartitionSpec(None, "x")


def test_through_transformations():
    cache = create()
    moved = jax.jit(lambda c: c.replace(lengths=c.lengths + 5))(cache)
    assert moved.lengths.tolist() == [5, 5, 5]
    assert cache.lengths.tolist() == [0, 0, 0]
    shapes = jax.eval_shape(create)
    assert shapes.k_pages[0].shape == cache.k_pages[0].shape
    leaves, structure = jax.tree.flatten(cache)
    assert len(leaves) == 2 * CONFIG.num_layers + 2
    assert jax.tree.structure(jax.tree.unflatten(structure, leaves)) == structure


def test_one_layer_short_is_another_structure():
    cache = create()
    assert jax.tree.structure(cache) != jax.tree.structure(cache.replace(k_pages=cache.k_pages[:1]))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"page_size": 48}, r"page_size must be one of \(16, 32, 64, 128\); got 48"),
        ({"batch_size": 0}, "must be positive; got 0, 40 and None"),
        ({"max_len": -1}, "must be positive; got 3, -1 and None"),
        ({"num_pages": 0}, "must be positive; got 3, 40 and 0"),
    ],
    ids=str,
)
def test_bad_sizes(fields, match):
    with pytest.raises(ValueError, match=match):
        create(**fields)


@pytest.mark.parametrize("fields", [{"max_len": 10**15}, {"num_pages": 10**12}], ids=str)
def test_more_than_the_device_has(fields):
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        create(**fields)


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(TypeError, match="pagesize"):
        create(pagesize=16)
    with pytest.raises(TypeError, match="length"):
        create().replace(length=1)


def test_capacity():
    cache = create(page_size=16).replace(lengths=jnp.array([0, 47, 3], jnp.int32))
    check_capacity(cache, 1)
    with pytest.raises(ContextLengthError, match=r"holds 47 tokens and cannot take 2 .* at 48"):
        check_capacity(cache, 2)
