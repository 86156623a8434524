"""`load` gives the model that the checkpoint holds, in one dtype, or one clear line."""

import json
import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from mlx_aimv2 import Aimv2VisionConfig, Aimv2VisionModel, load
from tests.small_models import FIXED, NATIVE, edit_config, edit_weights


@pytest.fixture
def copy(tmp_path):
    """A copy of the fixed reference checkpoint that a test may damage."""
    shutil.copytree(FIXED, tmp_path / "copy")
    return tmp_path / "copy"


def pixels(size: int = 42) -> mx.array:
    return mx.random.normal((1, size, size, 3), key=mx.random.key(1))


def test_a_folder_and_its_weight_file_load_alike():
    folder, _ = load(FIXED)
    file, _ = load(FIXED / "model.safetensors")
    assert mx.array_equal(folder.encode_image(pixels()), file.encode_image(pixels()))


@pytest.mark.parametrize("folder", [FIXED, NATIVE], ids=["fixed", "native"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_dtype_throughout(folder, dtype):
    model, _ = load(folder, dtype=dtype)
    wanted = getattr(mx, dtype)
    output = model(pixels(), output_hidden_states=True)
    arrays = [array for _, array in tree_flatten(model.parameters())]
    arrays += [output.last_hidden_state, *output.hidden_states, model.encode_image(pixels(), normalize=True)]
    assert {array.dtype for array in arrays} == {wanted}
    assert model.dtype == wanted


def test_a_stray_float32_tensor_does_not_promote_the_rest(copy):
    kinds = {"trunk.blocks.1.norm_1.weight": np.float32}
    edit_weights(copy, lambda tensors: {name: a.astype(kinds.get(name, np.float16)) for name, a in tensors.items()})
    model, _ = load(copy)
    assert model(pixels()).last_hidden_state.dtype == mx.float16


def test_an_mlx_dtype_serves_as_well_as_its_name():
    assert load(FIXED, dtype=mx.float16)[0].dtype == mx.float16


def test_an_unknown_dtype_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"float32, float16, bfloat16.*float8"):
        load(FIXED, dtype="float8")


def test_lazy_weights_are_the_same_weights():
    eager, lazy = load(FIXED)[0], load(FIXED, lazy=True)[0]
    assert mx.array_equal(eager.encode_image(pixels()), lazy.encode_image(pixels()))


def test_return_config_gives_the_content_of_config_json_third():
    model, _, config = load(FIXED, return_config=True)
    assert isinstance(model, Aimv2VisionModel)
    assert config == json.loads((FIXED / "config.json").read_text())


def test_config_and_weights_of_different_sizes_are_named_with_both(copy):
    edit_config(copy, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"num_hidden_layers is 2, the weights say 3.*hidden_size is 128.* say 96"):
        load(copy)


def test_a_missing_tensor_an_extra_one_and_a_misshaped_one_are_all_named(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["trunk.blocks.0.attn.proj.weight"], tensors["trunk.blocks.2.mlp.fc3.weight"]
    tensors["trunk.blocks.0.attn.projj.weight"] = np.zeros((2, 2), np.float32)
    tensors["trunk.post_trunk_norm.weight"] = np.zeros(95, np.float32)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        load(copy)
    message = str(caught.value)
    for part in ("missing trunk.blocks.0.attn.proj.weight, trunk.blocks.2.mlp.fc3.weight", "extra trunk.blocks.0.attn"):
        assert part in message
    assert "trunk.post_trunk_norm.weight (wanted (96,), got (95,))" in message
    assert "\n" not in message


def test_a_name_that_is_neither_a_path_nor_a_hub_name():
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*owner/name"):
        load("nowhere")


def test_a_revision_of_a_folder_is_refused():
    with pytest.raises(ValueError, match=r"on disk and has no revision"):
        load(FIXED, revision="main")


def test_offline_a_hub_name_says_what_to_do():
    with pytest.raises(ConnectionError, match=r"apple/aimv2-large-patch14-336 at revision 639423a.*HF_HUB_OFFLINE"):
        load("apple/aimv2-large-patch14-336")


def test_loading_draws_no_random_numbers_so_a_thread_that_loads_may_end_with_the_process():
    # The state of MLX's random numbers belongs to its thread; freed while the process exits, it aborts the process.
    program = """
import sys
import threading
import mlx.core as mx
from mlx_aimv2 import load

def forbidden(*arguments, **settings):
    raise AssertionError("random numbers drawn")

mx.random.uniform = mx.random.normal = forbidden
thread = threading.Thread(target=load, args=[sys.argv[1]])
thread.start()
thread.join()
"""
    result = subprocess.run([sys.executable, "-c", program, str(FIXED)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_loading_leaves_the_random_state_of_the_user_as_it_was():
    mx.random.seed(7)
    wanted = mx.random.uniform().item()
    mx.random.seed(7)
    load(FIXED)
    assert mx.random.uniform().item() == wanted


def test_a_model_that_is_not_loaded_starts_with_random_weights():
    model = Aimv2VisionModel(Aimv2VisionConfig(22, 13, 2, 2, image_size=15, patch_size=5))
    for weight in (model.patch_embed.proj.weight, model.blocks[1].mlp.gate.weight):
        assert weight.std().item() > 0.01


def test_a_name_longer_than_any_path_is_one_line():
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load("x" * 5000)
