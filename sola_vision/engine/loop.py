# SPDX-License-Identifier: Apache-2.0
"""The training loop: `fit` takes a task, a model and two datasets, and writes a run's folder.

A step is a function of its number: learning rate, images, augmentation and every random draw follow from (seed,
step). A run resumed from `last/` on the same number of processes and threads is therefore bit-identical to one that
was not interrupted. Losses, failures and requests of all processes are reduced in one small tensor per step. On a GPU
the host reads it one step late, to avoid waiting; all of them are read before an evaluation or a checkpoint.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from . import checkpoint, loading, optim, resuming
from .config import Task, TrainConfig
from .distributed import Interrupts, distributed, local_gradients, on_main, share_buffers, whole
from .loading import Collate, EvaluationBatches
from .log import SUMMARY, metric_texts, surroundings, write_json
from .reports import Report
from .run import Run, Sets, prepare


class TrainingStopped(RuntimeError):  # noqa: N818 - it ends the run, as StopIteration ends a loop
    """Raised when the loss or the gradient is nan or infinite."""


def fit(
    task: Task,
    model: nn.Module,
    train_set: Dataset[Any],
    val_set: Dataset[Any],
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    metadata: dict[str, str] | None = None,
    kept: str = "",
    collate: Collate | None = None,
    eval_collate: Collate | None = None,
    begin: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train `model` in place and return the summary, which is also written to the folder.

    `metadata` is stored in best.safetensors with the weights of the submodule `kept` ("" for the whole model). With
    `resume` the run in `folder` continues from its last checkpoint. The first process calls `begin` once all checks
    have passed and before anything is written. Under torchrun every process makes the same call.
    """
    folder = Path(folder)
    with distributed(config.device) as world, Interrupts() as interrupts:
        on_main(lambda: resuming.check_folder(folder, resume))
        sets = Sets(train_set, val_set, collate, eval_collate)
        run = prepare(task, model, sets, config, folder, world, resume=resume, begin=begin)
        run.metadata, run.kept = metadata or {}, kept
        try:
            _train(run, interrupts)
            return _summarise(run)
        finally:
            run.close()


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, batches: EvaluationBatches, *, amp: str = "none") -> dict[str, float]:
    """Return the task's metrics; images that could not be read are recorded in `batches.skipped`."""
    training = model.training
    model.eval()
    try:
        with whole(model), _autocast(batches.world.device, amp):
            return {name: float(value) for name, value in task.evaluate(model, batches).items()}
    finally:
        model.train(training)


def _train(run: Run, interrupts: Interrupts) -> None:
    config, progress = run.config, run.progress
    run.model.train()
    run.logged = (progress.step, time.monotonic())
    while True:
        if run.stop:
            _save(run)
            text = f"stopped at step {progress.step} of {run.total}; resume {run.folder} to continue"
            run.log.info(text)
            raise KeyboardInterrupt(text)
        due = _evaluation_due(run)
        if (due and progress.step != run.saved_step) or _save_due(run):
            _save(run)  # first, because an evaluation may fail
        if due:
            _evaluate(run)
            _save(run)
        if progress.step == run.total:
            return

        lr = optim.lr_at(progress.step, config, run.epoch_steps, run.total)
        values = _step(run, lr)
        progress.step += 1
        late = run.world.is_main and time.monotonic() - run.saved > config.save_seconds
        flags = {"failures": bool(run.skipped.fresh), "stop": interrupts.requested, "save": late}
        run.reports.send(progress.step, lr, values, flags)
        every = min(config.log_every, run.epoch_steps)  # an epoch of few steps has a record too
        logging = progress.step % every == 0 or progress.step == run.total
        _receive(run, everything=logging)
        if logging:
            _log(run, lr)
        else:
            run.log.progress(progress.step, run.epoch)


