"""The command line: `main` runs it, `output` is what it says, and each verb has a file with its flags and one call."""
