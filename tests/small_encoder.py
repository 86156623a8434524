"""Makes a small image encoder in Apple's layout, for tests of files and arithmetic that need no trained weights.

Its widths are multiples of 128, so that every quantization fits.
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from mlx_aimv2.config import Aimv2VisionConfig
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.pretrain.objective import initialise
from mlx_aimv2.pretrain.pretraining import write_checkpoint

CONFIG = Aimv2VisionConfig(128, 256, 4, 2, image_size=56)


@cache
def small_encoder() -> Path:
    """The folder, written when it is first asked for and removed when the tests end."""
    place = Path(tempfile.mkdtemp(prefix="small-encoder-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    model = Aimv2VisionModel(CONFIG)
    initialise(model, CONFIG.num_hidden_layers, seed=4)
    write_checkpoint(model, place / "encoder")
    return place / "encoder"
