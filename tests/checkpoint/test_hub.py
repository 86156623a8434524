"""Checkpoints come from the Hub at the right commit, without a file too many, and folders are uploaded to it.

Each case runs in a process of its own, because huggingface_hub reads its environment when it is imported.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_aimv2.checkpoint.hub import download
from mlx_aimv2.cli import main
from mlx_aimv2.config import RELEASED
from tests.loopback import TOKEN, Hub, serve
from tests.programs import HANGS
from tests.small_models import FIXED, edit_config, edit_weights

NAME = "apple/aimv2-large-patch14-224"
PIN = RELEASED[NAME.removeprefix("apple/")].commit
MAIN = "f" * 40
Result = subprocess.CompletedProcess[str]
DECOYS = ("mlx_model.safetensors", "flax_model.msgpack", "modeling_aimv2.py", "aimv2_overview_light.png")


@pytest.fixture
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture
def released(tmp_path, hub) -> Hub:
    """A repository as Apple's: its own layout at the pinned commit, another model on main, and files nobody needs."""
    folder = Path(shutil.copytree(FIXED, tmp_path / "released"))
    (folder / "expected.npz").unlink()
    for decoy in DECOYS:
        (folder / decoy).write_bytes(b"not to be fetched")
    (folder / "LICENSE").write_text("terms")
    (folder / "README.md").write_text("---\nlicense: apple-amlr\n---\n")
    hub.publish(NAME, PIN, folder)
    edit_config(folder, rms_norm_eps=0.25)
    hub.publish(NAME, MAIN, folder)
    return hub


def run(hub: Hub, home: Path, code: str, *arguments: object, **environment: str) -> Result:
    """Runs a line of Python against the loopback Hub."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; argv = sys.argv\n{code}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=inherited | hub.environment(home, **environment),
        timeout=HANGS,
    )


def requests_like(module: str, name: str) -> Exception:
    """An error as an HTTP library raises it, which is no OSError."""
    return type(name, (Exception,), {"__module__": module})("the peer\nwent away")


READ = """
from mlx_aimv2.cli.dispatch import one_line_errors
from mlx_aimv2.loading import read_source
def work():
    source = read_source(argv[1], revision=argv[2] if len(argv) > 2 else None)
    print(source.origin.repo, source.origin.commit, source.config.rms_norm_eps, source.layout)
    return 0
sys.exit(one_line_errors(work))
"""

READ_EACH = """
from mlx_aimv2.cli.dispatch import one_line_errors
from mlx_aimv2.loading import read_source
for name in argv[1:]:
    code = one_line_errors(lambda: read_source(name) and 0)
    print(code, end=chr(31), flush=True)
    print(end=chr(31), file=sys.stderr, flush=True)
