"""Faults in the training of `fit`, `pretrain` and `lit`, in their caches, and in what an index finds and keeps."""

from tests.mutations import Mutation

FIT, PRETRAIN = ("tests/learn/test_facts_of_training.py",), ("tests/pretrain/test_facts_of_pretraining.py",)
INDEX = ("tests/index/test_facts_of_indexes.py",)


def fit(*names: str) -> tuple[str, ...]:
    """Facts of `fit` by the ends of their names."""
    return tuple(f"{FIT[0]}::test_{name}" for name in names)


def pretrain(*names: str) -> tuple[str, ...]:
    """Facts of `pretrain` and `lit` by the ends of their names."""
    return tuple(f"{PRETRAIN[0]}::test_{name}" for name in names)


def train(*names: str) -> tuple[str, ...]:
    """Facts of the loop by the ends of their names."""
    return tuple(f"tests/test_train.py::test_{name}" for name in names)


FILE_CHANGES = fit("a_file_that_changes_after_it_was_checked_is_checked_again")
FEATURES = fit(
    "features_are_computed_again_for_whatever_decides_them",
    "a_half_checkpoint_in_its_own_dtype_is_no_other_ones_features",
)
EPOCHS = fit("every_epoch_takes_each_image_once_in_another_order")
MIXUP = fit("images_that_are_mixed_take_their_share_of_the_targets_with_them")
RESUMED = fit("a_run_that_was_stopped_and_resumed_equals_one_that_was_not")
CHANGES = fit("an_option_changes_what_is_learned")
OWN = fit("a_run_is_resumed_with_its_own_encoder_alone", "a_run_is_resumed_with_its_own_images_and_labels_alone")
CAPTIONS = pretrain("a_run_goes_on_with_its_own_images_and_captions_alone")
WITH_LESS = "a_loss_that_is_no_number_stops_and_can_be_gone_on_from_with_less"
CUT_OFF = fit("features_that_were_cut_off_are_computed_and_the_others_are_not")
WIRED = ("tests/backend/test_x86_training.py::test_on_a_mac_memory_is_wired_while_a_training_runs",)
RATE, LENGTH = fit("the_rate_falls_towards_the_end"), fit("gradients_are_cut_to_one_length")
BEST = fit("of_several_rates_the_best_is_kept_as_if_it_had_been_the_only_one")
COMMAND = fit("the_commands_flags_are_the_options")

SETTINGS = ("tests/cli/test_settings.py",)
COMPILED = "tests/test_compiled_step.py::test_"
AUGMENT, LORA, DENSE = (f"tests/learn/test_{name}.py::test_" for name in ("augment", "lora", "dense"))
CAPTIONED, PRETRAIN_RUNS = (f"tests/pretrain/test_{name}.py::test_" for name in ("captioned", "pretrain"))

PRE_CHANGES = pretrain("an_option_changes_what_is_learned")
PRE_RESUMED = pretrain("a_run_that_was_stopped_and_resumed_equals_one_that_was_not")
FIRST_CAPTION = pretrain("the_first_caption_alone_is_as_if_there_were_no_others")
PRE_RATE, PRE_LENGTH = pretrain("the_rate_falls_towards_the_end"), pretrain("gradients_are_cut_to_one_length")

UNTRUSTED = ("tests/test_untrusted_json.py",)
SHARDS = tuple(
    f"tests/pretrain/test_captioned.py::test_{name}"
    for name in (
        "the_files_of_an_example_are_bounded_together_and_others_are_not_held",
        "a_shard_that_unpacks_to_much_more_than_itself_is_bounded",
    )
)
WRITTEN = tuple(
    f"tests/cli/test_streams.py::test_{name}"
    for name in (
        "a_shortened_line_keeps_its_start_and_its_advice",
        "an_import_that_a_signal_breaks_is_no_broken_package",
    )
)
HOME = (
    "tests/test_files.py::test_without_a_home_what_may_be_computed_again_goes_to_the_temporary_folder",
    "tests/test_files.py::test_a_name_that_no_file_can_have_is_one_that_is_not_there",
)

