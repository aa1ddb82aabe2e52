# SPDX-License-Identifier: Apache-2.0
"""Options that only some tasks have: the help names the others, and so does the error."""

import pytest


@pytest.mark.parametrize("verb", ["eval", "predict"])
def test_help_without_a_checkpoint_says_how_to_list_the_other_options(capsys, verb):
    from sola_vision.cli import main

    with pytest.raises(SystemExit):
        main([verb, "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert f"Of a detector or a segmentation network: `sola {verb} --checkpoint RUN --help`" in help_text
    assert ("sola eval --results FILE --help" in help_text) == (verb == "eval")


def test_an_option_of_another_task_is_named_as_such(refused, data, trained):
    image = data / "val" / "ant" / "0.png"
    words = "--threshold is an option for detection, but --checkpoint is for classification; see `sola predict --help`"
    for option in (["--threshold", 0.5], ["--threshold=0.5"]):
        refused("predict", image, "--checkpoint", trained, *option, names=[words])
    words = "--out is an option for detection and segmentation, but --checkpoint is for classification"
    refused("predict", image, "--checkpoint", trained, "--out", "x", names=[words])
    words = "--slide is an option for segmentation, but --results is for detection"
    refused("eval", "--results", "a", "--annotations", "b", "--slide", 3, names=[words])
    # an option of no task
    refused(
        "predict", image, "--checkpoint", trained, "--confidence", 3, names=["unrecognized arguments: --confidence"]
    )
