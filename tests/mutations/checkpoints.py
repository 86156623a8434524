"""Faults in reading, quantizing and converting checkpoints, and in indexes of their embeddings."""

from tests.mutations import Mutation

LAYOUTS, QUANTIZE, LOADING = "mlx_aimv2/checkpoint/layouts.py", "mlx_aimv2/quantize.py", "mlx_aimv2/loading.py"
DETECT, SAFE_WRITE = "mlx_aimv2/checkpoint/detect.py", "mlx_aimv2/safe_write.py"
UPDATE, READER, NEAREST = "mlx_aimv2/embed/update.py", "mlx_aimv2/index/reader.py", "mlx_aimv2/index/nearest.py"

NAMES, BITS, LOAD = ("tests/checkpoint/test_layouts.py",), ("tests/test_quantize.py",), ("tests/test_loading.py",)
UPDATES, SEARCH, POOLS = (
    ("tests/embed/test_update.py",),
    ("tests/index/test_nearest.py",),
    ("tests/embed/test_pooling.py",),
)

CHECKPOINTS = (
    Mutation(
        "keys and values are swapped in the transformers layout",
        LAYOUTS,
        '"attention.k_proj.weight", "attention.v_proj.weight")',
        '"attention.v_proj.weight", "attention.k_proj.weight")',
        NAMES,
    ),
    Mutation(
        "gate and up are swapped in Apple's layout",
        LAYOUTS,
        "_DRAFT_NAMES = {",
        '_BLOCK = tuple((row[0], {"mlp.fc1.weight": "mlp.fc3.weight", "mlp.fc3.weight": "mlp.fc1.weight"}'
        ".get(row[1], row[1]), *row[2:]) for row in _BLOCK)\n_DRAFT_NAMES = {",
        NAMES,
    ),
    Mutation(
        "height and width of the patch convolution are swapped when it is read",
        LAYOUTS,
        "lambda x: x.transpose(0, 2, 3, 1)",
        "lambda x: x.transpose(0, 3, 2, 1)",
        NAMES,
    ),
    Mutation(
        "height and width of the patch convolution are swapped when it is exported",
        LAYOUTS,
        "lambda x: x.transpose(0, 3, 1, 2)",
        "lambda x: x.transpose(0, 3, 2, 1)",
        NAMES,
    ),
    Mutation(
        "the convolution of Apple's MLX layout is transposed too",
        LAYOUTS,
        '_APPLE_MLX = {"pos_embed": BATCHED}',
        '_APPLE_MLX = {PATCH_CONV: OIHW, "pos_embed": BATCHED}',
        NAMES,
    ),
    Mutation(
        "a tensor that the model has not is accepted",
        DETECT,
        "if extra := set(inside) - shared:",
        "if extra := shared - set(inside):",
        LOAD,
    ),
    Mutation(
        "a tensor of another shape is accepted",
        DETECT,
        "if tuple(wanted[name]) != tuple(inside[name]):",
        "if len(wanted[name]) != len(inside[name]):",
        LOAD,
    ),
    Mutation(
        "a tensor keeps a dtype of its own",
        LOADING,
        "            array = array.astype(dtype)\n",
        "            pass\n",
        LOAD,
    ),
    Mutation(
        "the bits asked for are ignored",
        QUANTIZE,
        '"bits": known.bits[0] if bits is None else bits,',
        '"bits": known.bits[0],',
        BITS,
    ),
    Mutation(
        "the group size asked for is ignored",
        QUANTIZE,
        '"group_size": known.group_sizes[0] if group_size is None else group_size,',
        '"group_size": known.group_sizes[0],',
        BITS,
    ),
    Mutation(
        "scales stay in float32",
        QUANTIZE,
        "part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part",
        "part",
        BITS,
    ),
    Mutation(
        "a recipe gives its higher bits to the blocks between",
        QUANTIZE,
        "return not inside and name in",
        "return inside and name in",
        BITS,
    ),
    Mutation(
        "the projection of images is quantized",
        QUANTIZE,
        'STAY_DENSE = ("head", "visual_projection", ',
        'STAY_DENSE = ("head", ',
        BITS,
    ),
    Mutation(
        "the report on fidelity compares the source with itself",
        "mlx_aimv2/conversion/fidelity.py",
        "return report(reference, run_blockwise(other, images, name=name), images)",
        "return report(reference, reference, images)",
        ("tests/conversion/test_fidelity.py",),
    ),
    Mutation(
        "the reference of the report runs in the checkpoint's dtype",
        "mlx_aimv2/conversion/fidelity.py",
        'revision=revision, dtype="float32", inside=True)',
        "revision=revision, inside=True)",
        ("tests/conversion/test_fidelity.py",),
    ),
    Mutation(
        "a folder that is not complete gets its name",
        SAFE_WRITE,
        "        yield folder\n        for file",
        "        try:\n            yield folder\n        except BaseException:\n            folder.rename(path)\n"
        "            raise\n        for file",
        ("tests/test_whole_or_nothing.py::test_an_error_in_a_block_leaves_nothing",),
    ),
    Mutation(
        "a folder of others is overwritten",
        SAFE_WRITE,
        "if path.is_symlink() or not path.is_dir() or not is_own(path):",
        "if path.is_symlink() or not path.is_dir():",
        ("tests/test_safe_write.py",),
    ),
    Mutation(
        "a shard of weights is closed after it has passed its size",
        "mlx_aimv2/conversion/folder.py",
        "held + array.nbytes > shard_bytes",
        "held > shard_bytes",
        ("tests/conversion/test_folder.py",),
    ),
    Mutation(
        "layers are counted one too low by embed",
        "mlx_aimv2/embed/pooling.py",
        "states[self.layer]",
        "states[self.layer - 1]",
        POOLS,
    ),
    Mutation(
        "rows and columns of a map are swapped",
        "mlx_aimv2/embed/pooling.py",
        "*vision.grid(pixels), -1)",
        "*vision.grid(pixels)[::-1], -1)",
        POOLS,
    ),
    Mutation(
        "the images of a batch get each other's vectors",
        "mlx_aimv2/embed/loader.py",
        "batches.append(_Batch(outputs, indices, shape))",
        "batches.append(_Batch(outputs, indices[::-1], shape))",
        ("tests/embed/test_encode.py",),
    ),
    Mutation(
        "an unchanged file is read again",
        UPDATE,
        "if stamp is not None and (about.st_size, about.st_mtime_ns) == (stamp.size, stamp.mtime_ns):",
        "if stamp is None and about is None:",
        UPDATES,
    ),
    Mutation(
        "a changed file of the same size counts as unchanged",
        UPDATE,
        "(about.st_size, about.st_mtime_ns) == (stamp.size, stamp.mtime_ns)",
        "about.st_size == stamp.size",
        UPDATES,
    ),
    Mutation(
        "images of other folders are forgotten",
        UPDATE,
        "if not is_under(path, folders) and path not in asked:",
        "if path is None:",
        ("tests/embed/test_update.py", "tests/embed/test_identity.py"),
    ),
    Mutation(
        "vectors are stored divided by the square of their length",
        "mlx_aimv2/index/writer.py",
        "vector / np.float32(length or 1.0)",
        "vector / np.float32(length**2 or 1.0)",
        ("tests/index/test_reader.py",),
    ),
    Mutation(
        "a query keeps its length",
        READER,
        "query = query / np.linalg.norm(query)",
        "query = query / 1.0",
        SEARCH,
    ),
    Mutation("the worst of the matches come first", READER, "sorted(found)[:k]]", "sorted(found)[::-1][:k]]", SEARCH),
    Mutation(
        "a search keeps one finalist too few",
        NEAREST,
        "np.flatnonzero(scores >= np.partition(best, -k)[-k] - np.float32(SLACK))",
        "np.flatnonzero(scores > np.partition(best, -k)[-k])",
        SEARCH,
    ),
    Mutation(
        "the rounded scores of a GPU choose the matches",
        NEAREST,
        "np.flatnonzero(scores >= np.partition(best, -k)[-k] - np.float32(SLACK))",
        "np.flatnonzero(scores >= np.partition(best, -k)[-k])",
        SEARCH,
    ),
    Mutation(
        "an index takes embeddings of another model",
        "mlx_aimv2/embed/job.py",
        "differences(self.index.provenance, description) if self.index is not None else ([], [])",
        "([], [])",
        ("tests/embed/test_job.py",),
    ),
    Mutation(
        "an index is searched with another model's vectors",
        "mlx_aimv2/embed/query.py",
        "refused, notes = differences(made, embedder.description)",
        "refused, notes = [], []",
        ("tests/embed/test_query.py",),
    ),
    Mutation(
        "other weights are not told by their values",
        "mlx_aimv2/embed/provenance.py",
        "len(one) == len(other) and np.allclose(one, other, rtol=TOLERANCE, atol=1e-6)",
        "len(one) == len(other)",
        ("tests/embed/test_provenance.py",),
    ),
)