"""


def read_each(hub: Hub, home: Path, names: Sequence[str], before: str = "") -> dict[str, Result]:
    """Reads several checkpoints in one process, which saves most of their time: name -> result."""
    result = run(hub, home, f"{before}{READ_EACH}", *names)
    assert result.returncode == 0, result.stderr
    found = zip(names, result.stdout.split("\x1f"), result.stderr.split("\x1f"), strict=False)
    return {name: subprocess.CompletedProcess([], int(code), "", errors) for name, code, errors in found}


def refusal(result: Result) -> str:
    assert result.returncode == 2, result.stdout
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("mlx-aimv2: ")
    assert "Traceback" not in result.stderr
    return line


@pytest.mark.slow
def test_a_released_checkpoint_comes_at_its_pinned_commit_with_only_the_files_needed(released, tmp_path):
    result = run(released, tmp_path / "home", READ, NAME)
    assert result.stdout.split() == [NAME, PIN, "1e-05", "apple"], result.stderr
    assert released.fetched() == [
        "LICENSE",
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    asked = len(released.requests)
    offline = run(released, tmp_path / "home", READ, NAME, HF_HUB_OFFLINE="1")
    assert offline.stdout == result.stdout, offline.stderr
    assert len(released.requests) == asked, "offline asks nothing"


def test_the_size_of_a_download_is_said_before_it_starts_and_info_needs_none(hub, tmp_path):
    hub.publish("somebody/aimv2", MAIN, FIXED)
    hub.repositories["somebody/aimv2"][MAIN]["pytorch_model.bin"] = b"the same again"  # which is not fetched
    size = (FIXED / "model.safetensors").stat().st_size
    result = run(hub, tmp_path / "home", MAIN_OF_CLI, "info", "somebody/aimv2", "--json")
    assert json.loads(result.stdout)["download"] == size, result.stderr
    assert not hub.fetched()
    line = f"mlx-aimv2: downloading {size / 1e6:.2f} MB of somebody/aimv2 into "
    for said in (True, False):
        result = run(hub, tmp_path / "home", MAIN_OF_CLI, "compare", FIXED, "somebody/aimv2")
        assert result.returncode == 0 and (line in result.stderr) == said, result.stderr
    asked = len(hub.fetched())
    result = run(hub, tmp_path / "home", MAIN_OF_CLI, "info", "somebody/aimv2", "--json")
    assert json.loads(result.stdout)["layout"] == "apple" and len(hub.fetched()) == asked


def test_a_revision_overrides_the_pinned_commit(released, tmp_path):
    result = run(released, tmp_path / "home", READ, NAME, "main")
    assert result.stdout.split() == [NAME, MAIN, "0.25", "apple"], result.stderr


def test_a_repository_of_somebody_else_comes_from_main_and_may_hold_shards(hub, tmp_path):
    from mlx_aimv2.conversion.folder import save_weights
    from mlx_aimv2.convert import convert

    defaults = save_weights.__kwdefaults__["shard_bytes"]
    save_weights.__kwdefaults__["shard_bytes"] = 400_000
    try:
        folder = convert(FIXED, tmp_path / "mlx", verify=False)
    finally:
        save_weights.__kwdefaults__["shard_bytes"] = defaults
    hub.publish("somebody/aimv2-mlx", MAIN, folder)
    result = run(hub, tmp_path / "home", READ, "somebody/aimv2-mlx")
    assert result.stdout.split() == ["somebody/aimv2-mlx", MAIN, "1e-05", "mlx-aimv2"], result.stderr
    assert sum(name.startswith("model-") for name in hub.fetched()) > 1


@pytest.mark.slow
def test_of_a_larger_model_only_the_shards_with_the_encoder_are_fetched(hub, tmp_path):
    prefix = "visual_tokenizer.backbone."
    encoder = {prefix + name: array for name, array in load_file(FIXED / "model.safetensors").items()}
    half = sorted(encoder)[: len(encoder) // 2]
    language = {f"llm.model.layers.{i}.mlp.up_proj.weight": np.zeros((3, 5), np.float32) for i in range(4)}
    first = {name: encoder[name] for name in half} | {"llm.model.norm.weight": np.ones(5, np.float32)}
    shards = [first, {name: encoder[name] for name in encoder if name not in half}, language]
    folder = tmp_path / "Ovis2"
    folder.mkdir()
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    backbone = json.loads((FIXED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"visual_tokenizer_config": {"backbone_config": backbone}}))
    hub.publish("AIDC-AI/Ovis2-1B", MAIN, folder)
    for offline in ("0", "1"):
        result = run(hub, tmp_path / "home", READ, "AIDC-AI/Ovis2-1B", HF_HUB_OFFLINE=offline)
        assert result.stdout.split() == ["AIDC-AI/Ovis2-1B", MAIN, "1e-05", "apple"], result.stderr
    assert [name for name in hub.fetched() if "0000" in name] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]


@pytest.mark.slow
def test_a_connection_cut_in_the_middle_is_resumed_where_it_broke(released, tmp_path):
    whole = bytes(range(256)) * 90_000  # 23 MB, because huggingface_hub writes ten at a time
    released.repositories[NAME][PIN]["vocab.json"] = whole
    released.cuts["vocab.json"] = [15_000_000]
    result = run(released, tmp_path / "home", READ, NAME)
    if result.returncode:  # older releases of huggingface_hub leave the second half to the next run
        assert "the download was interrupted; run it again" in refusal(result)
        result = run(released, tmp_path / "home", READ, NAME)
    assert result.stdout.split()[:2] == [NAME, PIN], result.stderr
    assert len(released.ranges) == 1
    assert 10_000_000 <= int(released.ranges[0].removeprefix("bytes=").rstrip("-")) <= 15_000_000
    assert [file.read_bytes() == whole for file in (tmp_path / "home").rglob("vocab.json")] == [True]


@pytest.mark.slow
def test_a_hub_that_breaks_down_in_the_middle_leaves_one_line_and_the_next_run_goes_on(released, tmp_path):
    released.down.add("model.safetensors")
    line = refusal(run(released, tmp_path / "home", READ, NAME))
    assert f"{NAME} at revision {PIN}: the " in line  # "Hub answered with an error" or "download was interrupted"
    offline = refusal(run(released, tmp_path / "home", READ, NAME, HF_HUB_OFFLINE="1"))
    assert NAME in offline
    assert "unset HF_HUB_OFFLINE to fetch the rest" in offline
    released.down.clear()
    released.requests.clear()
    assert run(released, tmp_path / "home", READ, NAME).returncode == 0
    assert released.fetched() == ["model.safetensors"], "files that came whole are kept"


REFUSED = {
    "large-patch14-224": (401, "GatedRepo", "requires a login; accept its terms there and set HF_TOKEN"),
    "large-patch14-336": (401, "", "the Hub"),
    "large-patch14-448": (404, "RepoNotFound", "neither a folder here nor a repository on the Hub"),
    "huge-patch14-224": (404, "RevisionNotFound", "the Hub has no such revision at revision "),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    with serve() as hub:
        hub.refuse = {f"apple/aimv2-{size}": (status, code) for size, (status, code, _) in REFUSED.items()}
        return read_each(hub, tmp_path_factory.mktemp("home"), list(hub.refuse))


@pytest.mark.parametrize("size", REFUSED)
def test_what_the_hub_refuses_is_one_line(refused, size):
    name, (*_, code, message) = f"apple/aimv2-{size}", REFUSED[size]
    line = refusal(refused[name])
    assert message in line
    assert name in line
    assert code != "RevisionNotFound" or RELEASED[f"aimv2-{size}"].commit in line


@pytest.mark.parametrize(
    "error",
    [
        requests_like("httpx", "ConnectError"),
        requests_like("requests.exceptions", "ChunkedEncodingError"),
        OSError(28, "No space left on device"),
        ConnectionResetError("reset"),
    ],
    ids=["httpx", "requests", "disk full", "reset"],
)
def test_what_breaks_in_the_network_is_one_line(monkeypatch, error):
    import huggingface_hub

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(ConnectionError, match=rf"{NAME}: the download was interrupted; run it again") as caught:
        download(NAME, revision=None, patterns=["config.json"])
    assert "\n" not in str(caught.value)


def test_a_mistake_of_ours_is_not_taken_for_the_network(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        download(NAME, revision=None, patterns=["config.json"])


def test_a_repository_without_safetensors_is_asked_for_its_pickled_weights_last(released, tmp_path):
    files = released.repositories[NAME][PIN]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    del files["mlx_model.safetensors"]
    line = refusal(run(released, tmp_path / "home", f"sys.modules['torch'] = None\n{READ}", NAME))
    assert "pytorch_model.bin: a pickled file, which only torch can read safely" in line
    assert "pytorch_model.bin" in released.fetched()


def test_a_repository_without_weights_says_what_was_looked_for(released, tmp_path):
    for name in ("model.safetensors", "mlx_model.safetensors"):
        del released.repositories[NAME][PIN][name]
    line = refusal(run(released, tmp_path / "home", READ, NAME))
    assert f"{NAME} at {PIN}: no weights; looked for model.safetensors.index.json" in line


MAIN_OF_CLI = "from mlx_aimv2.cli import main; sys.exit(main(argv[1:]))"


@pytest.mark.slow
def test_a_folder_is_uploaded_whole_and_loads_from_there(hub, tmp_path):
    name, folder = "somebody/aimv2-mlx", tmp_path / "mlx"
    flags = ("--hf-path", FIXED, "--mlx-path", folder, "--no-verify", "--upload-repo", name)
    result = run(hub, tmp_path / "home", MAIN_OF_CLI, "convert", *flags, HF_TOKEN=TOKEN)
    assert f"[INFO] Uploading to {hub.address}/{name}" in result.stderr
    assert result.stdout.strip() == str(folder)
    published = list(hub.repositories[name].values())[-1]
    assert published == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert f'load("{name}")' in published["README.md"].decode()
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    (folder / ".DS_Store").write_text("a file of the system")
    result = run(hub, tmp_path / "home", MAIN_OF_CLI, "upload", folder, name, HF_TOKEN=TOKEN)  # the repository is there
    assert result.stdout.strip() == f"{hub.address}/{name}", result.stderr
    assert "note: not part of a checkpoint, so not uploaded: .DS_Store" in result.stderr
    assert list(hub.repositories[name].values())[-1] == published | {
        "config.json": (folder / "config.json").read_bytes()
    }
    assert run(hub, tmp_path / "other", READ, name).stdout.split()[0] == name


CHECK_EACH = """
from mlx_aimv2.cli.dispatch import one_line_errors
from mlx_aimv2.checkpoint.hub import check_upload
for name in argv[1:]:
    one_line_errors(lambda: check_upload(name) or 0)