TRAINING = (
    Mutation("untrusted JSON may be as deep as it likes", "if _is_deeper(value, MAX_DEPTH):", "if False:", UNTRUSTED),
    Mutation(
        "a number in untrusted JSON may be infinite or none",
        "isinstance(value, kinds) and (not isinstance(value, float) or math.isfinite(value))",
        "isinstance(value, kinds)",
        UNTRUSTED,
    ),
    Mutation(
        "weights of a head or of adapters may be NaN",
        'if (name := first_not_finite(arrays)) is not None:\n        raise ValueError(f"{file} is damaged',
        'if (name := None) is not None:\n        raise ValueError(f"{file} is damaged',
        UNTRUSTED,
    ),
    Mutation(
        "a state's progress may be anything",
        "if found != wanted or not 0 <= saved",
        "if not 0 <= saved",
        UNTRUSTED,
    ),
    Mutation("the files of an example are unbounded", "if held > MAX_KEY_BYTES or (", "if (", SHARDS),
    Mutation(
        "a shard may unpack to anything",
        "if not 0 <= member.size <= unpacked <= limit or archive.offset > limit:",
        "if False:",
        SHARDS,
    ),
    Mutation(
        "a line is as long as what it quotes", "return line if len(line) <= limit else", "return line or", WRITTEN
    ),
    Mutation(
        "an import that a signal stops advises to reinstall", "if stops:  # a module in C", "if False:  # C", WRITTEN
    ),
    Mutation("without a home a folder is called ~", "if homeless else folder", "if False else folder", HOME),
    Mutation(
        "the cache of files ignores when they were changed",
        "is_unchanged(about, *row[4:])",
        "is_unchanged(about, row[4], about.st_mtime_ns, None, None)",
        FILE_CHANGES,
    ),
    Mutation(
        "the cache of files remembers those that may still change",
        "if (about := stat_of(path)) and about.st_mtime_ns < settled",
        "if (about := stat_of(path))",
        ("tests/learn/test_samples.py::test_a_file_that_was_changed_a_moment_ago_is_not_remembered",),
    ),
    Mutation(
        "the cache of features ignores the preprocessing",
        '"preprocessing": asdict(processor.preprocessing),\n        **more',
        "**more",
        FEATURES,
    ),
    Mutation(
        "the cache of features ignores the weights",
        '"weights": fingerprint(model)["digest"],\n        "dtype"',
        '"dtype"',
        FEATURES,
    ),
    Mutation("the cache of features ignores the dtype", '"dtype": str(model.dtype),\n        "pre', '"pre', FEATURES),
    Mutation(
        "every epoch of fit is in the same order",
        "np.random.default_rng([self.seed, epoch]).permutation",
        "np.random.default_rng([self.seed, 0]).permutation",
        EPOCHS,
    ),
    Mutation(
        "fit sees some images twice in an epoch and others never",
        "np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))",
        "np.random.default_rng([self.seed, epoch]).integers(0, len(self.samples), len(self.samples))",
        EPOCHS,
    ),
    Mutation(
        "every epoch of pretrain is in the same order",
        "np.random.default_rng((seed, 0, epoch))",
        "np.random.default_rng((seed, 0, 0))",
        pretrain("every_epoch_of_pretraining_takes_each_image_once_in_another_order"),
    ),
    Mutation(
        "every epoch of lit is in the same order",
        "np.random.default_rng([self.seed, epoch]).permutation",
        "np.random.default_rng([self.seed, 0]).permutation",
        pretrain("every_epoch_of_lit_takes_other_images_together"),
    ),
    Mutation(
        "mixup mixes pixels and not labels",
        "return shares[0] * losses + shares[1] * run.loss(outputs, other)",
        "return losses",
        MIXUP,
    ),
    Mutation(
        "mixup mixes labels and not pixels",
        "pixels = shares[0] * pixels + shares[1] * pixels[order]",
        "pixels = shares[0] * pixels + shares[1] * pixels",
        MIXUP,
    ),
    Mutation(
        "the share of patches that is to be hidden is what is seen",
        "left.flat[rng.permutation(left.size)[:hidden]] = False",
        "left.flat[rng.permutation(left.size)[hidden:]] = False",
        fit("the_mask_hides_its_share_of_the_patches"),
    ),
    Mutation(
        "full trains the first blocks, not the last",
        r'*(rf"encoder\.blocks\.{i}\..*" for i in range(first))',
        r'*(rf"encoder\.blocks\.{i}\..*" for i in range(layers, depth))',
        fit("the_last_blocks_are_those_that_are_trained"),
    ),
    Mutation("fit cuts no gradient", "clipped(gradients, plan.clip, self.groups)", "gradients", LENGTH),
    Mutation(
        "pretrain cuts no gradient",
        "clipped(gradients, plan.clip, self.groups)",
        "gradients",
        PRE_LENGTH,
    ),
    Mutation(
        "a model is trained as it is used, without dropout",
        "        self.model.train()\n",
        "",
        CHANGES,
    ),
    Mutation(
        "a box is scored without how near its centre is",
        "np.sqrt(likely * central[:, None])",
        "likely",
        fit("a_box_far_from_its_centre_scores_less"),
    ),
    Mutation(
        "epochs count batches where several make a step",
        "per_epoch = max(1, order.per_epoch // options.grad_accumulation_steps)",
        "per_epoch = max(1, order.per_epoch)",
        fit("epochs_count_whole_batches_where_they_are_accumulated"),
    ),
    Mutation("all candidates learn at one rate", "Group(rate / base_rate,", "Group(1.0,", BEST),
    Mutation(
        "a val loss as low as the lowest ends a run",
        "val_loss <= done.best_loss < math.inf",
        "val_loss < done.best_loss",
        train("early_stopping_goes_by_the_val_loss_too"),
    ),
    Mutation(
        "the warm-up counts against a run",
        " or done.step <= plan.warm_up",
        "",
        train("early_stopping_goes_by_the_val_loss_too"),
    ),
    Mutation(
        "the worst candidate is kept",
        "int(np.argmax([score for score, _ in scores(model)]))",
        "int(np.argmin([score for score, _ in scores(model)]))",
        BEST,
    ),
    Mutation(
        "a head ignores the dtype that it was trained in",
        'dtype=dtype or wanted.get("dtype")',
        "dtype=dtype",
        fit("a_head_computes_in_the_dtype_that_it_was_trained_in"),
    ),
    Mutation(
        "held-out images are mirrored as some for training are",
        "learner(processor.normalised(levels))",
        "learner(processor.normalised(levels[:, :, ::-1]))",
        fit("what_is_held_out_is_seen_as_it_is", "scores_are_those_of_the_images_as_they_are"),
    ),
    Mutation(
        "held-out images of pretrain are cropped like those for training",
        "Preparation(settings.vision, settings.seed)",
        "Preparation(settings.vision, settings.seed, settings.augmentation)",
        pretrain("held_out_images_are_neither_cropped_nor_changed"),
    ),
    Mutation(
        "the crops that lit keeps of an image have one key",
        'digest + view.to_bytes(4, "little")',
        "digest",
        ("tests/pretrain/test_lit_tuning.py::test_each_of_many_views_is_kept_and_computed_once",),
    ),
    Mutation(
        "all steps of a native run have one grid",
        "step = number // settings.grad_accumulation_steps + 1",
        "step = 1",
        pretrain("each_step_of_a_native_run_has_one_grid_for_its_batches_and_other_steps_have_others"),
    ),
    Mutation(
        "--views is ignored",
        "for one in flagged(kind)}",
        'for one in flagged(kind) if one.name != "views"}',
        pretrain("views_change_what_lit_learns"),
    ),
    Mutation(
        "--min-area is ignored",
        "for one in flagged(kind)}",
        'for one in flagged(kind) if one.name != "min_area"}',
        PRE_CHANGES,
    ),
    Mutation(
        "a state of lit is another one's where it is saved more often",
        " if name not in MAY_CHANGE}",
        "}",
        pretrain("how_often_a_run_reports_and_saves_may_change_when_it_goes_on"),
    ),
    Mutation("settings may be endless", "not abs(number) <= MAX_FLOAT", "number != number", SETTINGS),
    Mutation("settings may be no number", "not abs(number) <= MAX_FLOAT", "abs(number) > MAX_FLOAT", SETTINGS),
    Mutation("ranges of settings are not checked", 'elif not about["holds"](value):', "elif False:", SETTINGS),
    Mutation(
        "the rate of fit does not fall",
        "mx.where(step < warm_up, risen, fallen)",
        "mx.where(step < warm_up, risen, 1.0)",
        RATE,
    ),
    Mutation(
        "the rate of pretrain and lit does not fall",
        "mx.where(step < warm_up, risen, fallen)",
        "mx.where(step < warm_up, risen, 1.0)",
        PRE_RATE,
    ),
    Mutation("--lora-rank is ignored", "options.lora_rank or lora.RANK", "lora.RANK", CHANGES),
    Mutation(
        "--lora-scale is ignored",
        "lora.SCALE if options.lora_scale is None else options.lora_scale",
        "lora.SCALE",
        CHANGES,
    ),
    Mutation("--lora-dropout is ignored", "options.lora_dropout or lora.DROPOUT", "lora.DROPOUT", CHANGES),
    Mutation("--no-augment is ignored", "rng=rng if options.augment else None", "rng=rng", CHANGES),
    Mutation("--flip is ignored", "flip=options.flip)", "flip=False)", CHANGES),
    Mutation(
        "--no-augment means the contrary",
        'action = "store_false" if default else "store_true"',
        'action = "store_true" if default else "store_false"',
        (*COMMAND, *SETTINGS),
    ),
    Mutation(
        "--patience is ignored",
        "return plan.patience > 0 and done.stale >= plan.patience",
        "return False",
        fit("patience_ends_a_run_that_gets_no_better"),
    ),
    Mutation(
        "evaluate --card draws nothing",
        "            results.card(samples, predictions, classes, folder)\n",
        "            pass\n",
        fit("evaluate_draws_the_cards_images_where_it_is_told"),
    ),
    Mutation(
        "--first-caption is ignored by pretrain",
        "rng.random() < self.first_caption",
        "rng.random() < 0",
        FIRST_CAPTION,
    ),
    Mutation(
        "--first-caption is ignored by lit", "rng.random() < settings.first_caption", "rng.random() < 0", FIRST_CAPTION
    ),
    Mutation(
        "the rate of a resumed run begins anew",
        'parts["optimizer"], step=done.step)',
        'parts["optimizer"])',
        RESUMED,
    ),
    Mutation(
        "a resumed run of fit forgets the best state",
        'parts["kept" if plan.keep != "last" else "model"]',
        'parts["model"]',
        fit("the_best_state_outlives_an_interruption"),
    ),
    Mutation(
        "gradients of accumulated batches are added",
        "tree_map(lambda gradient: gradient / plan.accumulate, total)",
        "total",
        fit("what_is_accumulated_is_the_mean_over_its_parts"),
    ),
    Mutation(
        "--grad-checkpoint is ignored",
        "checkpoint=options.grad_checkpoint,",
        "",
        fit("what_is_to_save_memory_saves_memory"),
    ),
    Mutation(
        "a resumed run of pretrain begins its moments anew",
        'lay_out(model, parts["optimizer"], step=done.step)',
        "lay_out(model, step=done.step)",
        PRE_RESUMED,
    ),
    Mutation(
        "a search leaves out what rounding has put behind",
        "SLACK = 2.0**-9",
        "SLACK = 0.0",
        INDEX,
    ),
    Mutation(
        "a copy in an index loses the digest of its content",
        "return (*_of_file(copy.file), length",
        "return (*_of_file(copy.file)[:3], bytes(32), *_of_file(copy.file)[4:], length",
        INDEX,
    ),
    Mutation(
        "what was cut off in a cache of features counts as whole",
        "count = min(self.rows_file.stat()",
        "count = max(self.rows_file.stat()",
        ("tests/learn/test_fit.py::test_rows_that_do_not_fit_have_no_keys", *CUT_OFF),
    ),
    Mutation(
        "what is added to a cache of features takes the keys of what was there",
        "start=len(self.index))}",
        "start=0)}",
        CUT_OFF,
    ),
    Mutation(
        "memory stays free to be swapped on a Mac",
        'mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))',
        "0",
        WIRED,
    ),
    Mutation("memory stays wired after a training", "mx.set_wired_limit(wired)", "pass", WIRED),
    Mutation(
        "a run of fit goes on with another encoder",
        '"encoder": encoder["weights"]["digest"][:16], ',
        "",
        OWN,
    ),
    Mutation(
        "a run of fit goes on with other images",
        "digest_of([sample.sha256 for sample in samples])",
        '""',
        OWN,
    ),
    Mutation(
        "a run of lit goes on with another encoder",
        '"encoder": fingerprint(encoder)["digest"][:16], ',
        "",
        pretrain("lit_goes_on_with_its_own_encoder_alone"),
    ),
    Mutation(
        "lit saves no state",
        "batches, plan, state=state, ranks=ranks,",
        "batches, plan, state=None, ranks=ranks,",
        PRE_RESUMED,
    ),
    Mutation(
        "lit leaves its state beside the finished pair",
        "        state.path.unlink(missing_ok=True)\n",
        "",
        ("tests/pretrain/test_lit_tuning.py::test_the_pair_is_all_that_is_left",),
    ),
    Mutation(
        "all batches of a step draw the same noise",
        "drawn(plan.seed, number, ranks.rank)",
        "drawn(plan.seed, step, ranks.rank)",
        train("every_batch_draws_noise_of_its_own"),
    ),
    Mutation(
        "each batch changes its images as the one before",
        "np.random.default_rng([self.seed, number, j])",
        "np.random.default_rng([self.seed, j])",
        train("a_batch_is_a_function_of_its_number_and_ranks_share_it"),
    ),
    Mutation(
        "a setting that one of two runs lacks may be anything",
        "sorted(then.keys() | now.keys())",
        "sorted(then.keys() & now.keys())",
        train("a_state_of_other_settings_or_another_model_is_refused"),
    ),
    Mutation(
        "what a block adds is no larger where it is skipped for some",
        "[:, None, None] / (1 - rate)",
        "[:, None, None]",
        ("tests/learn/test_learner.py",),
    ),
    Mutation(
        "positions are decayed in pretraining",
        '(r".*pos_embed", Group(decay=0.0))',
        '(r".*pos_embed", Group(decay=1.0))',
        pretrain("matrices_are_decayed_and_positions_are_not"),
    ),
    Mutation(
        "held-out losses are too small by the size of a batch",
        "np.asarray(losses).sum()",
        "np.asarray(losses).mean()",
        pretrain("held_out_losses_are_means_over_the_images_and_their_first_captions"),
    ),
    Mutation(
        "the losses of a step are those of one rank",
        "group=ranks.group), ranks.mean(means)",
        "group=ranks.group), means",
        train("losses_are_means_over_the_ranks_and_the_score_is_that_of_the_first"),
    ),
    Mutation(
        "a score is divided by the number of ranks",
        "{name: ranks.size * value for name, value in ranks.mean(told).items()}",
        "{name: value for name, value in ranks.mean(told).items()}",
        train("losses_are_means_over_the_ranks_and_the_score_is_that_of_the_first"),
    ),
    Mutation(
        "a state of a model of other shapes is taken",
        "if found != expected or not all(",
        "if found.keys() != expected.keys() or not all(",
        train("a_state_of_other_settings_or_another_model_is_refused"),
    ),
    Mutation(
        "colours of training images are changed to one side",
        "rng.uniform(1 - amount, 1 + amount)",
        "rng.uniform(1 - amount, 1)",
        (AUGMENT + "colours_are_changed_to_either_side",),
    ),
    Mutation(
        "where no crop fits the upper left corner is taken",
        "return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2",
        "return 0.0, 0.0, w, h",
        (AUGMENT + "the_middle_is_taken_where_no_crop_fits",),
    ),
    Mutation(
        "the last operation of RandAugment is never drawn",
        "rng.integers(0, len(names), operations)",
        "rng.integers(0, len(names) - 1, operations)",
        (AUGMENT + "each_operation_is_drawn",),
    ),
    Mutation(
        "posterizing keeps as many bits as it should drop",
        "round(8 - 4 * abs(s))",
        "round(4 * abs(s))",
        (AUGMENT + "an_operation_of_no_strength_changes_nothing",),
    ),
    Mutation(
        "a resumed run forgets its patience",
        "done, parts = state.progress, state.load(kept)",
        "done, parts = Progress(**vars(state.progress) | {'stale': 0}), state.load(kept)",
        train("a_resumed_run_is_as_patient_as_one_that_was_not_stopped"),
    ),
    Mutation(
        "the warm-up of fit is longer than the run",
        "warm_up=min(self.type.warm_up_epochs * per_epoch, max(1, steps // 5)),",
        "warm_up=self.type.warm_up_epochs * per_epoch,",
        fit("the_first_step_goes_as_far_as_the_rate_says"),
    ),
    Mutation(
        "an image that changes while features are computed is not noticed",
        "if changed := [path for sha256, path in missing.items() if sha256 not in cache.index]:",
        "if changed := []:",
        fit("an_image_that_changes_while_features_are_computed_is_named"),
    ),
    Mutation(
        "all candidates are decayed alike",
        "Group(rate / base_rate, decay / base_decay if base_decay else 1.0,",
        "Group(rate / base_rate, 1.0,",
        fit("candidates_of_one_rate_are_decayed_each_as_it_should_be"),
    ),
    Mutation(
        "the candidate that starts as the probe learns at the highest rate",
        "settings.append((min(run.type.learning_rates), run.type.weight_decays[0]))",
        "settings.append((max(run.type.learning_rates), run.type.weight_decays[0]))",
        fit("each_candidate_learns_at_its_own_rate_and_the_one_that_starts_as_the_probe_at_the_lowest"),
    ),
    Mutation(
        "gradients of all candidates are cut together",
        ', clip_with=f"{i}")',
        ")",
        fit("gradients_of_a_candidate_are_cut_as_if_it_were_the_only_one"),
    ),
    Mutation(
        "a block runs for one image more than are drawn",
        "< mx.floor(batch * (1 - rate) + mx.random.uniform(key=draw))",
        "< batch",
        ("tests/learn/test_learner.py::test_of_an_odd_number_of_images_now_one_more_and_now_one_less_is_skipped",),
    ),
    Mutation(
        "a step is compiled for any number of shapes",
        "if len(traced) < MAX_TRACES:",
        "if True:",
        (f"{COMPILED}a_function_is_compiled_for_so_many_shapes_and_computed_for_others",),
    ),
    Mutation(
        "no step is compiled",
        "mx.compile(function, inputs=state, outputs=state)",
        "function",
        (f"{COMPILED}the_compiled_update_is_one_kernel_for_a_tensor_and_two_for_the_norm",),
    ),
    Mutation(
        "every step mixes its images alike",
        "rng = np.random.default_rng(np.array(drawn(options.seed, number, ranks.rank)[1]))",
        "rng = np.random.default_rng(0)",
        fit("every_step_mixes_its_images_in_a_way_of_its_own"),
    ),
    Mutation(
        "full skips no block by default",
        "drop_path=own.drop_path",
        "drop_path=options.drop_path or 0.0",
        fit("what_full_takes_by_default_may_be_said"),
    ),
    Mutation(
        "the lengths of DoRA's rows have a gradient",
        "lengths = mx.stop_gradient(mx.linalg.norm(super().adapted(), axis=1))",
        "lengths = mx.linalg.norm(super().adapted(), axis=1)",
        (LORA + "the_lengths_of_doras_rows_are_constants_for_the_gradient",),
    ),
    Mutation(
        "adapters of all blocks, -1, are on none",
        "count = depth if num_layers == -1 else num_layers",
        "count = num_layers",
        (LORA + "adapters_of_all_blocks_may_say_so_by_minus_one",),
    ),
    Mutation(
        "fuse takes a head folder without reading its head",
        "        _load_learned(head, info, loaded.model.vision)\n",
        "        _load_changes(head, kind, loaded.model.vision)\n",
        ("tests/learn/test_fit.py::test_weights_that_are_no_numbers_or_do_not_fit_are_refused_by_whoever_uses_them",),
    ),
    Mutation(
        "a processor that was loaded before a fork hangs after it",
        "        check_process()\n        steps = self.preprocessing\n",
        "        steps = self.preprocessing\n",
        ("tests/backend/test_threads.py::test_a_forked_process_works_or_says_spawn",),
    ),
    Mutation(
        "adapters are fused with any encoder",
        "    if info:\n        check_encoder(head, encoder, loaded)\n",
        "    if info:\n",
        (LORA + "fuse_makes_a_checkpoint_that_load_and_the_converter_read",),
    ),
    Mutation(
        "a run of fit is resumed with another seed",
        'may_change = ("learning_rate", "patience", "adapter_path")',
        'may_change = ("learning_rate", "patience", "adapter_path", "seed")',
        fit("a_run_is_resumed_with_its_own_settings_alone"),
    ),
    Mutation(
        "a card shows the best images as the worst",
        "key=lambda pair: quality(*pair))[:6]",
        "key=lambda pair: -quality(*pair))[:6]",
        (DENSE + "the_card_begins_with_the_worst_images",),
    ),
    Mutation(
        "a class that no image has counts as never found",
        "(np.diag(counts)[there > 0] / there[there > 0]).mean()",
        "(np.diag(counts) / np.maximum(there, 1)).mean()",
        ("tests/learn/test_metrics.py::test_recall_is_the_mean_over_the_classes_that_there_are",),
    ),
    Mutation(
        "precision and recall are swapped in the table",
        "(right, called), (right, there)",
        "(right, there), (right, called)",
        ("tests/learn/test_heads.py::test_the_table_has_precision_before_recall",),
    ),
    Mutation(
        "masks of training images are interpolated",
        "resample=Image.Resampling.NEAREST",
        "resample=Image.Resampling.BILINEAR",
        (DENSE + "a_mask_holds_the_numbers_of_its_classes_alone_at_whatever_size",),
    ),
    Mutation(
        "an example that a broken shard cuts is used",
        "                found = [(ending, content) for _, ending, content in members]\n",
        "                found: list[tuple[str, bytes]] = []\n                try:\n"
        "                    found.extend((ending, content) for _, ending, content in members)\n"
        "                except tarfile.TarError:\n                    pass\n",
        ("tests/pretrain/test_captioned.py::test_the_example_at_which_a_shard_breaks_is_left_out",),
    ),
    Mutation(
        "images of one caption are wrong answers to it",
        "return features.view(image, view), texts[chosen], keys[texts[0]]",
        "return features.view(image, view), texts[chosen], image",
        pretrain("images_of_one_caption_are_no_wrong_answers_to_it"),
    ),
    Mutation(
        "lit never takes the last view",
        "int(rng.integers(settings.views))",
        "int(rng.integers(max(1, settings.views - 1)))",
        pretrain("views_change_what_lit_learns"),
    ),
    Mutation(
        "predicted patches are drawn with the mean of the one before",
        "* deviation[:, 1:] + mean[:, 1:]",
        "* deviation[:, :-1] + mean[:, :-1]",
        pretrain("a_patch_that_is_predicted_is_drawn_with_its_own_mean"),
    ),
    Mutation(
        "a tokenizer learns from first captions alone",
        "for example in data.epoch(None) for caption in example.texts)",
        "for example in data.epoch(None) for caption in example.texts[:1])",
        pretrain("a_tokenizer_learns_from_all_captions"),
    ),
    Mutation(
        "a run of pretrain goes on with other ranks",
        ', "ranks": ranks.size}',
        "}",
        pretrain("pretraining_goes_on_with_as_many_ranks_as_it_was_begun_with"),
    ),
    Mutation(
        "an export replaces an image of the index",
        "inputs=[output, *inputs],",
        "inputs=[output],",
        ("tests/index/test_outputs.py::test_an_export_replaces_an_untrusted_file_only_when_told_to",),
    ),
    Mutation(
        "a page tells where on this disk a checkpoint lies",
        'name if made.get("commit") else Path(name).name',
        "name",
        ("tests/index/test_html.py::test_a_page_names_a_checkpoint_of_this_disk_by_its_folder_alone",),
    ),
    Mutation(
        "vectors of float32 in an index may be infinite",
        "if not -HALF_INFINITE < wide.min() <= wide.max() < HALF_INFINITE:",
        "if False:",
        ("tests/index/test_damaged_index.py::test_vectors_of_float32_are_checked_too",),
    ),
    Mutation(
        "who reads an index does not wait for a writer",
        "BUSY_SECONDS = 60.0",
        "BUSY_SECONDS = 0.0",
        ("tests/index/test_reader.py::test_who_reads_waits_until_a_writer_is_done",),
    ),
    Mutation(
        "a truncated image has no thumbnail",
        "policy=FAST).rgb((THUMBNAIL",
        'policy=type(FAST)(decode="fast", truncated="refuse")).rgb((THUMBNAIL',
        ("tests/index/test_html.py::test_what_is_there_of_an_image_is_enough_for_its_thumbnail",),
    ),
    Mutation(
        "the progress of a resumed run begins at nothing",
        "watch.on_progress(done.step)",
        "watch.on_progress(1)",
        train("the_progress_of_a_resumed_run_begins_where_it_was"),
    ),
    Mutation(
        "evaluate keeps its notes on DATA to itself",
        "(*dataset.notes, *seen(samples, loaded.trained_on))",
        "tuple(seen(samples, loaded.trained_on))",
        ("tests/learn/test_fit.py::test_evaluate_and_predict_print_a_table_and_the_best_labels",),
    ),
    Mutation(
        "a fused model does not say its dtype",
        ' | {"torch_dtype": dtype_name(model.dtype)}',
        "",
        (LORA + "fuse_makes_a_checkpoint_that_load_and_the_converter_read",),
    ),
    Mutation(
        "the pooling head of an encoder is decayed in full",
        r'frozen = [r"encoder\.head\..*", *(rf"encoder',
        'frozen = [*(rf"encoder',
        fit("the_encoders_own_pooling_head_stays_as_it_is"),
    ),
    Mutation(
        "boxes that nobody is sure of are dropped",
        "MAX_BOXES = 0.05, 1000, 100",
        "MAX_BOXES = 0.5, 1000, 100",
        (DENSE + "a_box_that_nobody_is_sure_of_is_kept_and_not_printed",),
    ),
    Mutation(
        "boxes that nobody is sure of are printed",
        "        if score >= SURE\n",
        "        if score >= 0\n",
        (DENSE + "a_box_that_nobody_is_sure_of_is_kept_and_not_printed",),
    ),
    Mutation(
        "colours of images with masks or boxes stay",
        "        image = jittered(image, COLOUR, rng)\n",
        "        pass\n",
        (DENSE + "colours_of_training_images_are_changed",),
    ),
    Mutation(
        "the betas of pretrain and lit are ignored",
        "            betas=(0.9, 0.95),\n",
        "",
        pretrain("the_betas_are_those_of_pretraining"),
    ),
    Mutation(
        "lit goes on with other views",
        "if name not in MAY_CHANGE}",
        'if name not in (*MAY_CHANGE, "views")}',
        pretrain("lit_goes_on_with_as_many_views_as_it_was_begun_with"),
    ),
    Mutation(
        "gradients of fit are cut at 1 by default",
        "clip: float = 3.0",
        "clip: float = 1.0",
        LENGTH,
    ),
    Mutation(
        "a long average forgets ten times as fast",
        "MAX_AVERAGE = 0.999",
        "MAX_AVERAGE = 0.99",
        train("a_long_average_keeps_999_parts_of_1000_at_each_step"),
    ),
    Mutation(
        "a state that cannot be written leaves what there is of it",
        "            beside.unlink(missing_ok=True)\n",
        "",
        fit("a_state_that_cannot_be_written_is_one_line_and_the_one_before_is_kept"),
    ),
    Mutation(
        "a box has no loss where it is seen from its edge",
        "weight = mx.maximum(wanted, MIN_WEIGHT) * answers",
        "weight = wanted * answers",
        ("tests/learn/test_fcos.py::test_a_box_is_learned_though_it_is_seen_from_its_edge_alone",),
    ),
    Mutation(
        "the weakest penalty of the probe is not tried",
        "range(1, -7, -1)",
        "range(1, -6, -1)",
        ("tests/learn/test_heads.py::test_the_linear_probe_is_the_one_that_val_likes_best",),
    ),
    Mutation(
        "a short run is evaluated more often than twenty times",
        "max(1, -(-steps // EVALUATIONS))",
        "max(1, steps // EVALUATIONS)",
        fit("a_run_is_evaluated_some_twenty_times_where_nobody_says_how_often"),
    ),
    Mutation(
        "training goes on without the dropout of its adapters",
        "{name: parameters[name] for name in PARAMETERS}",
        '{name: parameters[name] for name in ("rank", "scale")}',
        fit("training_goes_on_with_the_dropout_of_its_adapters"),
    ),
    Mutation(
        "all blocks are skipped for the same images",
        "_for_some(run, x, rate, keys[number])",
        "_for_some(run, x, rate, keys[0])",
        ("tests/learn/test_learner.py::test_each_block_is_skipped_for_images_of_its_own",),
    ),
    Mutation(
        "held-out images of native encoders are squeezed",
        "ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)",
        "image.resize((size[1], size[0]), Image.Resampling.BICUBIC)",
        (CAPTIONED + "a_held_out_image_of_a_native_encoder_is_cropped_in_its_middle_and_not_squeezed",),
    ),
    Mutation(
        "an encoder learns at the rate of the next width",
        "if self.vision.hidden_size <= width), 4e-4)",
        "if self.vision.hidden_size < width), 4e-4)",
        (PRETRAIN_RUNS + "each_width_has_the_papers_rate",),
    ),
    Mutation(
        "samples are of training images where others are held out",
        "shown = held_out[:4] or first_examples(data, as_is, grid, 4)",
        "shown = first_examples(data, as_is, grid, 4)",
        (PRETRAIN_RUNS + "samples_are_drawn_of_held_out_images_where_there_are_any",),
    ),
    Mutation(
        "a run that goes on elsewhere has a tokenizer of its own",
        "tokenizer, folder if resume else start)",
        "tokenizer, folder if resume else None)",
        (PRETRAIN_RUNS + "a_run_that_goes_on_elsewhere_keeps_its_words",),
    ),
    Mutation(
        "a run goes on with other labels",
        "digest_of([dataset.classes, *(_content(sample.target) for sample in samples)])",
        "digest_of(dataset.classes)",
        OWN,
    ),
    Mutation(
        "a mask is known by its name",
        "return Path(target) if isinstance(target, str) else target",
        "return target",
        OWN,
    ),
    Mutation(
        "a run goes on with other captions",
        "(example.name, example.image, example.texts) for example",
        "(example.name, example.image) for example",
        CAPTIONS,
    ),
    Mutation(
        "shards of the same names are the same data",
        "digest_of((file.name, file) for file in data.files)",
        "digest_of(file.name for file in data.files)",
        CAPTIONS,
    ),
    Mutation(
        "a run goes on with another tokenizer of its size",
        "digest_of([tokenizer.backend.to_str()])",
        '""',
        pretrain("a_run_goes_on_with_its_own_tokenizer_alone"),
    ),
    Mutation(
        "two runs into one target write one state",
        "with locked(folder, patience=0) if rank == 0 else nullcontext():",
        "with nullcontext():",
        train("one_run_at_a_time_has_a_target"),
    ),
    Mutation(
        "a state of an exploded loss is kept",
        "is_pending and loss <= EXPLODED * (1 + done.first_loss), False",
        "is_pending, False",
        (*fit(WITH_LESS), *pretrain(WITH_LESS)),
    ),
    Mutation(
        "a pretraining goes on at no other rate",
        'MAY_CHANGE = ("learning_rate", "steps_per_report",',
        'MAY_CHANGE = ("steps_per_report",',
        pretrain(WITH_LESS),
    ),
    Mutation(
        "weights that are no numbers are loaded",
        'is not None:\n        raise ValueError(f"{file} is damaged: {name} has values',
        '== 0:\n        raise ValueError(f"{file} is damaged: {name} has values',
        ("tests/learn/test_fit.py::test_weights_that_are_no_numbers_or_do_not_fit_are_refused_by_whoever_uses_them",),
    ),
    Mutation(
        "a run that fails before its first state leaves its tokenizer",
        "            if rank == 0 and not state.is_file():\n                discard(folder)\n",
        "",
        train("a_run_that_fails_without_a_state_leaves_only_what_is_not_its_own"),
    ),
    Mutation(
        "a spreadsheet computes a label",
        "if FORMULA.match(cell) else cell",
        "if False else cell",
        ("tests/learn/test_fit.py::test_a_label_is_text_on_the_card_and_in_a_spreadsheet",),
    ),
    Mutation(
        "Markdown acts on a label",
        "_as_text(cell) for cell in row",
        "cell for cell in row",
        ("tests/learn/test_fit.py::test_a_label_is_text_on_the_card_and_in_a_spreadsheet",),
    ),
    Mutation(
        "a full disk does not say what to do",
        'if error.errno in FULL else ""',
        'if error.errno in () else ""',
        ("tests/test_whole_or_nothing.py::test_a_file_that_may_not_grow_is_one_line_and_leaves_nothing",),
    ),
)
