# SPDX-License-Identifier: Apache-2.0
"""The training loop: `fit` takes a task, a model and two datasets, and fills a run's folder.

A step is a function of its number: learning rate, images, augmentation and every random draw follow from (seed,
step), so that a run resumed from `last/`, on as many processes and threads, ends with the bits of one that was never
interrupted. Losses, failures and requests of all processes travel in one small tensor a step, which a GPU's host
reads one step late in order not to wait; before anything is evaluated or saved all of them have been read.
"""

import copy
import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from . import checkpoint, loading, optim, resuming
from .checkpoint import Progress
from .config import Task, TrainConfig
from .distributed import (
    Interrupts,
    World,
    copy_from_main,
    distributed,
    local_gradients,
    on_main,
    parallel,
    set_precision,
    share_buffers,
    whole,
)
from .loading import Collate, EvaluationBatches
from .log import SUMMARY, Log, surroundings, write_json
from .reports import Report, Reports


class TrainingStopped(RuntimeError):  # noqa: N818 - an end of the run, as StopIteration is one
    """The loss or the gradient is no longer a number."""


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
    """Train `model` in place and return the summary that is also in the folder.

    `metadata` goes into best.safetensors, beside the weights of the submodule `kept` ("": of the whole model). With
    `resume` the run in `folder` goes on where its last checkpoint is. The first process calls `begin` as soon as
    nothing can be refused any more and nothing is written yet. Under torchrun every process calls this alike.
    """
    folder = Path(folder)
    with distributed(config.device) as world, Interrupts() as interrupts:
        on_main(lambda: resuming.check_folder(folder, resume))
        sets = (train_set, val_set, collate, eval_collate)
        run = _prepare(task, model, *sets, config, folder, world, resume, metadata, begin)
        run.kept = kept
        try:
            _train(run, interrupts)
            return _summarise(run)
        finally:
            run.batches.close()
            run.held_out.close()
            run.log.close()


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, batches: EvaluationBatches, *, amp: str = "none") -> dict[str, float]:
    """The task's metrics; `batches.skipped` then knows the images that could not be read."""
    training = model.training
    model.eval()
    try:
        with whole(model), _autocast(batches.world.device, amp):
            return {name: float(value) for name, value in task.evaluate(model, batches).items()}
    finally:
        model.train(training)


