"""Are we as fast as transformers on torch, on this machine, with the same weights and the same pixels?

`python -m benchmarks.side_by_side [SIZE …] [--batch B …] [--dtype …] [--rounds N] [--runs N] [--cpu]`, with the extra
`parity` installed. Each contender runs in a process of its own, in turn, `rounds` times: what disturbs one disturbs the
other. The ratio is ours over torch's in each round, its median over the rounds; below 1 we are faster. The features of
both are compared. On a Mac torch runs on MPS, beside an NVIDIA GPU on CUDA, elsewhere and with --cpu on the CPU; there
our process multiplies with OpenBLAS where it is installed. The table is Markdown.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

CONTENDERS = ("mlx_aimv2", "transformers")
OPENBLAS = Path(f"/usr/lib/{platform.machine()}-linux-gnu/libopenblas.so.0")


def write_checkpoint(folder: Path, size: str) -> None:
    """Random weights of a released size as transformers lays them out, and pixels for the largest batch."""
    import mlx.core as mx

    from mlx_aimv2 import bench, export
    from mlx_aimv2 import folder as folders
    from mlx_aimv2.loading import build, parameter_shapes
    from mlx_aimv2.names import layout_for
    from mlx_aimv2.preprocessing import published
    from mlx_aimv2.processor import Aimv2Processor

    config = bench.released_config(size)
    ours = ((name, _random(name, shape)) for name, shape in sorted(parameter_shapes(build(config)).items()))
    folders.save_weights(folder, layout_for("transformers", pair=False).to_theirs(ours), metadata={"format": "pt"})
    folders.save_config(folder, export.config_for(config, "transformers") | {"torch_dtype": "float32"})
    Aimv2Processor(published(config.image_size)).save_to(folder)
    mx.clear_cache()


def _random(name: str, shape: tuple[int, ...]) -> "object":
    import mlx.core as mx

    if "norm" in name:
        return mx.random.uniform(0.5, 1.5, shape)
    return mx.random.normal(shape) * (0.02 if len(shape) < 2 else np.prod(shape[1:]) ** -0.5)


def pixels(folder: Path, batch: int) -> np.ndarray:
    """The same pictures for both, `(B, 3, H, W)`."""
    side = json.loads((folder / "config.json").read_text())["image_size"]
    return np.random.default_rng(0).normal(size=(batch, 3, side, side)).astype(np.float32)


def time_mlx_aimv2(folder: Path, batch: int, dtype: str, runs: int, cpu: bool) -> tuple[list[float], np.ndarray]:
    """Seconds of each run and the features, ours."""
    import time

    import mlx.core as mx

    from mlx_aimv2 import load

    if cpu:
        mx.set_default_device(mx.cpu)
    model, _ = load(folder, dtype=dtype)
    given = mx.array(pixels(folder, batch).transpose(0, 2, 3, 1)).astype(model.dtype)
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        features = model(given).last_hidden_state
        mx.eval(features)
        seconds.append(time.perf_counter() - began)
    return seconds[1:], np.array(features.astype(mx.float32))


def time_transformers(folder: Path, batch: int, dtype: str, runs: int, cpu: bool) -> tuple[list[float], np.ndarray]:
    """Seconds of each run and the features, transformers' with torch's fused attention."""
    import time

    import torch
    from transformers import Aimv2VisionModel

    device = "cpu"
    if not cpu:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    kind = getattr(torch, dtype)
    model = Aimv2VisionModel.from_pretrained(folder, dtype=kind, attn_implementation="sdpa").to(device).eval()
    given = torch.from_numpy(pixels(folder, batch)).to(device, kind)
    seconds = []
    with torch.inference_mode():
        for _ in range(runs + 1):
            began = time.perf_counter()
            features = model(given).last_hidden_state
            wait()
            seconds.append(time.perf_counter() - began)
    return seconds[1:], features.float().cpu().numpy()


def in_process(contender: str, folder: Path, batch: int, dtype: str, runs: int, cpu: bool) -> list[float]:
    """Runs one contender in a fresh process: seconds of each run."""
    environment = dict(os.environ)
    if contender == "mlx_aimv2" and OPENBLAS.exists():
        environment["LD_PRELOAD"] = str(OPENBLAS)
    command = [sys.executable, "-m", "benchmarks.side_by_side", "--contender", contender, "--folder", str(folder)]
    command += ["--batch", str(batch), "--dtype", dtype, "--runs", str(runs), *(["--cpu"] if cpu else [])]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{contender} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def compare(folder: Path, size: str, batch: int, dtype: str, arguments: argparse.Namespace) -> str:
    """One line of the table."""
    times = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name in CONTENDERS:
            times[name].append(in_process(name, folder, batch, dtype, arguments.runs, arguments.cpu))
        print(size, batch, dtype, {name: f"{min(rounds[-1]):.3f} s" for name, rounds in times.items()}, file=sys.stderr)
    medians = {name: [statistics.median(seconds) for seconds in rounds] for name, rounds in times.items()}
    ratios = [ours / theirs for ours, theirs in zip(*medians.values(), strict=True)]
    fastest = {name: min(map(min, rounds)) for name, rounds in times.items()}
    ours, theirs = (np.load(folder / f"{name}.npy") for name in CONTENDERS)
    cells = [size, dtype, batch, *(f"{statistics.median(medians[name]) * 1e3:.0f}" for name in CONTENDERS)]
    cells += [f"{statistics.median(ratios):.2f}", *(f"{fastest[name] * 1e3:.0f}" for name in CONTENDERS)]
    cells += [f"{fastest['mlx_aimv2'] / fastest['transformers']:.2f}"]
    cells += [f"{np.linalg.norm(ours - theirs) / np.linalg.norm(theirs):.1e}"]
    return f"| {' | '.join(map(str, cells))} |"


def machine() -> str:
    """Processor, cores and versions, for the line above the table."""
    from mlx_aimv2 import device

    on = device.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{on.chip} ({on.kind}), {os.cpu_count()} cores; mlx {device.mlx_build()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description="mlx_aimv2 and transformers on torch, side by side")
    parser.add_argument("sizes", nargs="*", default=["large-patch14-224"], metavar="SIZE")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        run = {"mlx_aimv2": time_mlx_aimv2, "transformers": time_transformers}[arguments.contender]
        seconds, features = run(arguments.folder, arguments.batch[0], arguments.dtype[0], arguments.runs, arguments.cpu)
        np.save(arguments.folder / f"{arguments.contender}.npy", features)
        print(json.dumps(seconds))
        return
    print(machine() + f"; {arguments.rounds} rounds of {arguments.runs} runs\n")
    print(
        "| model | dtype | pictures | ours, ms | torch, ms | ratio | our least | torch's least | ratio | difference |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as place:
            write_checkpoint(Path(place), size)
            for dtype in arguments.dtype:
                for batch in arguments.batch:
                    print(compare(Path(place), size, batch, dtype, arguments), flush=True)


if __name__ == "__main__":
    main()
