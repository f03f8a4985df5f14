"""The training example: losses fall, a resumed run is the same run, every pattern sees the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

import spdsl
from examples import train_lm
from examples.lm import checkpoint
from examples.lm.attention import Dense, Size, arguments, mean_weights
from examples.lm.data import Text, read_text
from examples.lm.model import LanguageModel
from examples.lm.run import Budget, Pace, Run

SIZE = Size(layers=1, query_heads=4, kv_heads=2, head_dim=16)
CPU = torch.device("cpu")
TWO_STREAMS = """
pattern two_streams {
    causal
    near = stream()
    far = stream()
    return gate(attend(near[sliding(8)]), attend(far))
}
"""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text() -> Text:
    return read_text(None, 65)


@pytest.fixture(scope="module")
def two_streams() -> Any:
    return spdsl.load(TWO_STREAMS)


def budget(text: Text, steps: int = 3) -> Budget:
    return Budget(steps=steps, length=64, batch=2, rate=3e-3, size=SIZE, text=text.digest, dtype="float32")


def run(tmp_path: Path, text: Text, module: Any = Dense, steps: int = 3) -> Run:
    return Run("some", module, 1, budget(text, steps), Pace(tmp_path, test_every=2, save_every=2, tests=2), CPU)


def weights(run: Run) -> list[torch.Tensor]:
    return [weight.detach() for weight in run.model.parameters()]


def test_the_loss_of_a_repeated_batch_falls(tmp_path: Path, text: Text, two_streams: Any) -> None:
    some = run(tmp_path, text, two_streams)
    batch = text.batch(1, 0, 2, 65)
    before = some.model.loss(batch).item()
    for _ in range(3):
        some.optimizer.zero_grad()
        some.model.loss(batch).backward()
        some.optimizer.step()
    assert some.model.loss(batch).item() < before - 0.1


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, text: Text, two_streams: Any) -> None:
    with Progress(disable=True) as progress:
        whole = run(tmp_path / "whole", text, two_streams, steps=5)
        whole.train(text, progress)
        cut = run(tmp_path / "cut", text, two_streams, steps=5)
        for _ in range(2):
            cut.step(text)
        cut.save()
        cut.step(text)  # lost: not in the checkpoint
        resumed = run(tmp_path / "cut", text, two_streams, steps=5)
        resumed.resume()
        assert resumed.history.step == 2
        resumed.train(text, progress)
    assert resumed.history.losses == whole.history.losses
    assert resumed.history.tests[5] == whole.history.tests[5]
    assert all(torch.equal(one, other) for one, other in zip(weights(resumed), weights(whole), strict=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, text: Text) -> None:
    run(tmp_path, text, steps=3).save()
    with pytest.raises(SystemExit, match="of another run: steps 3 there, 4 here"):
        run(tmp_path, text, steps=4).resume()


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.json"
    checkpoint.replace(file, b"old")
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.replace(file, b"new")
    assert file.read_bytes() == b"old"


def test_patterns_see_the_same_batches_and_begin_alike(tmp_path: Path, text: Text, two_streams: Any) -> None:
    seen: dict[str, list[torch.Tensor]] = {"dense": [], "two": []}
    models = {}
    for name, module in (("dense", Dense), ("two", two_streams)):
        one = run(tmp_path, text, module)
        one.model.embedding.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0]))
        models[name] = {key: weight.detach().clone() for key, weight in one.model.named_parameters()}
        for _ in range(3):
            one.step(text)
    assert len(seen["dense"]) == 3
    assert torch.equal(torch.stack(seen["dense"]), torch.stack(seen["two"]))
    assert not torch.equal(seen["dense"][0], seen["dense"][1])
    shared = models["dense"].keys() & models["two"].keys()
    assert {"embedding.weight", "layers.0.attention.project.q.weight", "layers.0.feed.up.weight"} <= shared
    assert all(torch.equal(models["dense"][key], models["two"][key]) for key in shared)


def test_batches_depend_on_seed_and_step(text: Text) -> None:
    first = text.batch(1, 0, 2, 65)
    assert first.shape == (2, 65)
    assert torch.equal(first, text.batch(1, 0, 2, 65))
    assert not torch.equal(first, text.batch(2, 0, 2, 65))


def test_a_module_says_what_it_takes(two_streams: Any) -> None:
    wanted = arguments(two_streams, SIZE)
    shown = [(one.name, one.heads, one.dim, one.rotated) for one in wanted.vectors]
    keys = [(f"k_{name}", 2, 16, True) for name in ("near", "far")]
    values = [(f"v_{name}", 2, 16, False) for name in ("near", "far")]
    assert sorted(shown) == sorted([("q", 4, 16, True), *keys, *values])
    assert (wanted.branches, wanted.weights) == (2, {})


def test_gates_begin_as_the_mean_of_the_branches(two_streams: Any) -> None:
    layer = LanguageModel(SIZE, two_streams, 0).layers[0].attention
    assert torch.allclose(layer.gate(torch.randn(3, SIZE.width)).sigmoid(), torch.tensor(0.5))


def test_compression_begins_as_the_mean() -> None:
    x = torch.randn(2, 4, 16)  # heads, tokens of a cell, dim
    shapes = {"k_up": (2, 4, 16, 5), "k_down": (2, 5, 16), "k_weight": (2, 4), "k_position": (2, 4, 16)}
    made = mean_weights(shapes)
    hidden = torch.nn.functional.gelu(torch.einsum("hwd,hwde->he", x + made["k_position"], made["k_up"]))
    assert torch.allclose(torch.einsum("he,hed->hd", hidden, made["k_down"]), x.mean(1), atol=1e-6)
    assert torch.allclose(torch.einsum("hwd,hw->hd", x + made["k_position"], made["k_weight"]), x.mean(1), atol=1e-6)


def test_tensors_over_tokens_are_refused() -> None:
    module = spdsl.load(train_lm.PATTERNS / "document.spat")
    with pytest.raises(ValueError, match=r"`doc`, int64 \[1, 128\], cannot be made from hidden states"):
        arguments(module, SIZE)
    with pytest.raises(SystemExit, match="`doc`, int64"):
        train_lm.main(["--pattern", "document"])


def test_the_command_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    story = tmp_path / "story.txt"
    story.write_text("All the world's a stage. " * 100, encoding="utf-8")
    words = "--compare dense,streaming_llm -D sinks=2 -D window=8 --seeds 0,1 --steps 2 --length 32 --batch 2 --tests 2"
    words += " --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --threads 1 --device cpu"
    given = [*words.split(), "--text", str(story), "--out", str(tmp_path)]
    train_lm.main(given)
    results = checkpoint.read_lines(tmp_path / "results.jsonl")
    found = sorted((line["name"], line["seed"]) for line in results)
    assert found == [(name, seed) for name in ("dense", "streaming_llm sinks=2 window=8") for seed in (0, 1)]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "ratio: to dense" in " ".join(capsys.readouterr().out.split())

    # A finished run has no steps left: its result stays.
    train_lm.main([*given, "--resume"])
    again = checkpoint.read_lines(tmp_path / "results.jsonl")
    assert [line["loss"] for line in again] == [line["loss"] for line in results]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no pattern sense: .*dense, alibi, "):
        train_lm.main(["--pattern", "sense", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="-D breadth: no parameter of streaming_llm"):
        train_lm.main(["--pattern", "streaming_llm", "-D", "breadth=3", "--out", str(tmp_path)])


def test_a_small_model_ignores_the_sizes_of_the_published_one(tmp_path: Path) -> None:
    file = tmp_path / "big.spat"
    file.write_text(
        "pattern big {\n    heads  query = 64, kv = 4\n    dim qk = 192, v = 128  # large\n    causal\n"
        "    return attend(all)\n}\n",
        encoding="utf-8",
    )
    (module,) = train_lm.load_patterns([str(file)], {}).values()
    assert [(one.heads, one.dim) for one in arguments(module, SIZE).vectors] == [(4, 16), (2, 16), (2, 16)]
    assert LanguageModel(SIZE, module, 0)(torch.zeros(1, 20, dtype=torch.long)).shape == (1, 20, 256)


def test_results_are_json_lines(tmp_path: Path, text: Text) -> None:
    some = run(tmp_path, text)
    with Progress(disable=True) as progress:
        some.train(text, progress)
    line = json.loads(json.dumps(some.result()))
    assert line["loss"] == some.history.tests[3]
    assert line["budget"]["size"] == {"layers": 1, "query_heads": 4, "kv_heads": 2, "head_dim": 16}
