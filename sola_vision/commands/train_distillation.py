# SPDX-License-Identifier: Apache-2.0
"""Preparation of `sola train` for a distillation recipe: a classifier that also learns from a teacher."""

import json
from dataclasses import replace

from sola_vision.commands import train_classification
from sola_vision.commands.dispatch import Job
from sola_vision.commands.options import Run
from sola_vision.engine import World
from sola_vision.recipes import DistillationRecipe
from sola_vision.tasks.distillation import Distillation, Student, find_columns, map_levels, pair_maps
from sola_vision.tasks.teacher import load_teacher


def prepare(request: Run, world: World) -> Job:
    """Return the data sets, network and task of the run."""
    recipe = request.configuration
    assert isinstance(recipe, DistillationRecipe)
    job = train_classification.prepare(request, world)
    classes: list[str] = json.loads(job.metadata["classes"])
    teacher = load_teacher(recipe.teacher, recipe.image)
    recipe.teacher.sha256 = teacher.sha256  # config.yaml reproduces the run with this teacher only
    targets = recipe.distill.targets if recipe.distill.target_weight else "none"
    columns, note = find_columns(targets, teacher, classes)
    student_levels, teacher_levels, pairs = [], [], []
    if recipe.distill.feature_weight:
        student_levels = map_levels(job.model, recipe.model.name, recipe.image.size)
        teacher_levels = map_levels(teacher.network, f"the teacher {teacher.name}", teacher.size or recipe.image.size)
        pairs = pair_maps([stride for stride, _ in student_levels], [stride for stride, _ in teacher_levels])
    elif columns is None:
        why = note.partition(":")[0] or "targets are none or weigh 0"
        raise ValueError(
            f"nothing is left to learn from the teacher {teacher.name}: {why}, "
            "and --distill.feature_weight is 0; raise it or choose targets"
        )
    taught = ["classes" if targets == "hard" else "probabilities"] if columns else []
    taught += [f"maps at strides {', '.join(str(teacher_levels[b][0]) for _, b in pairs)}"] if pairs else []
    levels = [b for _, b in pairs]
    return replace(
        job,
        task=Distillation(len(classes), recipe.image, teacher.to(world.device), recipe.distill, columns, levels),
        model=Student(
            job.model, [a for a, _ in pairs], [(student_levels[a][1], teacher_levels[b][1]) for a, b in pairs]
        ),
        kept="network",
        metadata=job.metadata | {"teacher": json.dumps({"name": teacher.name, "sha256": recipe.teacher.sha256})},
        description=f"{job.description}; distilled from the {' and '.join(taught)} of {teacher.name}",
        printed_metrics=(*job.printed_metrics, "teacher_top1"),
        report="\n".join(line for line in (job.report, note) if line) or None,
    )
