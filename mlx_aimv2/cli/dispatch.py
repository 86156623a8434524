"""Runs `mlx-aimv2 VERB`: the list of verbs, their parser, and how a run ends, by an error or a signal."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import takewhile
from types import FrameType
from typing import Any, NoReturn

from mlx_aimv2 import __version__
from mlx_aimv2.cli.output import abandon, log, progress, say
from mlx_aimv2.config import LIT_CHECKPOINT
from mlx_aimv2.files import discard_unfinished

VERBS = {
    "embed": ("use", "PATH... -o FILE", "embed folders of images into an index, for search"),
    "search": ("use", "INDEX QUERY", "find images in an index by example images, by words or by both"),
    "duplicates": ("use", "INDEX", "list images that occur more than once in an index; nothing is deleted"),
    "classify": ("use", "IMAGE...", "rank your labels by how well they fit each image"),
    "map": ("use", "IMAGE... -m MODEL", "draw features of images: a colour for each patch, or how similar patches are"),
    "serve": ("use", "(INDEX | -m MODEL)", "open a web page to search, explore and teach, with an API for programs"),
    "info": ("use", "INDEX|MODEL", "show what an index or a checkpoint contains"),
    "convert": ("convert", "--hf-path MODEL", "convert a checkpoint to an MLX folder"),
    "compare": ("convert", "REFERENCE MODEL", "measure how far a model is from its reference, on images"),
    "export": ("convert", "-m MODEL -o FILE", "write an encoder for programs in Swift and C++, or for Core ML"),
    "fuse": ("convert", "--adapter-path HEAD", "merge adapters into the encoder"),
    "upload": ("convert", "FOLDER OWNER/NAME", "publish a converted folder on the Hugging Face Hub"),
    "fit": ("learn", "DATA -m MODEL -o HEAD", "learn your labels from a folder of images"),
    "predict": ("learn", "HEAD IMAGE...", "predict labels, masks or boxes for images"),
    "evaluate": ("learn", "HEAD DATA", "score a trained head on labelled images"),
    "pretrain": ("learn", "DATA -o DIR", "train an encoder on images with captions, with the paper's objective"),
    "lit": (
        "learn",
        "DATA --encoder DIR -o DIR",
        "tune a text encoder to a frozen encoder (LiT, locked-image tuning), to search by words",
    ),
    "bench": ("measure", "(-m MODEL | --random SIZE)", "measure the speed and memory of a model"),
}
"""Verb -> its group in the list, its required arguments, and its help."""

LARGE = "apple/aimv2-large-patch14-224"

EXAMPLES = {
    "embed": f"~/Pictures -m {LIT_CHECKPOINT} -o photos.db",
    "search": 'photos.db cat.jpg -a "in the snow" -s person --html found.html --open',
    "duplicates": "photos.db --html duplicates.html --open",
    "classify": 'cat.jpg dog.jpg --labels cat,dog,fox --template "a photo of a {}"',
    "map": "photo.jpg -m apple/aimv2-large-patch14-native --patch 9,12",
    "serve": "photos.db",
    "info": "photos.db",
    "convert": f"--hf-path {LARGE} --mlx-path large-4bit -q",
    "compare": f"{LARGE} large-4bit --images ~/Pictures",
    "export": f"-m {LARGE} -o encoder.mlxfn --input uint8",
    "fuse": "--adapter-path my-labels --save-path my-encoder",
    "upload": "large-4bit my-name/aimv2-large-4bit",
    "fit": f"photos/ -m {LARGE} -o my-labels",
    "predict": "my-labels new.jpg",
    "evaluate": "my-labels held-out/",
    "pretrain": "data/ -o encoder --size large --iters 20000 --validation held-out/",
    "lit": "data/ --encoder encoder -o pair",
    "bench": f"-m {LARGE} --batch 1 4 16",
}
"""Verb -> the example at the top of its help."""

FILES = (
    "bench", "classify_map", "embed_search_duplicates", "fit_predict_evaluate_fuse", "info_compare_export_upload",
    "pretrain_lit", "serve",
)  # fmt: skip
"""The files of this folder with verbs, which their names list. `convert` is in the package's `convert`."""