"""


def checked(hub: Hub, home: Path, *names: str, **environment: str) -> list[str]:
    """The lines that `check_upload` of each name ends in."""
    return run(hub, home, CHECK_EACH, *names, **environment).stderr.splitlines()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "an upload needs a token with write access: run hf auth login, or set HF_TOKEN"),
        ({"HF_TOKEN": "hf_wrong"}, "the Hub refuses (401); set HF_TOKEN to a token that may do this"),
        ({"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "nothing can be uploaded while HF_HUB_OFFLINE is set; unset it"),
    ],
    ids=["none", "unknown", "offline"],
)
def test_a_token_that_may_not_write_is_known_before_anything_is_converted(hub, tmp_path, environment, words):
    flags = ("--hf-path", FIXED, "--mlx-path", tmp_path / "mlx", "--upload-repo", "somebody/aimv2-mlx")
    line = refusal(run(hub, tmp_path / "home", MAIN_OF_CLI, "convert", *flags, **environment))
    assert line == f"mlx-aimv2: somebody/aimv2-mlx: {words}"
    assert not (tmp_path / "mlx").exists()
    assert not any(verb == "POST" for verb, _ in hub.requests)


def test_only_a_repository_that_the_token_may_write_to_passes(hub, tmp_path):
    hub.repositories |= {name: {MAIN: {}} for name in ("ours/there", "ours/closed")}
    hub.closed.add("ours/closed")
    names = ("somebody/new", "Somebody/New", "ours/new", "ours/there", "ours/closed", "theirs/new", "no-owner", "a/b/c")
    lines = checked(hub, tmp_path, *names, HF_TOKEN=TOKEN)
    wanted = [
        "ours/closed: the Hub refuses (403); set HF_TOKEN to a token that may do this",
        "theirs/new: the token is somebody's, who may write only to somebody, ours",
        "no-owner: not a Hub name of the form owner/name: put your name or an organisation's in front",
        "a/b/c: not a Hub name of the form owner/name",
    ]
    assert len(lines) == len(wanted), lines
    for line, words in zip(lines, wanted, strict=True):
        assert line.startswith(f"mlx-aimv2: {words}")
    assert not any(verb == "POST" for verb, _ in hub.requests), "asking makes no repository"
    hub.whoami |= {"auth": {"accessToken": {"role": "read"}}}
    assert "somebody/new: the token is read-only" in checked(hub, tmp_path, "somebody/new", HF_TOKEN=TOKEN)[0]


def test_a_hub_that_breaks_down_in_an_upload_leaves_the_command_that_goes_on(hub, tmp_path):
    name, folder = "somebody/aimv2-mlx", tmp_path / "an mlx folder"
    hub.down.add(name)
    flags = ("--hf-path", FIXED, "--mlx-path", folder, "--no-verify", "--upload-repo", name)
    line = refusal(run(hub, tmp_path / "home", MAIN_OF_CLI, "convert", *flags, HF_TOKEN=TOKEN))
    command = line.rpartition("resume with mlx-aimv2 ")[2]
    assert command == f"upload '{folder}' {name}"
    hub.down.clear()
    result = run(hub, tmp_path / "home", MAIN_OF_CLI, *shlex.split(command), HF_TOKEN=TOKEN)
    assert result.stdout.strip() == f"{hub.address}/{name}", result.stderr
    assert "model.safetensors" in list(hub.repositories[name].values())[-1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "nowhere is not a folder here: upload takes one written by convert, fuse or save"),
        ("head", "head is a head: upload takes checkpoints; mlx-aimv2 fuse makes one from a tuned encoder"),
        ("photos", "photos: no weights; looked for"),
        ("other", "other has its weights in mlx_model.safetensors: convert it first and upload the result"),
    ],
)
def test_what_is_no_checkpoint_of_ours_is_not_uploaded(tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.chdir(tmp_path)
    for folder in ("head", "photos"):
        Path(folder).mkdir()
    Path("head/head.json").touch()
    shutil.copytree(FIXED, "other")
    Path("other/model.safetensors").rename("other/mlx_model.safetensors")
    assert main(["upload", name, "somebody/x"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_network_the_answer_is_one_line_at_once(hub, tmp_path):
    result = run(hub, tmp_path / "home", READ, NAME, HF_ENDPOINT="http://no-such-host.invalid")
    line = refusal(result)
    assert "the Hub cannot be reached" in line and NAME in line
    assert len(result.stderr.strip().splitlines()) <= 1


def test_without_a_network_the_cache_serves(released, tmp_path):
    assert run(released, tmp_path / "home", READ, NAME).returncode == 0
    result = run(released, tmp_path / "home", READ, NAME, HF_ENDPOINT="http://no-such-host.invalid")
    assert result.returncode == 0, result.stderr


CONVERT_AND_NOTE = """
import json
import mlx.core
import safetensors
read = []
def noted(name, function):
    def note(path, *rest, **more):
        read.extend([name] * ("/snapshots/" in str(path)))
        return function(path, *rest, **more)
    return note
