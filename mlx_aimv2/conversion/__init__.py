"""The steps of `convert`: the folder that is written, its bits, and the report on its fidelity."""
