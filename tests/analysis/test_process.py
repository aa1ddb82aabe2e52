# SPDX-License-Identifier: Apache-2.0
"""A measurement in a fresh process: its JSON document, or None and one line."""

from sola_vision.analysis.process import in_process


def test_the_document_of_a_process_is_returned(tmp_path, capsys):
    file = tmp_path / "document.json"
    file.write_text('{"seconds": 1.5}')
    assert in_process("json.tool", str(file), subject="a file") == {"seconds": 1.5}
    assert capsys.readouterr().err == ""


def test_a_failure_is_one_line(tmp_path, capsys):
    assert in_process("json.tool", str(tmp_path / "missing"), subject="a file") is None
    error = capsys.readouterr().err
    assert error.startswith("sola: a file could not be measured: ")
    assert "No such file" in error
    assert error.count("\n") == 1


def test_a_process_that_takes_too_long_is_ended(capsys):
    slow = "-n", "1", "-r", "1", "import time; time.sleep(600)"
    assert in_process("timeit", *slow, subject="a pause", timeout=0.5) is None
    assert capsys.readouterr().err == "sola: a pause could not be measured: it took over 0.5 s\n"
