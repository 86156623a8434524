"""The command line: `main` runs it, `output` is what it says, and each verb has a file with its flags and one call."""

from mlx_aimv2.cli.dispatch import convert_main, main, parser

__all__ = ["convert_main", "main", "parser"]
