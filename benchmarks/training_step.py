"""A LoRA training step of aimv2-large-patch14-224, with half of its patches hidden, and with transformers and peft.

Random weights in float32, adapters of rank 8 on every matrix of the blocks, gradient checkpointing, AdamW, a linear
head on the mean token. Each contender runs in a process of its own, in turn, on the CPU; the table shows the fastest
step by the clock and by the processor, which other work on the machine hardly changes, and the peak of memory.

    python -m benchmarks.training_step [--blocks 24] [--batch 4] [--rounds 3] [--steps 3]

Needs the extra `parity` and `pip install peft`; for the MLX side OpenBLAS, as benchmarks/README.md says.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np

CLASSES, RANK, LEARNING_RATE = 10, 8, 1e-4
WIDTH, INTERMEDIATE, HEADS, SIDE = 1024, 2816, 8, 224

whole_process = ExitStack()
"""What holds until a contender's process ends."""


def mlx_step(blocks: int, batch: int, *, half_hidden: bool = False) -> Callable[[], float]:
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_aimv2.backend import x86
    from mlx_aimv2.config import Aimv2VisionConfig
    from mlx_aimv2.learn import lora
    from mlx_aimv2.learn.classify.head import MeanHead
    from mlx_aimv2.learn.learner import Learner
    from mlx_aimv2.model import Aimv2VisionModel
    from mlx_aimv2.train.loop import Plan, Step

    mx.set_default_device(mx.cpu)
    whole_process.enter_context(x86.prepared())
    encoder = Aimv2VisionModel(Aimv2VisionConfig(WIDTH, INTERMEDIATE, blocks, HEADS, image_size=SIDE))
    mx.eval(encoder.parameters())
    lora.add_adapters(encoder, "lora", num_layers=blocks, rank=RANK)
    learner = Learner(encoder, MeanHead(WIDTH, CLASSES))
    pixels, labels = mx.array(images(batch)), mx.arange(batch) % CLASSES
    patches = mx.broadcast_to(mx.arange((SIDE // 14) ** 2), (batch, (SIDE // 14) ** 2))
    visible = patches[:, ::2] if half_hidden else None  # every second one

    def losses(learner: Learner, batch: mx.array, key: mx.array) -> dict[str, mx.array]:
        outputs = learner(batch, visible=visible, checkpoint=True)
        return {"loss": nn.losses.cross_entropy(outputs["logits"], labels, reduction="mean")}

    class Same:
        def __call__(self, number: int) -> tuple[mx.array, int]:
            return pixels, 0

        def close(self) -> None:
            pass

    plan = Plan(steps=1, learning_rate=LEARNING_RATE, weight_decay=0.05)
    step = Step(learner, losses, plan)
    return lambda: step(0, Same())[0]["loss"]


def torch_step(blocks: int, batch: int) -> Callable[[], float]:
    import peft
    import torch
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    config = Aimv2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=14,
        use_head=False,
    )
    encoder = Aimv2VisionModel._from_config(config, attn_implementation="sdpa")
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(encoder, peft.LoraConfig(r=RANK, lora_alpha=160, target_modules=targets))
    encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()
    head = torch.nn.Linear(WIDTH, CLASSES)
    trained = [p for p in adapted.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.05)
    pixels = torch.from_numpy(images(batch).transpose(0, 3, 1, 2).copy())
    labels = torch.arange(batch) % CLASSES

    def step() -> float:
        tokens = adapted(pixel_values=pixels).last_hidden_state
        loss = torch.nn.functional.cross_entropy(head(tokens.mean(dim=1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


CONTENDERS: dict[str, Callable[[int, int], Callable[[], float]]] = {
    "mlx-aimv2": mlx_step,
    "mlx-aimv2, half hidden": partial(mlx_step, half_hidden=True),
    "transformers + peft": torch_step,
}


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32)


def measured(name: str, blocks: int, batch: int, steps: int) -> dict[str, float]:
    """In this process: the fastest step after a first one, and the peak of memory in GB."""
    step = CONTENDERS[name](blocks, batch)
    step()
    seconds, processor = [], []
    for _ in range(steps):
        began, used = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": min(seconds), "processor": min(processor), "gigabytes": peak / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description="A LoRA training step beside transformers with peft.")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender, in turn")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one, arguments.blocks, arguments.batch, arguments.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("blocks", "batch", "steps")]
    for _ in range(arguments.rounds):
        for name in CONTENDERS:
            environment = dict(os.environ)
            if CONTENDERS[name] is torch_step:  # torch brings a BLAS of its own
                environment.pop("LD_PRELOAD", None)
            command = [sys.executable, __file__, "--one", name, *flags]
            run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{arguments.blocks} blocks, batch {arguments.batch}, load average {os.getloadavg()[0]:.1f}")
    print("| contender | step | processor seconds | peak memory |\n| --- | ---: | ---: | ---: |")
    best = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    own = best["mlx-aimv2"]
    for name, row in best.items():
        ratios = [f" ({own[key] / row[key]:.2f} of it)" if CONTENDERS[name] is torch_step else "" for key in row]
        if "hidden" in name:
            ratios = [f" ({row[key] / own[key]:.2f} times)" for key in row]
        cells = [f"{value:.2f}{unit}" for value, unit in zip(row.values(), (" s", " s", " GB"), strict=True)]
        print(f"| {name} | {' | '.join(cell + ratio for cell, ratio in zip(cells, ratios, strict=True))} |")
    print("In brackets: half hidden beside all patches, and mlx-aimv2 as a share of transformers + peft.")


if __name__ == "__main__":
    main()
