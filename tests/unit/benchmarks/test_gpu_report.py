"""The GPU report without a GPU: plan, traces, files, and processes with a fake worker."""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.gpu_report import __main__ as command
from benchmarks.gpu_report import figures, kernels, processes, rows
from benchmarks.gpu_report.results import Report
from benchmarks.gpu_report.rows import Row


def row(name: str, priority: int = 1, seconds: float = 10, kind: str = "step") -> Row:
    return Row(name, kind, priority, seconds)


# --- the plan


class Asked(dict):
    """Results that remember which rows a figure asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)


def asked(value) -> set[str]:
    results = Asked()
    value(results)
    return results.names


def test_names_are_unique_and_figures_name_rows():
    names = [one.name for one in rows.all_rows()]
    assert len(names) == len(set(names))
    wanted = set().union(*(asked(value) for _, _, _, value in figures.FIGURES))
    assert wanted and wanted <= set(names)


GOALS = {name: value for name, _, goal, value in figures.FIGURES if goal}


@pytest.mark.parametrize("name", [name for name in GOALS if "of all rows" not in name])
def test_figures_with_a_goal_are_measured_by_default(name):
    kept, _ = rows.trim(rows.all_rows(), command.MINUTES * 60)
    assert asked(GOALS[name]) and asked(GOALS[name]) <= {one.name for one in kept}


def test_most_important_rows_fit_into_eight_minutes():
    """Those up to a stated priority and whatever costs nothing beside others, no less important one in their place."""
    kept, left_out = rows.trim(rows.all_rows(), 8 * 60)
    assert command.MINUTES == 8 and rows.estimate(kept) <= 8 * 60 - processes.LAST
    assert kept == [one for one in rows.all_rows() if one.beside or one.priority <= rows.LEAST_IMPORTANT]
    assert rows.estimate(kept) + min(one.seconds for one in left_out) > 8 * 60


def test_trimming_goes_by_priority_and_counts_rows_beside_each_other_once():
    around = rows.AROUND
    plan = [row("slow", 3), row("test", 1, 30, "tests"), row("curve", 2, 25, "curve"), row("first", 1)]
    assert rows.estimate(plan) == around + 30 + 20
    kept, left_out = rows.trim(plan, around + 40)
    assert [one.name for one in kept] == ["test", "curve", "first"]
    assert [one.name for one in left_out] == ["slow"]
    assert rows.trim(plan, 0) == ([], plan)


def test_rows_are_picked_by_pattern():
    plan = [row("2b-bf16"), row("2b-fp8"), row("images")]
    assert [one.name for one in rows.pick(plan, ["2b-*"])] == ["2b-bf16", "2b-fp8"]
    with pytest.raises(ValueError, match="no row is called '3b'; there are 2b-bf16"):
        rows.pick(plan, ["3b"])


def test_the_row_that_decides_about_graphs_is_timed_first():
    """A trained encoder with torch's attention, which either replays or is lost as with Transformer Engine's."""
    first = min((one for one in rows.all_rows() if not one.beside), key=lambda one: one.priority)
    assert first.name == "2b-bf16-graph" and set(rows.TORCH_ATTENTION) < set(first.argv)


def test_every_file_of_gpu_tests_is_a_row():
    files = {one.settings["file"] for one in rows.test_rows()}
    assert {"tests/gpu/test_production.py", "tests/gpu/test_transformer_engine.py"} <= files


# --- what a trace says


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3", "attention"),
        ("void fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<5>, AdamFunctorMaster<bf16>>", "optimizer, gradient norm"),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<float>, std::array<char*, 3>, "
            "TrivialOffsetCalculator<2>, at::native::memory::LoadWithCast<2>, StoreWithCast<1>>",
            "gradient accumulation",
        ),
        ("void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add<c10::BFloat16>>", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>", "activations"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "copies"),
        ("void at::native::CatArrayBatchedCopy_vectorized<OpaqueType<16>>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "fills, random"),
        ("void at::native::reduce_kernel<128, 4, ReduceOp<c10::BFloat16, sum_functor>>", "reductions"),
        ("void at::native::index_elementwise_kernel<128, 4, index_put_kernel>", "gather, scatter"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<Kernel_traits>", "norms"),
        ("void transformer_engine::detail::cast_transpose_general_kernel<fp8>", "FP8 casts"),
        ("triton_poi_fused_add_mul_3", "elementwise"),
        ("triton_red_fused_sum_1", "reductions"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("something_new", "other"),
    ],
)  # fmt: skip
def test_kernels_are_classed_by_name(name, kind):
    assert kernels.kind(name) == kind


def test_overlapping_kernels_count_once():
    assert kernels.covered([]) == 0
    assert kernels.covered([(5, 7), (0, 4), (1, 2), (3, 6), (10, 11)]) == 8


def test_trace_is_summed_per_step(tmp_path):
    events = [
        {"ph": "X", "cat": "kernel", "name": "nvjet_a", "ts": 0, "dur": 4000},
        {"ph": "X", "cat": "kernel", "name": "nvjet_a", "ts": 2000, "dur": 4000},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 9000, "dur": 1000},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9000},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 0},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = kernels.summarize(kernels.read_trace(path), 2)
    assert (found["kernels"], found["busy_ms"]) == (1.5, 3.5)
    assert found["classes"] == {"matrix products": [4.0, 1.0], "copies": [0.5, 0.5]}
    assert found["top"][0] == ["nvjet_a", "matrix products", 4.0, 1.0]


# --- figures and files


def measured(milliseconds: float, **more) -> dict:
    profile = {
        "kernels": 10,
        "busy_ms": 40.0,
        "classes": {"matrix products": [30.0, 5], "copies": [10.0, 5]},
        "top": [],
    }
    step = {"seconds": [milliseconds / 1e3] * 3, "tokens": 1000, "warmup_seconds": [1.0], "recompiled": 0}
    return {**step, "profile": profile, "device": "NVIDIA H100 80GB HBM3", "took": 1.0, **more}


def test_figures_follow_from_rows():
    results = {
        "2b-bf16-graph": measured(
            50, useful_flops=989.4e12 * 0.05 * 0.4, flops=100.0, peak_gib=11, predicted_gib=10
        ),
        "2b-bf16-graph-no-lvtc": measured(59, flops=120.0, replay_difference=2e-5),
        "curve-bf16": {"losses": [2.0, 1.0, 0.5]},
        "curve-bf16-graph": {"losses": [2.0, 1.01], "replay_difference": 0.0},
        "curve-exact-eager": {"replay_difference": None},
    }
    found = {name: value(results) for name, _, _, value in figures.FIGURES}
    assert found["2B whole, bf16, graph: MFU"] == "40.0%"
    assert found["GPU busy share of that step, graph"] == "80.0%"
    assert found["share of kernel time in matrix products and attention, graph"] == "75.0%"
    assert found["LVTC off over on, 2B: measured of predicted"] == "1.180 of 1.200, 90% of the gain"
    assert found["losses of 50 steps, graph against eager"] == "1.0e-02"
    assert found["eager over graph, 2B bf16"] == ""
    replays = "first replay of a graph against the step without it, largest of all rows"
    assert found[replays] == "2.0e-05 (2 rows)"
    assert figures.useful_share({**results["2b-bf16-graph"], "device": "CPU"}, False) is None


def test_table_is_whole_after_every_part_and_read_again(tmp_path):
    report = Report(tmp_path, "command", "gpu_report-x", "abc")
    report.add("plain-loop", {"device": "H100", "cudnn": 91002})
    report.add("plain-loop", {**measured(40)})
    report.add("8b-fp8-graph", {"error": "ValueError: a | b"})
    report.add("8b-fp8-graph", {"error": "its process ended", "took": 3.0})
    report.add("tests-x", {"tests": 3, "skipped": 1, "failed": {"test_a": "assert 1\n== 2"}, "took": 2.0})
    report.add("images", {"images": [{"path": "new", "images/s": 7000.0}], "took": 1.0})
    text = (tmp_path / "gpu_report-x.md").read_text()
    assert "| plain-loop | 40 (40-40) | 100.0% | 10 |" in text and ", cuDNN 91002, " in text
    assert "- `8b-fp8-graph`: ValueError: a \\| b" in text
    assert "| tests-x | 1 | 1 | 1 | 2.0 |" in text and "- `tests-x`: test_a: assert 1 == 2" in text
    assert "| new | 7,000.0 |" in text
    again = Report.read(tmp_path / "gpu_report-x.json")
    assert list(again.lines()) == list(report.lines())
    assert [name for name in report.results if again.finished(name)] == ["plain-loop", "tests-x", "images"]


def test_answers_of_parts_stay_when_their_row_is_ended(tmp_path):
    """They came one by one, before pytest could write its report."""
    report = Report(tmp_path, "command", "gpu_report-x", "abc")
    report.add("tests-graph_parts", {"parts": {"split": "replays"}, "versions": "cudnn 91002"})
    report.add("tests-graph_parts", {"parts": {"split": "replays", "mlp": "illegal\naccess"}})
    report.add("tests-graph_parts", {"error": "ended after 176 s"})
    text = (tmp_path / "gpu_report-x.md").read_text()
    assert "- `tests-graph_parts`: split (cudnn 91002): replays" in text
    assert "- `tests-graph_parts`: mlp (cudnn 91002): illegal access" in text


def test_picture_shows_rows_with_a_profile(tmp_path):
    report = Report(tmp_path, "command", "gpu_report-x", "abc")
    assert report.draw() == "no picture: no row has a profile"
    report.add("plain-loop", measured(50))
    assert report.draw() == "picture: gpu_report-x.png"
    assert "![where the milliseconds go](gpu_report-x.png)" in list(report.lines())


# --- processes


FAKE = """
import json, subprocess, sys, time
row = json.loads(sys.argv[1])
do = row.get("do", "work")
if do == "die": sys.exit(3)
print("noise\\nREADY", flush=True)
sys.stdin.readline()
start = time.time()
send = lambda **values: print("RESULT " + json.dumps(values), flush=True)
send(first=1, start=start)
if do == "hang": time.sleep(60)
if do == "child": subprocess.Popen(["sleep", "60"]); sys.exit(0)
if do == "raise": send(error="RuntimeError: out of memory"); print("Traceback ...", file=sys.stderr); sys.exit(1)
time.sleep(0.2)
send(second=2, end=time.time())
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Rows whose worker is the script above; returns what was flushed."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(
        processes.Process,
        "_command",
        lambda self: [sys.executable, str(script), json.dumps({"kind": self.row.kind, **self.row.settings})],
    )
    monkeypatch.setattr(processes, "LEAST", 3.0)
    monkeypatch.setattr(processes, "IMPORTS", 30.0)
    return script


