"""Powers of two as a polynomial: MLX's CPU backend for x86 computes `exp` one number at a time."""

from __future__ import annotations

import math

import mlx.core as mx

LOG2_E = math.log2(math.e)

EXP2 = (0.00132764701, 0.00967554096, 0.0555071309, 0.240221202, 0.693146944, 1.00000012)
"""`2 ** x` for x from -1/2 to 1/2 as a polynomial, highest power first: the minimax fit, relative error 7.5e-8."""

ROUND = 1.5 * 2**23 + 127
"""Added to a float32, it leaves the number rounded to an integer, 127 greater, in the lowest bits."""


def exp2(x: mx.array) -> mx.array:
    """`2 ** x` in float32, relative error 2.4e-7.

    `x` must be from -127 to 128; the result is zero below -126.5, infinite above 127.5.
    """
    # The rounded integer has no derivative: the polynomial of the remainder has all of it.
    shifted = mx.stop_gradient(x + ROUND)
    power = mx.left_shift(shifted.view(mx.uint32), 23).view(mx.float32)  # the integer becomes the exponent
    rest = x - (shifted - ROUND)
    result = EXP2[0] * rest
    for coefficient in EXP2[1:-1]:
        result = (result + coefficient) * rest
    return (result + EXP2[-1]) * power
