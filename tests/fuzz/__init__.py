"""Broken and hostile inputs by the thousand: `python -m tests.fuzz`. Each must end well or in one clear line."""
