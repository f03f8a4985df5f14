"""All launches of generated modules, recorded on CPU tensors, and the report of a generated file."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.crosscompile

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from click.testing import CliRunner  # noqa: E402
from rich.console import Console  # noqa: E402

import spdsl  # noqa: E402
from spdsl import targets  # noqa: E402
from spdsl.cli import main  # noqa: E402
from spdsl.machine import module_report  # noqa: E402
from spdsl.machine.launches import Launch, Workload  # noqa: E402
from spdsl.machine.survey import survey  # noqa: E402
from spdsl.runtime.launch.launch import Paged, config_for, decode_config  # noqa: E402
from spdsl.runtime.tuning.configs import TABLES, lookup, table_dim, tables_for  # noqa: E402

WINDOW = "pattern {name} {{\n    causal\n{lines}    return attend(sliding(100))\n}}\n"


def window(folder: Path, name: str, lines: str = "") -> Path:
    path = folder / f"{name}.spat"
    path.write_text(WINDOW.format(name=name, lines=lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return load(tmp_path_factory.mktemp("survey"), "surveyed")


def load(folder: Path, name: str, lines: str = "") -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPDSL_CACHE_DIR", str(folder / "cache"))
        return spdsl.load(window(folder, name, lines))


def by_phase(launches: list[Launch]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for launch in launches:
        assert launch.workload is not None
        found.setdefault(launch.workload.phase, []).append(launch.name)
    return found


def test_phases(module: ModuleType) -> None:
    assert by_phase(survey(module, dims=((64, 64),))) == {
        "train": ["attend_forward", "row_delta", "attend_dq", "attend_dkdv"],
        "prefill": ["append_rows", "append_lengths", "attend_forward"],
        "decode": ["append_rows", "append_lengths", "attend_decode", "join_splits"],
    }


def test_only_the_phases_of_the_module(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PHASES", ("decode",))
    assert set(by_phase(survey(module, dims=((64, 64),)))) == {"decode"}


def test_workloads(module: ModuleType) -> None:
    launches = survey(module, ("bf16", "fp32"), ((64, 64), (64, 32)))
    forwards = [x for x in launches if x.name == "attend_forward" and x.workload and x.workload.phase == "train"]
    assert [x.workload for x in forwards] == [
        Workload("train", "bf16", 64, 64),
        Workload("train", "fp32", 64, 64),
        Workload("train", "bf16", 64, 32),
        Workload("train", "fp32", 64, 32),
    ]
    types = {name: leaf.type for _, name, leaf in forwards[1].leaves()}
    assert types["q.data"] == "*fp32"
    assert (forwards[2].constexprs["C.QK_DIM"], forwards[2].constexprs["C.V_DIM"]) == (64, 32)
    assert forwards[0].constexprs["kv.GROUP"] == 4
    assert len({x.key for x in launches}) == len(launches)


def test_strides_are_those_of_a_real_run(module: ModuleType) -> None:
    for launch in survey(module, dims=((64, 64),)):
        assert launch.workload is not None
        pointers = [leaf for _, _, leaf in launch.leaves() if leaf.type.startswith("*")]
        assert pointers
        assert all(leaf.divisible and leaf.within_2gb for leaf in pointers)
        if launch.workload.phase == "decode":
            continue  # the partial results of one split, which is what a CPU asks for, lie closer together
        strides = [leaf for _, name, leaf in launch.leaves() if name.endswith((".batch", ".head", ".token"))]
        assert all(leaf.divisible or leaf.value == 1 for leaf in strides)


def test_what_a_pattern_fixes(tmp_path: Path) -> None:
    module = load(tmp_path, "fixed", "    heads query = 4, kv = 4\n    dim   qk = 96, v = 48\n")
    launches = survey(module, dims=((64, 64), (128, 128)))
    assert {(x.workload.qk_dim, x.workload.v_dim) for x in launches if x.workload} == {(96, 48)}
    (forward, *_) = launches
    assert forward.constexprs["C.QK_DIM"] == 96
    assert forward.constexprs["kv.GROUP"] == 1


def test_tables_of_an_architecture(module: ModuleType) -> None:
    """The target decides tiles, the precision of fp32 dots and the splits; afterwards the module is as it was."""
    found = {}
    for name in ("sm_90", "gfx942"):
        target = targets.find(name)
        launches = {x.name: x.constexprs for x in survey(module, ("fp32",), ((64, 64),), target)}
        for kernel in ("forward", "dq", "dkdv"):
            config = lookup(kernel, target.architecture, 64, 4)
            chosen = launches[f"attend_{kernel}"]
            assert (chosen["C.BLOCK_M"], chosen["C.BLOCK_N"]) == (config.block_m, config.block_n)
        assert launches["attend_decode"]["C.SPLITS"] == 1  # 100 keys are not worth two programs
        found[name] = launches["attend_forward"]["C.PRECISION"]
    assert found == {"sm_90": "tf32x3", "gfx942": "ieee"}
    assert survey(module, ("fp32",), ((64, 64),))[0].constexprs["C.PRECISION"] == "tf32x3"


@pytest.mark.parametrize(
    "architecture, table",
    [("sm_75", "sm_80"), ("sm_89", "sm_80"), ("sm_103", "sm_100"), ("sm_120", "sm_80"), ("gfx950", "gfx942")],
)
def test_unknown_architectures(architecture: str, table: str) -> None:
    assert tables_for(architecture) is TABLES[table]


def test_bias_has_configurations_of_its_own() -> None:
    """Where the tables have one; else those without a bias."""
    plain, biased = (lookup(name, "sm_90", 128, 2) for name in ("dkdv", "dkdv_bias"))
    assert plain != biased
    assert lookup("dkdv_bias", "sm_90", 64, 2) == lookup("dkdv", "sm_90", 64, 2)
    assert lookup("forward_bias", "sm_90", 128, 2) == lookup("forward", "sm_90", 128, 2)


def test_small_tiles_take_fewer_warps() -> None:
    """A page of 16 keys has columns for two warps of mma, a second part of 16 columns has rows for one."""
    paged = {page: Paged(torch.zeros(1, 4).int(), page, 256) for page in (16, 64)}
    warps = {}
    for page, dim in ((64, 128), (16, 128), (64, 80)):
        q = torch.zeros(1, 8, 1, dim, dtype=torch.bfloat16)
        warps[page, dim] = decode_config(q, dim, 4, paged[page]).num_warps
    assert warps == {(64, 128): 4, (16, 128): 2, (64, 80): 1}


def test_gradients_of_keys_are_looked_up_by_both_dims() -> None:
    assert table_dim("dkdv_bias", 192, 128) == table_dim("units_dkdv_pairs", 160, 160) == 160
    assert table_dim("dq", 192, 128) == table_dim("units", 128, 192) == 192


def test_links_before_the_rows_take_stages() -> None:
    """A page table, or a list of blocks, costs one stage for every block loaded ahead; both cost two."""
    q, paged = torch.zeros(1, 8, 256, 64, dtype=torch.bfloat16), Paged(torch.zeros(1, 4).int(), 64, 256)
    direct = config_for("forward", q, 64)
    assert direct.num_stages == 3
    assert config_for("forward", q, 64, paged).num_stages == 5
    assert config_for("forward", q, 64, listed=True).num_stages == 5
    assert config_for("forward", q, 64, paged, listed=True).num_stages == 5


def test_unknown_dtype(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'bf17': known are bf16"):
        survey(module, ("bf17",))


def test_module_not_made_by_spdsl(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("PHASES = ()\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="has no MODULE and no example_inputs and no rt: not made by spdsl"):
        module_report.report(path)


def test_report_of_a_file(tmp_path: Path) -> None:
    source = window(tmp_path, "reported", "    dim qk = 64, v = 64\n")
    run = CliRunner().invoke(main, ["compile", str(source), "-o", str(tmp_path)])
    assert run.exit_code == 0, run.output
    screen = io.StringIO()
    Console(file=screen, width=200).print(module_report.report(tmp_path / "reported.py", ["h200", "mi300x"]))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in screen.getvalue().splitlines() if "│" in line]
    assert [row[0] for row in rows] == 2 * [
        *("attend_forward", "row_delta", "attend_dq", "attend_dkdv"),
        *("append_rows", "append_lengths", "attend_forward"),
        *("append_rows", "append_lengths", "attend_decode", "join_splits"),
    ]
    assert rows[0][1:3] == ["train bf16 64/64", "h200"]
    assert "wgmma" in rows[0][9]
    assert "mfma" in rows[11][9]
    assert all(int(row[5]) > 0 for row in rows)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = window(tmp_path, "commanded", "    dim qk = 64, v = 64\n")
    arguments = ["compile", str(source), "-o", str(tmp_path), "--report"]
    unknown = CliRunner().invoke(main, [*arguments, "--target", "h10"])
    assert unknown.exit_code == 2
    assert "did you mean h100" in unknown.output
    assert not (tmp_path / "commanded.py").exists()
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    path, *table = run.output.splitlines()
    assert path.endswith("commanded.py")
    assert max(map(len, table)) <= 80
    wide = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})
    assert "attend_dkdv │ train bf16 64/64 │ h100" in " ".join(wide.output.split())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert "no report: cross-compiling needs a process without TRITON_INTERPRET" in refused.output
