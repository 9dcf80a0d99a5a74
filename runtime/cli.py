"""The command line `iedit`. Heavy packages are imported inside the commands: `iedit --help` imports no torch."""

from __future__ import annotations

import click


@click.group()
def main() -> None:
    """Localised image editing with diffusion models."""