def told(*plan: Row, seconds: float = 60) -> dict[str, dict]:
    found: dict[str, dict] = {}
    flush = lambda name, part: found.setdefault(name, {}).update(part)  # noqa: E731
    processes.run(plan, time.monotonic() + seconds, flush)
    return found


def test_timed_rows_do_not_overlap(fake):
    found = told(*(row(name, priority) for name, priority in (("a", 2), ("b", 1), ("c", 3))), seconds=60)
    order = [found[name] for name in ("b", "a", "c")]
    assert all(one["second"] == 2 and "error" not in one for one in order)
    assert all(before["end"] <= after["start"] for before, after in pairwise(order))


def test_a_row_that_fails_stops_no_other_and_says_why(fake):
    plan = [
        Row("dies", "step", 1, 0.1, settings={"do": "die"}),
        Row("raises", "step", 2, 0.1, settings={"do": "raise"}),
        Row("hangs", "curve", 3, 0.1, settings={"do": "hang"}),
        row("works", 4, 1),
    ]
    found = told(*plan)
    assert found["dies"]["error"] == "its process ended with code 3"
    assert found["raises"]["error"] == "RuntimeError: out of memory" and "Traceback" in found["raises"]["log"]
    assert "expected" in found["hangs"]["error"] and found["hangs"]["first"] == 1
    assert found["works"]["second"] == 2 and "error" not in found["works"]