def _step(run: Run, lr: float) -> dict[str, Tensor]:
    """Run one optimiser step and return the means of the losses over its micro-batches, on the device."""
    config, step = run.config, run.progress.step
    optim.set_lr(run.optimizer, lr)
    run.optimizer.zero_grad(set_to_none=True)
    values: dict[str, Tensor] = {}
    for micro in range(config.accumulate):
        batch = next(run.batches)
        # stochastic depth and mixing draw from the global generators; seeding here avoids saving their state
        loading.seed_all(config.seed, "step", step, micro, run.world.rank)
        with local_gradients(run.trained, last=micro == config.accumulate - 1):
            with _autocast(run.world.device, config.amp):
                loss, parts = run.task.loss(run.trained, batch)
            run.scaler.scale(loss / config.accumulate).backward()
        for name, value in {**parts, "loss": loss}.items():
            values[name] = values.get(name, 0) + value.detach().float() / config.accumulate

    run.scaler.unscale_(run.optimizer)
    parameters = [parameter for parameter in run.model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if config.clip is None else config.clip)
    values["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    run.scaler.step(run.optimizer)
    run.scaler.update()
    share_buffers(run.model)
    if run.ema is not None:
        run.ema.update(run.model, step)
    return values


def _receive(run: Run, everything: bool) -> None:
    progress = run.progress
    for report in run.reports.receive(everything):
        run.grad_norm = report.values.pop("grad_norm")
        # the fp16 scaler skips a step whose gradient overflowed; otherwise it has already been applied to the weights
        for name, value in (("loss", report.values["loss"]), ("gradient norm", run.grad_norm)):
            if not math.isfinite(value) and (name == "loss" or not run.scaler.is_enabled()):
                raise TrainingStopped(_stop_message(run, report, name, value))
        for name, value in report.values.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        progress.summed += 1
        if report.flags["failures"]:
            run.skipped.share(run.log.info)
        run.stop |= report.flags["stop"]
        run.save |= report.flags["save"]


def _stop_message(run: Run, report: Report, name: str, value: float) -> str:
    epoch = (report.step - 1) // run.epoch_steps + 1
    if run.saved_step is None:
        good = "no checkpoint had been saved"
    else:
        good = f"{run.folder / checkpoint.STATE} holds the last good state, from step {run.saved_step}"
    return (
        f"the {name} became {value} in epoch {epoch}, step {report.step}, at a learning rate of {report.lr:.3g}; "
        f"{good}: try a lower lr, a longer warm-up, or amp none"
    )


def _log(run: Run, lr: float) -> None:
    progress, now = run.progress, time.monotonic()
    step, before = run.logged
    speed = (progress.step - step) / max(now - before, 1e-9)
    record = {name: value / progress.summed for name, value in progress.sums.items()}
    record |= {"lr": lr, "grad_norm": run.grad_norm, "images_per_second": speed * run.config.batch_size}
    run.log.record("train", progress.step, run.epoch, record)
    shown = {"loss": record["loss"], "lr": lr, "images/s": record["images_per_second"]}
    run.log.progress(progress.step, run.epoch, shown, left=(run.total - progress.step) / speed)
    progress.sums, progress.summed = {}, 0
    run.logged = (progress.step, now)


def _evaluation_due(run: Run) -> bool:
    step = run.progress.step
    at_mark = step % (run.epoch_steps * run.config.evaluate_every) == 0 or step == run.total
    return at_mark and step > 0 and step != run.progress.evaluated


def _save_due(run: Run) -> bool:
    step, every = run.progress.step, run.config.save_steps
    return step > 0 and step != run.saved_step and (run.save or (every is not None and step % every == 0))


def _evaluate(run: Run) -> None:
    _receive(run, everything=True)
    progress, began = run.progress, time.monotonic()
    loading.seed_all(run.config.seed, "evaluation", progress.step)
    metrics = evaluate(run.task, run.best_model, run.held_out, amp=run.config.amp)
    run.held_out.skipped.share(run.log.info)
    seconds = time.monotonic() - began
    progress.evaluated, progress.latest = progress.step, metrics
    run.log.record("eval", progress.step, run.epoch, {**metrics, "seconds": seconds})
    run.log.info("  ".join([f"epoch {run.epoch:.2f}", *metric_texts(run.task, metrics, ".4g").values()]))
    if run.task.metric not in metrics:
        raise ValueError(f"metric={run.task.metric!r} is not returned by evaluate(): use one of {', '.join(metrics)}")
    value = metrics[run.task.metric]
    if math.isfinite(value) and (not progress.best or value > progress.best[run.task.metric]):
        progress.best = {**metrics, "step": progress.step}
        checkpoint.save_weights(run.folder / checkpoint.BEST, run.best_model.get_submodule(run.kept), run.metadata)
    run.logged = (run.logged[0], run.logged[1] + seconds)  # excluded from the training speed


def _save(run: Run) -> None:
    _receive(run, everything=True)  # a state after a nan loss must not replace a good one
    progress = run.progress
    progress.metrics_bytes = run.log.position()
    progress.scaler, progress.metadata = run.scaler.state_dict(), dict(run.metadata)
    progress.skipped = {
        "training": {str(index): text for index, text in run.skipped.known.items()},
        "evaluation": {str(index): text for index, text in run.held_out.skipped.known.items()},
    }
    now = replace(progress, seconds=progress.seconds + time.monotonic() - run.began)
    checkpoint.save_state(run.folder, run.modules, run.optimizer, now)
    run.saved, run.saved_step, run.save = time.monotonic(), progress.step, False


def _summarise(run: Run) -> dict[str, Any]:
    progress = run.progress
    summary = {
        **progress.latest,
        "metric": run.task.metric,
        "best": progress.best,
        "epochs": round(run.epoch, 4),
        "steps": progress.step,
        "seconds": round(progress.seconds + time.monotonic() - run.began, 1),
        "images_skipped": {"training": len(run.skipped.known), "evaluation": len(run.held_out.skipped.known)},
        **surroundings(run.world.device, run.world.size),
    }
    on_main(lambda: write_json(run.folder / SUMMARY, summary))
    return summary


def _autocast(device: torch.device, amp: str) -> torch.autocast:
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "none")
