"""`doctor`: whether a run can start, before anything happens."""

from pathlib import Path

import click

from manifests.console import json_option, print_json, printable
from reshard.cli_options import folder_argument
from reshard.doctor import examine


@click.command()
@folder_argument("src")
@folder_argument("dst")
@json_option
def doctor(src: Path, dst: Path, as_json: bool) -> None:
    """Say whether a run from SRC into DST can start, what it needs, and how long it will take.

    \b
    Example:
      reshard doctor DeepSeek-V3 DeepSeek-V3-experts

    It tries out DST's file system in a folder that it removes again. Exit code 0 when a run can start, else that of
    the first problem, which the run would end with too.
    """
    report = examine(src, dst)
    if as_json:
        print_json(report.to_document())
    else:
        for line in report.lines():
            click.echo(printable(line))
    if report.exit_code:
        raise click.exceptions.Exit(report.exit_code)
