"""Memory in large pages: tensors like any others, apart from each other, and gone when the last of a chunk is."""

from __future__ import annotations

import gc
import mmap
import weakref

import pytest
import torch

from specdec import pages
from specdec.pages import LEAST, PAGE, Pages

needs_advice = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="there are no large pages to ask for")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32])
def test_tensors_are_zero_aligned_and_apart(dtype: torch.dtype) -> None:
    some = Pages(chunk=4 * PAGE)
    shapes = [(3, LEAST // 2 + 1), (1,), (LEAST,), (PAGE // 4, 5), (PAGE // 4, 3)]
    tensors = [some.zeros(shape, dtype) for shape in shapes]
    for shape, tensor in zip(shapes, tensors, strict=True):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert not tensor.any()
        assert tensor.data_ptr() % 64 == 0
    for value, tensor in enumerate(tensors, start=1):
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in tensors] == [[value] for value in range(1, 6)]


@needs_advice
def test_the_first_of_a_chunk_begins_a_page_and_one_larger_than_a_chunk_has_its_own() -> None:
    some = Pages(chunk=PAGE)
    small, large, next_one = (some.zeros((size,), torch.uint8) for size in (LEAST, 3 * PAGE, LEAST))
    assert small.data_ptr() % PAGE == 0
    assert large.data_ptr() % PAGE == 0
    assert next_one.data_ptr() % PAGE == 0


@needs_advice
def test_a_chunk_goes_with_its_last_tensor() -> None:
    some = Pages(chunk=4 * PAGE)
    first, second = some.zeros((LEAST,), torch.uint8), some.zeros((LEAST,), torch.uint8)
    assert second.data_ptr() - first.data_ptr() == LEAST
    assert some._open is not None
    chunk = some._open()
    assert chunk is not None
    gone = weakref.ref(chunk)
    del first, chunk
    gc.collect()
    assert gone() is not None
    second.fill_(7)
    del second
    gc.collect()
    assert gone() is None
    assert not some.zeros((LEAST,), torch.uint8).any(), "a new chunk"


def test_a_system_without_large_pages_gives_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    tensor = Pages().zeros((LEAST,), torch.float32)
    assert tensor.shape == (LEAST,)
    assert not tensor.any()
