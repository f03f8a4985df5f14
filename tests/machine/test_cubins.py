"""Binaries for a deployment: what is written, what the loader makes of a call, and what the driver is told."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.crosscompile

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import spdsl  # noqa: E402
from spdsl import targets  # noqa: E402
from spdsl.machine import cubins  # noqa: E402
from spdsl.machine.launches import Launch  # noqa: E402
from spdsl.machine.machine_code import _cuobjdump  # noqa: E402
from spdsl.machine.survey import survey  # noqa: E402
from spdsl.machine.tune import tensors_of  # noqa: E402
from tests.library import launches as launching_of  # noqa: E402
from tests.library import tables  # noqa: E402

PATTERN = """
pattern deployed {
    param  window = 64
    heads  query = 4, kv = 2
    dim    qk = 32, v = 32
    causal
    return attend(sliding(window))
}
"""
H200 = targets.find("h200")
LAUNCHES = 7  # of each phase rows, lengths and attention; in a step the merge of the splits, too
Call = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return spdsl.load(PATTERN)


@pytest.fixture(scope="module")
def launches(module: ModuleType) -> list[Launch]:
    return [x for x in survey(module, target=H200) if x.workload is not None and x.workload.phase != "train"]


@pytest.fixture(scope="module")
def folder(launches: list[Launch], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("binaries") / "new"
    cubins.write(folder, [(launch, H200) for launch in launches])
    return folder


@pytest.fixture(scope="module")
def loader(folder: Path) -> Iterator[ModuleType]:
    """The file that was written, not the one of the package."""
    spec = importlib.util.spec_from_file_location("written_cubin_loader", folder / "cubin_loader.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["written_cubin_loader"] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules["written_cubin_loader"]


@pytest.fixture(scope="module")
def calls(module: ModuleType) -> list[Call]:
    """What the module really passes to `rt.launch`, tensors and all."""
    found: list[Call] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        found.append((kernel, grid, args, named))

    with tables(H200.architecture, H200.sm_count), module.rt.launching(note):
        for tokens, step in ((256, module.prefill), (1, module.decode)):
            inputs = module.example_inputs(2, tokens, dtype=torch.bfloat16)
            step(**inputs, cache=module.Cache(2, 4096, dtype=torch.bfloat16))
    return found


def launch_of(module: ModuleType) -> Callable[..., None]:
    """What starts a kernel within a call of the module."""
    found: Callable[..., None] = module.MODULE.entry(module.rt.launch)
    return found


def manifest(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "manifest.json").read_text())["kernels"])


def test_manifest_describes_the_files(folder: Path, launches: list[Launch]) -> None:
    entries = manifest(folder)
    assert len(entries) == len(launches) == LAUNCHES
    for entry in entries:
        assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        assert re.fullmatch(r"\w+_sm_90_[0-9a-f]{16}\.cubin", entry["file"])
        assert entry["threads"] == 32 * entry["options"]["num_warps"]
    assert {path.name for path in folder.iterdir() if path.is_file()} == {x["file"] for x in entries} | {
        "manifest.json",
        "cubin_loader.py",
    }


def test_the_loader_needs_torch_alone(folder: Path) -> None:
    text = (folder / "cubin_loader.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported <= {
        "__future__",
        "ctypes",
        "hashlib",
        "inspect",
        "json",
        "collections",
        "warnings",
        "pathlib",
        "types",
        "typing",
        "torch",
    }


def test_every_call_finds_its_binary(folder: Path, loader: ModuleType, calls: list[Call]) -> None:
    known = {entry["key"] for entry in manifest(folder)}
    keys = [key_of(loader, call) for call in calls]
    assert len(keys) == LAUNCHES
    assert set(keys) == known


def key_of(loader: ModuleType, call: Call) -> str:
    kernel, _, args, named = call
    options = {name: named[name] for name in ("num_warps", "num_stages")}
    constexprs = {name: value for name, value in named.items() if name not in options}
    leaves = [loader.specialised(leaf) for leaf in loader.leaves_of(kernel, args, constexprs)]
    return str(loader.key_of(kernel.__name__, leaves, **options))


def test_parameters_are_those_of_the_binary(folder: Path, loader: ModuleType, calls: list[Call]) -> None:
    """Number, sizes and order, from the binary's own table of parameters (EIATTR_KPARAM_INFO)."""
    entries = {entry["key"]: entry for entry in manifest(folder)}
    for call in calls:
        kernel, _, args, named = call
        constexprs = {name: value for name, value in named.items() if name not in ("num_warps", "num_stages")}
        values = loader.packed(list(loader.leaves_of(kernel, args, constexprs)))
        text = _cuobjdump("-elf", folder / entries[key_of(loader, call)]["file"])
        found = re.findall(r"Ordinal : 0x(\w+)\s+Offset  : 0x(\w+)\s+Size    : 0x(\w+)", text)
        wanted = sorted({(int(number, 16), int(size, 16)) for number, _, size in found})
        assert [(number, loader.ctypes.sizeof(value)) for number, value in enumerate(values)] == wanted


