"""The command line: `main` runs it, `output` prints its messages, each verb's file has its flags and a single call."""

from mlx_aimv2.cli.dispatch import convert_main, main, parser

__all__ = ["convert_main", "main", "parser"]
