"""Every code is explained, with an example that raises it and a fixed form that does not."""

from __future__ import annotations

import pytest

from spdsl.catalogue import Entry, entries, explain
from spdsl.diagnostics import Report, Source
from spdsl.syntax.parse import parse


def codes(text: str) -> set[str]:
    report = Report(Source(text))
    parse(report.source, report)
    return {found.code for found in report.diagnostics}


@pytest.mark.parametrize("entry", entries().values(), ids=lambda entry: entry.code)
def test_examples(entry: Entry) -> None:
    of_syntax = entry.code.startswith("E0") or entry.code == "E104"
    assert codes(entry.bad * entry.repeated) == ({entry.code} if of_syntax else set())
    assert codes(entry.fixed) == set()


@pytest.mark.parametrize("entry", entries().values(), ids=lambda entry: entry.code)
def test_texts(entry: Entry) -> None:
    assert entry.title[0].isupper()
    assert not entry.title.endswith(".")
    assert len(entry.text) > 80
    assert entry.name == entry.name.lower().replace(" ", "-")


def test_names_are_unique() -> None:
    names = [entry.name for entry in entries().values()]
    assert len(set(names)) == len(names)


def test_explain_takes_either_case() -> None:
    assert explain("e004") is explain("E004")
    with pytest.raises(KeyError):
        explain("E999")
