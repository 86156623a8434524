"""Faults in what is said and shown of results, in labels and captions that are read, and in indexes and their pages."""

from tests.mutations import Mutation

FIT, DENSE = (f"tests/learn/test_{name}.py::test_" for name in ("fit", "dense"))
HTML, DAMAGED = (f"tests/index/test_{name}.py::test_" for name in ("html", "damaged_index"))

DATES = ("tests/embed/test_dates.py",)
NEAREST = ("tests/index/test_nearest.py",)
DUPLICATES = ("tests/index/test_duplicates.py",)

HOUR = "tests/cli/test_first_hour.py::test_"

RESULTS = (
    Mutation(
        "commands run a checkpoint in its own dtype",
        "default=None if own else AUTO, metavar",
        "default=None, metavar",
        (HOUR + "a_half_checkpoint_runs_in_what_suits_the_machine",),
    ),
    Mutation(
        "an index takes another dtype with -m",
        'names = ("dtype", "pool",',
        'names = ("pool",',
        (HOUR + "an_index_keeps_the_dtype_that_it_was_made_with",),
    ),
    Mutation(
        "nothing found is no failure",
        "if not self.files and not self.problems:",
        "if False:",
        (HOUR + "a_kind_of_failure_has_one_exit_code_in_every_verb",),
    ),
    Mutation(
        "images that fail are not counted",
        "        self.append(path)\n",
        "",
        (HOUR + "a_kind_of_failure_has_one_exit_code_in_every_verb",),
    ),
    Mutation(
        "a note is written each time",
        "if text in _shown.notes:",
        "if False:",
        (HOUR + "a_note_is_written_once",),
    ),
    Mutation(
        "what begins is not shown",
        "        self._begin(words, 1, desc",
        "        dict(desc",
        (HOUR + "a_bar_stands_at_nothing_with_what_is_happening",),
    ),
    Mutation(
        "a step's memory without its activations",
        "20 * parameters + 4 * kept",
        "20 * parameters",
        (HOUR + "the_memory_that_info_computes_is_what_a_pass_and_a_step_take",),
    ),
    Mutation(
        "the size of a download is not said",
        "if size := sum(held.get(name, 0) for name in absent):",
        "if size := 0:",
        ("tests/checkpoint/test_hub.py::test_the_size_of_a_download_is_said_before_it_starts_and_info_needs_none",),
    ),
    Mutation(
        "--labels are compared without Unicode's one form",
        "allowed = [same_form(name) for name in labels or dataset.classes]",
        "allowed = list(labels or dataset.classes)",
        (FIT + "the_list_of_labels_may_be_in_another_unicode_form",),
    ),
    Mutation(
        "boxes outside the image are kept",
        "seen = areas(found) > 0",
        "seen = areas(found) >= 0",
        (DENSE + "boxes_come_back_in_the_images_own_pixels",),
    ),
    Mutation(
        "five classes have a top5",
        "if len(classes) > 5:",
        "if len(classes) >= 5:",
        ("tests/learn/test_heads.py::test_scores_are_scikit_learns",),
    ),
    Mutation(
        "the table counts images that are said to have a class",
        "images += own.any(axis=1)",
        "images += own.any(axis=0)",
        (DENSE + "the_table_counts_the_images_that_have_a_class",),
    ),
    Mutation(
        "two classes of masks may have one name",
        "if duplicates := [name for name, count in Counter(names.values()).items() if count > 1]:",
        "if duplicates := list[str]():",
        ("tests/learn/test_mask_files.py::test_two_classes_of_one_name_are_refused",),
    ),
    Mutation(
        "endings in a shard may not be capitals",
        "yield key, ending.lower(), content.read()",
        "yield key, ending, content.read()",
        ("tests/pretrain/test_captioned.py::test_endings_in_a_shard_may_be_capitals",),
    ),
    Mutation(
        "lit says nothing of an image whose data end early",
        "                if image.note is not None:\n",
        "                if False:\n",
        ("tests/pretrain/test_lit_tuning.py::test_an_image_whose_data_end_early_is_used_and_named",),
    ),
    Mutation(
        "a bar of a page may be shorter than nothing",
        "{100 * min(1.0, max(0.0, card.bar)):.1f}",
        "{100 * min(1.0, card.bar):.1f}",
        (HTML + "a_bar_is_as_long_as_the_score_and_never_shorter_than_nothing",),
    ),
    Mutation(
        "a page may not be called in capitals",
        "if page.suffix.lower() not in ENDINGS:",
        "if page.suffix not in ENDINGS:",
        (HTML + "a_page_may_be_called_in_capitals",),
    ),
    Mutation(
        "vectors that a GPU reads may be infinite",
        "if not all(mx.isfinite(part).all().item() for part in rows):",
        "if not all(mx.eval(part) is None for part in rows):",
        (DAMAGED + "what_a_gpu_reads_is_checked_too",),
    ),
    Mutation(
        "an index called what?.db is another file",
        "name = quote(os.fsencode(path.absolute()))",
        "name = os.fsdecode(path.absolute())",
        ("tests/index/test_reader.py::test_an_index_may_have_any_name",),
    ),
    Mutation(
        "an embedding that is read may be infinite",
        "            if not np.isfinite(vector).all():\n",
        "            if False:\n",
        (DAMAGED + "vectors_of_float32_are_checked_too",),
    ),
    Mutation(
        "what an index says of a file may be anything",
        "if not all(isinstance(value, kind) for value, kind in zip(values, STAMP, strict=True)):",
        "if False:",
        (DAMAGED + "what_an_index_says_of_a_file_is_checked",),
    ),
    Mutation(
        "a move of what is not there removes what has the new name",
        "            self._columns(move.source)  # raises KeyError before the target's entry is removed\n",
        "",
        ("tests/index/test_writer.py::test_an_addition_that_fails_changes_nothing",),
    ),
    Mutation(
        "an image whose EXIF tells no date has none",
        "coalesce(nullif({}, '')",
        "coalesce({}",
        DATES,
    ),
    Mutation(
        "a span holds the day before which it ends",
        '("before", before, "<")',
        '("before", before, "<=")',
        DATES,
    ),
    Mutation(
        "the day of a photograph is that of its last change",
        "for at in (_values(block, first.get(EXIF)).get(TAKEN), first.get(CHANGED)):",
        "for at in (first.get(CHANGED), _values(block, first.get(EXIF)).get(TAKEN)):",
        DATES,
    ),
    Mutation(
        "a file that is recognised loses its date",
        "            found.taken = opened.taken\n",
        '            found.taken = "" if is_known else opened.taken\n',
        ("tests/embed/test_dates.py", "tests/embed/test_identity.py"),
    ),
    Mutation(
        "of two that embed into an index the folders of the last are remembered",
        '{**json.loads(found.get("sources", "{}")), **sources}',
        "{**sources}",
        ("tests/embed/test_query.py",),
    ),
    Mutation(
        "--update forgets what was excluded",
        'flags = {"exclude": [*options.exclude],',
        'flags = {"exclude": [],',
        ("tests/embed/test_query.py",),
    ),
    Mutation(
        "a preview that is upright is turned",
        "if preview.orientation == 1 and (turn < 5 or (wide < high) == (width < height)):",
        "if preview.orientation == 1:",
        ("tests/images/test_raw.py",),
    ),
    Mutation(
        "a preview of any size is taken for a raw photograph",
        "max(preview.size) >= min(ENOUGH, max(size) / 2)",
        "max(preview.size) >= 0",
        ("tests/images/test_raw.py",),
    ),
    Mutation(
        "the parts of a query have their own lengths",
        "total += weight * (one / np.linalg.norm(one))",
        "total += weight * one",
        NEAREST,
    ),
    Mutation(
        "a folder is any beginning of a name",
        '{"path >= ?": start + b"/",',
        '{"path >= ?": start,',
        NEAREST,
    ),
    Mutation(
        "what is subtracted is added",
        "queries += [query._replace(weight=-query.weight) for",
        "queries += [query._replace(weight=query.weight) for",
        ("tests/embed/test_query.py::test_images_and_words_combine",),
    ),
    Mutation(
        "two images are one by their vectors alone",
        "result[rows] = self._difference(way[rows]) <= MAX_DIFFERENCE",
        "result[rows] = True",
        DUPLICATES,
    ),
    Mutation(
        "images are compared without being laid over each other",
        "place = (place - step).clip(-MAX_CROP, MAX_CROP).astype(np.float32)",
        "place = place.astype(np.float32)",
        DUPLICATES,
    ),
    Mutation(
        "small versions join what their originals keep apart",
        "(sorted(largest) == sorted(pair) or small.same(np.array([largest]))[0])",
        "True",
        DUPLICATES,
    ),
    Mutation(
        "the smallest image is the one to keep",
        "return -member.height * member.width, -member.bytes,",
        "return member.height * member.width, -member.bytes,",
        DUPLICATES,
    ),
)
