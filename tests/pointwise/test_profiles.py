"""Every batch that can be planned fits, at a bounded cost in padding and memory."""

from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dear_batch.pointwise.profiles import Profile, Span, fit, lay_out, layout
from dear_batch.pointwise.recipe import EncodedPair
from dear_batch.pointwise.rows import Batch, Layout, batches, smaller
from tests.pointwise.test_rows import pair

LIMITS = st.tuples(st.integers(30, 2048), st.integers(1, 40_000), st.floats(1, 300))


@st.composite
def planned(draw: st.DrawFn) -> tuple[tuple[Profile, ...], list[EncodedPair], Layout]:
    """Profiles, pairs, and limits of a job within those of the profiles."""
    row_tokens, batch_tokens, document_tokens = draw(LIMITS)
    profiles = lay_out(row_tokens, max(row_tokens, batch_tokens), document_tokens)
    whole = layout(profiles)
    longest = draw(st.integers(12, min(300, whole.row_tokens)))
    lengths = draw(st.lists(st.integers(0, longest - 11), min_size=1, max_size=300))
    random = np.random.default_rng(draw(st.integers(0, 9)))
    pairs = [
        pair([1, *[2] * int(random.integers(1, 10))], [int(i) + 3, *[9] * n])
        for i, n in zip(random.integers(0, 10**6, len(lengths)), lengths, strict=True)
    ]
    row = draw(st.integers(longest, whole.row_tokens))
    most = draw(st.integers(1, whole.batch_tokens))
    return profiles, pairs, replace(whole, row_tokens=row, batch_tokens=most)


def halved(batch: Batch) -> Iterator[Batch]:
    """What is tried when memory runs out, again and again, down to single documents."""
    yield batch
    if len(batch.documents) > 1:
        for part in smaller(batch, len(batch.rows) * batch.length // 2):
            yield from halved(part)


@settings(deadline=None, max_examples=150)
@given(planned())
def test_every_batch_and_every_part_of_one_fits_a_profile(
    case: tuple[tuple[Profile, ...], list[EncodedPair], Layout],
) -> None:
    profiles, pairs, limits = case
    for planned_batch in batches(pairs, limits):
        for batch in halved(planned_batch):
            rows, tokens, documents = len(batch.rows), batch.length, max(batch.counts)
            index, (R, T, P) = fit(profiles, rows, tokens, documents)
            profile = profiles[index]
            assert R in profile.rows
            assert T in profile.tokens
            assert P in profile.documents
            assert rows == R
            assert tokens <= T < tokens + max(8, tokens / 8)
            assert documents <= P < 2 * documents


@given(LIMITS)
def test_no_profile_needs_more_memory_than_a_full_batch(limits: tuple[int, int, float]) -> None:
    row_tokens, batch_tokens, document_tokens = limits
    for profile in lay_out(row_tokens, batch_tokens, document_tokens):
        assert profile.most_tokens <= max(row_tokens, batch_tokens)
        for span in (profile.rows, profile.tokens, profile.documents):
            assert 1 <= span.least <= span.best <= span.most


def test_full_batches_of_packed_rows_share_a_few_shapes() -> None:
    """DL19's lengths, roughly: what CUDA graphs are captured for."""
    random = np.random.default_rng(0)
    pairs = [
        pair([1, q, q, q], [int(random.integers(2, 10**6)), *[9] * int(n)])
        for q in range(100)
        for n in random.gamma(6.0, 13.0, 100).clip(8, 220)
    ]
    profiles = lay_out()
    full = [b for b in batches(pairs, layout(profiles)) if len(b.rows) == 16]
    shapes = {fit(profiles, 16, b.length, len(b.documents)) for b in full}
    assert len(full) > 20
    assert len(shapes) <= 3
    assert {index for index, _ in shapes} == {0}
    assert {R * T for _, (R, T, _) in shapes} == {16 * 1024}


def test_the_default_profiles() -> None:
    assert [(p.rows, p.tokens) for p in lay_out()] == [
        (Span(9, 16, 16), Span(513, 1024, 1024)),
        (Span(1, 4, 8), Span(513, 1024, 1024)),
        (Span(1, 16, 16), Span(1, 256, 512)),
    ]


def test_a_profile_outlives_a_manifest() -> None:
    (profile, *_) = lay_out(256, 2048)
    assert Profile.from_json(asdict(profile)) == profile


def test_what_fits_no_profile_is_refused() -> None:
    for shape in ((17, 1024, 10), (16, 1025, 10), (1, 10, 0)):
        with pytest.raises(ValueError, match="no profile takes"):
            fit(lay_out(), *shape)
