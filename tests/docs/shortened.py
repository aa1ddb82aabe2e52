# SPDX-License-Identifier: Apache-2.0
"""What is not run as the pages have it, and why: everything else is."""

# (text in a Python block, text that runs instead, why)
REPLACED = [
    ("pretrained=True)\nsola_vision", "pretrained=False)\nsola_vision", "random weights are as good, and tests do not download"),
]  # fmt: skip

# (pattern, words put behind the command, why): it runs for real, but not for as long
SHORTER = [
    (r"sola train digits", "--train.epochs 1 --train.warmup_epochs 0 --train.batch_size 256", "minutes of training"),
    (r"sola train few_objects .*zoom", "--train.epochs 1 --train.warmup_epochs 0 --train.workers 0 --image.crop 64", "an hour of training"),
    (r"sola train few_objects", "--train.epochs 1 --train.warmup_epochs 0 --train.workers 0 --image.size 64 --image.crop null", "an hour of training"),
    (r"sola train few_masks", "--train.steps 2 --train.warmup_steps 0 --train.batch_size 2 --train.workers 0 --image.size 64 --image.crop 64", "an hour of training"),
    (r"sola train ", "--train.epochs 1 --train.warmup_epochs 0 --train.batch_size 8 --train.workers 0 --train.amp none --image.size 32", "minutes to hours of training"),
    (r"sola eval ", "--workers 0", "processes that read a handful of images"),
    (r"sola study (?!.*(--report|--list))", "--seeds 1 --epochs 1", "hours of training"),
    (r"sola search ", "--epochs 1", "hours of training"),
    (r"sola explain ", "--no-page --field-size 64", "a minute a picture"),
]  # fmt: skip

# (pattern, why): the real command line reads the command to its end, and it stops there
PARSED = [
    (r"torchrun .* train |sola train (imagenet|coco|ade20k)_", "the paper's recipes want eight GPUs and its data"),
    (r"--scale paper", "the paper's recipe, on a GPU"),
    (r"sola app", "serves until Ctrl-C; tests/app has it in a browser"),
    (r"sola bench|--measure|benchmarks/", "measures for minutes on a machine that does nothing else"),
    (r"--budget 400ms", "whether that is met depends on the machine"),
    (r"sola export runs/few_images", "half a minute each; tests/export/test_docs.py runs those of its page, the tutorial one here"),
    (r"onnx_classify.py model.onnx", "as the line before"),
]  # fmt: skip

# (pattern, why): no command line of ours reads it
ELSEWHERE = [
    (r"^TORCH=|^KERNEL=|^c\+\+ |^\./classify", "tests/export/test_docs.py compiles and runs it"),
]

# (pattern in a Python block, why): compiled here, run elsewhere
COMPILED = [
    (r"model\.onnx|model\.pt2", "tests/export/test_docs.py exports and runs it"),
]
