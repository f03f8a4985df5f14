"""argument_lines: the shapes of a module's arguments, for a docstring."""

from __future__ import annotations

import textwrap

from spdsl.codegen.module_text import ModuleText


def argument_lines(module: ModuleText) -> str:
    """The shapes of the arguments, for a docstring."""
    pattern = module.pattern
    q_heads, kv_heads = pattern.query_heads or "Hq", pattern.kv_heads or "Hkv"
    qk, v = pattern.qk_dim or "Dqk", pattern.v_dim or "Dv"
    lines = [f"{x.name} [B, {x.heads or q_heads}, N, {x.dim or qk}]" for x in module.queries]
    for x in module.streams:
        lines.append(f"{x.key_argument} [B, {x.heads or kv_heads}, M, {x.qk or qk}]")
        if x.value_argument:
            lines.append(f"{x.value_argument} [B, {x.heads or kv_heads}, M, {x.v or v}]")
    unread = module.unread("train") if "train" in module.phases else ()
    read = [x for x in module.tensors if x.name not in unread]
    lines += [f"{x.name} {x.dtype} [{', '.join(['B', *map(str, x.axes)])}]" for x in read]
    for given in (x for x in module.choices if x.name not in unread):
        heads = {"head": q_heads, "group": kv_heads, "all": 1}[given.share]
        if given.given:
            units = f"units of {given.unit} keys, -1 padded"
            lines.append(f"{given.name} int [B, {heads}, tiles of {given.rows} rows, most]: {units}")
    for listed in (x for x in module.lists if x.name not in unread):
        heads = {"head": q_heads, "group": kv_heads, "all": 1}[listed.share]
        units = f"units of {listed.unit} keys, -1 padded" if listed.unit > 1 else "keys, -1 padded"
        lines.append(f"{listed.name} int [B, {heads}, N, {listed.most or 'any'}]: {units}")
    lines += [f"{x.name} [{', '.join(map(str, x.axes))}]" for x in module.weights]
    lines += [f"gates [B, Hq, N, {module.gated}]"] if module.gated and "gates" not in unread else []
    for found in module.selected:
        heads = q_heads if found.choice.share == "head" else kv_heads
        units = f"units of {found.choice.unit} keys to use instead of the computed ones, -1 padded"
        tiles = "1" if found.choice.for_all else f"tiles of {found.choice.rows} rows"
        rows = tiles if found.choice.tiled else "N"
        lines.append(f"{found.name} int [B, {heads}, {rows}, any]: {units}")
    lines += [f"{', '.join(unread)}: not read here, may be left out"] if unread else []
    text = module.spelling.written("; ".join(lines) + ". -> out [B, Hq, N, Dv] in the dtype of q.")
    text = textwrap.fill(text, 110)
    return textwrap.indent(text, "    ")
