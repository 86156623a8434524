"""Faults in `fit` and in its scores, in pre-training and in LiT tuning."""

from tests.mutations import Mutation

DATA = (
    "tests/learn/test_samples.py::test_a_folder_per_label_is_split_into_three_parts_of_every_class",
    "tests/learn/test_samples.py::test_equal_content_never_lies_in_two_parts",
)
SAMPLES = ("tests/learn/test_samples.py",)
METADATA, CAPTIONED = "tests/learn/test_tables.py", "tests/pretrain/test_captioned.py"
BROKEN = (f"{SAMPLES[0]}::test_broken_images_are_refused_all_at_once_or_left_out",)
READ, REFUSED = f"{METADATA}::test_a_table_that_means_one_thing_is_read", f"{METADATA}::test_a_table_that_is_unclear"
PARTS = tuple(
    f"{SAMPLES[0]}::test_{name}" for name in ("what_a_head_is_scored_on", "with_given_classes_nothing_is_split")
)
PREDICTIONS = (
    "tests/learn/test_dense_fit.py::test_predictions_keep_the_paths_of_their_images_and_replace_nothing",
    "tests/test_files.py",
)
HEADS = ("tests/learn/test_heads.py",)
FACTS, PRE_FACTS = "tests/learn/test_facts_of_training.py", "tests/pretrain/test_facts_of_pretraining.py"
PRECISION = (
    "tests/learn/test_average_precision.py::test_it_is_pycocotools_on_some_random_sets",
    "tests/learn/test_average_precision.py::test_half_of_the_objects_found_is_half_of_the_recalls",
)
IOU, GEOMETRY, PLACES = (
    ("tests/learn/test_metrics.py",),
    ("tests/learn/test_boxes.py",),
    ("tests/learn/test_placement.py",),
)
FORMATS, MASKS, COCO = (
    ("tests/learn/test_box_formats.py",),
    ("tests/learn/test_mask_files.py",),
    ("tests/learn/test_coco.py",),
)
OBJECTIVE, TUNING = ("tests/pretrain/test_objective.py",), ("tests/pretrain/test_lit_tuning.py",)
RUNS = "tests/pretrain/test_pretrain.py::test_"
NATIVE = "test_patches_are_as_many_as_the_paper_draws_and_a_batch_has_as_many_of_them_whatever_the_size"

SEVERAL = "tests/learn/test_several_labels_and_numbers.py::test_"