def test_a_child_that_holds_the_output_delays_nothing(fake):
    """Otherwise the row would last until the report's time is over, and say so."""
    found = told(Row("child", "curve", 1, 60, settings={"do": "child"}), row("works", 2, 1), seconds=29)
    assert found["child"]["first"] == 1 and "error" not in found["child"]
    assert found["works"]["second"] == 2


def test_rows_that_no_longer_fit_are_left_out(fake):
    found = told(row("long", 1, 100), row("short", 2, 1), seconds=30)
    assert found["long"]["error"].startswith("left out") and found["short"]["second"] == 2


def test_time_that_is_left_goes_to_rows_that_were_trimmed(fake, monkeypatch):
    """After all others, whatever their priority; those that still do not fit say nothing."""
    monkeypatch.setattr(processes, "LATE", 5.0)
    found: dict[str, dict] = {}
    flush = lambda name, part: found.setdefault(name, {}).update(part)  # noqa: E731
    plan = [row("one", 3, 1), row("two", 3, 1)]
    spare = [row("later", 6, 1), row("long", 5, 1000), row("next", 5, 1), row("curve", 4, 1, "curve")]
    processes.run(plan, time.monotonic() + 60, flush, spare)
    assert list(found) == ["one", "two", "next", "later"]
    assert all("error" not in one and one["second"] == 2 for one in found.values())


