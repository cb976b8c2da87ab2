"""Who is chosen, when, and with what pages; no model computes here."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine.allocator import PageAllocator
from jaxinfer.engine.buckets import Buckets, round_up
from jaxinfer.engine.request import Prompt, Request, request_key
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.outputs import RequestMetrics
from jaxinfer.sampling_params import SamplingParams


def make(num_pages=16, *, max_num_seqs=4, tokens=32, fixed=False) -> Scheduler:
    buckets = Buckets(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=tokens, table_width=num_pages, fixed=fixed
    )
    return Scheduler(PageAllocator(num_pages=num_pages, page_size=16), buckets)


def request(arrival: int, length: int, max_tokens: int = 4) -> Request:
    prompt = Prompt(
        request_id=str(arrival), text=None, token_ids=[1] * length, params=SamplingParams(),
        metrics=RequestMetrics(arrival_s=0.0),
    )  # fmt: skip
    return Request(
        prompt=prompt, index=0, arrival=arrival, key=(0, 0), stop_ids=(), max_tokens=max_tokens,
        detokenizer=None,
    )  # fmt: skip


def start(scheduler: Scheduler, request: Request) -> None:
    """What the engine does after a chunk: note it, and the first token at the end."""
    if scheduler.prefilled(request, scheduler.chunk(request)):
        request.append(1, None)


def test_short_prompts_share_a_call_in_order():
    scheduler = make()
    requests = [request(i, length) for i, length in enumerate((5, 9, 3))]
    scheduler.waiting.extend(requests)
    # Two rows of 16 tokens are the budget; four rows would not fit.
    assert scheduler.next_prefill() == requests[:2]
    assert [len(scheduler.pages.owned(r)) for r in requests] == [1, 1, 0]
    assert list(scheduler.waiting) == requests[2:]


def test_a_wide_prompt_does_not_share():
    scheduler = make()
    requests = [request(0, 5), request(1, 20)]
    scheduler.waiting.extend(requests)
    # Padded to 32 tokens, two rows would exceed the budget of 32.
    assert scheduler.next_prefill() == requests[:1]


def test_fixed_shapes_prefill_one_at_a_time():
    scheduler = make(fixed=True)
    scheduler.waiting.extend([request(0, 5), request(1, 5)])
    assert len(scheduler.next_prefill()) == 1


def test_a_long_prompt_goes_in_chunks_and_alone():
    scheduler = make()
    long, short = request(0, 70), request(1, 5)
    scheduler.waiting.extend([long, short])
    chunks = []
    while long not in scheduler.running:
        assert scheduler.next_prefill() == [long]
        chunks.append(scheduler.chunk(long))
        start(scheduler, long)
    assert chunks == [32, 32, 6]
    assert scheduler.prefilling is None
    assert scheduler.next_prefill() == [short]


def test_rows_are_limited():
    scheduler = make(max_num_seqs=2)
    for i in range(2):
        scheduler.waiting.append(request(i, 5))
        for chosen in scheduler.next_prefill():
            start(scheduler, chosen)
    scheduler.waiting.append(request(2, 5))
    assert not scheduler.can_prefill()
    assert scheduler.next_prefill() == []
    scheduler.remove(scheduler.running[0])
    assert scheduler.can_prefill()


def test_nobody_overtakes_the_head_of_the_queue():
    scheduler = make(num_pages=4)
    first, large, small = request(0, 30, 40), request(1, 40), request(2, 3)
    scheduler.waiting.append(first)
    start(scheduler, *scheduler.next_prefill())
    scheduler.waiting.extend([large, small])
    assert not scheduler.can_prefill()
    scheduler.remove(first)
    assert scheduler.next_prefill() == [large]


def test_the_running_keep_room_for_their_next_page():
    scheduler = make(num_pages=3)
    growing = request(0, 15, 20)
    scheduler.waiting.append(growing)
    start(scheduler, *scheduler.next_prefill())
    # Two pages are free: one for the newcomer's next tokens, but then none for who runs.
    scheduler.waiting.append(request(1, 17))
    assert not scheduler.can_prefill()
    # An answer that ends within its page needs no room.
    scheduler.remove(growing)
    done_soon = request(2, 10, 4)
    scheduler.waiting.appendleft(done_soon)
    assert scheduler.next_prefill() == [done_soon]
    start(scheduler, done_soon)
    assert scheduler.can_prefill()


def test_the_youngest_is_preempted_to_the_head_of_the_queue():
    scheduler = make()
    requests = [request(i, 5) for i in range(4)]
    for r in requests[:3]:
        scheduler.waiting.append(r)
        start(scheduler, *scheduler.next_prefill())
    scheduler.waiting.append(requests[3])
    assert scheduler.preempt_youngest() is requests[2]
    assert scheduler.preempt_youngest() is requests[1]
    assert list(scheduler.waiting) == requests[1:]
    assert scheduler.running == requests[:1]
    assert scheduler.pages.owned(requests[2]) == []
    assert requests[2].prompt.metrics.preemptions == 1
    # What it had answered is prefilled again behind its prompt.
    assert scheduler.chunk(requests[2]) == 6
    assert requests[2].tokens(4, 6) == [1, 1]
    scheduler.check_invariants()


def test_a_younger_prompt_that_is_half_computed_goes_first():
    scheduler = make()
    old, young = request(0, 5), request(1, 70)
    scheduler.waiting.append(old)
    start(scheduler, *scheduler.next_prefill())
    scheduler.waiting.append(young)
    assert scheduler.next_prefill() == [young]
    assert not scheduler.ends_prompt([young])
    scheduler.prefilled(young, scheduler.chunk(young))
    assert scheduler.preempt_youngest() is young
    assert (scheduler.running, scheduler.prefilling, young.cached) == ([old], None, 0)
    assert list(scheduler.waiting) == [young]
    scheduler.check_invariants()


def test_remove_from_anywhere():
    scheduler = make()
    long, waiting = request(0, 70), request(1, 5)
    scheduler.waiting.extend([long, waiting])
    scheduler.next_prefill()
    scheduler.remove(long)
    scheduler.remove(waiting)
    scheduler.remove(waiting)
    assert not scheduler.has_work
    assert scheduler.pages.num_free == 16


def test_invariants_see_pages_of_the_idle_and_missing_pages():
    scheduler = make()
    idle = request(0, 5)
    scheduler.pages.grow(idle, num_tokens=5)
    with pytest.raises(AssertionError, match="do not compute"):
        scheduler.check_invariants()
    scheduler.pages.release(idle)
    scheduler.running.append(idle)
    with pytest.raises(AssertionError, match="lacks pages"):
        scheduler.check_invariants()


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=12),
    num_pages=st.integers(7, 20),
    rows=st.integers(1, 5),
)
def test_everybody_ends_whatever_comes(shapes, num_pages, rows):
    """The engine's loop without a model: pages run out, requests are preempted, all finish."""
    scheduler = make(num_pages, max_num_seqs=rows)
    requests = [request(i, length, most) for i, (length, most) in enumerate(shapes)]
    scheduler.waiting.extend(requests)
    prefilled_last = False
    for _ in range(5000):
        if not scheduler.has_work:
            break
        interleave = scheduler.prefilling is not None and prefilled_last and scheduler.running
        if scheduler.can_prefill() and not interleave:
            prefilled_last = True
            for r in scheduler.next_prefill():
                start(scheduler, r)
        else:
            prefilled_last = False
            pages = scheduler.pages
            while not all(pages.grow(r, num_tokens=r.num_tokens) for r in scheduler.running):
                scheduler.preempt_youngest()
            for r in scheduler.running:
                r.append(1, None)
        for r in requests:
            if r.finished and r in scheduler.running:
                scheduler.remove(r)
        scheduler.pages.check_invariants()
        scheduler.check_invariants()
    assert [len(r.output_ids) for r in requests] == [most for _, most in shapes]
    assert scheduler.pages.num_free == num_pages


