# SPDX-License-Identifier: Apache-2.0
"""Images per second and memory of networks on a GPU, in inference and training, compared with timm's."""

from collections.abc import Iterator
from typing import Any

import torch
from gpu_timing import Clock, Job, first_line, graphed, interleaved

# those of the measures come first, since time may run out before the last
MODELS = [
    "sola_small",
    "swin_tiny_patch4_window7_224",
    "sola_tiny",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "convnext_tiny",
    "sola_base",
    "sola_nano",
    "efficientformer_l1",
    "resnet18",
]
CLASSES = 1000


def models(names: list[str], size: int, batch: int, rounds: int, clock: Clock, mode: str) -> Iterator[dict[str, Any]]:
    """Yield images/s under bfloat16 autocast, every model in its best memory layout, and the memory that it adds. mode:
    "eager"; "compiled"; "graph", a replay of a CUDA graph, which launches nothing.
    """
    jobs: dict[str, Job] = {}
    memory: dict[str, float | None] = {}
    for name in names:
        if clock.over():
            print(f"models: time ran out before {name}", flush=True)
            break
        try:
            new_jobs, added = prepared(name, size, batch, mode)
            jobs |= new_jobs
            memory |= added
        except Exception as error:  # a failing model must not stop the others
            print(f"models: {name} skipped: {first_line(error)}", flush=True)
        # cached blocks of one model's activations may not fit those of another
        torch.cuda.empty_cache()
    for key, (median, spread) in interleaved(jobs, rounds, clock, hidden=False).items():
        name, direction = key.split()
        yield {
            "what": "model",
            "model": name,
            "mode": mode,
            "direction": direction,
            "batch": batch,
            "size": size,
            "dtype": "bfloat16 autocast",
            "images_per_second": batch / median * 1e6,
            "spread": spread,
            "peak_mib": memory[key],
        }


def prepared(name: str, size: int, batch: int, mode: str) -> tuple[dict[str, Job], dict[str, float | None]]:
    """Return the jobs of a network, already called once, and the MiB that each of them needs; None for graphs, each of
    which keeps memory of its own.
    """
    before = torch.cuda.memory_allocated()
    jobs = model_jobs(name, size, batch, mode)
    if mode == "graph":
        return {key: graphed(job) for key, job in jobs.items()}, dict.fromkeys(jobs)
    return jobs, {key: peak(job, before) for key, job in jobs.items()}


def peak(job: Job, before: int) -> float:
    """Return the peak MiB on the device during a second call of the job, without the `before` bytes of other jobs."""
    job()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    job()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def model_jobs(name: str, size: int, batch: int, mode: str, device: str = "cuda") -> dict[str, Job]:
    """Return a network's forward and training step, as "name inference" and "name training"."""
    from sola_vision.analysis.cost import build

    # networks with windows or learned positions are built for one size
    model = build(name, (size, size), CLASSES, device=device).to(device)
    layout = torch.channels_last if any(isinstance(m, torch.nn.Conv2d) for m in model.modules()) else None
    images = torch.randn(batch, 3, size, size, device=device)
    if layout is not None:
        model, images = model.to(memory_format=layout), images.to(memory_format=layout)
    labels = torch.randint(CLASSES, (batch,), device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=mode == "graph")
    network = torch.compile(model) if mode == "compiled" else model

    # a mode is set once for many calls, as in a training loop: setting it visits every module
    def infer() -> None:
        if model.training:
            model.eval()
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            network(images)

    def train() -> None:
        if not model.training:
            model.train()
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return {f"{name} inference": infer, f"{name} training": train}
