# SPDX-License-Identifier: Apache-2.0
"""From a network to torch.export's graph, for any batch, height and width."""

from contextlib import nullcontext

import torch
import torch.fx.experimental._config as symbols
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from sola_vision import ops
from sola_vision.export.networks import Exportable

# on every map of this image the sides are neither 1, nor each other, nor those of a pooled map (2, 3, 6)
_EXAMPLE = (2, 160, 224)


def trace(network: Exportable, *, plain: bool) -> ExportedProgram:
    """The graph of a network; `plain` shows torch's operators and one placeholder where the Bi-WKV operator is,
    otherwise the graph calls the kernels.
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
        # sides of 1 are sizes like any other. ONNX has no conditions on sizes, and there the shorter way suffices
        symbols.patch(backed_size_oblivious=not plain),  # type: ignore[attr-defined]  # torch adds it at import
    ):
        program = torch.export.export(network, (example,), dynamic_shapes=(dims,))
    # what was asked about the example's sizes only chose layouts in memory, also where the tracer made a bound of it
    # (a fourth stage: more than 32 pixels) that the file would hold images to; check.py compares other sizes
    program._guards_code = []
    for symbol, bounds in program.range_constraints.items():
        program._range_constraints[symbol] = ValueRanges(1, bounds.upper)
    return program