def note(event, arguments):
    # An opening by open(…, opener=) is told twice, by open with a mode and by os.open without one.
    if event == "open" and arguments[1] is not None and "/snapshots/" in str(arguments[0]):
        read.append(str(arguments[0]).rpartition("/")[2])
sys.addaudithook(note)
mlx.core.load, safetensors.safe_open = noted("weights", mlx.core.load), noted("header", safetensors.safe_open)
from mlx_aimv2.convert import convert
convert(argv[1], argv[2])
print(json.dumps(read))
"""


@pytest.mark.slow
def test_a_conversion_resolves_its_source_once_whatever_is_pushed_meanwhile(hub, tmp_path):
    folder = Path(shutil.copytree(FIXED, tmp_path / "released", ignore=shutil.ignore_patterns("*.npz")))
    hub.publish("some/body", PIN, folder)
    edit_weights(folder, lambda tensors: {name: array * np.float32(1.5) for name, array in tensors.items()})
    hub.on_request = lambda: len(hub.requests) == 2 and hub.publish("some/body", MAIN, folder)
    result = run(hub, tmp_path / "home", CONVERT_AND_NOTE, "some/body", tmp_path / "mlx")
    assert result.returncode == 0, result.stderr
    asked = [path.partition("?")[0] for _, path in hub.requests if "/revision/" in path]
    assert asked == ["/api/models/some/body/revision/main", f"/api/models/some/body/revision/{PIN}"]  # once by its name
    read = json.loads(result.stdout)
    assert (read.count("config.json"), read.count("header")) == (1, 1)
    assert read.count("weights") == 2  # once more to write them: the reference frees each block's as it goes
    report = json.loads((tmp_path / "mlx" / "fidelity.json").read_text())
    assert report["token_cosine"]["min"] == pytest.approx(1, abs=1e-12)
    assert PIN in (tmp_path / "mlx" / "README.md").read_text()