class Library:
    """A CUDA driver that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.told.append((name, args)) or 0


class Nowhere:
    """In place of torch.cuda on a machine without a GPU."""

    def __init__(self, *_: object) -> None:
        self.cuda_stream = 7

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def no_gpu(loader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.torch.cuda, "device", Nowhere)
    monkeypatch.setattr(loader.torch.cuda, "current_stream", Nowhere)
    monkeypatch.setattr(loader.torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.mark.usefixtures("no_gpu")
def test_what_the_driver_is_told(folder: Path, loader: ModuleType, module: ModuleType, calls: list[Call]) -> None:
    library, before, launch = Library(), module.MODULE.start, launch_of(module)
    running = loader.install(module, folder, strict=True, library=library)
    try:
        for kernel, grid, args, named in [*calls, calls[0]]:
            launch(kernel, grid, *args, **named)
        launch(calls[0][0], (0, 1, 1), *calls[0][2], **calls[0][3])  # an empty grid is no launch
    finally:
        running.remove()
    assert module.MODULE.start is before
    names = [name for name, _ in library.told if name != "cuFuncSetAttribute"]
    assert names == LAUNCHES * ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"] + ["cuLaunchKernel"]
    entries = {entry["key"]: entry for entry in manifest(folder)}
    started = [args for name, args in library.told if name == "cuLaunchKernel"]
    for call, told in zip([*calls, calls[0]], started, strict=True):
        entry = entries[key_of(loader, call)]
        assert told[1:4] == (*call[1], 1, 1)[:3]
        assert told[4:8] == (entry["threads"], 1, 1, entry["shared"])
        assert told[8].value == 7
    asked = [args[1:] for name, args in library.told if name == "cuFuncSetAttribute"]
    assert asked == [(8, entry["shared"]) for entry in entries.values() if entry["shared"] > 49152]


@pytest.mark.usefixtures("no_gpu")
def test_another_launch_is_refused_or_compiled(
    folder: Path, loader: ModuleType, module: ModuleType, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(module.MODULE, "start", lambda kernel, *_, **__: compiled.append(kernel.__name__))
    kernel, grid, args, named = calls[0]
    other = {**named, "num_warps": 2}
    for strict in (True, False):
        running = loader.install(module, folder, strict=strict, library=Library())
        try:
            if strict:
                with pytest.raises(LookupError, match="no binary for sm_90 and append_rows"):
                    launch_of(module)(kernel, grid, *args, **other)
            else:
                launch_of(module)(kernel, grid, *args, **other)
        finally:
            running.remove()
    assert compiled == ["append_rows"]


@pytest.mark.usefixtures("no_gpu")
def test_a_changed_binary_is_refused(
    folder: Path, loader: ModuleType, module: ModuleType, calls: list[Call], tmp_path: Path
) -> None:
    for path in filter(Path.is_file, folder.iterdir()):  # a loader that was imported may have left __pycache__
        (tmp_path / path.name).write_bytes(path.read_bytes() + (b"x" if path.suffix == ".cubin" else b""))
    running = loader.install(module, tmp_path, strict=True, library=Library())
    try:
        with pytest.raises(RuntimeError, match="is not the file that manifest"):
            launch_of(module)(calls[0][0], calls[0][1], *calls[0][2], **calls[0][3])
    finally:
        running.remove()


OTHERS = {
    "parameters": (PATTERN, {"window": 32}, "params is {'window': 32}, theirs {'window': 64}"),
    "text": (PATTERN.replace("causal", "causal  # the same kernels"), {}, "text is [0-9a-f]{64}, theirs"),
    "pattern": (PATTERN.replace("deployed", "renamed"), {}, "pattern is renamed, theirs deployed"),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("other", OTHERS)
def test_binaries_of_another_module_are_refused_or_compiled(
    folder: Path, loader: ModuleType, calls: list[Call], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, params, message = OTHERS[other]
    module = spdsl.load(text, **params)
    compiled: list[str] = []
    monkeypatch.setattr(module.MODULE, "start", lambda kernel, *_, **__: compiled.append(kernel.__name__))
    with pytest.raises(LookupError, match=message):
        loader.install(module, folder, strict=True, library=Library())
    with pytest.warns(UserWarning, match=message):
        running = loader.install(module, folder, library=Library())
    try:
        kernel, grid, args, named = calls[0]
        launch_of(module)(kernel, grid, *args, **named)
    finally:
        running.remove()
    assert compiled == ["append_rows"]


def test_binaries_of_another_library_are_refused(
    folder: Path, loader: ModuleType, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels are in all modules; their digest says which."""
    monkeypatch.setattr(module.MODULE, "digest", "0" * 64)
    with pytest.raises(LookupError, match=r"digest is 0{64}, theirs [0-9a-f]{64}"):
        loader.install(module, folder, strict=True, library=Library())


