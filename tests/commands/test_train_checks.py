# SPDX-License-Identifier: Apache-2.0
"""The checks of `sola train` before the first step: errors that name the option to change, and the first lines."""

import shlex
import shutil

import pytest
from small import CLASSES, TINY


# weights -------------------------------------------------------------------------------------------------------------
def test_a_name_with_pretrained_weights_is_refused(refused, data):
    words = ["--data", data, "--model.name", "resnet18.a1_in1k", "--model.dims", "null"]
    refused(*TINY, *words, names=["--model.name resnet18.a1_in1k", "--model.name resnet18 ", "--init FILE"])


@pytest.mark.parametrize(("words", "random"), [([], True), (["--init", "RUN"], False), (["--resume"], False)])
def test_the_first_line_names_the_origin_of_the_weights(sola, data, trained, words, random):
    words = [trained if word == "RUN" else word for word in words]
    once = [*TINY, "--data", data, "--out", "run", "--train.steps", 1]
    if words == ["--resume"]:
        assert sola(*once).code == 0
    said = sola(*once, *words)
    assert said.code == 0
    first = said.err.splitlines()[0]
    assert ("; random weights; " in first) == random
    assert first.startswith(f"weights from {trained}") == ("--init" in words)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--model.dims [16,16,32,32]", "--model.dims '[8,16,32,32]'"),
        ("--model.schedule LL/LL/LL/LS", "--model.schedule LL/LL/LLSLLS/LS"),
        ("--model.bridges 1.1>4.2", "--model.bridges ''"),
        ("--model.name resnet18 --model.dims null", "--model.name sola_nano --model.dims '[8,16,32,32]'"),
        ("--model.name sola_base", "--model.name sola_nano"),
        ("--model.name sola_base --model.dims [8,16,32,64]", "--model.name sola_nano --model.dims '[8,16,32,32]'"),
    ],
)
def test_init_from_another_network_names_the_options_that_fit(refused, sola, data, trained, words, options):
    start = [*TINY, "--data", data, "--out", "run", "--init", trained, *words.split()]
    line = refused(*start, names=["the file is of sola_nano with schedule LL/LL/LLSLLS/LS, this run of "])
    assert line.endswith(f": use {options}\n")
    assert sola(*start, *shlex.split(options)).code == 0


# data ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("absent", "named"),
    [(CLASSES[1:2], "bee"), (CLASSES[:6], "ant, bee, cat, dog, emu, ..."), ([], None)],
)
def test_classes_without_held_out_images_are_named(sola, data, tmp_path, absent, named):
    shutil.copytree(data, "images")
    for name in absent:
        shutil.rmtree(tmp_path / "images" / "val" / name)
    said = sola(*TINY, "--data", "images", "--out", "run", "--train.steps", 1)
    assert said.code == 0
    first, *others = said.err.splitlines()
    assert "; random weights; " in first
    lines = [line for line in others if line.startswith("no held-out images of: ")]
    assert lines == ([f"no held-out images of: {named}"] if named else [])
