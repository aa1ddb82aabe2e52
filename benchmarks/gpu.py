# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in few calls; each part writes benchmarks/results/gpu-<part>.json.

    python benchmarks/gpu.py correct                        # the kernel against its definition
    python benchmarks/gpu.py operator --vision-rwkv DIR     # its speed beside HBM, SDPA, portable, Vision-RWKV's CUDA
    python benchmarks/gpu.py models                         # images/s beside timm's models, eager
    python benchmarks/gpu.py models --compiled --only NAME ...

A part stays under ten minutes: when its --minutes are over it stops between two measurements and writes what it has.
Jobs of one table run in interleaved rounds; a time is the median over rounds of the round's shortest call, beside it
the spread (interquartile range over median). Each call is timed by device events, with the caches filled by other data.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
SHAPES = [(128, 3136, 96), (128, 784, 192), (1, 3136, 96), (1, 65536, 96), (8, 16384, 96)]
# nominal memory bandwidth in TB/s by the vendor's data sheet; other devices get the measured one only
NOMINAL = {"H200": 4.8, "H100": 3.35, "A100-SXM4-80GB": 2.04, "A100-SXM4-40GB": 1.56, "RTX 4090": 1.01, "L40S": 0.86}
MODELS = [
    "sola_nano",
    "sola_tiny",
    "sola_small",
    "sola_base",
    "resnet18",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "efficientformer_l1",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
]
Job = Callable[[], Any]


