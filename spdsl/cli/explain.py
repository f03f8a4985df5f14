"""`spdsl explain`"""

from __future__ import annotations

import click

_EPILOG = """\b
Example: spdsl explain E102"""


@click.command("explain", short_help="Explains the code of an error or warning.", epilog=_EPILOG)
@click.argument("code", required=False)
def explain_code(code: str | None) -> None:
    """Explains a code such as E004, with an example and its fixed form. Without CODE: all codes, a line each."""
    from spdsl.catalogue import entries, explain
    from spdsl.diagnostics import did_you_mean

    if code is None:
        for entry in entries().values():
            click.echo(f"{entry.code}  {entry.title}")
        return
    try:
        entry = explain(code)
    except KeyError:
        near = did_you_mean(code.upper(), entries())
        told = f"{near.text} `spdsl explain` lists them; " if near else ""
        raise click.UsageError(f"there is no code `{code}`; {told}the codes are {', '.join(entries())}") from None
    times = f" (this text {entry.repeated} times)" if entry.repeated > 1 else ""
    click.echo(f"{entry.code}: {entry.title} ({entry.name})\n\n{entry.text.strip()}\n")
    click.echo(f"Wrong{times}:\n\n{_indented(entry.bad)}\n\nRight:\n\n{_indented(entry.fixed)}")


def _indented(text: str) -> str:
    visible = text.strip("\n").replace("\0", "<NUL>").replace("\u202e", "<U+202E>")
    return "\n".join(f"    {line}".rstrip() for line in visible.split("\n"))