LEARNING = (
    Mutation(
        "logits are multiplied by the temperature",
        "head.scale = 1 / temperature(softmax_losses,",
        "head.scale = temperature(softmax_losses,",
        (SEVERAL + "the_temperature_is_found_and_a_val_of_which_all_is_right_makes_no_certainty",),
    ),
    Mutation(
        "equal scores come one after another in a precision",
        "ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))",
        "ends = np.arange(len(scores))",
        (SEVERAL + "metrics_are_scikit_learns",),
    ),
    Mutation(
        "the gradient of several labels is that of none",
        "sigmoid_losses(logits, labels), sigmoid(logits) - labels",
        "sigmoid_losses(logits, labels), sigmoid(logits)",
        (SEVERAL + "linear_maps_reach_scikit_learns_objective",),
    ),
    Mutation(
        "a class is told however improbable it is",
        "return bool(self.probabilities.max() < self.min_score)",
        "return False",
        (SEVERAL + "below_the_score_that_is_asked_for_it_is_none_of_these",),
    ),
    Mutation(
        "hidden patches are left out of a dense head's map",
        'if visible is not None and "hidden" in self:',
        "if False:",
        ("tests/learn/test_dense_fit.py::test_a_learned_vector_stands_where_a_patch_is_hidden",),
    ),
    Mutation(
        "every table is taken for one with commas",
        "separator = max(names, key=lambda one: (bool(column(names[one], IMAGE)), len(names[one])))",
        'separator = ","',
        (f"{READ}[semicolons]", f"{READ}[tabs]"),
    ),
    Mutation(
        "a name with backslashes is looked for as it is",
        'slashed = name.replace("\\\\", "/")',
        "slashed = name",
        (f"{READ}[backslashes]",),
    ),
    Mutation(
        "of an image with two labels the first one counts",
        "elif found.get(path, (mark,))[0] != mark:",
        "elif path == where:",
        (f"{REFUSED}_is_refused_with_what_to_change[two labels]",),
    ),
    Mutation(
        "whole numbers keep the point that pandas gave them",
        'texts = [WHOLE.sub(r"\\1", text) for text in texts]',
        "texts = [*texts]",
        (f"{METADATA}::test_labels_are_text_or_whole_numbers",),
    ),
    Mutation(
        "folders with a table each are labels",
        "[*tables.tables(folder, of=of).values()] or alike",
        "[*tables.tables(folder, of=of).values()]",
        (f"{METADATA}::test_folders_with_a_table_each_are_no_labels",),
    ),
    Mutation(
        "the labels of Kaggle's sample submission are scored",
        'if len(here) > 1 and "" in here:',
        'if len(here) > 9 and "" in here:',
        (f"{METADATA}::test_a_table_of_no_part_beside_one_of_a_part_is_not_scored",),
    ),
    Mutation(
        "an image whose mask is broken is refused though --skip-broken is given",
        "elif isinstance(labels, str):\n                broken.append(labels)",
        "elif isinstance(labels, str):\n                faults.append(labels)",
        (f"{SAMPLES[0]}::test_an_image_whose_mask_is_broken_is_one_that_cannot_be_read",),
    ),
    Mutation(
        "what lies in DATA is denied",
        "if (others := not_read(data)) else",
        "if (others := list[str]()) else",
        (f"{METADATA}::test_what_lies_there_is_named_and_never_denied",),
    ),
    Mutation(
        "broken images are left out without being asked to",
        "faults = [*([] if skip_broken else broken), *faults]",
        "faults = [*faults]",
        BROKEN,
    ),
    Mutation(
        "of broken images those alone are told that a header shows",
        "return check_images(paths) if faults and not decode else (known | found, faults)",
        "return known | found, faults",
        BROKEN,
    ),
    Mutation(
        "a broken image in a shard is told in every epoch",
        "if line not in self._said:",
        "if line:",
        (f"{CAPTIONED}::test_a_broken_image_in_a_shard_is_named_once_or_refused",),
    ),
    Mutation(
        "pretrain trains on the shards of val",
        'found.setdefault(part_of(file.stem) or "", []).append(file)',
        'found.setdefault("", []).append(file)',
        (f"{CAPTIONED}::test_of_parts_train_is_trained_on_and_the_others_are_named",),
    ),
    Mutation(
        "the numbers of the classes are off by one",
        "for number, name in enumerate(names)}",
        "for number, name in enumerate(names, 1)}",
        DATA,
    ),
    Mutation(
        "training sees the label of another class",
        "label = np.asarray(sample.target)",
        "label = np.maximum(0, np.asarray(sample.target) - 1)",
        (f"{FACTS}::test_training_begins_with_the_linear_probe_and_the_right_labels",),
    ),
    Mutation(
        "a fine-tuning begins with a head of zeros, not with the linear probe",
        "    head.update(probe.parameters())\n",
        "",
        (f"{FACTS}::test_training_begins_with_the_linear_probe_and_the_right_labels",),
    ),
    Mutation(
        "copies of an image with two labels lie in two parts",
        "groups[owner.setdefault(sample.sha256, stratum)][sample.sha256]",
        "groups[stratum][sample.sha256]",
        DATA,
    ),
    Mutation(
        "val and test share their images",
        '"test" if index < held + for_test else "train"',
        '"val" if index < held + for_test else "train"',
        DATA,
    ),
    Mutation(
        "fine-tuning keeps the step that is best on the training images",
        'val = self.dataset.splits["val"] or self.dataset.splits["test"]',
        'val = self.dataset.splits["train"]',
        (f"{FACTS}::test_the_best_step_is_chosen_on_val",),
    ),
    Mutation(
        "training keeps its last state, not its best",
        '    if plan.keep != "last":\n        model.update(tree_unflatten(list(kept.items())))\n',
        "",
        (f"{FACTS}::test_the_state_with_the_best_score_is_the_one_that_is_written",),
    ),
    Mutation(
        "pixels without a label count",
        "known = labels != IGNORED",
        "labels = np.where(labels == IGNORED, 0, labels)\n    known = labels != IGNORED",
        IOU,
    ),
    Mutation(
        "the union counts the intersection twice",
        "counts.sum(axis=0) + counts.sum(axis=1) - both",
        "counts.sum(axis=0) + counts.sum(axis=1)",
        IOU,
    ),
    Mutation(
        "an object is found by several boxes",
        "free[rows, taken] = False",
        "free[rows, taken] = True",
        PRECISION,
    ),
    Mutation(
        "boxes are matched from the lowest score up",
        "order = np.argsort(-found.scores[predicted]",
        "order = np.argsort(found.scores[predicted]",
        PRECISION,
    ),
    Mutation(
        "precision is not made to fall with recall",
        "np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]",
        "precision",
        PRECISION,
    ),
    Mutation(
        "boxes of another class are suppressed",
        "mine = np.flatnonzero(labels[order] == label)",
        "mine = np.flatnonzero(labels[order] == labels[order])",
        GEOMETRY,
    ),
    Mutation(
        "generalised overlap ignores the hull",
        " - (hull - union) / mx.maximum(hull, TINY)",
        "",
        GEOMETRY,
    ),
    Mutation(
        "mirrored boxes keep their sides",
        "boxes[:, [0, 2]] = self.size[1] - boxes[:, [2, 0]]",
        "boxes[:, [0, 2]] = boxes[:, [0, 2]]",
        PLACES,
    ),
    Mutation(
        "the focal loss weighs what is there as what is not",
        "mx.where(wanted, ALPHA, 1 - ALPHA)",
        "mx.where(wanted, 1 - ALPHA, ALPHA)",
        ("tests/learn/test_fcos.py",),
    ),
    Mutation(
        "rows and columns of a doubled map are swapped",
        "x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * rows",
        "x.transpose(0, 1, 4, 2, 3, 5).reshape(batch, 2 * rows",
        ("tests/learn/test_upsample.py",),
    ),
    Mutation(
        "far neighbours vote like near ones",
        "axis=1) - 1) / self.temperature)",
        "axis=1) - 1) * self.temperature)",
        HEADS,
    ),
    Mutation(
        "rare classes count less in a balanced probe",
        "np.where(counts > 0, len(labels) / (",
        "np.where(counts > 0, 1 / len(labels) * (",
        (*HEADS, "tests/learn/test_fit.py::test_balanced_classes_find_more_of_the_rare_ones_and_the_card_says_so"),
    ),
    Mutation(
        "a vote is never balanced",
        "if self.is_balanced:\n            votes",
        "if False:\n            votes",
        HEADS,
    ),
    Mutation(
        "an image of a cross-validation is scored by a head that has seen it",
        "for own, one in numbers if own != fold]",
        "for own, one in numbers]",
        ("tests/learn/test_fit.py::test_a_cross_validation_does_not_see_what_it_scores",),
    ),
    Mutation(
        "a refitted head has learned the training part alone",
        "head, options = trained.refit(learned)",
        'head, options = trained.refit(splits["train"])',
        ("tests/learn/test_fit.py::test_refit_learns_all_images_and_keeps_the_estimate_and_the_settings",),
    ),
    Mutation(
        "the penalty of the probe holds for the bias too",
        "gradient[:-1] += l2 * linear[:-1]",
        "gradient += l2 * linear",
        HEADS,
    ),
    Mutation(
        "beside the adapters of one's own loop the rest of the model learns",
        "    model.freeze()\n    model.update_modules(tree_unflatten(found))",
        "    model.update_modules(tree_unflatten(found))",
        ("tests/learn/test_lora.py::test_the_adapters_of_a_pair_learn_alone_and_fuse_into_what_they_do",),
    ),
    Mutation(
        "fused adapters forget their scale",
        "+ self.scale * (a @ b).T",
        "+ (a @ b).T",
        ("tests/learn/test_lora.py",),
    ),
    Mutation(
        "adapters go around the first blocks, not the last",
        "for i in range(depth - count, depth):",
        "for i in range(count):",
        ("tests/learn/test_lora.py",),
    ),
    Mutation(
        "layer decay is reversed",
        "Group(rate=decay ** (depth + 1 - i))",
        "Group(rate=decay**i)",
        (f"{FACTS}::test_layers_learn_the_slower_the_nearer_to_the_pixels",),
    ),
    Mutation(
        "the learning rate rises where it should fall",
        "0.5 * (1 + mx.cos(",
        "0.5 * (1 - mx.cos(",
        ("tests/test_train.py::test_the_rate_rises_linearly_to_its_peak_and_falls_as_half_a_cosine",),
    ),
    Mutation(
        "norms and biases are decayed",
        "group if array.ndim >= 2 else",
        "group if array.ndim >= 1 else",
        (f"{FACTS}::test_matrices_alone_are_decayed",),
    ),
    Mutation(
        "moments stay biased towards the zero they begin with",
        "bias_correction=True",
        "bias_correction=False",
        (f"{FACTS}::test_the_first_step_goes_as_far_as_the_rate_says",),
    ),
    Mutation(
        "the prefix is one patch too long",
        "position[None, None, :] < lengths",
        "position[None, None, :] <= lengths",
        OBJECTIVE,
    ),
    Mutation(
        "the decoder predicts a patch from itself",
        "x[:, : patches - 1]",
        "x[:, 1:patches]",
        OBJECTIVE,
    ),
    Mutation(
        "the decoder sees what follows",
        "run_blocks(self.blocks, x, causal=True)",
        "run_blocks(self.blocks, x, causal=False)",
        OBJECTIVE,
    ),
    Mutation(
        "the image loss compares with patches that are not normalised",
        "target = normalised(patches[:, 1:])",
        "target = patches[:, 1:]",
        OBJECTIVE,
    ),
    Mutation(
        "the image loss leaves out the first patch after the prefix",
        "[None] >= lengths[:, None]",
        "[None] > lengths[:, None]",
        OBJECTIVE,
    ),
    Mutation(
        "the filling after a caption counts in the text loss",
        "return mx.cumsum(ends, axis=1) - ends == 0",
        "return mx.ones(targets.shape, mx.bool_)",
        OBJECTIVE,
    ),
    Mutation(
        "the end of text is not learned",
        "return mx.cumsum(ends, axis=1) - ends == 0",
        "return mx.cumsum(ends, axis=1) == 0",
        OBJECTIVE,
    ),
    Mutation(
        "a resumed run sees its last example again",
        "self.position = n + 1",
        "self.position = n",
        ("tests/pretrain/test_captioned.py", "tests/pretrain/test_pretrain.py"),
    ),
    Mutation(
        "the contrastive loss has one direction",
        "0.5 * (per_image.mean() + per_text.mean())",
        "per_image.mean()",
        TUNING,
    ),
    Mutation(
        "equal captions count as wrong",
        "logits = mx.where(same & ~own, -math.inf, logits)",
        "logits = mx.where(own & ~own, -math.inf, logits)",
        TUNING,
    ),
    Mutation(
        "LiT tuning trains the trunk",
        "    freeze(model, FROZEN_TRUNK)\n",
        "",
        (f"{PRE_FACTS}::test_the_trunk_is_frozen_and_the_rest_is_not",),
    ),
    Mutation(
        "LiT tuning gives the last weights, not their average",
        "name: share * average[name] + (1 - share) * x for",
        "name: x for",
        TUNING,
    ),
    Mutation(
        "val is scored where there is test",
        '("test", "val", "", "train")',
        '("val", "test", "", "train")',
        PARTS,
    ),
    Mutation(
        "evaluate scores a part of a folder without parts",
        "    if classes is not None:\n        splits:",
        "    if classes is not None and scored:\n        splits:",
        PARTS,
    ),
    Mutation(
        "an image whose header was read counts as decoded",
        " and row[3] >= decoded",
        "",
        ("tests/learn/test_samples.py::test_a_header_that_was_read_does_not_count_as_a_decoded_image",),
    ),
    Mutation(
        "fit looks for boxes again after it has recognised them",
        "found = form.find(data, recognised.located if recognised else form.locate(data, scan), scan)",
        "found = form.find(data, form.locate(data, scan), scan)",
        (f"{FORMATS[0]}::test_fit_reads_each_file_that_describes_the_data_once",),
    ),
    Mutation(
        "a list that is not UTF-8 is empty",
        '            self.faults.append(str(error))\n            return ""',
        '            return ""',
        (f"{FORMATS[0]}::test_a_list_that_is_not_utf_8_is_told_with_what_else_is_wrong", *MASKS),
    ),
    Mutation("an image in two parts is no note", "if other != part:", "if other is None:", SAMPLES),
    Mutation(
        "hidden files are images and labels",
        'if name.startswith("."):',
        'if name == ".":',
        ("tests/learn/test_samples.py::test_junk_of_other_programs_is_neither_an_image_nor_a_label",),
    ),
    Mutation(
        "the pictures of a head's card are data",
        '    ("head.json",),\n',
        "",
        ("tests/images/test_find_images.py", *SAMPLES),
    ),
    Mutation(
        "predictions lie flat in their folder",
        "Path(os.path.relpath(file, common))",
        "Path(Path(file).name)",
        PREDICTIONS,
    ),
    Mutation(
        "predictions of a.jpg and a.png are one file",
        "casefold()] > 1 else stem",
        "casefold()] > 9 else stem",
        PREDICTIONS,
    ),
    Mutation(
        "pixels that nobody labelled are of class 0 where classes have other numbers",
        "classes: NDArray[Any] = values.astype(np.uint8)",
        "classes: NDArray[Any] = np.zeros(values.shape, np.uint8)",
        ("tests/learn/test_mask_files.py",),
    ),
    Mutation(
        "CVAT's red is blue",
        "@ np.array([1 << 16, 1 << 8, 1])",
        "@ np.array([1, 1 << 8, 1 << 16])",
        ("tests/learn/test_mask_files.py",),
    ),
    Mutation(
        "a head takes its encoder's newest commit, not its own",
        'revision = revision or (None if model else wanted.get("commit"))',
        "revision = None",
        ("tests/learn/test_fit.py::test_a_head_asks_for_the_commit_of_its_encoder_that_it_was_trained_on",),
    ),
    Mutation(
        "VOC's pixels are counted from 0",
        "(x - (right > x), y - (bottom > y), right, bottom)",
        "(x, y, right, bottom)",
        FORMATS,
    ),
    Mutation(
        "YOLO's centre is a corner",
        "(x - w / 2, y - h / 2, x + w / 2, y + h / 2)",
        "(x, y, x + w, y + h)",
        FORMATS,
    ),
    Mutation(
        "a polygon of YOLO is its first four numbers",
        "if len(values) >= 6 and len(values) % 2 == 0:",
        "if len(values) >= 600 and len(values) % 2 == 0:",
        FORMATS,
    ),
    Mutation("names of YAML become numbers and booleans", "yaml.BaseLoader", "yaml.SafeLoader", FORMATS),
    Mutation(
        "VOC's difficult objects are trained on",
        'Row(f"object {count}", name, box, entry.findtext("difficult"))',
        'Row(f"object {count}", name, box)',
        FORMATS,
    ),
    Mutation(
        "the lists of VOC's classes are parts",
        "(part := part_of(file.stem)) and file.stem.isalpha()",
        "(part := part_of(file.stem))",
        FORMATS,
    ),
    Mutation(
        "an image is found by its whole name alone",
        'PurePosixPath(name.replace("\\\\", "/")).name, name]',
        "name]",
        FORMATS,
    ),
    Mutation(
        "Roboflow's root category is a class",
        "roots = reading.above - used",
        "roots = set[str]()",
        COCO,
    ),
    Mutation(
        "boxes of an image that EXIF turns may be of any pixels",
        "and open_image(path).orientation > 1:",
        "and open_image(path).orientation > 8:",
        COCO,
    ),
    Mutation(
        "why a mask does not fit on an image that EXIF turns is not said",
        "open_image(path).orientation >= 5:",
        "open_image(path).orientation > 8:",
        (*MASKS, *COCO),
    ),
    Mutation(
        "255 is class 1 though other classes are there",
        "        if not seen <= {0, IGNORED}:\n            return False\n    return seen ==",
        "    return seen >=",
        MASKS,
    ),
    Mutation(
        "an image with two masks takes one of them",
        "elif len(found) > 1:",
        "elif len(found) > 2:",
        MASKS,
    ),
    Mutation(
        "of masks that are links to one file one is found",
        "known = path if self.every_name else identity(path, about)",
        "known = identity(path, about)",
        (f"{SAMPLES[0]}::test_what_belongs_to_an_image_goes_by_each_name_of_its_file",),
    ),
    Mutation(
        "an image of a Mac has no mask from Linux",
        'return same_form(str(Path(file).relative_to(folder).with_suffix("")))',
        'return str(Path(file).relative_to(folder).with_suffix(""))',
        (*MASKS, *FORMATS),
    ),
    Mutation(
        "labels of two letter cases are not told",
        "if cases[name.casefold()] > 1",
        "if cases[name] > 1",
        (f"{SAMPLES[0]}::test_labels_that_differ_in_letter_case_alone_are_told",),
    ),
    Mutation(
        "folders of one name in every label are not told",
        "if len(below) == len(places) > 1 and",
        "if len(below) == len(places) > 2 and",
        (f"{SAMPLES[0]}::test_folders_of_one_name_in_every_label_are_told",),
    ),
    Mutation(
        "a table of boxes is one of labels",
        "        if of is LABEL and column(names, BOX):\n            continue\n",
        "",
        (f"{METADATA}::test_a_table_of_boxes_is_not_taken_for_labels",),
    ),
    Mutation(
        "of two columns of one name the last one counts",
        "if name and names.count(name) > 1",
        "if name and names.count(name) > 9",
        (f"{REFUSED}_is_refused_with_what_to_change[two columns of one name]",),
    ),
    Mutation(
        "a list in a cell is one text",
        "return found if isinstance(found, (list, dict)) else cell",
        "return cell",
        (METADATA, CAPTIONED),
    ),
    Mutation(
        "COCO's images alone are not known by their start",
        '|.*"images"\\s*:\\s*\\[\\s*\\{[^{}]*"file_name"',
        "",
        COCO,
    ),
    Mutation(
        "one id of two categories is the last one",
        "for key, name in pairs if names[key] != name",
        "for key, name in pairs if key not in names",
        COCO,
    ),
    Mutation(
        "boxes in shares of the sides are tiny ones in pixels",
        "max(cut) <= 1 > area",
        "max(cut) <= 0 > area",
        COCO,
    ),
    Mutation(
        "a smoothed mask has a class for each grey",
        "len(seen) > MAX_UNNAMED",
        "len(seen) > 256",
        MASKS,
    ),
    Mutation(
        "lists that name no image leave all of them out",
        "if pairs and not any(found.values()):",
        "if not pairs and not any(found.values()):",
        MASKS,
    ),
    Mutation(
        "files of one ending under a key of a shard are not told",
        "if len(parts) < len(found):",
        "if len(parts) > len(found):",
        (CAPTIONED,),
    ),
    Mutation(
        "pretraining decays by the rate, as AdamW does",
        "weight_decay=self.weight_decay / rate,",
        "weight_decay=self.weight_decay,",
        (f"{RUNS}a_schedule_of_zero_gradients_leaves_951_thousandths_of_a_matrix_and_all_of_a_norm",),
    ),
    Mutation(
        "the rate of pretraining falls to zero",
        "min_rate=self.rate * PAPER_MIN_RATE / self._paper_rate,",
        "",
        (f"{RUNS}each_width_has_the_papers_rates",),
    ),
    Mutation(
        "numbers of native patches are drawn more narrowly",
        "z = rng.normal()",
        "z = rng.normal() / 2",
        (f"{CAPTIONED}::{NATIVE}",),
    ),
    Mutation(
        "native batches are as many images whatever their size",
        "return max(1, round(size * math.sqrt(patches[0] * patches[1]) / math.prod(grid)))",
        "return size",
        (f"{CAPTIONED}::{NATIVE}", f"{PRE_FACTS}::test_a_native_batch_of_small_images_has_more_of_them"),
    ),
    Mutation("a patch's variance is biased", "keepdims=True, ddof=1)", "keepdims=True)", OBJECTIVE),
    Mutation(
        "generation forgets what it saw", "if (before := cache[number]) is not None:", "if before := None:", OBJECTIVE
    ),
    Mutation(
        "generated patches have no mean", "* mx.maximum(predicted[..., -1:], 0) + predicted[..., -2:-1]", "", OBJECTIVE
    ),
    Mutation(
        "lit begins the text side of a pair anew",
        "model.load_weights(list(flat(encoder.parameters()).items()))",
        "initialise(model, 1, seed=settings.seed)",
        (f"{TUNING[0]}::test_a_pair_that_goes_on_for_no_steps_is_as_it_was",),
    ),
    Mutation(
        "lit with held-out images keeps the last weights",
        'replace(plan, keep="best",',
        'replace(plan, keep="last",',
        (f"{TUNING[0]}::test_of_a_run_with_held_out_images_the_best_recall_is_kept",),
    ),
    Mutation(
        "a caption with half a character is left out in silence",
        "if len(whole) < len(texts):",
        "if False:",
        (f"{CAPTIONED}::test_of_several_captions_the_one_with_half_a_character_is_named_and_left_out",),
    ),
    Mutation(
        "the paper's recipe learns from the images as they are",
        "if run.type.augmentation is not None and run.options.augment:",
        "if False:",
        ("tests/learn/test_fit.py::test_the_papers_recipe_learns_on_images_that_are_changed_at_random_each_time",),
    ),
)