@pytest.mark.parametrize("missing", ["module", "triton", None])
def test_binaries_of_another_runtime_are_refused(
    folder: Path, loader: ModuleType, module: ModuleType, tmp_path: Path, missing: str | None
) -> None:
    told = json.loads((folder / "manifest.json").read_text())
    told = {name: value for name, value in told.items() if name != missing} if missing else {**told, "triton": "3.0.0"}
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    message = "manifest.json does not say the" if missing else r"triton is [\d.]+, theirs 3.0.0"
    with pytest.raises(LookupError, match=message):
        loader.install(module, tmp_path, strict=True, library=Library())


def test_a_module_imported_from_its_file_has_its_binaries(
    folder: Path, loader: ModuleType, module: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "deployed.py"
    path.write_text(spdsl.compile(PATTERN).text)
    spec = importlib.util.spec_from_file_location("deployed", path)
    assert spec is not None
    assert spec.loader is not None
    imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    assert imported.MODULE.namespace != module.MODULE.namespace
    loader.install(imported, str(folder), strict=True, library=Library()).remove()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"module": json}, "module: expected one that spdsl made, got json"),
        ({"module": None}, "module: expected one that spdsl made"),
        ({"folder": 3}, "folder: expected a path, got int"),
        ({"strict": "no"}, "strict: expected True or False, got str"),
    ],
)
def test_arguments_of_install(
    folder: Path, loader: ModuleType, module: ModuleType, changes: dict[str, Any], message: str
) -> None:
    before = module.MODULE.start
    with pytest.raises(TypeError, match=f"^{message}"):
        loader.install(**{"module": module, "folder": folder, "strict": True, **changes})
    assert module.MODULE.start is before


