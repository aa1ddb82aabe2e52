# SPDX-License-Identifier: Apache-2.0
"""Token shift: every projection of a linear layer sees a blend of each token and one neighbour.

# not in the paper: Vision-RWKV's mixes begin with it (Q-Shift, worth 3.6 points there) and SoLA-Vision takes its linear
# layer from Vision-RWKV, while its own text never names the shift. One argument turns it off.
"""

import torch
from torch import Tensor


def quad_shift(x: Tensor) -> Tensor:
    """Each quarter of the channels comes from another neighbour: left, right, above, below; zero outside the image.

    x [B, H, W, C] -> [B, H, W, C]. Channels beyond four times C // 4 stay where they are.
    """
    quarter = x.shape[-1] // 4
    left, right, above, below, rest = x.split([quarter] * 4 + [x.shape[-1] - 4 * quarter], dim=-1)
    pad = torch.nn.functional.pad
    return torch.cat(
        (
            pad(left[:, :, :-1], (0, 0, 1, 0)),
            pad(right[:, :, 1:], (0, 0, 0, 1)),
            pad(above[:, :-1], (0, 0, 0, 0, 1, 0)),
            pad(below[:, 1:], (0, 0, 0, 0, 0, 1)),
            rest,
        ),
        dim=-1,
    )


def token_shift(x: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    """mix * x + (1 - mix) * quad_shift(x) for each mix [C]; x [B, H, W, C]."""
    shifted = quad_shift(x)
    return tuple(torch.lerp(shifted, x, mix.to(x.dtype)) for mix in mixes)
