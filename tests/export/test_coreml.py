"""Core ML packages: MIL computes of the network what MLX computes; the written specification is read back.

Core ML predicts on macOS alone. MIL, the language of its converter, evaluates most operations on constants with NumPy;
those that it does not, convolution, SiLU and weights in bits, are taught to it here.
"""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import bundled, load
from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from mlx_aimv2.export import export
from mlx_aimv2.export.encoder import prepare
from tests.small_models import NATIVE, pair_with_words
from tests.small_training import Workshop, write_encoder

ct = pytest.importorskip("coremltools", reason="needs coremltools, of the extra `coreml`")

from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Function, types  # noqa: E402
from coremltools.converters.mil.mil.ops.defs.iOS15.activation import silu  # noqa: E402
from coremltools.converters.mil.mil.ops.defs.iOS17.conv import conv  # noqa: E402
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_blockwise_shift_scale  # noqa: E402

from mlx_aimv2.export.coreml import Network  # noqa: E402

# coremltools leaves the folders that it unpacks to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

EMOJI = bundled.emoji_checkpoint()

NEAR = 1e-5
"""Of the largest number: both compute in float32."""


@pytest.fixture
def taught(monkeypatch):
    """MIL learns the operations that it cannot evaluate by itself."""

    def convolve(self):
        x, weight, bias = (part.val for part in (self.x, self.weight, self.bias))
        (_, _, height, width), (dims, channels, p, _) = x.shape, weight.shape
        rows, columns = height // p, width // p
        x = x[:, :, : rows * p, : columns * p].reshape(1, channels, rows, p, columns, p)
        return np.einsum("bcrpsq,dcpq->bdrs", x, weight.reshape(dims, channels, p, p)) + bias[:, None, None]

    monkeypatch.setattr(conv, "value_inference", convolve)
    monkeypatch.setattr(silu, "value_inference", lambda self: self.x.val / (1 + np.exp(-self.x.val)))
    packed = constexpr_blockwise_shift_scale
    monkeypatch.setattr(packed, "value_inference", packed.materialized_val_inference, raising=False)


def evaluated(model, x, **settings):
    """What MIL and what MLX compute of levels (1, H, W, 3), by default noise, or of a row of ids: two lists."""
    given = {"output": None, "input": "uint8", "size": None, "dtype": "float32", "revision": None}
    exported = prepare(model, **given | {"keep_quantized": True} | settings)
    x = np.random.default_rng(5).integers(0, 256, (1, *exported.shape)).astype(np.uint8) if x is None else x
    turned = x if exported.text is not None else x.transpose(0, 3, 1, 2).astype(np.float32)
    with Function({}, opset_version=ct.target.iOS18):
        found = [one.val for one in Network(mb, types, exported).outputs(mb.const(val=turned))]
    return found, [np.array(one) for one in exported(mx.array(x))]


