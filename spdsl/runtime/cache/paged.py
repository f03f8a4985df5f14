"""Where kernels find what a cache holds."""

from __future__ import annotations

from spdsl.runtime.cache.cache import CacheStore, EntryStore
from spdsl.runtime.entries.entries import entry_count
from spdsl.runtime.launch.launch import Paged


def paged_of(cache: CacheStore) -> Paged:
    """The tokens."""
    return Paged(cache.page_table, cache.page or 0, cache.capacity)


def paged_entries(cache: EntryStore, name: str) -> Paged:
    """The entries of a compressed stream, which never lie in pages."""
    return Paged(None, 0, entry_count(cache.capacity, cache.entries[name].cells), cache.entry_spans[name])
