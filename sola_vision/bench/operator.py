# SPDX-License-Identifier: Apache-2.0
"""Speed of the operator: the compiled kernel against the portable form, attention, and a single pass over the data.

The lower bound is one pass that reads k and v and writes a new y, `k + v`. "repeated" calls take the same tensors
again, "streamed" calls take the next of a ring of tensors that is larger than the caches.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sola_vision import ops
from sola_vision.bench.rounds import Job, Protocol, Times, interleave, ratio

Shape = tuple[int, int, int]  # batch, tokens, channels

SHAPES: tuple[Shape, ...] = ((1, 3136, 96), (8, 3136, 96), (1, 784, 192), (8, 196, 512), (1, 65536, 96))
_HEAD = 32  # channels per head of the attention baseline
_RING = 256 * 2**20  # bytes of the ring of streamed calls
# products of queries and keys beyond which attention takes seconds
_MOST_PAIRS = 2**28


@dataclass(frozen=True)
class Name:
    """One job: which path computes what from which data."""

    path: str  # "native", "portable", "attention", "copy"
    direction: str  # "forward", "backward" (alone), "both" (through autograd)
    data: str = "repeated"  # or "streamed"


@dataclass(frozen=True)
class Ratio:
    """A ratio of two jobs of one shape, and the project's target for it, if any."""

    what: str
    shape: Shape
    dtype: str
    value: float
    spread: float
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """True if the target is met, None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def measure(
    shapes: tuple[Shape, ...],
    dtypes: tuple[torch.dtype, ...],
    protocol: Protocol,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return rows and ratios for every shape and dtype; a path that is not available here is reported and skipped."""
    missing = ops.missing_kernel("cpu")
    if missing is not None:
        report(f"native skipped: {missing}")
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for shape in shapes:
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            report(f"{text(shape)} {name}")
            with torch.no_grad():
                times = interleave(_jobs(shape, dtype, native=missing is None), protocol)
            for job, taken in times.items():
                measured = {"microseconds": taken.median * 1e6, "spread": taken.spread}
                every = [seconds * 1e6 for seconds in taken.rounds]
                rows.append({"shape": shape, "dtype": name, **asdict(job), **measured, "rounds": every})
            ratios += [
                asdict(found) | {"met": found.met} for found in compare(times, shape, name, _in_cache(shape, dtype))
            ]
    return {"rows": rows, "ratios": ratios}


def text(shape: Shape) -> str:
    """Format a shape as 8x3136x96."""
    return "x".join(map(str, shape))


def compare(times: dict[Name, Times], shape: Shape, dtype: str, in_cache: bool) -> list[Ratio]:
    """Return the ratios of one shape. Targets: the project's for k, v and y in cache or streaming, and at 56 x 56
    tokens of 96 channels for attention in float32.
    """
    attention = shape[1:] == (3136, 96) and dtype == "float32"
    forward, backward, both = (Name("native", direction) for direction in ("forward", "backward", "both"))
    streamed = Name("native", "forward", "streamed"), Name("copy", "forward", "streamed")
    pairs: list[tuple[str, Name, Name, float | None, bool]] = [
        ("forward over a copy, repeated", forward, Name("copy", "forward"), 4.0 if in_cache else None, False),
        ("forward over a copy, streamed", *streamed, None if in_cache else 2.5, False),
        ("backward over forward", backward, forward, 2.2, False),
        ("attention over forward", Name("attention", "forward"), forward, 120.0 if attention else None, True),
        ("attention over both", Name("attention", "both"), both, 100.0 if attention else None, True),
        ("portable over forward", Name("portable", "forward"), forward, None, True),
        ("portable over both", Name("portable", "both"), both, None, True),
    ]
    return [
        Ratio(what, shape, dtype, *ratio(times[over], times[under]), target, at_least)
        for what, over, under, target, at_least in pairs
        if over in times and under in times
    ]


def operands(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return decay, bonus, key, value and an output gradient as in a trained network."""
    g = torch.Generator().manual_seed(seed)
    channels = shape[2]
    decay, bonus = torch.rand(channels, generator=g) * 20, torch.randn(channels, generator=g) * 0.5
    key, value, grad = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    return decay, bonus, key, value, grad


def _jobs(shape: Shape, dtype: torch.dtype, native: bool) -> dict[Name, Job]:
    decay, bonus, key, value, grad = operands(shape, dtype)
    paths = {"native": torch.ops.sola.wkv} if native else {}
    paths["portable"] = torch.ops.sola.wkv_portable
    ring = _ring(key, value)
    jobs: dict[Name, Job] = {
        Name("copy", "forward"): partial(torch.add, key, value),
        Name("copy", "forward", "streamed"): lambda: torch.add(*next(ring)),
    }
    for path, forward in paths.items():
        jobs[Name(path, "forward")] = partial(forward, decay, bonus, key, value)
        jobs[Name(path, "both")] = _both(forward, (decay, bonus, key, value), grad)
    if native:
        _, states = torch.ops.sola.wkv_with_states(decay, bonus, key, value)
        jobs[Name("native", "backward")] = partial(torch.ops.sola.wkv_backward, decay, bonus, key, value, states, grad)
        jobs[Name("native", "forward", "streamed")] = lambda: torch.ops.sola.wkv(decay, bonus, *next(ring))
    if shape[0] * shape[1] ** 2 <= _MOST_PAIRS and shape[2] % _HEAD == 0 and dtype == torch.float32:
        attention = torch.nn.functional.scaled_dot_product_attention
        # the key is also the query: a separate tensor would not change the time
        k, v, g = (x.view(*shape[:2], -1, _HEAD).transpose(1, 2) for x in (key, value, grad))
        jobs[Name("attention", "forward")] = partial(attention, k, k, v)
        jobs[Name("attention", "both")] = _both(attention, (k, k, v), g)
    return jobs


def _both(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> Job:
    leaves = [x.detach().requires_grad_() for x in inputs]

    @torch.enable_grad()
    def job() -> Any:
        return torch.autograd.grad(function(*leaves), leaves, grad)

    return job


def _ring(key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    # at most 300 pairs of small shapes: the other jobs of a round evict the caches too
    pairs = min(max(2, _RING // (2 * key.numel() * key.element_size())), 300)
    return cycle([(key.clone(), value.clone()) for _ in range(pairs)])


def _in_cache(shape: Shape, dtype: torch.dtype) -> bool:
    """True if k, v and y together fit the second-level caches of the cores in use."""
    return 3 * shape[0] * shape[1] * shape[2] * dtype.itemsize <= second_level_cache() * torch.get_num_threads()


def second_level_cache() -> int:
    """Return the bytes of a core's second-level cache, or 1 MiB if the system does not report it."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(size.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**20