def near(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == np.float32
        assert np.abs(one - other).max() <= NEAR * np.abs(other).max()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    place = tmp_path_factory.mktemp("sources")
    bits = {f"{bits} bits": {"q_bits": bits, "q_group_size": 32} for bits in (4, 5, 8)}
    return {
        "fixed": write_encoder(place / "fixed"),
        "native": NATIVE,
        "pair": pair_with_words(place / "pair"),
        "emoji": EMOJI,
        **{name: convert(EMOJI, place / name, quantize=True, verify=False, **own) for name, own in bits.items()},
        "mxfp4": convert(EMOJI, place / "mxfp4", quantize=True, q_mode="mxfp4", verify=False),
    }


CASES = {
    "fixed": ("fixed", {"output": "both"}),
    "fixed at another size": ("fixed", {"size": 56}),
    "native": ("native", {"output": "both", "size": (3, 2)}),
    "pair": ("pair", {"output": "both"}),
    "emoji": ("emoji", {}),
    "4 bits": ("4 bits", {}),
    "5 bits": ("5 bits", {}),
    "8 bits": ("8 bits", {}),
    "mxfp4": ("mxfp4", {}),
}


@pytest.mark.slow
@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("case", CASES)
def test_mil_computes_what_mlx_computes_of_an_image(sources, case):
    name, settings = CASES[case]
    near(*evaluated(sources[name], None, **settings))


@pytest.mark.slow
@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("name", ["pair", "emoji", "4 bits"])
def test_mil_computes_what_mlx_computes_of_a_text(sources, name):
    model, processor = load(sources[name])
    config = model.config.text_config
    ids = np.full((1, config.max_position_embeddings), config.eos_token_id, np.int32)
    own = np.array(processor.tokenize("a dog"))
    ids[:, : own.shape[1]] = own
    near(*evaluated(sources[name], ids, output="text", input="float"))


@pytest.mark.slow
@pytest.mark.usefixtures("taught")
@pytest.mark.parametrize("kind", ["linear", "attentive", "lora"])
def test_mil_computes_the_probabilities_of_a_head(tmp_path, kind):
    settings = {} if kind == "linear" else {"iters": 2, "batch_size": 4}
    head = Workshop(tmp_path / "learning").head("classify", kind, **settings)
    near(*evaluated(head, None))


def read(package):
    """The written specification: its inputs, outputs and metadata."""
    return ct.models.MLModel(str(package), skip_model_load=True).get_spec()


def operations(spec):
    """The names of all operations, in their order."""
    function = spec.mlProgram.functions["main"]
    return [one.type for one in function.block_specializations[function.opset].operations]


@pytest.mark.slow
def test_the_written_package_says_what_goes_in_and_out_and_whose_it_is(tmp_path):
    import shutil

    source = shutil.copytree(EMOJI, tmp_path / "source")
    (source / "LICENSE").write_text("research only")
    out = tmp_path / "app" / "Encoder.mlpackage"
    assert main(["export", "-m", str(source), "-o", str(out), "--output", "both"]) == 0
    spec = read(out)
    assert spec.specificationVersion == 9  # iOS 18, macOS 15
    [given] = spec.description.input
    assert (given.type.imageType.height, given.type.imageType.width) == (84, 84)
    assert [one.name for one in spec.description.output] == ["image", "tokens"]
    assert [list(one.type.multiArrayType.shape) for one in spec.description.output] == [[1, 192], [1, 36, 192]]
    assert spec.description.metadata.license == "research only"
    assert "source" in spec.description.metadata.shortDescription
    count = load(EMOJI)[0].vision.config.num_hidden_layers
    assert operations(spec).count("scaled_dot_product_attention") == count + 1  # the pooling head's too
    described = json.loads((tmp_path / "app" / "Encoder.json").read_text())
    assert described["outputs"][1] == {"name": "tokens", "dtype": "float32", "shape": [36, 192]}
    assert (tmp_path / "app" / "LICENSE").read_text() == "research only"


def test_weights_of_the_packages_dtype_are_not_copied():
    exported = prepare(EMOJI, None, "uint8", None, dtype="float16", revision=None, keep_quantized=True)
    weight = exported.vision.blocks[0].mlp.up.weight
    with Function({}, opset_version=ct.target.iOS18):
        like = mb.const(val=np.zeros(3, np.float16))
    assert np.shares_memory(Network(mb, types, exported).array(weight, like), np.asarray(weight))


@pytest.mark.slow
def test_bits_stay_bits(sources, tmp_path):
    for name, count in (("4 bits", 5), ("5 bits", 0)):
        spec = read(export(sources[name], tmp_path / f"{name}.mlpackage"))
        layers = load(EMOJI)[0].vision.config.num_hidden_layers
        assert operations(spec).count("constexpr_blockwise_shift_scale") == count * layers


@pytest.mark.slow
def test_a_head_becomes_a_classifier_with_its_labels(tmp_path):
    head = Workshop(tmp_path / "learning").head("classify", "linear")
    spec = read(export(head, tmp_path / "Labels.mlpackage"))
    [described] = json.loads((tmp_path / "Labels.json").read_text())["outputs"]
    assert described["name"] == spec.description.predictedProbabilitiesName
    assert spec.description.predictedFeatureName == "label"
    assert spec.description.predictedProbabilitiesName == "label_probs"
    assert all(label in spec.SerializeToString() for label in (b"dark", b"grey", b"light"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch 1,4", "a .mlpackage takes one image or text at a time"),
        ("--input float", "--input is for .mlxfn, a .mlpackage takes an image: leave it out"),
        ("--dtype bfloat16", ".mlpackage takes float16 or float32: choose one with --dtype"),
    ],
)
def test_wrong_use_ends_in_one_line(tmp_path, capsys, words, message):
    assert main(["export", "-m", str(EMOJI), "-o", str(tmp_path / "E.mlpackage"), *words.split()]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and message in said
    assert list(tmp_path.iterdir()) == []
