"""Faults in the network, on both ways through its blocks, and in what goes into it: images and texts."""

from tests.mutations import Mutation

REFERENCE, OPERATIONS, SHARDS = (
    ("tests/test_reference.py",),
    ("tests/backend/test_x86_attention.py",),
    ("tests/backend/test_x86_shards.py",),
)
TRAINING, METAL = ("tests/backend/test_x86_training.py",), ("tests/backend/test_metal.py",)
DTYPE = ("tests/backend/test_dtype.py",)
LONG = ("tests/test_long_attention.py",)
OWN, LIT, MASK = ("tests/test_model.py",), ("tests/test_lit.py",), ("tests/test_patch_mask.py",)
PIXELS, SOURCES = ("tests/images/test_processor.py",), ("tests/images/test_image_sources.py",)
WORDS, LABELS = ("tests/test_tokenizer.py",), ("tests/test_zero_shot_classifier.py",)

NETWORK = (
    Mutation(
        "gate and up are swapped",
        "swiglu(self.gate(x), self.up(x))",
        "swiglu(self.up(x), self.gate(x))",
        SHARDS,
    ),
    Mutation(
        "gate and up are swapped on x86",
        "swiglu(block.mlp.gate(h), block.mlp.up(h),",
        "swiglu(block.mlp.up(h), block.mlp.gate(h),",
        REFERENCE,
    ),
    Mutation("queries and keys are swapped", "return q, k, v", "return k, q, v", REFERENCE),
    Mutation(
        "the norms have ten times the epsilon",
        "self.norm2 = nn.RMSNorm(hidden_size, eps)",
        "self.norm2 = nn.RMSNorm(hidden_size, 10 * eps)",
        REFERENCE,
    ),
    Mutation(
        "a residual takes a kernel of its own",
        "return mx.addmm(residual.flatten(0, -2), x.flatten(0, -2), layer.weight.T).reshape(residual.shape)",
        "return residual + layer(x)",
        METAL,
    ),
    Mutation(
        "the gradient of a weight is one matrix for each image",
        "return mx.addmm(residual.flatten(0, -2), x.flatten(0, -2), layer.weight.T).reshape(residual.shape)",
        "return mx.addmm(residual, x, layer.weight.T)",
        METAL,
    ),
    Mutation(
        "the bias of a layer is lost",
        'if not isinstance(layer, nn.Linear) or "bias" in layer:',
        "if not isinstance(layer, nn.Linear):",
        METAL,
    ),
    Mutation(
        "pixels are cast to the dtype that they have",
        "self.patch_embed(pixels.astype(self.dtype))",
        "self.patch_embed(mx.array(pixels, self.dtype))",
        METAL,
    ),
    Mutation(
        "each pass casts the positions of a native grid",
        "mx.array(layers.sincos_positions(rows, columns, self.config.hidden_size), x.dtype)",
        "mx.array(layers.sincos_positions(rows, columns, self.config.hidden_size)).astype(x.dtype)",
        METAL,
    ),
    Mutation(
        "each pass copies the patch kernel of Apple's layout",
        "        array = mx.contiguous(array)  #",
        "        pass  #",
        METAL,
    ),
    Mutation(
        "the reference of a conversion is rounded to TF32",
        'os.environ.setdefault(TF32, "0")',
        "pass",
        DTYPE,
    ),
    Mutation("TF32 counts as off where MLX may have read it as on", "if mx.get_peak_memory() == 0:", "if True:", DTYPE),
    Mutation(
        "an M4 is said to have TF32",
        "(self.family or FIRST_WITH_MATRIX_UNITS) >= FIRST_WITH_MATRIX_UNITS",
        "(self.family or FIRST_WITH_MATRIX_UNITS) >= FIRST_WITH_BFLOAT16",
        DTYPE,
    ),
    Mutation("a report does not say that TF32 may be on", 'found["tf32"] = may_use_tf32()', "pass", DTYPE),
    Mutation("an index and a head do not say that TF32 may be on", '"tf32": may_use_tf32(),', "", DTYPE),
    Mutation(
        "seven images of 336 pixels make a batch",
        "return 1 << max(1, BATCH_TOKENS // max(1, tokens)).bit_length() - 1",
        "return max(1, 4096 // max(1, tokens))",
        METAL,
    ),
    Mutation(
        "a block adds its feed-forward before the norm",
        "return self.mlp(self.norm2(x), residual=x)",
        "return self.norm2(self.mlp(x, residual=x))",
        SHARDS,
    ),
    Mutation(
        "the final norm of the vision encoder is left out",
        "        x = self.norm(x)\n        pooled = self.head(x) if",
        "        pooled = self.head(x) if",
        REFERENCE,
    ),
    Mutation(
        "the final norm of the text encoder is left out",
        "        x = self.norm(x)\n        pooled = x[mx.arange",
        "        pooled = x[mx.arange",
        LIT,
    ),
    Mutation(
        "rows and columns of the positions are swapped",
        "angles = (column[:, None] * omega, row[:, None] * omega)",
        "angles = (row[:, None] * omega, column[:, None] * omega)",
        OWN,
    ),
    Mutation(
        "rows and columns within a patch are swapped",
        "x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns",
        "x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, rows * columns",
        OWN,
    ),
    Mutation(
        "hidden states begin with the first block",
        "embedded = self.embed(pixels, patch_mask=patch_mask)\n        states = [embedded]",
        "embedded = self.embed(pixels, patch_mask=patch_mask)\n        states = []",
        REFERENCE,
    ),
    Mutation(
        "the patch mask is inverted",
        "mx.where(patch_mask, shape[1], 0)",
        "mx.where(patch_mask, 0, shape[1])",
        MASK,
    ),
    Mutation(
        "patches that stay visible lose their places",
        "return x if visible is None else mx.take_along_axis(x, visible[..., None], axis=1)",
        "return x if visible is None else x[:, : visible.shape[1]]",
        MASK,
    ),
    Mutation(
        "the pooling head does not scale its scores",
        "pooled = merge_heads(attention(q, k, v))",
        "pooled = merge_heads(attention(q * q.shape[-1] ** 0.5, k, v))",
        LIT,
    ),
    Mutation(
        "attention scales by the number of values, not by its root",
        "scale = queries.shape[-1] ** -0.5",
        "scale = queries.shape[-1] ** -1",
        OPERATIONS,
    ),
    Mutation("attention is never causal", '"causal" if causal else None\n    return', "None\n    return", OPERATIONS),
    Mutation(
        "the gradient of long attention ignores its mask",
        "scores = mx.where(mask[first:last].T, scores, -math.inf)",
        "pass",
        LONG,
    ),
    Mutation(
        "the gradient of long attention is never causal",
        "<= mx.arange(first, last), scores, -math.inf)",
        "<= keys.shape[0], scores, -math.inf)",
        LONG,
    ),
    Mutation(
        "the gradient of keys is not scaled", "of_keys + scale * (of_scores @ own)", "of_keys + of_scores @ own", LONG
    ),
    Mutation("training keeps the scores of many tokens", "self.training and x.shape[1] >= LONG", "False", LONG),
    Mutation("Metal is not forced to fuse", "mask=allowed, force_fused=True)", "mask=allowed)", LONG),
    Mutation(
        "the text encoder sees what follows",
        "run(self.blocks, embedded, causal=True)",
        "run(self.blocks, embedded, causal=False)",
        LIT,
    ),
    Mutation(
        "texts are pooled at their last end of text",
        "mx.argmax(ids == self.config.eos_token_id, axis=1)",
        "mx.argmax((ids == self.config.eos_token_id) * mx.arange(ids.shape[1]), axis=1)",
        LIT,
    ),
    Mutation(
        "the scale of the logits has no limit",
        "mx.exp(mx.clip(self.logit_scale.astype(mx.float32), 0.0, limit))",
        "mx.exp(self.logit_scale.astype(mx.float32))",
        LIT,
    ),
    Mutation(
        "the sum over tokens is held in half precision",
        "mean = tokens.astype(mx.float32).mean(axis=1)",
        "mean = tokens.mean(axis=1).astype(mx.float32)",
        OWN,
    ),
    Mutation(
        "vectors are divided by the lengths of the batch's columns",
        "mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)",
        "mx.maximum(mx.linalg.norm(x, axis=0, keepdims=True), 1e-12)",
        LIT,
    ),
    Mutation("one coefficient of the exponential is wrong", "0.0555071309", "0.0555971309", OPERATIONS),
    Mutation(
        "causal attention on x86 leaves out the token itself",
        "<= positions, scores",
        "< positions, scores",
        OPERATIONS,
    ),
    Mutation(
        "each chunk of queries on x86 begins at token 0",
        "first=first if causal else None",
        "first=0 if causal else None",
        OPERATIONS,
    ),
    Mutation(
        "attention on x86 ignores its mask",
        "scores = mx.where(mask, scores, -math.inf)",
        "scores = mx.where(mask, scores, scores)",
        ("tests/pretrain/test_objective.py",),
    ),
    Mutation(
        "the softmax on x86 overflows",
        "exp2(mx.maximum(scores - largest, -127))",
        "exp2(mx.maximum(scores, -127))",
        OPERATIONS,
    ),
    Mutation(
        "the gradient of SwiGLU is wrong",
        "(sigmoid + silu * (1 - sigmoid))",
        "(sigmoid + silu * sigmoid)",
        OPERATIONS,
    ),
    Mutation(
        "the gradient of cross-entropy on x86 forgets the target",
        "mx.take_along_axis(shares, targets, axis=-1) - grad",
        "mx.take_along_axis(shares, targets, axis=-1)",
        TRAINING,
    ),
    Mutation(
        "each core trains on the whole batch",
        "shards.run(work, *(shards.split(x) for x in arrays))",
        "shards.run(work, *([x] * len(shards.streams) for x in arrays))",
        TRAINING,
    ),
    Mutation(
        "moments do not lie in memory as the gradients do",
        'weights & {path, path.rpartition(".")[0]}',
        "weights & {path}",
        TRAINING,
    ),
    Mutation(
        "what a step frees goes back to the system",
        "mx.set_cache_limit(min(MOST_FREED, memory // 2))",
        "mx.set_cache_limit(x86.MLX_CACHE_LIMIT)",
        TRAINING,
    ),
    Mutation(
        "a shard is cut into shards",
        "if mx.default_stream(mx.cpu) in own:",
        "if mx.default_stream(mx.cpu) in []:",
        TRAINING,
    ),
    Mutation(
        "a shard attends to its own tokens alone",
        "if shards.axis == TOKENS:",
        "if shards.axis == IMAGES:",
        SHARDS,
    ),
    Mutation(
        "mean and standard deviation are swapped",
        "pixels = (pixels - mx.array(steps.image_mean)) / mx.array(steps.image_std)",
        "pixels = (pixels - mx.array(steps.image_std)) / mx.array(steps.image_mean)",
        PIXELS,
    ),
    Mutation(
        "levels on the device are not divided by the standard deviation",
        "(pixels - mx.array(steps.image_mean)) / mx.array(steps.image_std)",
        "pixels - mx.array(steps.image_mean)",
        ("tests/images/test_fast_decoding.py::test_levels_normalised_on_the_device_are_the_processors_pixels",),
    ),
    Mutation(
        "the crop is one pixel off",
        "(image.height - height) // 2, (image.width - width) // 2",
        "(image.height - height) // 2 + 1, (image.width - width) // 2",
        PIXELS,
    ),
    Mutation(
        "the longest edge is resized, not the shortest",
        "shortest = min(width, height)",
        "shortest = max(width, height)",
        PIXELS,
    ),
    Mutation(
        "colours are in the order blue, green, red",
        "        return np.asarray(image)\n",
        "        return np.asarray(image)[..., ::-1]\n",
        PIXELS,
    ),
    Mutation(
        "preprocessor_config.json's mean is passed over",
        '_three(fields["image_mean"], "image_mean", file)',
        "CLIP_MEAN",
        ("tests/images/test_preprocessing.py",),
    ),
    Mutation(
        "the orientation in EXIF is ignored",
        "upright = image.transpose(Image.Transpose[TURNS[orientation - 2]])",
        "upright = image.copy()",
        (f"{SOURCES[0]}::test_a_photograph_is_turned_upright_as_its_exif_tag_says",),
    ),
    Mutation(
        "a photograph is turned the other way",
        '"TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")',
        '"TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270")',
        (f"{SOURCES[0]}::test_a_photograph_is_turned_upright_as_its_exif_tag_says",),
    ),
    Mutation("what is transparent becomes black", "image.size, (255, 255, 255))", "image.size, (0, 0, 0))", SOURCES),
    Mutation(
        "a long text loses its end of text",
        "[self.bos, *encoding.ids[: self.context - 2], self.eos]",
        "[self.bos, *encoding.ids, self.eos][: self.context]",
        WORDS,
    ),
    Mutation("texts are filled with zeros", "self.eos, np.int32)", "0, np.int32)", WORDS),
    Mutation(
        "capitals count in a tokenizer made from vocab.json",
        "[normalizers.NFC(), normalizers.Lowercase()]",
        "[normalizers.NFC()]",
        (*WORDS, "tests/test_zero_shot_checkpoints.py::test_vocab_and_merges_serve_as_well_as_tokenizer_json"),
    ),
    Mutation(
        "templates are averaged before they have unit length",
        "np.array(unit_length(model.encode_text(mx.array(ids[rows, :length]))))",
        "np.array(model.encode_text(mx.array(ids[rows, :length])))",
        LABELS,
    ),
    Mutation(
        "templates and labels are confused",
        ".reshape(len(self.labels), len(self.templates), -1)",
        ".reshape(len(self.templates), len(self.labels), -1).swapaxes(0, 1)",
        LABELS,
    ),
    Mutation(
        "texts come back in the order of their lengths",
        "vectors[rows] = ",
        "vectors[start : start + len(rows)] = ",
        LABELS,
    ),
)
