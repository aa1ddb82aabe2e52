# SPDX-License-Identifier: Apache-2.0
"""A network as one ONNX file: standard operators, any batch, height and width, cost linear in the number of tokens."""

import ast
import importlib
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sola_vision.export.check import Run
from sola_vision.export.networks import Exportable
from sola_vision.export.trace import trace

OPSET = 20  # the first with Gelu; attention is written in basic operators, which many runtimes require
_DOMAIN = "sola"  # of the placeholder for the Bi-WKV operator, until it is expanded


def check_packages() -> None:
    """Raise ImportError if a package that writes or runs ONNX files is not installed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise ImportError(
                f"the format onnx needs {package}, which is not installed: pip install 'sola-vision[export]'"
            ) from None


def write(network: Exportable, path: Path, precision: str, metadata: Mapping[str, str]) -> dict[str, int]:
    """Write the file and return the number of nodes of each operator."""
    import onnx

    dtype = torch.float16 if precision == "float16" else torch.float32
    model = _graph(network.prepared(dtype))
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.producer_name = "sola-vision"
    from onnx_ir import save

    save(model, path)
    if precision == "int8":
        quantise(path)
    stored = onnx.load(path)
    onnx.checker.check_model(stored, full_check=True)
    return dict(Counter(node.op_type for node in stored.graph.node).most_common())


def session(path: Path) -> Run:
    """Return a function that runs the file in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in running.run(None, {"images": images.numpy()})]

    return run


def _graph(network: Exportable) -> Any:
    from onnx_ir.passes import Sequential, common

    from sola_vision.export import wkv

    placeholder = wkv.placeholder(_DOMAIN)
    program = torch.onnx.export(
        trace(network, plain=True),
        (),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=list(network.names),
        custom_translation_table={
            torch.ops.sola.wkv_portable.default: placeholder,
            torch.ops.sola.wkv.default: placeholder,
        },
        optimize=False,
        verbose=False,
    )
    assert program is not None
    program.optimize()
    model = program.model
    wkv.expand(model, _DOMAIN)
    Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    _name_sizes(model)
    _name_nodes(model)
    common.NameFixPass()(model)
    return model


def _name_sizes(model: Any) -> None:
    """Name the sizes of inputs and outputs batch, height and width instead of the tracer's numbered symbols.

    Sizes in between get no names: runtimes treat sizes of one name as equal, and the tracer's are not always right.
    """
    import onnx_ir as ir

    (images,) = model.graph.inputs
    names = {str(dim): name for dim, name in zip(images.shape, ("batch", "channels", "height", "width"), strict=True)}
    symbols = {symbol: name for symbol, name in names.items() if not symbol.isdigit()}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b")
    for value in (images, *model.graph.outputs):
        dims = (dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        renamed = [pattern.sub(lambda match: symbols[match[0]], dim) if isinstance(dim, str) else dim for dim in dims]
        value.shape = ir.Shape(renamed)
    outer = {images, *model.graph.outputs}
    for value in (value for node in model.graph for value in node.outputs if value not in outer):
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in value.shape])


def _name_nodes(model: Any) -> None:
    """Name each node by its module and operator, such as stages.2.layers.1.mixer/MatMul."""
    counts: Counter[str] = Counter()
    scope = ""
    for node in model.graph:
        stored = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if stored is not None:  # nodes created by rewriting have none and follow their origin
            scopes = [name for name in ast.literal_eval(stored)[:-1] if name]
            scope = scopes[-1].removeprefix("network.") if scopes else ""
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        counts[name] += 1
        node.name = f"{name}_{counts[name]}" if counts[name] > 1 else name
        node.metadata_props.clear()
        node.doc_string = None


def quantise(path: Path) -> None:
    """Quantise the weights of matrix products to 8 bits, and their inputs at run time; the operator stays in float32.

    Weights are unsigned: onnxruntime's product of unsigned inputs and signed weights overflows in 16 bits on processors
    that have AVX2 without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = onnx.load(path)
    del whole.graph.value_info[:]  # the quantiser transposes matrices, and stored shapes would contradict it
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # its advice to preprocess the file, which has been done
    try:
        quantize_dynamic(
            whole, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QUInt8
        )
    finally:
        logging.disable(level)
