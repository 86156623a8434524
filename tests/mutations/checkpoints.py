"""Faults in reading, quantizing and converting checkpoints, and in indexes of their embeddings."""

from tests.mutations import Mutation

EXPORT = "tests/export/test_export.py::test_"

NAMES, BITS, LOAD = ("tests/checkpoint/test_layouts.py",), ("tests/test_quantize.py",), ("tests/test_loading.py",)
UPDATES, SEARCH, POOLS = (
    ("tests/embed/test_update.py",),
    ("tests/index/test_nearest.py",),
    ("tests/embed/test_pooling.py",),
)

GPTQ = ("tests/conversion/test_gptq.py",)

BESIDE = "tests/checkpoint/test_hostile_checkpoints.py::test_"

SAVE, HUB = "tests/conversion/test_save.py::test_", "tests/checkpoint/test_hub.py::test_"
TOWERS, SIZES = "tests/checkpoint/test_read.py::test_", "tests/test_image_size.py::test_"
PIXELS = "tests/images/test_preprocessing.py::test_"

CHECKPOINTS = (
    Mutation(
        "layers with bits of their own are saved with those of the others",
        "return shared | dict.fromkeys(layers(model), False) | own",
        "return shared | dict.fromkeys(layers(model), False)",
        (SAVE + "a_quantized_model_comes_back_with_the_same_bits",),
    ),
    Mutation(
        "a resized encoder is saved with the preprocessing of its source",
        "        processor.save_to(place)\n        if isinstance(model, Aimv2Model)",
        "        if isinstance(model, Aimv2Model)",
        (SAVE + "what_was_loaded_comes_back",),
    ),
    Mutation(
        "weights of several dtypes are saved, which load makes one of",
        "if len(dtypes) > 1 or dtypes[0] not in DTYPES:",
        "if dtypes[0] not in DTYPES:",
        (SAVE + "what_cannot_come_back_is_refused_and_nothing_is_left",),
    ),
    Mutation(
        "a saved model forgets its licence",
        "copy_beside(place, source, BESIDE)",
        "pass",
        (SAVE + "licence_origin_and_tokenizer_go_along_and_a_source_that_is_gone_is_said",),
    ),
    Mutation(
        "a token that may only read converts for hours",
        '.get("role") == "read":',
        '.get("role") == "nobody":',
        (HUB + "only_a_repository_that_the_token_may_write_to_passes",),
    ),
    Mutation(
        "whoever the token is of may write anywhere",
        "if owner.casefold() not in map(str.casefold, owners):",
        "if not owner:",
        (HUB + "only_a_repository_that_the_token_may_write_to_passes",),
    ),
    Mutation(
        "an upload that breaks off does not say how to go on",
        "; {folder} is complete: resume with {command}",
        "",
        (HUB + "a_hub_that_breaks_down_in_an_upload_leaves_the_command_that_goes_on",),
    ),
    Mutation(
        "whatever lies in the folder is uploaded",
        "allow_patterns=list(patterns),\n                commit_message",
        "commit_message",
        (HUB + "a_folder_is_uploaded_whole_and_loads_from_there",),
    ),
    Mutation(
        "a keyword of transformers is a keyword that nobody knows",
        "for name in filter(KEYWORDS.__contains__, kwargs):",
        "for name in ():",
        ("tests/test_habits.py::test_a_habit_is_answered_by_one_line",),
    ),
    Mutation(
        "the rest of a larger model beside an encoder at its root is an error",
        "if match.prefix or not any(map(_LANGUAGE.search, names)):",
        "if True:",
        (f"{TOWERS}an_encoder_at_the_root_of_a_larger_model_is_taken_with_the_rest_counted_aloud",),
    ),
    Mutation(
        "the language model's sizes are taken for the encoder's",
        '"vocab_size" not in part or "patch_size" in part',
        "True",
        (f"{TOWERS}sizes_come_from_the_towers_section_or_its_tensors_never_from_the_language_model",),
    ),
    Mutation(
        "every shard of a larger model is opened",
        "if name.startswith(match.prefix) and name not in rest",
        "if name",
        (f"{TOWERS}of_a_larger_model_in_shards_only_those_with_the_encoder_are_opened",),
    ),
    Mutation(
        "a vision-language model's square is cut where its file gives the shortest edge",
        "if not size or (steps.final_size and not is_open):",
        "if True:",
        (f"{PIXELS}what_a_vision_language_models_code_does_counts_where_no_file_says_it",),
    ),
    Mutation(
        "an image processor that is not known is CLIP's",
        "if (defaults := PROCESSORS.get(kind)) is None:",
        "if (defaults := PROCESSORS.get(kind, CLIP_DEFAULTS)) is None:",
        (f"{PIXELS}settings_that_cannot_be_followed_are_refused",),
    ),
    Mutation(
        "timm's share is lost at another size",
        "return side * size // min(steps.final_size or (side,))",
        "return size",
        (f"{SIZES}the_processor_prepares_the_new_size_as_it_did_its_own",),
    ),
    Mutation(
        "a resized folder keeps the processor of the checkpoint's size",
        "if not (is_said := is_clips(folder, processor.preprocessing)):",
        "is_said = True\n    if False:",
        (f"{SIZES}convert_writes_the_resized_folder",),
    ),
    Mutation(
        "an index forgets at which size it was made",
        '"max_patches", "image_size")\n        kept',
        '"max_patches")\n        kept',
        (f"{SIZES}an_index_is_made_and_searched_at_the_size_asked_for",),
    ),
    Mutation(
        "compare runs the checkpoint at its own size",
        "read_source(other, image_size=image_size)",
        "read_source(other)",
        (f"{SIZES}compare_says_what_a_size_costs",),
    ),
    Mutation(
        "a moving average is taken for the weights where its name comes first",
        "key=lambda found: (found[0], not _EMA.search(found[3]))",
        "key=lambda found: found[0]",
        (f"{BESIDE}of_weights_and_their_moving_average_the_weights_are_taken_aloud",),
    ),
    Mutation(
        "of two encoders in one file the first one is taken",
        "if len(encoders) > 1:",
        "if len(encoders) > 9:",
        (f"{BESIDE}two_encoders_in_one_file_are_refused",),
    ),
    Mutation(
        "half of a character is text",
        "if _SURROGATE.search(text):",
        "if False:",
        ("tests/test_untrusted_json.py::test_what_nothing_could_hold_is_one_short_line",),
    ),
    Mutation(
        "every buffer is left out",
        'r"(^|\\.)(position_ids|num_batches_tracked)$"',
        'r"(^|\\.)(position_ids|num_batches_tracked|\\w*mean|\\w*mask)$"',
        (f"{BESIDE}a_buffer_that_means_nothing_is_left_out_aloud_and_any_other_refused",),
    ),
    Mutation(
        "keys and values are swapped in the transformers layout",
        '"attention.k_proj.weight", "attention.v_proj.weight")',
        '"attention.v_proj.weight", "attention.k_proj.weight")',
        NAMES,
    ),
    Mutation(
        "gate and up are swapped in Apple's layout",
        "_DRAFT_NAMES = {",
        '_BLOCK = tuple((row[0], {"mlp.fc1.weight": "mlp.fc3.weight", "mlp.fc3.weight": "mlp.fc1.weight"}'
        ".get(row[1], row[1]), *row[2:]) for row in _BLOCK)\n_DRAFT_NAMES = {",
        NAMES,
    ),
    Mutation(
        "height and width of the patch convolution are swapped when it is read",
        "lambda x: x.transpose(0, 2, 3, 1)",
        "lambda x: x.transpose(0, 3, 2, 1)",
        NAMES,
    ),
    Mutation(
        "height and width of the patch convolution are swapped when it is exported",
        "lambda x: x.transpose(0, 3, 1, 2)",
        "lambda x: x.transpose(0, 3, 2, 1)",
        NAMES,
    ),
    Mutation(
        "the convolution of Apple's MLX layout is transposed too",
        '_APPLE_MLX = {"pos_embed": BATCHED}',
        '_APPLE_MLX = {PATCH_CONV: OIHW, "pos_embed": BATCHED}',
        NAMES,
    ),
    Mutation(
        "a tensor that the model has not is accepted",
        "if extra := set(inside) - shared:",
        "if extra := shared - set(inside):",
        LOAD,
    ),
    Mutation(
        "a tensor of another shape is accepted",
        "if tuple(wanted[name]) != tuple(inside[name]):",
        "if len(wanted[name]) != len(inside[name]):",
        LOAD,
    ),
    Mutation(
        "a tensor keeps a dtype of its own",
        "            array = array.astype(dtype)\n",
        "            pass\n",
        LOAD,
    ),
    Mutation(
        "the bits asked for are ignored",
        '"bits": known["bits"][0] if bits is None else bits,',
        '"bits": known["bits"][0],',
        BITS,
    ),
    Mutation(
        "the group size asked for is ignored",
        '"group_size": known["group_size"][0] if group_size is None else group_size,',
        '"group_size": known["group_size"][0],',
        BITS,
    ),
    Mutation(
        "scales stay in float32",
        "part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part",
        "part",
        BITS,
    ),
    Mutation(
        "a recipe gives its higher bits to the blocks between",
        "return not inside and name in",
        "return inside and name in",
        BITS,
    ),
    Mutation(
        "the projection of images is quantized",
        'STAY_DENSE = ("head", "visual_projection", ',
        'STAY_DENSE = ("head", ',
        BITS,
    ),
    Mutation(
        "the errors of a column are not fed on inside its group",
        "block[i + 1 :] += factor[row, row + 1 : end, None] * errors[row]",
        "block[i + 1 :] += 0",
        GPTQ,
    ),
    Mutation(
        "the errors of a group are not fed on to the others",
        "due = factor[:start, start:end].T @ errors[:start]",
        "due = 0 * factor[:start, start:end].T @ errors[:start]",
        GPTQ,
    ),
    Mutation(
        "a group's scale is that of the weights before they were corrected",
        "mx.quantize(mx.array(expected.T),",
        "mx.quantize(mx.array(columns[start:end].T),",
        GPTQ,
    ),
    Mutation(
        "packed numbers have their high bits first",
        'axis=-1, bitorder="little")',
        'axis=-1, bitorder="big")',
        GPTQ,
    ),
    Mutation(
        "what judges a conversion calibrates it too",
        "[file for file in files if file not in set(judges)]",
        "[file for file in files]",
        GPTQ,
    ),
    Mutation(
        "the photograph that judges is among those that calibrate",
        "for file in bundled.photographs()[:-1]]",
        "for file in bundled.photographs()]",
        GPTQ,
    ),
    Mutation(
        "the token embedding has no more bits than the blocks",
        'max(settings["bits"], EMBEDDING_BITS)',
        'max(settings["bits"], 2)',
        GPTQ,
    ),
    Mutation(
        "an image is the nearest to itself",
        "np.fill_diagonal(scores, -np.inf)\n        found.append",
        "found.append",
        ("tests/conversion/test_fidelity.py",),
    ),
    Mutation(
        "a report computes halves in halves on a CPU",
        'computed = "float32" if dtype is None and slow_here(own)',
        'computed = "float32" if dtype is None and not slow_here(own)',
        ("tests/conversion/test_fidelity.py",),
    ),
    Mutation(
        "the report on fidelity compares the source with itself",
        "found = run_other(judged, images, run, dtype=dtype, on_progress=on_progress)",
        "found = run",
        ("tests/conversion/test_fidelity.py",),
    ),
    Mutation(
        "the reference of the report runs in the checkpoint's dtype",
        'run_blockwise(source, images, dtype="float32", inside=True, on_progress=on_progress)',
        "run_blockwise(source, images, inside=True)",
        ("tests/conversion/test_fidelity.py",),
    ),
    Mutation(
        "positions of another grid are interpolated without cubic weights",
        "resize((old, new), Image.Resampling.BICUBIC)",
        "resize((old, new), Image.Resampling.BILINEAR)",
        ("tests/test_image_size.py",),
    ),
    Mutation(
        "an image size that is asked for is ignored",
        "if self.image_size is not None and own.image_size is not None:",
        "if self.image_size == 0:",
        ("tests/test_image_size.py",),
    ),
    Mutation(
        "a conversion asks again what the name of its source means",
        "= run_reference(source.reopened(), images, on_progress=on_progress)",
        "= run_reference(read_source(hf_path, revision=revision), images)",
        ("tests/test_convert.py",),
    ),
    Mutation(
        "a folder that is not complete gets its name",
        "        yield folder\n        for file",
        "        try:\n            yield folder\n        except BaseException:\n            folder.rename(path)\n"
        "            raise\n        for file",
        ("tests/test_whole_or_nothing.py::test_an_error_in_a_block_leaves_nothing",),
    ),
    Mutation(
        "a folder of others is overwritten",
        "if path.is_symlink() or not path.is_dir() or not is_own(path):",
        "if path.is_symlink() or not path.is_dir():",
        ("tests/test_files.py",),
    ),
    Mutation(
        "a shard of weights is closed after it has passed its size",
        "held + array.nbytes > shard_bytes",
        "held > shard_bytes",
        ("tests/conversion/test_folder.py",),
    ),
    Mutation(
        "layers are counted one too low by embed",
        "states[self.layer]",
        "states[self.layer - 1]",
        POOLS,
    ),
    Mutation(
        "rows and columns of a map are swapped",
        "*vision.grid(pixels), -1)",
        "*vision.grid(pixels)[::-1], -1)",
        POOLS,
    ),
    Mutation(
        "the images of a batch get each other's vectors",
        "batches.append(_Batch(outputs, indices, shape))",
        "batches.append(_Batch(outputs, indices[::-1], shape))",
        ("tests/embed/test_encode.py",),
    ),
    Mutation(
        "an unchanged file is read again",
        "if stamp is not None and stamp.fits(about):",
        "if stamp is None and about is None:",
        UPDATES,
    ),
    Mutation(
        "a changed file of the same size counts as unchanged",
        "if ctime_ns is None or now[:2] != (size, mtime_ns):",
        "if ctime_ns is None or now[0] != size:",
        ("tests/test_files.py",),
    ),
    Mutation(
        "two files of one size and time of change may swap their names",
        "return now[2] == ctime_ns and (now[3] == inode or ctime_ns == mtime_ns)",
        "return True",
        ("tests/embed/test_identity.py",),
    ),
    Mutation(
        "a name that has become a link to another image keeps its old vector",
        "and identity(path, about) in reached()",
        "and identity(path, about) is None",
        ("tests/embed/test_identity.py",),
    ),
    Mutation(
        "an index of format 1 never learns what tells of a change",
        "if None not in (stamp.ctime_ns, stamp.taken):",
        "if True:",
        ("tests/embed/test_identity.py",),
    ),
    Mutation(
        "images of other folders are forgotten",
        "if not is_under(path, folders) and path not in asked and not is_other:",
        "if path is None:",
        ("tests/embed/test_update.py", "tests/embed/test_identity.py"),
    ),
    Mutation(
        "vectors are stored divided by the square of their length",
        "vector / np.float32(length or 1.0)",
        "vector / np.float32(length**2 or 1.0)",
        ("tests/index/test_reader.py",),
    ),
    Mutation(
        "a query keeps its length",
        "unit: NDArray[Any] = total / length",
        "unit: NDArray[Any] = total / 1.0",
        SEARCH,
    ),
    Mutation("the worst of the matches come first", "sorted(found)[:k]]", "sorted(found)[::-1][:k]]", SEARCH),
    Mutation(
        "a search keeps one finalist too few",
        "np.flatnonzero(scores >= np.partition(best, -k)[-k] - np.float32(SLACK))",
        "np.flatnonzero(scores > np.partition(best, -k)[-k])",
        SEARCH,
    ),
    Mutation(
        "the rounded scores of a GPU choose the matches",
        "np.flatnonzero(scores >= np.partition(best, -k)[-k] - np.float32(SLACK))",
        "np.flatnonzero(scores >= np.partition(best, -k)[-k])",
        SEARCH,
    ),
    Mutation(
        "an index takes embeddings of another model",
        "refused, notes = differences(self.index.provenance if self.index is not None else description, description)",
        "refused, notes = differences(description, description)",
        ("tests/embed/test_job.py",),
    ),
    Mutation(
        "an index is searched with another model's vectors",
        "refused, notes = differences(made, embedder.description)",
        "refused, notes = [], []",
        ("tests/embed/test_query.py",),
    ),
    Mutation(
        "other weights are not told by their values",
        "len(one) != len(another) or not np.allclose(one, another, rtol=TOLERANCE, atol=1e-6)",
        "len(one) != len(another)",
        ("tests/embed/test_provenance.py",),
    ),
    Mutation(
        "weights that changed since they were checked are taken",
        "if again._shapes == self._shapes:",
        "if again._shapes:",
        ("tests/test_convert.py",),
    ),
    Mutation(
        "a copy is made before the move of what it is a copy of",
        """            for item in copies:
                if item.is_move:
                    self._move(item)
            rows += [self._copied(item) for item in copies if not item.is_move]
""",
        """            rows += [self._copied(item) for item in copies if not item.is_move]
            for item in copies:
                if item.is_move:
                    self._move(item)
""",
        ("tests/index/test_writer.py",),
    ),
    Mutation(
        "a vector of zeros is divided by its length",
        "np.float32(length or 1.0)",
        "np.float32(length)",
        ("tests/index/test_reader.py",),
    ),
    Mutation(
        "the text of an export runs by this machine's own blocks",
        "text.unchecked(x, run=plain_blocks)",
        "text.unchecked(x)",
        (EXPORT + "a_text_encoder_takes_ids_of_one_length_filled_with_eos",),
    ),
    Mutation(
        "levels go into an export as if they were pixels",
        'pixels = self.processor.normalised(x) if self.dtype == "uint8" else x',
        'pixels = x.astype(mx.float32) if self.dtype == "uint8" else x',
        (EXPORT + "a_native_checkpoint_takes_one_grid_as_levels",),
    ),
    Mutation(
        "an export is not read back",
        "if not mx.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE):",
        "if False:",
        (EXPORT + "a_file_that_reads_back_otherwise_is_refused",),
    ),
    Mutation(
        "an export replaces what lies beside it",
        "if not path.is_file() or read_bytes(path) != read_bytes(file)}",
        "if not path.is_file()}",
        (EXPORT + "no_file_that_is_there_is_replaced",),
    ),
    Mutation(
        "a head is exported as its logits",
        "return [ANSWERS[self.task][1](logits)]",
        "return [logits]",
        (EXPORT + "with_a_head_inside_come_the_probabilities_that_predict_gives",),
    ),
)