def test_buckets():
    buckets = Buckets(max_num_seqs=12, max_num_batched_tokens=100, table_width=9)
    assert [buckets.rows(n) for n in (1, 2, 3, 8, 9, 12)] == [1, 2, 4, 8, 12, 12]
    assert [buckets.prefill_tokens(n) for n in (1, 17, 65, 100)] == [16, 32, 100, 100]
    assert [buckets.prefill_rows(n, 16) for n in (1, 2, 3, 5)] == [1, 2, 4, 6]
    assert [buckets.decode_width(n) for n in (0, 1, 5, 9)] == [4, 4, 8, 9]
    with pytest.raises(ValueError, match="13 exceeds the largest bucket 12"):
        round_up(13, lowest=1, highest=12)


def test_fixed_buckets_depend_on_nothing():
    buckets = Buckets(max_num_seqs=12, max_num_batched_tokens=100, table_width=9, fixed=True)
    assert {buckets.rows(n) for n in range(1, 13)} == {12}
    assert {buckets.decode_width(n) for n in range(1, 10)} == {9}


def test_keys_differ_and_repeat():
    keys = {request_key(*numbers) for numbers in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))}
    assert len(keys) == 4
    assert request_key(5, 6) == request_key(5, 6)
    assert all(0 <= number < 2**32 for key in keys for number in key)
