"""`auto` chooses the dtype that suits the machine, and a model has that dtype throughout."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_aimv2 import bundled, load
from mlx_aimv2.backend import device
from mlx_aimv2.backend.device import Machine
from mlx_aimv2.conversion import fidelity
from mlx_aimv2.convert import convert
from mlx_aimv2.embed.cache import differences
from mlx_aimv2.embed.encode import Embedder, Pooling
from mlx_aimv2.learn.head_folder import check_encoder, describe_encoder
from mlx_aimv2.loading import read_source

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"

CPU, CUDA, NEXT = Machine("cpu", "a CPU"), Machine("cuda", "a GPU"), Machine("metal", "a later chip")
M1, M2, M3, M5 = (Machine("metal", f"M{family - 12}", family) for family in (13, 14, 15, 17))

FITS, TOO_LARGE = 32751.0, 32753.0


def with_report(folder: Path, largest: object) -> Path:
    (folder / "fidelity.json").write_text(json.dumps({"largest_activation": {"block": "blocks.1", "value": largest}}))
    return folder


@pytest.fixture
def copy(tmp_path):
    """A copy of the fixed reference checkpoint that a test may add to."""
    shutil.copytree(REFERENCE / "fixed", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("machine", "unknown", "with_headroom", "without_headroom"),
    [
        (CPU, "float32", "float32", "float32"),
        (M1, "float16", "float16", "bfloat16"),
        (M2, "float16", "float16", "bfloat16"),
        (M3, "bfloat16", "float16", "bfloat16"),
        (M5, "bfloat16", "float16", "bfloat16"),
        (NEXT, "bfloat16", "float16", "bfloat16"),
        (CUDA, "bfloat16", "float16", "bfloat16"),
    ],
    ids=lambda value: getattr(value, "chip", value),
)
def test_auto_is_what_suits_the_machine_and_the_report(tmp_path, machine, unknown, with_headroom, without_headroom):
    assert device.suited_dtype(tmp_path, on=machine) == unknown
    assert device.suited_dtype(with_report(tmp_path, FITS), on=machine) == with_headroom
    assert device.suited_dtype(with_report(tmp_path, TOO_LARGE), on=machine) == without_headroom


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"largest_activation": {}}', '{"largest_activation": {"value": "x"}}']
)
def test_a_report_that_says_nothing_is_no_report(tmp_path, text):
    (tmp_path / "fidelity.json").write_text(text)
    assert device.largest_activation(tmp_path) is None


def test_the_converters_report_is_read(tmp_path):
    folder = convert(REFERENCE / "outlier", tmp_path / "mlx")
    report = json.loads((folder / fidelity.FILE).read_text())
    assert device.largest_activation(folder) == report["largest_activation"]["value"] > 1000


@pytest.fixture
def on(monkeypatch):
    """A function that makes MLX say it computes on another device, with these facts about it."""

    def become(kind, **facts):
        device_type = mx.cpu if kind == "cpu" else mx.gpu
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device_type))
        monkeypatch.setattr(mx, "device_info", lambda which: facts)
        monkeypatch.setattr(mx.metal, "is_available", lambda: kind == "metal")

    return become


@pytest.mark.parametrize(
    ("facts", "family"),
    [
        ({"device_name": "Apple M1", "architecture": "applegpu_g13g"}, 13),
        ({"device_name": "Apple M2 Ultra", "architecture": "applegpu_g14d"}, 14),
        ({"device_name": "Apple M5 Max", "architecture": "applegpu_g17s"}, 17),
        ({"device_name": "Apple M9"}, None),
    ],
)
def test_a_macs_chip_is_known_by_its_architecture(on, facts, family):
    on("metal", **facts)
    assert device.machine() == Machine("metal", facts["device_name"], family)


@pytest.mark.parametrize("machine", [CPU, M1, M3, M5, NEXT, CUDA], ids=lambda machine: machine.chip)
@pytest.mark.parametrize("value", [None, "0", "1"])
def test_tf32_is_recorded_where_there_is_any_and_nobody_turned_it_off(tmp_path, monkeypatch, machine, value):
    """In the report on a conversion, in an index and in a head: but it keeps none of them from being used."""
    monkeypatch.delenv(device.TF32)
    if value is not None:
        monkeypatch.setenv(device.TF32, value)
    monkeypatch.setattr(device, "machine", lambda: machine)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 1)  # MLX was used before
    wanted = machine in (M5, NEXT, CUDA) and value != "0"
    report = fidelity.compare(REFERENCE / "fixed", REFERENCE / "fixed", images=bundled.photographs()[:1])
    assert report["tf32"] == wanted == any("TensorFloat32" in line for line in report["warnings"])
    loaded = read_source(REFERENCE / "fixed").load()
    head, index = describe_encoder(loaded, loaded.processor), Embedder(loaded, Pooling.of(loaded.model)).description
    assert head["tf32"] == index["tf32"] == wanted
    assert differences(index, index | {"tf32": not wanted}) == ([], [])
    check_encoder(tmp_path, {name: head[name] for name in head if name != "tf32"}, loaded)  # as it was written before


MEASURE = """
import os, sys
{before}
from mlx_aimv2.convert import convert
{used}
convert(sys.argv[1], sys.argv[2], verify={verify})
print(os.environ.get("MLX_ENABLE_TF32"))
"""


@pytest.mark.parametrize(
    ("before", "used", "verify", "wanted"),
    [
        ("", "", True, "0"),
        ("", "", False, "None"),  # nothing is measured
        ("", "import mlx.core as mx; mx.eval(mx.ones(3) @ mx.ones(3))", True, "None"),  # it may have been read
        pytest.param("os.environ['MLX_ENABLE_TF32'] = '1'", "", True, "1", marks=pytest.mark.slow),
    ],
    ids=["fresh", "without proof", "used before", "the user's own"],
)
def test_a_conversion_turns_tf32_off_for_its_reference(tmp_path, before, used, verify, wanted):
    program = MEASURE.format(before=before, used=used, verify=verify)
    environment = {name: value for name, value in os.environ.items() if name != device.TF32}
    command = [sys.executable, "-c", program, str(REFERENCE / "fixed"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [wanted]


def test_a_gpu_that_is_not_metals_is_cudas(on):
    on("cuda", device_name="a GPU", architecture="sm_90")
    assert device.machine() == CUDA


@pytest.mark.parametrize(
    ("tag", "macos", "said"),
    [
        ("py3-none-macosx_14_0_arm64", "26.3", "built for macOS 14"),
        ("py3-none-macosx_26_0_arm64", "26.1", "update macOS"),
        ("py3-none-macosx_26_0_arm64", "26.2", None),
        ("py3-none-any", "27.0", None),
    ],
)
def test_an_m5_without_its_kernels_is_told(monkeypatch, tmp_path, tag, macos, said):
    """By the wheel of mlx-metal that is installed and the system that it runs on."""
    about = tmp_path / "mlx_metal-99.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-metal\nVersion: 99\n")
    (about / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {tag}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    note = device.advice(M5)
    assert note is None if said is None else said in note
    assert device.advice(M3) is None


def test_a_slow_blas_is_told(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(device, "is_x86", lambda: True)
    for count, threads, said in ((2, 1, False), (2, 2, True), (64, 64, False)):
        monkeypatch.setattr(device, "cpu_count", lambda count=count: count)
        monkeypatch.setattr(device, "suits_haswell", lambda: False)
        monkeypatch.setattr(device, "blas_threads", lambda threads=threads: threads)
        monkeypatch.setattr(device, "openblas", lambda: None)
        assert "LD_PRELOAD=libopenblas.so.0" in device.advice(CPU)
        assert ("OPENBLAS_NUM_THREADS=1" in device.advice(CPU)) == (count == 2)  # many cores are OpenBLAS's own
        monkeypatch.setattr(device, "openblas", lambda: ...)
        assert ("OPENBLAS_NUM_THREADS=1" in (device.advice(CPU) or "")) == said
    monkeypatch.setattr(device, "is_x86", lambda: False)
    monkeypatch.setattr(device, "cpu_count", lambda: 2)
    assert device.advice(CPU) is None


@pytest.mark.parametrize(
    ("vendor", "flags", "told"),
    [
        ("AuthenticAMD", "avx2 avx512f", True),
        ("AuthenticAMD", "avx2", False),
        ("GenuineIntel", "avx2 avx512f", False),
        (None, "", False),
    ],
)
def test_openblas_kernels_that_are_slow_on_amd_are_told_until_others_are_chosen(
    tmp_path, monkeypatch, vendor, flags, told
):
    if vendor is not None:
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags} vaes\n")
    suits = device.suits_haswell(tmp_path / "cpuinfo")
    assert suits == told
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    for name, value in {"openblas": ..., "blas_threads": 1, "suits_haswell": suits}.items():
        monkeypatch.setattr(device, name, lambda value=value: value)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    assert ("OPENBLAS_CORETYPE=Haswell" in (device.advice(CPU) or "")) == told
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    assert device.advice(CPU) is None


def test_load_takes_auto(on, copy):
    on("cpu")
    assert load(copy, dtype="auto")[0].dtype == mx.float32
    on("metal", device_name="Apple M1", architecture="applegpu_g13g")
    assert load(copy, dtype="auto")[0].dtype == mx.float16
    assert load(with_report(copy, TOO_LARGE), dtype="auto")[0].dtype == mx.bfloat16
    on("metal", device_name="Apple M3", architecture="applegpu_g15g")
    assert load(with_report(copy, FITS), dtype="auto")[0].dtype == mx.float16


def test_a_half_checkpoint_computes_in_float32_on_a_cpu_with_auto(on, tmp_path):
    folder = convert(REFERENCE / "fixed", tmp_path / "half", dtype="float16", verify=False)
    on("cpu")
    assert load(folder)[0].dtype == mx.float16
    assert load(folder, dtype="auto")[0].dtype == mx.float32


@pytest.mark.parametrize("keep_quantized", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_pair_of_encoders_is_in_one_dtype_throughout(tmp_path, dtype, keep_quantized):
    folder = convert(
        REFERENCE / "lit",
        tmp_path / "mlx",
        quantize=keep_quantized,
        q_group_size=32 if keep_quantized else None,
        verify=False,
    )
    model, _ = load(folder, dtype=dtype, keep_quantized=keep_quantized)
    pixels, ids = mx.zeros((1, 42, 42, 3)), mx.array([[7, 5, 210], [3, 210, 210]])
    image, text = (
        encoder(given, output_hidden_states=True)
        for encoder, given in ((model.vision_model, pixels), (model.text_model, ids))
    )
    arrays = [array for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)]
    for output in (image, text):
        arrays += [output.last_hidden_state, output.pooler_output, *output.hidden_states]
    arrays += [model.encode_image(pixels), model.encode_text(ids), model.encode_text(ids, normalize=True)]
    assert {array.dtype for array in arrays} == {getattr(mx, dtype)}
    assert model(pixels, ids).logits_per_image.dtype == mx.float32
