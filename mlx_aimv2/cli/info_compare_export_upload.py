"""Verbs of a checkpoint: `info` prints what it contains (an index too), `compare` how far it is from its reference,
`export` writes its encoder for programs in Swift and C++, or for Core ML, `upload` publishes its folder on the Hub.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mlx_aimv2.checkpoint.hub import check_upload, file_sizes, is_in_cache, upload
from mlx_aimv2.checkpoint.read import WEIGHT_FILES, WEIGHT_SUFFIXES, is_hub_name, released_at
from mlx_aimv2.cli.flags import MODEL, REVISION, add_dtype, add_image_size, add_revision, groups, whole_numbers
from mlx_aimv2.cli.output import aligned, note, progress, show
from mlx_aimv2.config import (
    DTYPES,
    Aimv2Config,
    Aimv2TextConfig,
    Aimv2VisionConfig,
    AnyConfig,
    dtype_name,
    megabytes,
)
from mlx_aimv2.files import expand_user, read_start

DTYPE_BYTES = {"float32": 4, "float16 or bfloat16": 2}

SQLITE = b"SQLite format 3\0"

Facts = dict[str, Any]


def add_info(parser: argparse.ArgumentParser) -> None:
    add = groups(parser, "input", "output")
    add["input"]("target", metavar="INDEX|MODEL", help=f"index written by mlx-aimv2 embed; {MODEL}")
    add_revision(add["input"])
    add["output"]("--json", action="store_true", help="print the facts as JSON")


def run_info(arguments: argparse.Namespace) -> int:
    """Prints one fact per line; no weights of a checkpoint are read or downloaded."""
    facts = about(arguments.target, revision=arguments.revision)
    if arguments.json:
        print(json.dumps(facts))
        return 0
    if facts.get("layer", 0) is None:
        facts["layer"] = "last, after the final norm"
        facts.pop("norm", None)
    for name, value in facts.items():
        if name.startswith("memory"):
            facts[name] = "computed: " + ", ".join(f"{megabytes(count)} ({how})" for how, count in value.items())
    if "download" in facts:
        facts["download"] = megabytes(facts["download"])
    for line in aligned({name.replace("_", " "): _readable(value) for name, value in facts.items()}):
        show(line)
    return 0


def about(target: str, *, revision: str | None = None) -> Facts:
    """Facts by their names: `an index's path, a folder, a weight file or a Hub name -> dictionary for JSON`."""
    path = expand_user(target)
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is an empty file")
    if _is_database(path):
        return _about_index(path)
    known = released_at(target, revision)
    commit = known.commit if known is not None else revision
    if path.exists() or not is_hub_name(target) or is_in_cache(target, revision=commit):
        return _about_checkpoint(target, revision)
    facts: Facts = {"checkpoint": target, "commit": commit, "downloaded": False}
    if known is not None:  # no need to ask the Hub
        return facts | {"download": 4 * known.parameters} | _about_sizes(known.config, known.parameters)
    sizes = file_sizes(target, revision=revision)
    shards = sum(size for file, size in sizes.items() if file.endswith(WEIGHT_SUFFIXES))
    return facts | {"download": next((sizes[file] for file in WEIGHT_FILES if file in sizes), shards)}


def _about_index(path: Path) -> Facts:
    """What an index contains and how it was made."""
    from mlx_aimv2.index.reader import AXES, Index

    with Index.open(path) as index:
        made = index.provenance
        folders = {os.path.dirname(name) for name in index.paths()}  # noqa: PTH120 - a Path each would take longer
        return {
            "index": str(path),
            "images": len(index),
            "folders": len(folders),
            "holds": f"{AXES[index.axes]} for each image, width {index.width}, {index.dtype}",
            "bytes": path.stat().st_size,
            **made,
            "weights": weights.get("digest") if isinstance(weights := made.get("weights"), dict) else None,
        }


def _about_checkpoint(name: str, revision: str | None) -> Facts:
    """What a checkpoint contains, from its config.json and the headers of its weight files."""
    from mlx_aimv2.loading import read_source

    source = read_source(name, revision=revision)
    origin, parameters = source.origin, source.parameters
    dtypes = sorted({dtype_name(array.dtype) for array in source.weights.values()} & set(DTYPES))
    return {
        "checkpoint": origin.repo or str(origin.folder),
        "commit": origin.commit,
        "layout": source.layout,
        **_about_sizes(source.config, parameters),
        "bytes": source.stored_bytes,
        "bits_per_weight": round(8 * source.stored_bytes / parameters, 3),
        "dtype": ", ".join(dtypes),
        "quantization": dict(source.quantization) if source.quantization is not None else None,
    }


def _about_sizes(config: AnyConfig, parameters: int) -> Facts:
    """The sizes of a network and the memory it needs."""
    pair = config if isinstance(config, Aimv2Config) else None
    vision, text = config.vision, pair.text_config if pair else None
    text_only = {"vocabulary": text.vocab_size, "context": text.max_position_embeddings} if text else {}
    size = vision.image_size
    return {
        "encoders": "vision and text" if pair else "vision",
        "images": f"{size}x{size} pixels, {vision.num_patches} tokens" if size else "any size (native)",
        **_sizes(vision),
        "intermediate": vision.intermediate_size,
        "patch": vision.patch_size,
        "pooling_head": vision.use_head,
        "projection": pair.projection_dim if pair else None,
        "text": _sizes(text) | text_only if text else None,
        "parameters": parameters,
        **memory(config, parameters),
    }


def memory(config: AnyConfig, parameters: int) -> Facts:
    """Bytes that a pass and a training step need for one image, computed from the sizes: `-> {what: {how: bytes}}`.

    A pass holds the weights and 8 D + 6 F values for each of N tokens (D the width, F that of the MLP, L blocks, H
    heads). Packed weights of the blocks take their bits plus half a bit of scales (groups of 64), the others 16 bits. A
    step keeps L (12 D + 6 F + 5 H N) values per token; full tuning adds 20 bytes per parameter: weights, gradients,
    both moments and their new values, in float32. Peaks on MLX's CPU backend are within a factor of two.
    """
    vision = config.vision
    towers = (vision, config.text_config) if isinstance(config, Aimv2Config) else (vision,)
    width, inner = vision.hidden_size, vision.intermediate_size
    tokens = vision.num_patches or 256  # native checkpoints take any size; this assumes 224 pixels
    held = tokens * (8 * width + 6 * inner)
    kept = vision.num_hidden_layers * tokens * (12 * width + 6 * inner + 5 * vision.num_attention_heads * tokens)
    packed = sum(
        one.num_hidden_layers * one.hidden_size * (4 * one.hidden_size + 3 * one.intermediate_size) for one in towers
    )
    passes = {name: size * (parameters + held) for name, size in DTYPE_BYTES.items()}
    for bits in (8, 4):
        passes[f"{bits} bits"] = round(packed * (bits + 0.5) / 8) + 2 * (parameters - packed + held)
    steps = {"full, float32": 20 * parameters + 4 * kept}
    steps |= {f"lora, {name}": size * (parameters + kept) for name, size in DTYPE_BYTES.items()}
    return {"memory_of_a_pass": passes, "memory_of_a_training_step": steps}


def _sizes(config: Aimv2VisionConfig | Aimv2TextConfig) -> Facts:
    return {"width": config.hidden_size, "blocks": config.num_hidden_layers, "heads": config.num_attention_heads}


def _is_database(path: Path) -> bool:
    try:
        return read_start(path, max_bytes=len(SQLITE)) == SQLITE
    except (OSError, ValueError):  # a folder, or not there
        return False


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(part)}" for key, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " ".join(_readable(part) for part in value)
    return "-" if value is None else str(value)


def add_compare(parser: argparse.ArgumentParser) -> None:
    from mlx_aimv2.conversion.fidelity import MAX_IMAGES

    add = groups(parser, "input", "output")
    add["input"]("reference", metavar="REFERENCE", help=f"run in float32: {MODEL}")
    add["input"]("other", metavar="MODEL", help="the model to judge")
    add_dtype(add["input"])
    add_image_size(add["input"])
    words = f"compare on {MAX_IMAGES} images from this folder (default: four bundled photographs)"
    add["input"]("--images", metavar="DIR", help=words)
    words = f"of REFERENCE: {REVISION} (default: Apple's release, pinned)"
    add["input"]("--revision", metavar="NAME", help=words)
    add["output"]("--json", action="store_true", help="print everything as JSON, with the range of each block")


def run_compare(arguments: argparse.Namespace) -> int:
    """Prints the table."""
    from mlx_aimv2.conversion.fidelity import choose_images, compare, table

    images = choose_images(arguments.images)
    keywords = {name: getattr(arguments, name) for name in ("revision", "dtype", "image_size")}
    with progress() as on_progress:
        found = compare(arguments.reference, arguments.other, images=images, on_progress=on_progress, **keywords)
    if arguments.json:
        print(json.dumps(found, indent=4))
    else:
        for line in table(found).split("\n"):
            show(line)
    return 0


def add_export(parser: argparse.ArgumentParser) -> None:
    add = groups(parser, "model", "input", "output")
    words = f"{MODEL}, or a folder written by fit (for class probabilities)"
    add["model"]("-m", "--model", required=True, metavar="MODEL", help=words)
    add_revision(add["model"])
    add_dtype(add["model"], "the checkpoint's, float16 for Core ML")
    words = ".mlxfn only: float (normalised pixels) or uint8 (bytes, normalised inside) (default: float)"
    add["input"]("--input", choices=("float", "uint8"), metavar="NAME", help=words)
    words = "images or texts per call; one file can hold several (default: 1)"
    add["input"]("--batch", type=whole_numbers, default=(1,), metavar="N,N,…", help=words)
    add_image_size(add["input"], "the checkpoint's, native 224")
    words = "native checkpoints: rows and columns of patches"
    add["input"]("--grid", type=whole_numbers, metavar="R,C", help=words)
    words = "file to write: NAME.mlpackage for Core ML, NAME.mlxfn for this machine's device (for Metal, use a Mac)"
    add["output"]("-o", dest="path", type=expand_user, required=True, metavar="FILE", help=words)
    words = "image (one vector each), tokens, both or text (default: image)"
    add["output"]("--output", choices=("image", "tokens", "both", "text"), metavar="NAME", help=words)


def run_export(arguments: argparse.Namespace) -> int:
    """Exports and prints the path of the file."""
    from mlx_aimv2.export import export

    show(str(export(**{name: value for name, value in vars(arguments).items() if name != "verb"})))
    return 0


def add_upload(parser: argparse.ArgumentParser) -> None:
    add = groups(parser, "what goes where")["what goes where"]
    add("folder", type=expand_user, metavar="FOLDER", help="checkpoint written by convert, fuse or save")
    add("repo", metavar="OWNER/NAME", help="repository on the Hub, created if it does not exist")


def run_upload(arguments: argparse.Namespace) -> int:
    """Uploads the files of a checkpoint and prints the repository's address; other files are not uploaded."""
    from mlx_aimv2.conversion.folder import WRITTEN
    from mlx_aimv2.learn.head_folder import INFO_FILE
    from mlx_aimv2.loading import read_source

    folder: Path = arguments.folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder here: upload takes one written by convert, fuse or save")
    if (folder / INFO_FILE).is_file():  # it names its encoder by a path on this machine, and predict only reads folders
        raise ValueError(f"{folder} is a head: upload takes checkpoints; mlx-aimv2 fuse makes one from a tuned encoder")
    files = read_source(folder).origin.files
    others = [file.name for file in sorted(folder.iterdir()) if not any(map(file.match, WRITTEN))]
    if odd := [file.name for file in files if file.name in others]:
        raise ValueError(f"{folder} has its weights in {', '.join(odd)}: convert it first and upload the result")
    check_upload(arguments.repo)
    if others:
        note(f"not part of a checkpoint, so not uploaded: {', '.join(others)}")
    show(upload(folder, arguments.repo, patterns=WRITTEN))
    return 0