class Clock:
    """How long a part may still take."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def over(self) -> bool:
        return time.monotonic() > self.end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    correct_parser = parts.add_parser("correct", help="kernel against reference: values, gradients, graphs, compile")
    operator_parser = parts.add_parser("operator", help="speed of the operator")
    operator_parser.add_argument("--vision-rwkv", type=Path, metavar="DIR", help="a checkout of Vision-RWKV")
    models_parser = parts.add_parser("models", help="throughput of networks, inference and training, 224, bf16")
    models_parser.add_argument("--only", nargs="+", default=MODELS, metavar="NAME", help="timm names")
    models_parser.add_argument("--batch", type=int, default=128)
    models_parser.add_argument("--compiled", action="store_true", help="under torch.compile: minutes a model")
    for sub in (operator_parser, models_parser):
        sub.add_argument("--rounds", type=int, default=7)
    for sub in (correct_parser, operator_parser, models_parser):
        sub.add_argument("--minutes", type=float, default=9.0)
        sub.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no CUDA device; run it on a machine with a GPU", file=sys.stderr)
        return 2
    if getattr(args, "vision_rwkv", None) is not None and not args.vision_rwkv.is_dir():
        print(f"benchmarks/gpu.py: --vision-rwkv {args.vision_rwkv}: no such folder", file=sys.stderr)
        return 2

    use_kernel()
    clock = Clock(args.minutes)
    if args.part == "correct":
        rows, good = correct(clock)
    elif args.part == "operator":
        rows, good = operator(args.rounds, clock, args.vision_rwkv), True
    else:
        rows = models(args.only, args.batch, args.rounds, clock, args.compiled)
        good = bool(rows)
    name = args.part + ("-compiled" if getattr(args, "compiled", False) else "")
    write(args.out / f"gpu-{name}.json", rows)
    return 0 if good else 1


def use_kernel() -> None:
    from sola_vision import ops
    from sola_vision.ops import gpu, register

    if ops.missing_kernel("cuda") is not None:
        gpu.register(register.library)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    from sola_vision.engine.log import surroundings

    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    where = surroundings(device, processes=1) | {
        "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "triton": triton_version(),
    }
    path.write_text(json.dumps({**where, "rows": rows}, indent=2) + "\n")
    print(f"wrote {path}")


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


# ---- correct


def correct(clock: Clock) -> tuple[list[dict[str, Any]], bool]:
    """The measures of accuracy, on the device: float32 in the wide and the calm range, bfloat16, graphs, compile."""
    from sola_vision import ops

    rows: list[dict[str, Any]] = []
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
        error = ((out.double() - exact).abs().max() / value.double().abs().max()).item()
        errors = [gradient_error(a, b, value, grad) for a, b in zip(grads, exact_grads, strict=True)]
        rows.append(
            {
                "what": "accuracy",
                "shape": [batch, num_tokens, channels],
                "dtype": name_of(dtype),
                "range": "trained network" if calm else "w -20..200, u -10..10, k -50..50",
                "forward": error,
                "gradients_wukv": errors,
                "bit_equal_runs": same,
                "ok": error <= 5e-6 * budget and max(errors) <= 1e-5 * budget and same,
            }
        )
        report(rows[-1])
    # the definition itself, once: the portable form above is a second opinion, not the referee
    inputs = operands(2, 300, 33, torch.float32)
    out, grads = call(ops.wkv, inputs)
    with ops.use("reference"):
        exact, exact_grads = call(ops.wkv, tuple(x.double() for x in inputs))
    value, grad = inputs[3:]
    errors = [gradient_error(a, b, value, grad) for a, b in zip(grads, exact_grads, strict=True)]
    error = ((out.double() - exact).abs().max() / value.double().abs().max()).item()
    good = error <= 5e-6 and max(errors) <= 1e-5
    rows.append({"what": "definition", "shape": [2, 300, 33], "forward": error, "gradients_wukv": errors, "ok": good})
    report(rows[-1])
    rows += [extremes(), cuda_graph(), compiled()]
    for row in rows[-3:]:
        report(row)
    return rows, all(row["ok"] for row in rows)


SIZES = [(2, 1, 1), (3, 2, 33), (2, 31, 96), (2, 33, 33), (2, 49, 96), (2, 197, 33), (2, 300, 1), (2, 3136, 96)]
SIZES += [(1, 65536, 33)]


def extremes() -> dict[str, Any]:
    """w to +-1e6, u to +-1e4, keys to +-1e4: finite, and right."""
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
            errors.append(2 * ((out.double() - exact).abs().max() / value.double().abs().max()).item())
            worst = max(worst, *(e if e == e else float("inf") for e in errors))
    return {"what": "extremes", "worst": worst, "ok": worst <= 1e-5}


def cuda_graph() -> dict[str, Any]:
    from sola_vision import ops

    inputs = operands(4, 784, 96, torch.bfloat16, calm=True)
    expected, expected_grads = call(ops.wkv, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(ops.wkv, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = call(ops.wkv, inputs)
    for x in (out, *grads):
        x.zero_()
    graph.replay()
    same = torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    return {"what": "cuda graph", "ok": same}


def compiled() -> dict[str, Any]:
    from sola_vision import ops

    inputs = operands(4, 784, 96, torch.float32, calm=True)
    expected, expected_grads = call(ops.wkv, inputs)
    out, grads = call(torch.compile(ops.wkv, fullgraph=True), inputs)
    same = torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    return {"what": "torch.compile", "ok": same}


def operands(
    batch: int, num_tokens: int, channels: int, dtype: torch.dtype, calm: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """decay, bonus, key, value and an output's gradient; calm as in a trained network, else the measures' ranges."""
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
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    out = wkv(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, inputs[4])


def gradient_error(got: Tensor, exact: Tensor, value: Tensor, grad: Tensor) -> float:
    floor = 0.1 * grad.double().abs().max() * value.double().abs().max()
    return ((got.double() - exact).abs().max() / torch.maximum(exact.abs().max(), floor)).item()


# ---- operator


def operator(rounds: int, clock: Clock, vision_rwkv: Path | None) -> list[dict[str, Any]]:
    """Microseconds of forward and of backward per shape and dtype, over the time HBM needs for 5 and 8 N C elements."""
    from sola_vision import ops

    theirs = build_vision_rwkv(vision_rwkv)
    bandwidth = copy_bandwidth()
    nominal = next((v for k, v in NOMINAL.items() if k in torch.cuda.get_device_name()), None)
    rows: list[dict[str, Any]] = [{"what": "bandwidth", "copy_tb_s": bandwidth / 1e12, "nominal_tb_s": nominal}]
    report(rows[0])
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            if clock.over():
                return rows
            inputs = operands(*shape, dtype, calm=True)
            jobs = operator_jobs(ops, inputs, theirs)
            floors = {"forward": 5, "backward": 8}
            for name, (median, spread) in interleaved(jobs, rounds, clock).items():
                path, _, direction = name.rpartition(" ")
                row = {
                    "what": "operator",
                    "path": path,
                    "direction": direction,
                    "shape": list(shape),
                    "dtype": "float32" if path == "vision-rwkv" else name_of(dtype),
                    "microseconds": median,
                    "spread": spread,
                }
                if direction in floors:
                    width = 4 if path == "vision-rwkv" else inputs[2].element_size()
                    floor = floors[direction] * inputs[2].numel() * width / bandwidth * 1e6
                    row["over_hbm_floor_measured"] = median / floor
                    if nominal is not None:
                        row["over_hbm_floor_nominal"] = median / floor * nominal * 1e12 / bandwidth
                rows.append(row)
                report(row)
            torch.cuda.empty_cache()
    return rows


def operator_jobs(ops: Any, inputs: tuple[Tensor, ...], theirs: Any) -> dict[str, Job]:
    """Jobs by "path direction": forward, backward alone where it can be called alone, and both."""
    decay, bonus, key, value, grad = inputs
    batch, num_tokens, channels = key.shape
    wkv, backward = torch.ops.sola.wkv, torch.ops.sola.wkv_backward
    jobs: dict[str, Job] = {
        "triton forward": lambda: wkv(decay, bonus, key, value),
        "triton backward": lambda: backward(decay, bonus, key, value, grad),
        "triton both": lambda: call(ops.wkv, inputs),
    }
    # the portable form keeps tens of float64 copies; attention's cost is quadratic
    if key.numel() <= 2**26:
        jobs["portable forward"] = lambda: torch.ops.sola.wkv_portable(decay, bonus, key, value)
        jobs["portable both"] = lambda: call(torch.ops.sola.wkv_portable, inputs)
    if batch * num_tokens**2 <= 2**33:
        heads = channels // 32
        q, k, v, g = (x.reshape(batch, num_tokens, heads, 32).transpose(1, 2) for x in (value, key, value, grad))
        attention = torch.nn.functional.scaled_dot_product_attention

        def attend() -> Any:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(attention(leaves[0], leaves[1], leaves[2]), leaves, g)

        jobs["sdpa forward"] = lambda: attention(q, k, v)
        jobs["sdpa both"] = attend
    if theirs is not None and channels % 32 == 0:
        # float32 only; its own w is divided by N by the caller
        w, u, k32, v32, g32 = (decay / num_tokens).contiguous(), bonus, key.float(), value.float(), grad.float()
        jobs["vision-rwkv forward"] = lambda: theirs.bi_wkv_forward(w, u, k32, v32)
        jobs["vision-rwkv backward"] = lambda: theirs.bi_wkv_backward(w, u, k32, v32, g32)

        def both() -> Any:
            theirs.bi_wkv_forward(w, u, k32, v32)
            return theirs.bi_wkv_backward(w, u, k32, v32, g32)

        jobs["vision-rwkv both"] = both
    return jobs


def build_vision_rwkv(checkout: Path | None) -> Any:
    """Vision-RWKV's present CUDA kernel, built for this GPU (its own flags name one generation)."""
    if checkout is None:
        print("vision-rwkv: skipped, give its checkout by --vision-rwkv DIR")
        return None
    folder = checkout / "classification/mmcls_custom/models/backbones/cuda_new"
    sources = sorted(str(x) for pattern in ("*.cpp", "*.cu") for x in folder.glob(pattern))
    if not sources:
        print(f"vision-rwkv: skipped, no sources in {folder}")
        return None
    try:
        from torch.utils.cpp_extension import load

        with tempfile.TemporaryDirectory() as shim:
            # a header that torch has dropped; this is where its contents went
            (Path(shim) / "THC").mkdir()
            (Path(shim) / "THC/THCAtomics.cuh").write_text("#include <ATen/cuda/Atomic.cuh>\n")
            major, minor = torch.cuda.get_device_capability()
            arch = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
            flags = ["--use_fast_math", "-O3", "--maxrregcount=60", arch]
            return load("bi_wkv", sources, extra_cuda_cflags=flags, extra_include_paths=[shim])
    except Exception as error:  # a toolkit that is missing shows in many ways, and the rest is worth measuring
        print(f"vision-rwkv: skipped, it does not build: {str(error).splitlines()[0][:200]}")
        return None


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a large copy."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source)) for _ in range(20)) * 1e-6
    return 2 * source.numel() * source.element_size() / seconds


