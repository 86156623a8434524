"""One file per verb of the command line: its flags, one call, what it prints."""
