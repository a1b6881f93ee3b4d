"""The `pop` command."""

from pop.cli.commands import main

__all__ = ["main"]
