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


FILE_CHANGES = fit("a_file_that_changes_after_it_was_checked_is_checked_again")
FEATURES = fit(
    "features_are_computed_again_for_whatever_decides_them",
    "a_half_checkpoint_in_its_own_dtype_is_no_other_ones_features",
)
EPOCHS = fit("every_epoch_takes_each_image_once_in_another_order")
MIXUP = fit("images_that_are_mixed_take_their_share_of_the_targets_with_them")
RESUMED = fit("a_run_that_was_stopped_and_resumed_equals_one_that_was_not")
CHANGES = fit("an_option_changes_what_is_learned")
RATE, LENGTH = fit("the_rate_falls_towards_the_end"), fit("gradients_are_cut_to_one_length")
BEST = fit("of_several_rates_the_best_is_kept_as_if_it_had_been_the_only_one")
COMMAND = fit("the_commands_flags_are_the_options")

SETTINGS = ("tests/test_settings.py",)

PRE_CHANGES = pretrain("an_option_changes_what_is_learned")
PRE_RESUMED = pretrain("a_run_that_was_stopped_and_resumed_equals_one_that_was_not")
FIRST_CAPTION = pretrain("the_first_caption_alone_is_as_if_there_were_no_others")
PRE_RATE, PRE_LENGTH = pretrain("the_rate_falls_towards_the_end"), pretrain("gradients_are_cut_to_one_length")

