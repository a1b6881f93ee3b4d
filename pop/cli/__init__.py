"""The `pop` command. May import every other package; no package imports this one."""

from pop.cli.commands import main

__all__ = ["main"]