MORE = """\
mlx-aimv2 VERB --help   shows an example and the flags of a verb
mlx-aimv2 --version     shows the version
MLX_AIMV2_TRACEBACK=1   before a command shows the traceback of an error
README.md and docs/ in the repository explain the verbs."""
"""Below the list of verbs."""

WIDTH, FLAG_COLUMN = 100, 32
"""The width of help, however wide the terminal is, and the last column where descriptions begin: two columns after
`--grad-accumulation-steps N`."""

URL = re.compile(r"\w{2,}:/+(?:(?:www\.)?(?:huggingface|hf)\.co/([\w.-]+/[\w.-]+))?")
"""The start of a URL; for one of the Hub's, also the repository's name."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that stop a run: Ctrl-C, `kill`, a closed terminal."""

TRACEBACK = "MLX_AIMV2_TRACEBACK"
"""The environment variable that shows where an error came from."""


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    return argparse.HelpFormatter(prog, max_help_position=FLAG_COLUMN, width=width)


class Parser(argparse.ArgumentParser):
    """argparse's parser with an example in its help, in at most 100 columns, and one-line errors."""

    def __init__(self, *, example: str = "", **settings: Any) -> None:
        # No abbreviations: a half-typed flag must not act as another one.
        super().__init__(add_help=False, formatter_class=_formatter, allow_abbrev=False, **settings)
        self.example = example
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def format_help(self) -> str:
        """The help of a verb: an example, not wrapped so it can be copied, the required arguments, the flags."""
        return f"example: {self.prog} {self.example}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the arguments and where to find help, and exits with 2."""
        say(f"{message}; see {self.prog} --help")
        self.exit(2)


class ListParser(Parser):
    """The top-level parser, whose help lists the verbs in groups."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.verbs = self.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)

    def format_help(self) -> str:
        """The verbs in groups, one line each."""
        lines, last = [f"usage: {self.prog} VERB [flags]", "", self.description or ""], ""
        for verb, parser in self.verbs.choices.items():
            if (group := VERBS[verb][0]) != last:
                lines += ["", f"{group}:"]
                last = group
            lines.append(f"  {verb:<10}  {parser.description}")
        return "\n".join([*lines, "", MORE, ""])


def main(argv: list[str] | None = None) -> int:
    """The command line: `arguments -> exit code`.

    0 done, 1 some inputs failed or a bug in this program, 2 wrong use; 128 plus the signal's number for a run that a
    signal stopped.
    """
    return one_line_errors(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def convert_main() -> int:
    """The command `mlx_aimv2.convert`, the same as `mlx-aimv2 convert`."""
    return main(["convert", *sys.argv[1:]])


def parser(verb: str | None = None) -> ListParser:
    """The parser of the whole command line, or with the flags of one verb only, importing only that verb's file."""
    whole = ListParser(prog="mlx-aimv2", description="Apple's AIMv2 vision encoders on MLX: images in, features out.")
    whole.add_argument("--version", action="version", version=f"mlx-aimv2 {__version__}", help="show the version")
    for name, (_, usage, words) in VERBS.items():
        usage = f"mlx-aimv2 {name} {usage} [flags]"
        added = whole.verbs.add_parser(name, help=words, description=words, usage=usage, example=EXAMPLES[name])
        if verb in (None, name):
            function_of(name, "add")(added)
    return whole


def function_of(verb: str, kind: str) -> Callable[..., Any]:
    """A verb's function: `run(arguments) -> exit code`, or for the kind `add` one that adds its flags to a parser."""
    files = {name: f"mlx_aimv2.cli.{file}" for file in FILES for name in file.split("_")}
    found: Callable[..., Any] = getattr(import_module(files.get(verb, "mlx_aimv2.convert")), f"{kind}_{verb}")
    return found


def _dispatch(argv: list[str]) -> int:
    argv = argv or ["--help"]  # the name alone prints the help
    argv = ["--null" if word == "-0" else word for word in argv]  # as an argparse flag it would match -0.1 too
    verb = argv[0]
    whole = parser(verb)
    for word in argv:
        if (url := URL.match(word)) is not None and not os.path.lexists(word):
            advice = f"give the Hub name {url[1]}" if url[1] else "download it first and give the file"
            raise ValueError(f"{word} is a URL: {advice}")
    if verb not in VERBS and not verb.startswith("-"):
        whole.error(f"there is no verb {verb}{_nearest(verb, VERBS) or '; the verbs are ' + ', '.join(VERBS)}")
    _check_flags(whole.verbs.choices.get(verb, whole), argv)
    arguments, unknown = whole.parse_known_args(argv)
    if unknown:
        advice = "" if unknown[0].startswith("-") else " (words that belong together need quotes)"
        whole.verbs.choices.get(verb, whole).error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    return int(function_of(arguments.verb, "run")(arguments))