TRAINING = (
    Mutation(
        "the cache of files ignores when they were changed",
        "WHERE path = ? AND size = ? AND mtime_ns = ?",
        "WHERE path = ? AND size = ? AND 0 <= ?",
        FILE_CHANGES,
    ),
    Mutation(
        "the cache of files remembers those that may still change",
        "if (about := _about(path)) and about[1] < settled",
        "if (about := _about(path))",
        FILE_CHANGES,
    ),
    Mutation(
        "the cache of features ignores the preprocessing",
        '"preprocessing": asdict(processor.preprocessing),\n    }\n    return hashlib',
        "}\n    return hashlib",
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
        "np.random.default_rng((seed, 4, epoch))",
        "np.random.default_rng((seed, 4, 0))",
        pretrain("every_epoch_of_lit_takes_other_images_together"),
    ),
    Mutation(
        "mixup mixes pixels and not labels",
        "return losses if share == 1 else share * losses + (1 - share) * run.task.loss(outputs, other)",
        "return losses",
        MIXUP,
    ),
    Mutation(
        "mixup mixes labels and not pixels",
        "pixels = share * pixels + (1 - share) * pixels[order]",
        "pixels = share * pixels + (1 - share) * pixels",
        MIXUP,
    ),
    Mutation(
        "the share of patches that is to be hidden is what is seen",
        "mask[chance.permutation(patches)[:hidden]] = True",
        "mask[chance.permutation(patches)[hidden:]] = True",
        fit("the_mask_hides_its_share_of_the_patches"),
    ),
    Mutation(
        "full trains the first blocks, not the last",
        "for block in encoder.blocks[len(encoder.blocks) - layers :]:",
        "for block in encoder.blocks[:layers]:",
        fit("the_last_blocks_are_those_that_are_trained"),
    ),
    Mutation("fit cuts no gradient", "clipped(gradients, settings.clip, groups)", "gradients", LENGTH),
    Mutation(
        "pretrain cuts no gradient",
        "optimizer.update(model, optimise.clipped(gradient))\n    weights",
        "optimizer.update(model, gradient)\n    weights",
        PRE_LENGTH,
    ),
    Mutation(
        "a model is trained as it is used, without dropout",
        "        model.train()\n        loss, gradients",
        "        loss, gradients",
        CHANGES,
    ),
    Mutation(
        "a box is scored without how near its centre is",
        "np.sqrt(_sigmoid(classes) * _sigmoid(centre)[:, None])",
        "_sigmoid(classes)",
        fit("a_box_far_from_its_centre_scores_less"),
    ),
    Mutation(
        "epochs count batches where several make a step",
        "per_epoch = max(1, batches.per_epoch // accumulate)",
        "per_epoch = max(1, batches.per_epoch)",
        fit("epochs_count_whole_batches_where_they_are_accumulated"),
    ),
    Mutation("all candidates learn at one rate", "Group(rate / base_rate,", "Group(1.0,", BEST),
    Mutation("the worst candidate is kept", "int(np.argmax(scores(model)))", "int(np.argmin(scores(model)))", BEST),
    Mutation(
        "a head ignores the dtype that it was trained in",
        'dtype=dtype or wanted.get("dtype")',
        "dtype=dtype",
        fit("a_head_computes_in_the_dtype_that_it_was_trained_in"),
    ),
    Mutation(
        "held-out images are changed like those for training",
        "pool.submit(task.pixels, sample.path, processor) for sample",
        "pool.submit(lambda s: (task.example(s, processor, chance=np.random.default_rng())['pixels'], 0), sample)"
        " for sample",
        fit("what_is_held_out_is_seen_as_it_is", "scores_are_those_of_the_images_as_they_are"),
    ),
    Mutation(
        "held-out images of pretrain are cropped like those for training",
        "Preparation(settings.vision, seed=settings.seed),",
        "Preparation(settings.vision, seed=settings.seed, augmentation=settings.augmentation),",
        pretrain("held_out_images_are_neither_cropped_nor_changed"),
    ),
    Mutation(
        "features of lit beyond what is computed at a time overwrite the first",
        "done = len(texts) * views - len(pending)",
        "done = 0",
        pretrain("views_of_the_whole_image_change_nothing_however_many_there_are"),
    ),
    Mutation("a resumed native run draws other grids", "grids(settings, first + 1)", "grids(settings, 1)", PRE_RESUMED),
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
        'if name not in ("steps_per_report", "save_every")}',
        "}",
        pretrain("how_often_a_run_reports_and_saves_may_change_when_it_goes_on"),
    ),
    Mutation("settings may be endless", "not abs(number) <= MAX_FLOAT", "number != number", SETTINGS),
    Mutation("settings may be no number", "not abs(number) <= MAX_FLOAT", "abs(number) > MAX_FLOAT", SETTINGS),
    Mutation("ranges of settings are not checked", 'elif not about["holds"](value):', "elif False:", SETTINGS),
    Mutation(
        "the rate of fit does not fall",
        "rate = settings.learning_rate * cosine(done.step, steps=settings.steps, warm_up=settings.warm_up)",
        "rate = settings.learning_rate",
        RATE,
    ),
    Mutation(
        "the rate of pretrain and lit does not fall",
        "fall = optim.cosine_decay(rate, max(1, steps - warm_up))",
        "fall = optim.linear_schedule(rate, rate, 1)",
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
    Mutation("--no-augment is ignored", "chance=chance if options.augment else None", "chance=chance", CHANGES),
    Mutation("--flip is ignored", "flip=options.flip)", "flip=False)", CHANGES),
    Mutation(
        "--no-augment means the contrary",
        'action = "store_false" if default else "store_true"',
        'action = "store_true" if default else "store_false"',
        (*COMMAND, *SETTINGS),
    ),
    Mutation(
        "--patience is ignored",
        "return settings.patience > 0 and done.stale >= settings.patience",
        "return False",
        fit("patience_ends_a_run_that_gets_no_better"),
    ),
    Mutation(
        "evaluate --card draws nothing",
        "loaded.task.card(samples, predictions, loaded.classes, Path(card))",
        "pass",
        fit("evaluate_draws_the_cards_images_where_it_is_told"),
    ),
    Mutation(
        "--first-caption is ignored by pretrain",
        "chance.random() < self.first_caption",
        "chance.random() < 0",
        FIRST_CAPTION,
    ),
    Mutation(
        "--first-caption is ignored by lit", "chance.random() < first_caption", "chance.random() < 0", FIRST_CAPTION
    ),
    Mutation(
        "a resumed run of fit counts its steps from zero",
        'found.second, found.progress["step"]',
        "found.second, 0",
        RESUMED,
    ),
    Mutation(
        "a resumed run of fit forgets the best state",
        "best, done = found.best, Progressed",
        "done = Progressed",
        fit("the_best_state_outlives_an_interruption"),
    ),
    Mutation(
        "gradients of accumulated batches are added",
        "tree_map(lambda gradient: gradient / settings.accumulate, total)",
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
        "    optimizer.state = state\n    mx.eval",
        "    mx.eval",
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
        "copy.size, copy.mtime_ns, sha256)",
        "copy.size, copy.mtime_ns, bytes(32))",
        INDEX,
    ),
)
