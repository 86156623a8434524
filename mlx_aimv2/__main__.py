"""`python -m mlx_aimv2`: the same as the command `mlx-aimv2`."""

import sys

from mlx_aimv2.cli import main

sys.exit(main())
