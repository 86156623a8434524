"""Compares the time of `import mlx_aimv2` with that of importing the parts of MLX that it needs.

`python -m benchmarks.import_time`: alternating fresh processes, medians and their ratio.
"""

import statistics
import subprocess
import sys
import time

STATEMENTS = {"mlx": "import mlx.core, mlx.nn", "mlx_aimv2": "import mlx_aimv2"}
ROUNDS = 21


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(ROUNDS):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{STATEMENTS[name]:<26} {median * 1000:6.0f} ms (least {min(times[name]) * 1000:.0f})")
    print(f"ratio {medians['mlx_aimv2'] / medians['mlx']:.2f} of the medians of {ROUNDS} runs each")


if __name__ == "__main__":
    main()