# ---- models


def models(names: list[str], batch: int, rounds: int, clock: Clock, compiled: bool) -> list[dict[str, Any]]:
    """Images/s at 224 under bfloat16 autocast, every model in its best memory layout."""
    import timm

    import sola_vision  # noqa: F401 - registers the names

    mode = "compiled" if compiled else "eager"
    jobs: dict[str, Job] = {}
    for name in names:
        if clock.over():
            print(f"models: time is over before {name}")
            break
        try:
            found = model_jobs(timm, name, batch, mode)
            for job in found.values():
                job()
            jobs |= found
        except Exception as error:  # one model that fails must not cost the others' numbers
            torch.cuda.empty_cache()
            print(f"models: {name} left out: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
    rows: list[dict[str, Any]] = []
    for key, (median, spread) in interleaved(jobs, rounds, clock, calls=3).items():
        name, direction = key.split()
        rows.append(
            {
                "what": "model",
                "model": name,
                "mode": mode,
                "direction": direction,
                "batch": batch,
                "size": 224,
                "dtype": "bfloat16 autocast",
                "images_per_second": batch / median * 1e6,
                "spread": spread,
            }
        )
        report(rows[-1])
    return rows


def model_jobs(timm: Any, name: str, batch: int, mode: str) -> dict[str, Job]:
    model = timm.create_model(name, num_classes=1000).to("cuda")
    layout = torch.channels_last if any(isinstance(m, torch.nn.Conv2d) for m in model.modules()) else None
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    if layout is not None:
        model, images = model.to(memory_format=layout), images.to(memory_format=layout)
    labels = torch.randint(1000, (batch,), device="cuda")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    network = torch.compile(model) if mode == "compiled" else model

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            network(images)

    def train() -> None:
        model.train()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return {f"{name} inference": infer, f"{name} training": train}


# ---- clock


def interleaved(jobs: dict[str, Job], rounds: int, clock: Clock, calls: int = 10) -> dict[str, tuple[float, float]]:
    """Median and spread in microseconds: every round gives each job two calls to warm up and the best of some."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in list(jobs.items()):
            try:
                for _ in range(2):
                    job()
                times[name].append(min(timed(job) for _ in range(calls)))
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory, left out")
                torch.cuda.empty_cache()
                del jobs[name], times[name]
        if clock.over():
            break
    return {name: (statistics.median(x), spread(x)) for name, x in times.items() if x}


def spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    quarters = statistics.quantiles(times, n=4)
    return (quarters[2] - quarters[0]) / statistics.median(times)


_flush: list[Tensor] = []


def timed(job: Job) -> float:
    """Microseconds of one call by device events, behind a pass over memory that empties caches and hides launches."""
    if not _flush:
        _flush.append(torch.empty(2**28, dtype=torch.uint8, device="cuda"))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush[0].zero_()
    start.record()
    job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def report(row: dict[str, Any]) -> None:
    print("  ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