def _check_flags(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Ends the run at a flag that the verb does not have: argparse would first list the required ones."""
    for word in takewhile(lambda word: word != "--", words):
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in parser._option_string_actions:
            parser.error(f"unrecognized arguments: {word}{_nearest(flag, parser._option_string_actions)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def one_line_errors(work: Callable[[], int]) -> int:
    """Runs `work`; any error becomes one line on stderr and an exit code, never a traceback.

    Notes (`warnings.warn`) become one line each too. If the reader of stdout goes away, as `head` does, the run ends
    quietly; that of stderr may go away without effect. With MLX_AIMV2_TRACEBACK=1 the traceback comes first.
    """
    try:
        _usable_streams()
        with stoppable() as stops, progress():
            try:
                return work()
            except ImportError:
                if stops:  # a module in C whose import a signal stops ends like this
                    raise stops[0] from None
                raise
            finally:
                sys.stdout.flush()
    except SystemExit:
        raise
    except KeyboardInterrupt as stop:
        say("; ".join(map(str, stop.args)) or "stopped")
        code = stop.exit_code if isinstance(stop, Stopped) else 130
    except BaseException as error:  # a library written in Rust panics with an exception that is not an Exception
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            abandon(sys.stdout)
            return 0
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            log(traceback.format_exc())
        say(_sentence(error))
        code = 2 if isinstance(error, (ValueError, OSError)) else 1
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        abandon(sys.stdout)
    return code


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; `exit_code` is the shell's for it, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        """Takes the number of the signal."""
        super().__init__("stopped" if number == signal.SIGINT else f"stopped ({signal.Signals(number).name})")
        self.number = number
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[list[Stopped]]:
    """Inside this context a signal ends the run cleanly: half-written files are removed, finished work is kept.

    Yields a list to which a signal appends the exception it raises.

    The first signal raises `Stopped` in the main thread, which ends as after any error. Where Python swallows that, as
    in a weak reference's callback, it is sent once more. A second signal does not wait for the cleanup, nor for a
    thread in a slow decoder.

    Signals that the process ignores (SIGHUP under nohup) stay ignored, and handlers installed by others stay in place.
    Outside the main thread, where Python allows no signal handlers, nothing changes.
    """
    stops: list[Stopped] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if stops:
            discard_unfinished()
            os._exit(128 + number)
        stops.append(Stopped(number))
        raise stops[0]

    def swallowed(fault: sys.UnraisableHookArgs) -> None:
        if not isinstance(fault.exc_value, Stopped):
            before(fault)
            return
        stops.clear()
        # Here and now it would be swallowed again.
        again = threading.Timer(0.01, os.kill, (os.getpid(), fault.exc_value.number))
        again.daemon = True
        again.start()

    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    nobodys = (signal.SIG_DFL, signal.default_int_handler)
    ours = {number: old for number in SIGNALS if (old := signal.getsignal(number)) in nobodys}
    for number in ours:
        signal.signal(number, stop)
    before, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        yield stops
    finally:
        sys.unraisablehook = before
        others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
        # Python waits for its threads before it ends, and one may be in a slow decoder: a second signal still ends it.
        if not (stops and any(not thread.daemon for thread in others)):
            for number, old in ours.items():
                if signal.getsignal(number) is stop:
                    signal.signal(number, old)


def _sentence(error: BaseException) -> str:
    """An error's message in one line; the system's errors without their number."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"not enough memory{f' ({error})' if str(error) else ''}: use smaller images or batches or another model"
    if isinstance(error, ImportError):
        return f"{error}: a package is missing or broken; run pip install --force-reinstall mlx-aimv2"
    return f"a bug in mlx-aimv2, {type(error).__name__}: {error}; {TRACEBACK}=1 before the command shows where"


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads: only then is a broken pipe not a failure."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are always reported
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _usable_streams() -> None:
    """Opens streams that the caller closed, and lets through text that the terminal's encoding cannot represent."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
