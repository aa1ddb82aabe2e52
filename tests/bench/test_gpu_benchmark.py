# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py and its tables, as far as testable without a GPU."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch):
    """The folder benchmarks is on the path, as when its scripts are run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import measures
    import report

    return gpu, measures, report


WHERE = {
    "hardware": "NVIDIA H100",
    "torch": "2.11.0",
    "timm": "1.0.31",
    "cuda": "13.0",
    "triton": "3.6.0",
    "commit": "0123456789abcdef",
    "command": "gpu.py all --vision-rwkv some/folder --commit 0123456789abcdef --rounds 5",
}


def call(path, direction, microseconds, beside="bfloat16", launch="eager", over=None, shape=(128, 3136, 96)):
    row = {"what": "operator", "path": path, "direction": direction, "beside": beside, "launch": launch}
    row |= {"shape": list(shape), "microseconds": microseconds, "spread": 0.01}
    return row if over is None else row | {"over_hbm_floor_measured": over}


def network(model, direction, rate):
    row = {"what": "model", "model": model, "direction": direction, "mode": "eager", "size": 224, "batch": 128}
    return row | {"images_per_second": rate, "spread": 0.002, "peak_mib": 2048.0}


def documents(measures):
    operator = [
        {"what": "bandwidth", "copy_tb_s": 3.0, "nominal_tb_s": 3.35},
        call("triton", "forward", 100.0, over=1.25),
        call("triton", "backward", 300.0, over=1.6),
        call("triton", "both", 500.0),
        call("vision-rwkv", "forward", 600.0, over=9.0),
        call("vision-rwkv", "both", 2000.0),
        # rows that the measures must not use
        call("triton", "forward", 1.0, beside="float32", over=0.1),
        call("triton", "forward", 1.0, launch="graph", over=0.1),
        call("triton", "forward", 1.0, over=0.1, shape=(1, 3136, 96)),
    ]
    rates = {measures.SMALL: (1400.0, 360.0), measures.SWIN: (1000.0, 300.0)}
    networks = [
        network(name, way, rate)
        for name, pair in rates.items()
        for way, rate in zip(("inference", "training"), pair, strict=True)
    ]
    passes = [
        {"what": "bandwidth", "copy_tb_s": 3.0},
        {
            **{"what": "pass", "name": "gate", "path": "kernel", "direction": "forward", "dtype": "bfloat16"},
            **{"microseconds": 90.0, "spread": 0.0, "over_hbm_floor_measured": 1.17},
        },
    ]
    kernel = {"name": "void gemm<a | b>", "calls": 3, "microseconds": 70.0, "share": 0.7}
    profile = [
        {
            **{"what": "model", "model": "sola_tiny", "direction": "inference", "batch": 128, "size": 224},
            **{"device_us": 100.0, "wall_us": 120.0, "launch_us": 90.0, "launched": 4, "kernels": [kernel]},
        }
    ]
    rows = {"operator": operator, "models": networks, "passes": passes, "profile": profile}
    return {f"gpu-{name}": WHERE | {"rows": lines} for name, lines in rows.items()}


def test_without_a_gpus_files_nothing_is_met(scripts):
    _, measures, report = scripts
    assert {m.met for m in measures.gpu_measures({})} == {None}
    for name in ("operator", "passes", "models", "profile"):
        assert report.TABLES[f"gpu-{name}"]({}) == f"*Not measured yet:* `python benchmarks/gpu.py {name}`"


def test_measures_of_the_gpu_take_the_right_rows(scripts):
    _, measures, _ = scripts
    found = {m.what: (m.value, m.met) for m in measures.gpu_measures(documents(measures))}
    assert found == {
        "operator: forward over HBM's time, 128x3136x96 bfloat16": (1.25, True),
        "operator: backward over HBM's time, 128x3136x96 bfloat16": (1.6, False),
        "operator: Vision-RWKV's CUDA kernel (float32) over forward, 128x3136x96 bfloat16": (6.0, True),
        "operator: Vision-RWKV's CUDA kernel (float32) over both, 128x3136x96 bfloat16": (4.0, False),
        "224 autocast: images/s in inference, sola_small over swin_tiny": (1.4, True),
        "224 autocast: images/s in training, sola_small over swin_tiny": (pytest.approx(1.2), False),
    }


def test_tables_show_what_the_files_say(scripts):
    _, measures, report = scripts
    results = documents(measures)
    tables = {name: report.TABLES[name](results) for name in report.TABLES if name.startswith("gpu-")}
    assert "| 128x3136x96 | bfloat16 | eager | 100.0 | 1.25 | 300.0 | 1.60 | 500.0 | 600.0 |" in tables["gpu-operator"]
    assert "| 1x3136x96 | bfloat16 | eager | 1.0 | 0.10 |  |" in tables["gpu-operator"]
    assert "| gate | bfloat16 | forward | 90.0 | 1.17 |  |  |" in tables["gpu-passes"]
    line = "| sola_small | 224x224 | 128 | eager | 1,400 | 2,048 | 0.2 | 360 | 2,048 | 0.2 |"
    assert line in tables["gpu-models"]
    assert "70 % `void gemm<a / b>`" in tables["gpu-profile"]
    assert "NVIDIA H100" in tables["gpu-measures"]
    # a row of a table has the columns of its head
    for table in tables.values():
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1
        assert "some/folder" not in table
    assert "commit 0123456789: `python benchmarks/gpu.py all --rounds 5`" in tables["gpu-operator"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["operator", "--vision-rwkv", "nowhere"], "nowhere: no such folder"),
        (["build-vision-rwkv", "nowhere"], "nowhere: no such folder"),
        (["models", "--batch", "0"], "0 must be at least 1"),
    ],
)
def test_wrong_arguments_end_in_a_line(scripts, words, said, monkeypatch, capsys):
    gpu, _, _ = scripts
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_part_that_fails_keeps_its_rows(scripts, monkeypatch, tmp_path, capsys):
    gpu, _, _ = scripts

    def part():
        yield {"what": "first", "ok": True}
        raise RuntimeError("second\nwith more lines")

    written = {}
    monkeypatch.setattr(gpu, "write", lambda path, rows, commit: written.update({path.name: (rows, commit)}))
    monkeypatch.setattr(gpu.torch.cuda, "empty_cache", lambda: None)
    assert not gpu.run_part("operator", part, tmp_path, "abc")
    assert written == {"gpu-operator.json": ([{"what": "first", "ok": True}], "abc")}
    assert "operator: stopped: RuntimeError: second\n" in capsys.readouterr().out
    assert gpu.run_part("models", lambda: [{"what": "model"}], tmp_path, None)
    assert not gpu.run_part("correct", lambda: [{"ok": True}, {"ok": False}], tmp_path, None)


def test_a_copy_without_git_is_told_its_commit(scripts, monkeypatch, tmp_path):
    import gpu_timing

    for name, value in {"get_device_capability": (9, 0), "get_device_name": "some GPU"}.items():
        monkeypatch.setattr(gpu_timing.torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(gpu_timing.torch.cuda, "max_memory_allocated", lambda *_: 0)
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(gpu_timing.torch.cuda, "get_device_properties", lambda *_: properties)
    gpu_timing.write(tmp_path / "new" / "gpu-models.json", [{"a": 1}], "abc")
    document = json.loads((tmp_path / "new" / "gpu-models.json").read_text())
    assert (document["commit"], document["hardware"], document["rows"]) == ("abc", "some GPU", [{"a": 1}])


def test_vision_rwkvs_sources_are_patched_in_a_copy(scripts, monkeypatch, tmp_path):
    import gpu_vision_rwkv as module

    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    text = '#include <THC/THCAtomics.cuh>\nAT_DISPATCH_FLOATING_TYPES(k.type(), "f", ([&] {}));\n'
    inside = tmp_path / "checkout" / module.INSIDE
    inside.mkdir(parents=True)
    (inside / "bi_wkv_kernel.cu").write_text(text)
    (inside / "bi_wkv.cpp").write_text("")
    found = module.sources(tmp_path / "checkout")
    assert found == module.sources(inside)
    assert module.sources(tmp_path / "cache") == []
    place, copies = module.patched(found)
    assert (place, copies) == module.patched(found)
    assert place.parent == tmp_path / "cache"
    patched = (place / "bi_wkv_kernel.cu").read_text()
    assert patched == '#include <ATen/cuda/Atomic.cuh>\nAT_DISPATCH_FLOATING_TYPES(k.scalar_type(), "f", ([&] {}));\n'
    assert (inside / "bi_wkv_kernel.cu").read_text() == text


def test_a_builds_errors_are_found_in_its_output(scripts):
    from gpu_vision_rwkv import errors

    text = "Error building extension: [1/2] nvcc -DTORCH_X\nnote\na.cu(3): error: no member\nninja: build stopped"
    assert errors(text) == ["a.cu(3): error: no member"]
    assert errors("\n".join(map(str, range(20)))) == [str(i) for i in range(10)]


def test_networks_run_as_they_are_timed(scripts):
    import gpu_models

    jobs = gpu_models.model_jobs("sola_nano", 32, 2, "eager", device="cpu")
    assert list(jobs) == ["sola_nano inference", "sola_nano training"]
    for job in jobs.values():
        job()


def test_slow_jobs_get_fewer_calls(scripts, monkeypatch):
    import gpu_timing

    now = {"quick": 10.0, "slow": 100_000.0, "slower": 1_000_000.0}
    called = dict.fromkeys(now, 0)

    def job(name):
        def run():
            called[name] += 1
            return now[name]

        return run

    monkeypatch.setattr(gpu_timing, "timed", lambda job, hidden: job())
    times = gpu_timing.interleaved({name: job(name) for name in now}, 2, gpu_timing.Clock(1))
    assert times == {name: (value, 0.0) for name, value in now.items()}
    assert called == {"quick": 2 * 12, "slow": 2 * 5, "slower": 2 * 3}


def test_what_networks_launch_is_compiled_for_every_width(scripts):
    import gpu_compile

    found = gpu_compile.layers(["sola_tiny", "resnet18", "sola_small"])
    assert found == [(768, 7), (384, 14), (256, 7), (192, 28), (192, 14), (128, 28), (96, 56)]
    gpu_compile.call(16, 3, "cpu")


def test_passes_are_compared_with_their_plain_forms(scripts, monkeypatch):
    import gpu_correct

    assert gpu_correct.passes("cpu")["ok"]
    monkeypatch.setattr(gpu_correct, "pass_error", lambda run, inputs: 1e-1)
    assert not gpu_correct.passes("cpu")["ok"]
    assert gpu_correct.network("cpu")["ok"]


def test_stored_commands_have_no_folders(scripts):
    import gpu_timing

    command = "gpu.py operator --rounds 3 --vision-rwkv /a/cuda_new --out /b --commit 1234567"
    assert gpu_timing.without_folders(command) == "gpu.py operator --rounds 3 --vision-rwkv DIR"
