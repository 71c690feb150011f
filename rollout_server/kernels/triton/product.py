"""Matrix product of two tiles, summed in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + a b. fp32 operands are not rounded to TF32.

    Triton's interpreter multiplies the bit patterns of bf16 as integers: there, operands are widened, which changes no
    product.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