EVERY_OPERATOR = """
pattern every {
    causal
    index  = stream(heads = 1, value = none)
    asks   = query(heads = 2)
    rank   = dot(index, query = asks)
    means  = compress(8, by = mean)
    chosen = top_k(2, score = rank, unit = max(16), share = max(group), force = last(1))
    fine   = attend(chosen)
    return gate(fine, attend(sliding(9)), attend(means)), kl(mass(fine), rank, share = mean(group))
}
"""


@pytest.mark.parametrize("pattern", [PATTERN, EVERY_OPERATOR], ids=["one", "every"])
def test_all_kernels_of_a_module_are_started_as_it_says(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its library, and of a backward pass, which has a thread of its own on a GPU."""
    module = spdsl.load(pattern)
    launched, own = list[str](), list[str]()
    with module.rt.launching(lambda kernel, *_, **__: launched.append(kernel.__name__)):
        used(module)
    monkeypatch.setattr(launching_of(module), "KERNELS_ON_CPU", True)
    monkeypatch.setattr(module.MODULE, "start", lambda kernel, *_, **__: own.append(kernel.__name__))
    used(module)
    assert own == launched
    assert "row_delta" in own


def used(module: ModuleType) -> None:
    """Each phase once, the backward pass in a thread."""
    sizes = {"dtype": torch.bfloat16, "device": "cpu"}
    inputs = module.example_inputs(1, 40, **sizes)
    for x in inputs.values():
        if x.is_floating_point():
            x.requires_grad_()
    outputs = [x for x in tensors_of(module.attention(**inputs)) if x.requires_grad]
    backward = threading.Thread(target=torch.autograd.backward, args=(outputs, [torch.ones_like(x) for x in outputs]))
    backward.start()
    backward.join()


@pytest.mark.parametrize("pattern", [PATTERN, EVERY_OPERATOR], ids=["one", "every"])
def test_all_kernels_of_a_cache_are_started_as_the_module_says(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every public function that starts some, its methods too."""
    module = spdsl.load(pattern)
    launched, own = list[str](), list[str]()
    with module.rt.launching(lambda kernel, *_, **__: launched.append(kernel.__name__)):
        generated(module)
    monkeypatch.setattr(launching_of(module), "KERNELS_ON_CPU", True)
    monkeypatch.setattr(module.MODULE, "start", lambda kernel, *_, **__: own.append(kernel.__name__))
    generated(module)
    assert own == launched
    assert own.count("append_rows") == 3


def generated(module: ModuleType) -> None:
    """A prompt, a step, tokens without queries, and what is done to them."""
    inputs = module.example_inputs(1, 40, heads=4, kv_heads=2, qk_dim=32, v_dim=32, dtype=torch.bfloat16)
    cache = module.Cache(1, 100, kv_heads=2, qk_dim=32, v_dim=32, dtype=torch.bfloat16)
    module.prefill(**inputs, cache=cache)
    module.decode(**{name: x[:, :, :1] for name, x in inputs.items()}, cache=cache)
    cache.append(*[x for name, x in inputs.items() if name.startswith(("k", "v"))])
    cache.truncate(50)
    cache.select([0, 0])
    cache.reset([1])
    cache.import_states(cache.export_states())


def test_binaries_are_of_one_module(launches: list[Launch], tmp_path: Path) -> None:
    """Those of the library are of any module."""
    others = survey(spdsl.load(PATTERN, window=32), target=H200)
    both = [next(x for x in of_one if x.name == "attend_forward") for of_one in (launches, others)]
    with pytest.raises(ValueError, match="of one module, got launches of 2"):
        cubins.write(tmp_path / "both", [(launch, H200) for launch in both])
    assert not (tmp_path / "both").exists()


def test_an_error_of_the_driver_is_told(loader: ModuleType) -> None:
    class Broken:
        def cuModuleLoadData(self, *_: object) -> int:
            return 200

    with pytest.raises(RuntimeError, match="cuModuleLoadData failed: CUDA error 200"):
        loader.Driver(Broken()).load(b"", "kernel", 0)
