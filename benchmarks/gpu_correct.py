# SPDX-License-Identifier: Apache-2.0
"""The GPU kernel against the definition and the portable form in float64: values, gradients, graphs, compile."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from gpu_timing import Clock, first_line, graphed, name_of
from torch import Tensor

SIZES = [(2, 1, 1), (3, 2, 33), (2, 31, 96), (2, 33, 33), (2, 49, 96), (2, 197, 33), (2, 300, 1), (2, 3136, 96)]
SIZES += [(1, 65536, 33)]


def correct(clock: Clock) -> Iterator[dict[str, Any]]:
    """Yield the accuracy on the device: float32 in the wide and the calm range, bfloat16, graphs, compile."""
    from sola_vision import ops

    cases = [(b, n, c, calm, torch.float32) for b, n, c in SIZES for calm in (False, True)]
    cases += [(2, 3136, 96, True, torch.bfloat16), (2, 197, 33, True, torch.float16)]
    for batch, num_tokens, channels, calm, dtype in cases:
        if clock.over():
            break
        inputs = operands(batch, num_tokens, channels, dtype, calm=calm)
        out, grads = call(ops.wkv, inputs)
        with ops.use("portable"):  # float64: 1e-12 from the definition, and linear in N
            exact, exact_grads = call(ops.wkv, tuple(x.double() for x in inputs))
        again, grads_again = call(ops.wkv, inputs)
        same = torch.equal(out, again) and all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
        value, grad = inputs[3:]
        budget = 1.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 1e-5
        error = value_error(inputs, exact, out)
        errors = [gradient_error(a, b, value, grad) for a, b in zip(grads, exact_grads, strict=True)]
        yield {
            "what": "accuracy",
            "shape": [batch, num_tokens, channels],
            "dtype": name_of(dtype),
            "range": "trained network" if calm else "w -20..200, u -10..10, k -50..50",
            "forward": error,
            "gradients_wukv": errors,
            "bit_equal_runs": same,
            "ok": error <= 5e-6 * budget and max(errors) <= 1e-5 * budget and same,
        }
    # once against the definition itself: the portable form above is another implementation of it
    inputs = operands(2, 300, 33, torch.float32)
    out, grads = call(ops.wkv, inputs)
    with ops.use("reference"):
        exact, exact_grads = call(ops.wkv, tuple(x.double() for x in inputs))
    value, grad = inputs[3:]
    errors = [gradient_error(a, b, value, grad) for a, b in zip(grads, exact_grads, strict=True)]
    error = value_error(inputs, exact, out)
    good = error <= 5e-6 and max(errors) <= 1e-5
    yield {"what": "definition", "shape": [2, 300, 33], "forward": error, "gradients_wukv": errors, "ok": good}
    for check in (extremes, cuda_graph, compiled, passes, network):
        try:
            yield check()
        except Exception as failure:  # run the other checks too
            yield {"what": check.__name__, "error": first_line(failure), "ok": False}


def value_error(inputs: tuple[Tensor, ...], exact: Tensor, trained: Tensor) -> float:
    """Return the error of the result in training and, from longer chunks, in inference, over the largest value."""
    from sola_vision import ops

    found = torch.stack((trained, ops.wkv(*inputs[:4]))).double()
    return ((found - exact).abs().max() / inputs[3].double().abs().max()).item()


def extremes() -> dict[str, Any]:
    """Check w to +-1e6, u to +-1e4 and keys to +-1e4: finite and accurate."""
    from sola_vision import ops

    worst = 0.0
    for decay, bonus, scale in [(1e6, 0, 1), (-1e6, 0, 1), (5, 1e4, 1), (5, -1e4, 1), (5, 0, 1e4), (-300, -300, 300)]:
        for num_tokens in (1, 2, 50, 131):
            _, _, key, value, grad = operands(2, num_tokens, 33, torch.float32)
            w, u = (torch.full((33,), float(x), device="cuda") for x in (decay, bonus))
            inputs = (w, u, key / 50 * scale, value, grad)
            out, grads = call(ops.wkv, inputs)
            with ops.use("reference"):
                exact, exact_grads = call(ops.wkv, tuple(x.double() for x in inputs))
            errors = [gradient_error(a, b, value, grad) for a, b in zip(grads, exact_grads, strict=True)]
            errors.append(2 * value_error(inputs, exact, out))
            worst = max(worst, *(e if e == e else float("inf") for e in errors))
    return {"what": "extremes", "worst": worst, "ok": worst <= 1e-5}


def cuda_graph() -> dict[str, Any]:
    """Check that a replayed CUDA graph gives the same bits."""
    from sola_vision import ops

    inputs = operands(4, 784, 96, torch.bfloat16, calm=True)
    expected, expected_grads = call(ops.wkv, inputs)
    replay = graphed(lambda: call(ops.wkv, inputs))
    out, grads = replay()
    for x in (out, *grads):
        x.zero_()
    replay()
    same = torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    return {"what": "cuda graph", "ok": same}


def compiled() -> dict[str, Any]:
    """Check that torch.compile gives the same bits."""
    from sola_vision import ops

    inputs = operands(4, 784, 96, torch.float32, calm=True)
    expected, expected_grads = call(ops.wkv, inputs)
    out, grads = call(torch.compile(ops.wkv, fullgraph=True), inputs)
    same = torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    return {"what": "torch.compile", "ok": same}


def passes(device: str = "cuda") -> dict[str, Any]:
    """Compare the element-wise passes and their gradients, as autocast calls them, with their plain forms in float64.

    The error is the largest in units of the result's precision.
    """
    from sola_vision import ops
    from sola_vision.layers.fused_gpu import layer_norm, residual_sum

    worst, factors = 0.0, torch.tensor([0.5, 2.0], device=device)
    for channels in (33, 96):
        g = torch.Generator().manual_seed(0)
        x, first, second = (torch.randn(2, 9, 7, channels, generator=g).to(device) for _ in range(3))
        weight, bias, *mixes = torch.rand(5, channels, generator=g).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            half = [first.to(dtype), second.to(dtype)]
            calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
                (lambda a, w, b: layer_norm(a, w, b, 1e-6), [half[0], weight, bias]),
                (
                    lambda a, w, b, m, to=dtype: ops.norm_shift(
                        a, w, b, 1e-6, m, dtype=to if a.dtype == torch.float32 else None
                    ),
                    [x, weight, bias, torch.stack(mixes)],
                ),
                (ops.gate, half),
                (ops.gated_sum, [x, *half]),
                (ops.squared_relu, half[:1]),
                (lambda a, b: residual_sum(a, b, factors), [x, half[0]]),
            ]
            for run, inputs in calls:
                worst = max(worst, pass_error(run, inputs) / torch.finfo(dtype).eps)
    return {"what": "passes", "worst_in_eps": worst, "ok": worst <= 8}


def network(device: str = "cuda") -> dict[str, Any]:
    """Compare a network with bridges and drop path, in float32, with its plain form, where the same seed drops the same
    images; and replay its inference under autocast as a CUDA graph.
    """
    from sola_vision import SolaVision, nano, ops

    torch.manual_seed(0)
    made = SolaVision(nano(bridges="paper", num_classes=10, drop_path_rate=0.3)).to(device).train()
    images = torch.randn(3, 3, 64, 96, device=device)

    def trained() -> list[Tensor]:
        torch.manual_seed(1)
        logits = made(images)
        return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(made.parameters()))]

    found = trained()
    with ops.use("portable"):
        exact = trained()
    worst = worst_error(found, exact)
    made.eval()

    @torch.inference_mode()
    def inferred() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits: Tensor = made(images)
        return logits

    same = True
    if device == "cuda":
        expected, replay = inferred(), graphed(inferred)
        with torch.inference_mode():
            replay().zero_()
        same = torch.equal(replay(), expected)
    return {"what": "network", "worst": worst, "graph_bit_equal": same, "ok": worst <= 1e-3 and same}


def pass_error(run: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Return the largest error of a result and its gradients, relative to the largest value of each."""
    from sola_vision import ops

    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    grad = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, leaves, grad))
    exact_leaves = [x.double().detach().requires_grad_() for x in inputs]
    with ops.use("portable"):
        exact_out = run(*exact_leaves).double()
    exact = (exact_out, *torch.autograd.grad(exact_out, exact_leaves, grad.double()))
    return worst_error(found, exact)


