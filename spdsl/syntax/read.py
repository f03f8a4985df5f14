"""From a file to its text: size, encoding and the characters that may stand in a source."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from spdsl.diagnostics import MOST_ERRORS, Applicability, Diagnostic, Hint, Report, Source, Span, SpatError
from spdsl.limits import SOURCE_BYTES

_TOO_LARGE = f"the source has more than {SOURCE_BYTES // 1024} KiB"

# Everything a source without comments consists of; `#` opens a comment.
_PLAIN = re.compile(r"[ -~\t\n]*")

# They reorder or hide the text around them, so that it reads differently from what it says.
_HIDDEN = frozenset("\u200b\u200c\u200d\u2060\ufeff\u00ad") | {
    chr(code)
    for first, last in ((0x200E, 0x200F), (0x202A, 0x202E), (0x2066, 0x2069))
    for code in range(first, last + 1)
}
_LINE_BREAKS = frozenset("\v\f\x1c\x1d\x1e\x85\u2028\u2029")

# Cyrillic and Greek letters and typographic signs that are taken for ASCII most often.
_LOOKALIKES = {
    ord(strange): plain
    for strange, plain in zip(
        "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0455\u0458\u04bb\u0501\u051b\u051d\u0410"
        "\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u03b1\u03bf\u03bd\u03c1\u03ba"
        "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u2212"
        "\u2013\u2014\u00d7\u00f7\u2264\u2265\u2260\u2223\u223c",
        [*"aeopcyxisjhdqwABEKMHOPCTXaovpkABEZHIKMNOPTYX", "-", "-", "-", "*", "/", "<=", ">=", "!=", "|", "~"],
        strict=True,
    )
}


def read(path: str | os.PathLike[str]) -> Source:
    """The source in a file.

    Raises OSError if it cannot be opened or is no regular file, SpatError (E001, E002) if it is no text.
    """
    # Non-blocking, so that a pipe without a writer is refused instead of waited for.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{os.fspath(path)}: not a regular file")
        return decode(file.read(SOURCE_BYTES + 1), Path(path).as_posix())


def decode(data: bytes, path: str = "<bytes>") -> Source:
    """The source in `data`: UTF-8, with or without a byte order mark.

    Raises SpatError: E001 if it is too large, E002 if it is not UTF-8.
    """
    if len(data) > SOURCE_BYTES:
        raise SpatError(Source("", path), [_too_large()])
    try:
        return Source(data.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        whole = Source(data.decode("utf-8-sig", errors="replace"), path)
        start = len(data[: error.start].decode("utf-8-sig", errors="replace"))
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start} belongs to no character"
        diagnostic = Diagnostic(
            "E002",
            "the source is not UTF-8",
            Span(start, start + 1),
            byte,
            hints=(Hint("save the file as UTF-8"),),
        )
        raise SpatError(whole, [diagnostic]) from None


def check_text(source: Source, report: Report) -> str | None:
    """The text with every forbidden character replaced by a harmless one at the same place.

    Reports E003; the replacements keep the parser from reporting a place again. None, with E001 or E002 (NUL)
    reported, for what is no source at all.
    """
    if len(source.text.encode("utf-8", errors="replace")) > SOURCE_BYTES:
        report.add(_too_large())
        return None
    if "\0" in source.text:
        place = source.text.index("\0")
        report.error("E002", "the source holds a NUL byte", Span(place, place + 1), "is this a binary file?")
        return None
    if _PLAIN.fullmatch(source.text):
        return source.text
    text = list(source.text)
    for place in islice(_strange_places(source.text), MOST_ERRORS):
        report.add(_judge(text[place], Span(place, place + 1)))
        text[place] = _stand_in(text[place])
    return "".join(text)


def _too_large() -> Diagnostic:
    note = "a pattern is a page of text; published ones are below 2 KiB"
    return Diagnostic("E001", _TOO_LARGE, Span(0, 0), notes=(note,))


def _strange_places(text: str) -> Iterator[int]:
    """Characters outside plain ASCII that are not simply part of a comment's prose."""
    comment = False
    for place, character in enumerate(text):
        if character == "\n":
            comment = False
        elif character == "#":
            comment = True
        elif " " <= character <= "~" or character == "\t" or (comment and _is_prose(character)):
            continue
        elif character != "\r" or text[place + 1 : place + 2] != "\n":
            yield place


def _is_prose(character: str) -> bool:
    return character > "\x9f" and character not in _HIDDEN and character not in _LINE_BREAKS


def _judge(character: str, span: Span) -> Diagnostic:
    if character == "\r":
        hint = Hint("end the line with a line feed", Applicability.MACHINE, span, "\n")
        return Diagnostic("E003", "a carriage return stands alone", span, "the line would not end here", hints=(hint,))
    named = _describe(character)
    if character in _HIDDEN:
        note = "it hides or reorders the text around it, so that the source reads differently from what it says"
        hint = Hint("remove it", Applicability.MACHINE, span, "")
        return Diagnostic("E003", f"invisible character {named}", span, notes=(note,), hints=(hint,))
    return Diagnostic("E003", f"forbidden character {named}", span, hints=_plain_hint(character, span))


def _plain_hint(character: str, span: Span) -> tuple[Hint, ...]:
    plain = _plain(character)
    if plain:
        return (Hint(f"it looks like `{plain}`", Applicability.MAYBE, span, plain),)
    return (Hint("outside comments a source is plain ASCII"),)


def _describe(character: str) -> str:
    name = unicodedata.name(character, "a control character")
    return f"U+{ord(character):04X} ({name})"


def _plain(character: str) -> str:
    folded = unicodedata.normalize("NFKC", character)
    return _LOOKALIKES.get(ord(character)) or (folded if folded.isascii() and folded.isprintable() else "")


def _stand_in(character: str) -> str:
    if character == "\r":
        return "\n"
    if character in _HIDDEN or character in _LINE_BREAKS or character < " " or "\x7f" <= character <= "\x9f":
        return " "
    plain = _plain(character)
    return plain if len(plain) == 1 else "_"