def test_imports_beside_nothing_are_part_of_a_rows_time(fake):
    """A row whose process could not start beside another."""
    found = told(row("long", 1, 100), row("short", 2, 20), seconds=30)
    assert found["short"]["error"].startswith("left out: ") and "it takes about 40" in found["short"]["error"]


def test_pytest_report_becomes_a_row(tmp_path):
    process = processes.Process.__new__(processes.Process)
    process.report = tmp_path / "report.xml"
    assert process._tests() == {"error": "pytest wrote no report"}
    process.report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="assert 1"/></testcase>'
        '<testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    assert process._tests() == {"tests": 3, "skipped": 1, "failed": {"b": "assert 1"}}


def test_command_runs_what_is_missing_and_keeps_the_rest(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    plan = [row("one", 1, 1), Row("two", "step", 2, 1, settings={"do": "raise"}), row("three", 3, 1000)]
    monkeypatch.setattr(command.rows, "all_rows", lambda: plan)
    monkeypatch.setattr(processes, "LAST", 0.0)
    monkeypatch.setattr(command.rows, "AROUND", 60.0)
    plan.append(row("four", 4, 59))  # a second too much, until the others take none
    out = tmp_path / "results"
    assert command.main(["--out", str(out), "--commit", "abc", "--minutes", "2"]) == 0
    (stored,) = out.glob("*.json")
    first = json.loads(stored.read_text())["rows"]
    assert first["one"]["second"] == 2 and first["two"]["error"] == "RuntimeError: out of memory"
    assert first["three"]["error"] == "left out: does not fit into 2 minutes"
    assert first["four"]["second"] == 2 and "error" not in first["four"]
    plan[1] = row("two", 2, 1)
    assert command.main(["--add-to", str(stored), "--minutes", "2"]) == 0
    second = json.loads(stored.read_text())["rows"]
    assert second["one"] == first["one"] and second["two"]["second"] == 2 and "error" not in second["two"]
    assert command.main(["--draw", str(stored)]) == 0
    assert "no picture" in capsys.readouterr().out


def test_without_cuda_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "none")]) == 0
    assert "no CUDA device here" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_unknown_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "3b-*"])
    assert "no row is called '3b-*'" in capsys.readouterr().err


def test_tiny_rows_have_arguments_that_this_trainer_takes():
    for one in rows.all_rows():
        if one.argv:
            words = rows.tiny(one).argv
            assert "transformer_engine" not in words and "--fp8-parts" not in words
            assert Path(words[words.index("--tokenizer-model") + 1]).exists()
