"""With JAXINFER_DEBUG=1 no request reads or writes another's pages, and none in silence."""

import dataclasses

import jax
import pytest

from jaxinfer.engine.allocator import PageAllocator
from jaxinfer.engine.engine import Engine
from tests.engine.small import GREEDY, decoder, engine, generate, prompts, run

TWO = prompts(2)


def started() -> Engine:
    """Two requests that decode, with 12 tokens to come and a step behind them."""
    made = engine()
    for prompt in TWO:
        made.add_request(prompt, GREEDY)
    while len(made._scheduler.running) < 2 or made._rows is None:
        made.step()
    return made


@pytest.mark.parametrize(("table", "num_tokens", "message"), [
    ([0, 8], 32, r"page_table must name pages 0 … 7; got 8 in entry 1"),
    ([-1, 1], 32, r"page_table must name pages 0 … 7; got -1 in entry 0"),
    ([0, 2], 32, "page_table names page 2 in entry 1, which is not its request's"),
    ([1, 0], 32, "page_table names page 1 in entry 0"),
    ([0, 1, 3], 32, "page_table names page 3 in entry 2"),
    ([0, 1], 33, "lengths reach 33 tokens where page_table has room for 32"),
    ([0], 20, "lengths reach 20 tokens where page_table has room for 16"),
])  # fmt: skip
def test_tables_that_do_not_fit(table, num_tokens, message):
    pages = PageAllocator(num_pages=8, page_size=16)
    pages.grow("a", num_tokens=32)
    pages.grow("b", num_tokens=16)
    pages.check_table("a", [0, 1], num_tokens=32)
    pages.check_table("a", [0], num_tokens=16)
    with pytest.raises(AssertionError, match=message):
        pages.check_table("a", table, num_tokens=num_tokens)


def test_rows_that_name_pages_of_another_request():
    made = started()
    one, other = made._scheduler.running
    owned = made.pages._owned
    owned[one], owned[other] = owned[other], owned[one]
    made.check_invariants()
    with pytest.raises(AssertionError, match="which is not its request's"):
        made.step()


@pytest.mark.parametrize("prompt", [[1] * 16, [1] * 40], ids=["whole", "in chunks"])
def test_steps_beyond_the_pages_of_a_row(monkeypatch, prompt):
    made = engine()
    monkeypatch.setattr(made, "_reserve", lambda steps: True)
    made.add_request(prompt, GREEDY)
    with pytest.raises(AssertionError, match=r"lengths reach \d+ tokens where page_table has room"):
        run(made)


def test_prompts_beyond_the_pages_of_a_row(monkeypatch):
    made = engine()
    made.add_request([1] * 20, GREEDY)
    grow = made.pages.grow
    monkeypatch.setattr(made.pages, "grow", lambda owner, num_tokens: grow(owner, num_tokens=16))
    with pytest.raises(AssertionError, match="lengths reach 20 tokens where page_table has"):
        made.step()


@pytest.mark.parametrize(("entry", "message"), [
    (32, "page_table must name pages 0 … 31 where lengths reach; got 32 in row 1, entry 0"),
    (-1, "page_table must name pages 0 … 31 where lengths reach; got -1 in row 1, entry 0"),
])  # fmt: skip
def test_the_device_is_checked_as_well(monkeypatch, entry, message):
    """Where the host's books are right and the table of the device is not."""
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    made = started()
    assert made.runner._state is not None
    table = made.runner._state.page_table.at[1, 0].set(entry)
    made.runner._state = dataclasses.replace(made.runner._state, page_table=table)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        run(made)


def test_debug_mode_changes_no_answer(monkeypatch):
    params = [GREEDY] * len(TWO)
    monkeypatch.delenv("JAXINFER_DEBUG", raising=False)
    want = generate(engine(), TWO, params)
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    made = Engine(decoder(), None, engine().config)
    assert made._checked
    assert generate(made, TWO, params) == want
