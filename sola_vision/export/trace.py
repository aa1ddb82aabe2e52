# SPDX-License-Identifier: Apache-2.0
"""Tracing of a network with torch.export, for any batch, height and width."""

from contextlib import nullcontext

import torch
import torch.fx.experimental._config as symbols
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from sola_vision import ops
from sola_vision.export.networks import Exportable

# in every map of these images the sides differ from 1, from each other and from those of pooled maps (2, 3, 6)
_EXAMPLE = (2, 160, 224)


def trace(network: Exportable, *, plain: bool) -> ExportedProgram:
    """Return the graph of a network: with `plain` ATen operators and one placeholder for each Bi-WKV operator,
    otherwise with calls of the kernels.
    """
    batch, height, width = _EXAMPLE
    dims = {0: Dim.DYNAMIC}
    if network.fixed_size is None:
        dims |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    else:
        height, width = network.fixed_size
    example = torch.zeros(batch, network.channels, height, width)
    with (
        torch.no_grad(),
        ops.use("portable") if plain else nullcontext(),
        # do not specialise on sides of 1; not needed for ONNX, which has no conditions on sizes
        symbols.patch(backed_size_oblivious=not plain),  # type: ignore[attr-defined]  # torch adds it at import
    ):
        program = torch.export.export(network, (example,), dynamic_shapes=(dims,))
    # guards on the example's sizes only come from the choice of memory layouts. As bounds (a fourth stage: more than 32
    # pixels) the file would reject smaller images, so they are removed; check.py compares other sizes
    program._guards_code = []
    for symbol, bounds in program.range_constraints.items():
        program._range_constraints[symbol] = ValueRanges(1, bounds.upper)
    return program
