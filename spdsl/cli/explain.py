"""`spdsl explain`"""

from __future__ import annotations

import click


@click.command("explain")
@click.argument("code")
def explain_code(code: str) -> None:
    """Explains a code such as E004, with an example and its fixed form."""
    from spdsl.catalogue import entries, explain

    try:
        entry = explain(code)
    except KeyError:
        raise click.UsageError(f"there is no code `{code}`; the codes are {', '.join(entries())}") from None
    times = f" (this text {entry.repeated} times)" if entry.repeated > 1 else ""
    click.echo(f"{entry.code}: {entry.title} ({entry.name})\n\n{entry.text.strip()}\n")
    click.echo(f"Wrong{times}:\n\n{_indented(entry.bad)}\n\nRight:\n\n{_indented(entry.fixed)}")


def _indented(text: str) -> str:
    visible = text.strip("\n").replace("\0", "<NUL>").replace("\u202e", "<U+202E>")
    return "\n".join(f"    {line}".rstrip() for line in visible.split("\n"))