def worst_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest error relative to the largest value of each tensor; infinity for NaN."""
    errors = [
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(found, exact, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def operands(
    batch: int, num_tokens: int, channels: int, dtype: torch.dtype, calm: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return decay, bonus, key, value and an output gradient; calm: as in a trained network, else in a wide range."""
    g = torch.Generator("cuda").manual_seed(0)
    size = (batch, num_tokens, channels)
    decay = torch.rand(channels, generator=g, device="cuda") * 220 - 20
    bonus = torch.rand(channels, generator=g, device="cuda") * 20 - 10
    key = (torch.rand(size, generator=g, device="cuda") * 2 - 1) * 50
    value, grad = (torch.randn(size, generator=g, device="cuda") for _ in range(2))
    if calm:
        decay, bonus, key = decay.clamp(max=0.3 * num_tokens) / 2, bonus / 5, key / 10
    return decay, bonus, key.to(dtype), value.to(dtype), grad.to(dtype)


def call(wkv: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the result of the operator and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    out = wkv(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, inputs[4])


def gradient_error(got: Tensor, exact: Tensor, value: Tensor, grad: Tensor) -> float:
    """Return the error over the largest gradient, or over a tenth of max|v| max|grad| if that is larger."""
    floor = 0.1 * grad.double().abs().max() * value.double().abs().max()
    return ((got.double() - exact).abs().max() / torch.maximum(exact.abs().max(), floor)).item()
