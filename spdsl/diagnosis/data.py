"""The tensors of a file or of the caller: `layers.<i>.<argument>` of layer i, or `<argument>` of all layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

_OF_LAYER = re.compile(r"layers\.(\d+)\.(\w+)")
_FEW = 8  # names in a message

Given = Mapping[str, Tensor] | str | PathLike[str]


class File(Mapping[str, Tensor]):
    """A safetensors file; a tensor is read when it is asked for. Raises ValueError if it is none, OSError."""

    def __init__(self, path: str | PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        with self.path.open("rb"):  # its errors name the file and the reason
            pass
        try:
            opened: Any = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{self.path}: no safetensors file ({error})") from None
        self._file = opened
        self._names: list[str] = list(opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        found: Tensor = self._file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def opened(given: Given) -> Mapping[str, Tensor]:
    """Tensors by name, those of a file as they are read."""
    return File(given) if isinstance(given, str | PathLike) else given


def layers_of(tensors: Mapping[str, Tensor]) -> list[int]:
    """The numbers of the layers, rising; [0] where no name has one."""
    found = {int(match[1]) for match in map(_OF_LAYER.fullmatch, tensors) if match}
    return sorted(found) or [0]


class Layer(Mapping[str, Tensor]):
    """The tensors of one layer by the names of arguments; its own before those of all."""

    def __init__(self, tensors: Mapping[str, Tensor], number: int) -> None:
        self._tensors, self._own = tensors, f"layers.{number}."

    def __getitem__(self, name: str) -> Tensor:
        own = self._own + name
        return self._tensors[own if own in self._tensors else name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._own + name in self._tensors or name in self._tensors)

    def __iter__(self) -> Iterator[str]:
        names = (name.removeprefix(self._own) for name in self._tensors)
        return iter(dict.fromkeys(name for name in names if not _OF_LAYER.fullmatch(name)))

    def __len__(self) -> int:
        return len(list(iter(self)))


def listed(names: Mapping[str, Tensor]) -> str:
    """Some of the names, for a message."""
    known = list(names)
    more = f" and {len(known) - _FEW} more" if len(known) > _FEW else ""
    return (", ".join(known[:_FEW]) or "nothing") + more