@dataclass
class _Run:
    """All that the functions below share."""

    task: Task
    config: TrainConfig
    folder: Path
    metadata: Mapping[str, str]
    world: World
    epoch_steps: int
    total: int
    model: nn.Module
    trained: nn.Module  # the model, or DDP around it
    ema: optim.Ema | None
    modules: dict[str, nn.Module]  # whose weights are saved
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: Generator[Any, None, None]
    held_out: EvaluationBatches
    skipped: loading.Skipped
    progress: Progress
    log: Log
    reports: Reports
    began: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)
    saved_step: int | None = None
    logged: tuple[int, float] = (0, 0.0)  # step and time of the last training record
    grad_norm: float = 0.0
    kept: str = ""
    stop: bool = False
    save: bool = False

    @property
    def epoch(self) -> float:
        return self.progress.step / self.epoch_steps

    @property
    def best_model(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module


def _prepare(
    task: Task,
    model: nn.Module,
    train_set: Dataset[Any],
    val_set: Dataset[Any],
    collate: Collate | None,
    eval_collate: Collate | None,
    config: TrainConfig,
    folder: Path,
    world: World,
    resume: bool,
    metadata: dict[str, str] | None,
    begin: Callable[[], None] | None,
) -> _Run:
    # torch does not promise a length
    images = {"training": len(train_set), "evaluation": len(val_set)}  # type: ignore[arg-type]
    size = images["training"]
    epoch_steps = loading.count_epoch_steps(size, config)
    total = optim.count_steps(config, epoch_steps)
    micro_batch = loading.micro_batch_size(config, world)
    set_precision(world.device)

    model, trained, average = _place(model, config, world)
    optimizer = optim.make_optimizer(model, config)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")

    saved = on_main(lambda: checkpoint.load_progress(folder, total, config.optimizer)) if resume else None
    progress = saved or Progress()
    modules = {"model": model} | ({} if average is None else {"ema": average})
    if saved is not None:
        checkpoint.load_state(folder, modules, optimizer)
        if saved.scaler:  # none without fp16
            scaler.load_state_dict(saved.scaler)
    if begin is not None:
        on_main(begin)
    # only now: it cuts off what the state does not know of
    log = Log(folder, main=world.is_main, total=total, step=progress.step, keep=progress.metrics_bytes)
    known = resuming.known_failures(progress, images)
    skipped = loading.Skipped("training", size, config.max_corrupt, known.get("training"))
    held_out = EvaluationBatches(
        val_set,
        world,
        batch_size=micro_batch,
        workers=config.workers,
        seed=config.seed,
        max_corrupt=config.max_corrupt,
        collate=eval_collate or collate,
        known=known.get("evaluation"),
    )
    run = _Run(
        task=task,
        config=config,
        folder=folder,
        metadata=metadata or {},
        world=world,
        epoch_steps=epoch_steps,
        total=total,
        model=model,
        trained=trained,
        ema=None if average is None else optim.Ema(average, config.ema),
        modules=modules,
        optimizer=optimizer,
        scaler=scaler,
        batches=loading.training_batches(train_set, config, world, progress.step, total, skipped, collate),
        held_out=held_out,
        skipped=skipped,
        progress=progress,
        log=log,
        reports=Reports(world.device),
    )
    if saved is not None:
        run.saved_step = progress.step
        if changed := resuming.changes(progress, config, images):
            log.say(f"the run goes on with another configuration: {', '.join(changed)}")
        log.say(f"resuming {folder} at step {progress.step} of {total}")
    elif resume:
        log.say(f"{folder} has no checkpoint yet: starting from the beginning")
    progress.config, progress.images, progress.metadata = asdict(config), images, dict(run.metadata)
    return run


def _place(model: nn.Module, config: TrainConfig, world: World) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """On the devices of all processes: the model, what is trained of it, and its moving average if there is one."""
    model = model.to(world.device)
    if world.size > 1 and world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # torch has none for the CPU
    copy_from_main(model.state_dict().values())
    average = copy.deepcopy(model).eval().requires_grad_(False) if config.ema else None
    if config.compile:
        for module in (model, average):
            if module is not None:
                module.compile()  # in place: the keys of checkpoints stay
    trained = parallel(model, config.strategy, world)
    if average is not None and config.strategy == "fsdp":
        parallel(average, config.strategy, world)
    return model, trained, average


def _train(run: _Run, interrupts: Interrupts) -> None:
    config, progress = run.config, run.progress
    run.model.train()
    run.logged = (progress.step, time.monotonic())
    while True:
        if run.stop:
            _save(run)
            text = f"stopped at step {progress.step} of {run.total}; resume {run.folder} to go on"
            run.log.say(text)
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
        logging = progress.step % config.log_every == 0 or progress.step == run.total
        _receive(run, everything=logging)
        if logging:
            _log(run, lr)
        else:
            run.log.progress(progress.step, run.epoch)


def _step(run: _Run, lr: float) -> dict[str, Tensor]:
    """One optimiser step over its micro-batches; the means of the losses over them, on the device."""
    config, step = run.config, run.progress.step
    optim.set_lr(run.optimizer, lr)
    run.optimizer.zero_grad(set_to_none=True)
    values: dict[str, Tensor] = {}
    for micro in range(config.accumulate):
        batch = next(run.batches)
        # stochastic depth and mixing draw from these; so they need no saved state
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


def _receive(run: _Run, everything: bool) -> None:
    progress = run.progress
    for report in run.reports.receive(everything):
        run.grad_norm = report.values.pop("grad_norm")
        # fp16's scaler skips a step whose gradient overflowed; anywhere else that gradient is in the weights now
        for name, value in (("loss", report.values["loss"]), ("gradient's norm", run.grad_norm)):
            if not math.isfinite(value) and (name == "loss" or not run.scaler.is_enabled()):
                raise TrainingStopped(_why_stopped(run, report, name, value))
        for name, value in report.values.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        progress.summed += 1
        if report.flags["failures"]:
            run.skipped.share(run.log.say)
        run.stop |= report.flags["stop"]
        run.save |= report.flags["save"]


def _why_stopped(run: _Run, report: Report, name: str, value: float) -> str:
    epoch = (report.step - 1) // run.epoch_steps + 1
    if run.saved_step is None:
        good = "no checkpoint had been saved"
    else:
        good = f"{run.folder / checkpoint.STATE} holds the last good state, of step {run.saved_step}"
    return (
        f"the {name} became {value} in epoch {epoch}, step {report.step}, at a learning rate of {report.lr:.3g}; "
        f"{good}: try a lower lr, a longer warm-up, or amp none"
    )


def _log(run: _Run, lr: float) -> None:
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


def _evaluation_due(run: _Run) -> bool:
    step = run.progress.step
    at_mark = step % (run.epoch_steps * run.config.evaluate_every) == 0 or step == run.total
    return at_mark and step > 0 and step != run.progress.evaluated


def _save_due(run: _Run) -> bool:
    step, every = run.progress.step, run.config.save_steps
    return step > 0 and step != run.saved_step and (run.save or (every is not None and step % every == 0))


def _evaluate(run: _Run) -> None:
    _receive(run, everything=True)
    progress, began = run.progress, time.monotonic()
    loading.seed_all(run.config.seed, "evaluation", progress.step)
    metrics = evaluate(run.task, run.best_model, run.held_out, amp=run.config.amp)
    run.held_out.skipped.share(run.log.say)
    seconds = time.monotonic() - began
    progress.evaluated, progress.latest = progress.step, metrics
    run.log.record("eval", progress.step, run.epoch, {**metrics, "seconds": seconds})
    run.log.say(f"epoch {run.epoch:.2f}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if run.task.metric not in metrics:
        raise ValueError(f"metric={run.task.metric!r} is not among what evaluate() returned: {', '.join(metrics)}")
    value = metrics[run.task.metric]
    if math.isfinite(value) and (not progress.best or value > progress.best[run.task.metric]):
        progress.best = {**metrics, "step": progress.step}
        checkpoint.save_weights(run.folder / checkpoint.BEST, run.best_model.get_submodule(run.kept), run.metadata)
    run.logged = (run.logged[0], run.logged[1] + seconds)  # not a part of the training speed


def _save(run: _Run) -> None:
    _receive(run, everything=True)  # a state after a loss that was no number must not replace a good one
    progress = run.progress
    progress.metrics_bytes = run.log.position()
    progress.scaler = run.scaler.state_dict()
    progress.skipped = {
        "training": {str(index): text for index, text in run.skipped.known.items()},
        "evaluation": {str(index): text for index, text in run.held_out.skipped.known.items()},
    }
    now = replace(progress, seconds=progress.seconds + time.monotonic() - run.began)
    checkpoint.save_state(run.folder, run.modules, run.optimizer, now)
    run.saved, run.saved_step, run.save = time.monotonic(), progress.step, False


def _summarise(run: _Run) -> dict[str, Any]:
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
