"""The benchmark harness: pairing, refusals, files, and one tiny run from end to end."""

from __future__ import annotations

import contextlib
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from longcat_kernels import native
from longcat_kernels.ops import OPS
from longcat_kernels.spec import Cost

FOLDER = Path(__file__).parent.parent / "benchmarks"
CEILINGS = {"copy": 1e9, "fma": 1e10}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the scripts be imported, and leaves torch's settings and the modules as they were."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before, threads, precision = set(sys.modules), torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(FOLDER)):
            del sys.modules[name]


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def busy(seconds: float) -> Any:
    """A call that takes so much processor time."""

    def call() -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return call


def fake_case(contenders: list[Any], **more: Any) -> Any:
    return script("harness").Case("fake", Cost(flops=10**6, bytes=10**5), lambda device: contenders, **more)


def quick(**more: Any) -> Any:
    return script("harness").Options(quick=True, **more)


def test_every_round_has_one_sample_of_each_in_alternating_order() -> None:
    order: list[str] = []

    def sample(name: str) -> Any:
        return lambda: order.append(name) or float(len(order))

    times = script("harness").interleave({"a": sample("a"), "b": sample("b")}, rounds=3, seconds=0)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_rounds_go_on_for_the_time_given_and_end_at_a_limit() -> None:
    harness = script("harness")
    times = harness.interleave({"a": lambda: time.sleep(0.01) or 0.01}, rounds=1, seconds=0.1)["a"]
    assert 4 <= len(times) <= 11
    assert len(harness.interleave({"a": lambda: 0.0}, rounds=1, seconds=60)["a"]) == harness.MOST_ROUNDS


def test_a_ratio_is_of_the_same_round() -> None:
    """A machine that slows down threefold in the middle of a run changes medians, not paired ratios."""
    ours = [1.0, 1.0, 3.0, 3.0, 3.0]
    assert script("harness").paired_ratio([2 * t for t in ours], ours) == 2.0
    peer = [2.0, 2.0, 6.0, 6.0, 3.0]
    assert statistics.median(peer) / statistics.median(ours) != script("harness").paired_ratio(peer, ours) == 2.0


def test_a_ratio_is_to_ours_at_the_same_precision_where_there_is_one() -> None:
    harness = script("harness")
    contenders = [
        harness.Contender("ours", lambda: busy(0.004)),
        harness.Contender("ours", lambda: busy(0.002), precisions=("medium",)),
        harness.Contender("peer", lambda: busy(0.008), precisions=("highest", "medium")),
    ]
    rows = harness.measure("op", fake_case(contenders), CEILINGS, quick())
    ratios = {(row.contender, row.precision): row.ratio_to_ours for row in rows}
    assert ratios["ours", "highest"] == ratios["ours", "medium"] == 1.0
    assert ratios["peer", "highest"] == pytest.approx(2, rel=0.3)
    assert ratios["peer", "medium"] == pytest.approx(4, rel=0.3)


def test_ratios_to_a_bound_say_what_can_be() -> None:
    harness = script("harness")
    contenders = [
        harness.Contender("ours", lambda: busy(0.004)),
        harness.Contender("copy", lambda: busy(0.002), is_bound=True),
        harness.Contender("peer", lambda: busy(0.008)),
    ]
    rows = harness.measure("op", fake_case(contenders), CEILINGS, quick())
    found = {row.contender: row.ratio_to_bound for row in rows}
    assert found["copy"] == 1.0
    assert found["ours"] == pytest.approx(2, rel=0.3) and found["peer"] == pytest.approx(4, rel=0.3)


def test_known_times_come_out() -> None:
    harness = script("harness")
    contenders = [
        harness.Contender("ours", lambda: busy(0.002)),
        harness.Contender("slower", lambda: busy(0.006), ceiling="fma", precisions=("highest", "medium")),
    ]
    ours, slower, medium = harness.measure("op", fake_case(contenders), CEILINGS, quick())
    assert (ours.ratio_to_ours, ours.contender, medium.precision) == (1.0, "ours", "medium")
    assert slower.median_s == pytest.approx(0.006, rel=0.3) and slower.ratio_to_ours == pytest.approx(3, rel=0.3)
    assert slower.gflops == pytest.approx(1e-3 / slower.median_s)
    shortest = max(10**6 / CEILINGS["fma"], 10**5 / CEILINGS["copy"])
    assert slower.fraction_of_ceiling == pytest.approx(shortest / slower.median_s)


def test_one_thread_is_timed_by_its_processor_time_alone() -> None:
    harness = script("harness")
    settings = {"device": "cpu", "threads": 1, "precision": "highest"}
    assert harness.sampler(lambda: time.sleep(0.02), wall=False, **settings)() < 0.01
    assert harness.sampler(lambda: time.sleep(0.02), wall=True, **settings)() >= 0.02


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls: list[int] = []
    sample = script("harness").sampler(
        lambda: calls.append(0), device="cpu", threads=1, precision="highest", wall=False
    )
    calls.clear()
    assert sample() < 1e-4 and len(calls) > 10


def test_a_wrong_result_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    harness, calls = script("harness"), []

    def judge(result: int) -> None:
        if result != 1:
            raise harness.WrongResult(f"gave {result}")

    def wrong(name: str) -> Any:
        return harness.Contender(name, lambda: lambda: calls.append(name) or 2, judge)

    right = harness.Contender("ours", lambda: lambda: 1, judge)
    rows = harness.measure("op", fake_case([right, wrong("peer")]), CEILINGS, quick())
    assert [row.contender for row in rows] == ["ours"] and calls == ["peer"]
    assert "peer: gave 2" in capsys.readouterr().out
    with pytest.raises(harness.WrongResult, match="fake: ours, avx2: gave 2"):
        harness.measure("op", fake_case([right, wrong("ours, avx2")]), CEILINGS, quick())
    assert calls == ["peer", "ours, avx2"]


def test_contenders_that_cannot_run_here_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    harness = script("harness")

    def absent() -> Any:
        raise harness.Skip("not installed")

    contenders = [harness.Contender("ours", lambda: lambda: None), harness.Contender("peer", absent)]
    rows = harness.measure("op", fake_case(contenders), CEILINGS, quick())
    assert [row.contender for row in rows] == ["ours"]
    assert "peer: not installed" in capsys.readouterr().out
    case = harness.Case("peer's sizes", Cost(flops=1, bytes=1), lambda device: absent())
    assert harness.measure("op", case, CEILINGS, quick()) == []
    assert "peer's sizes: not installed" in capsys.readouterr().out


def test_a_peer_may_fail_as_it_likes_ours_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    harness = script("harness")

    def broken() -> None:
        raise NotImplementedError("no float32 here\nand more")

    contenders = [harness.Contender("ours", lambda: lambda: None), harness.Contender("peer", lambda: broken)]
    rows = harness.measure("op", fake_case(contenders), CEILINGS, quick())
    assert [row.contender for row in rows] == ["ours"]
    assert "peer: NotImplementedError: no float32 here\n" in capsys.readouterr().out
    with pytest.raises(NotImplementedError):
        harness.measure("op", fake_case([harness.Contender("ours", lambda: broken)]), CEILINGS, quick())


def test_a_brief_run_leaves_out_what_takes_long_to_make() -> None:
    harness = script("harness")
    slow = harness.Contender("peer", lambda: pytest.fail("made"), slow=True)
    contenders = [harness.Contender("ours", lambda: busy(0.001)), slow]
    (row,) = harness.measure("op", fake_case(contenders), CEILINGS, harness.Options(brief=True))
    assert row.rounds >= harness.ROUNDS and row.rounds * row.median_s < 5


def test_on_a_gpu_no_ceiling_is_that_of_a_processors_instructions() -> None:
    harness = script("harness")
    contender = harness.Contender("ours", lambda: lambda: None, ceiling="fma_avx512")
    ceilings = {"copy": 1e9, "half_gemm 8x8x8": 1e12}
    row = harness._row(
        "op", fake_case([contender]), contender, [1e-3], [1e-3], ceilings, harness.Options(device="cuda")
    )
    assert row.fraction_of_ceiling == pytest.approx(10**5 / 1e9 / 1e-3)
    here = harness._row("op", fake_case([contender]), contender, [1e-3], [1e-3], ceilings, harness.Options())
    assert here.fraction_of_ceiling is None


def test_an_older_ours_competes_in_the_same_rounds() -> None:
    harness = script("harness")
    options = quick(rivals={"ours at HEAD~1": lambda: 1.0})
    contenders = [harness.Contender("ours", lambda: busy(0.002))]
    ours, older = harness.measure("op", fake_case(contenders), CEILINGS, options)
    assert older.contender == "ours at HEAD~1" and older.rounds == ours.rounds and older.median_s == 1.0


def test_a_contender_with_an_environment_runs_in_its_own_process() -> None:
    harness = script("harness")
    apart = harness.Contender("peer", lambda: pytest.fail("made here"), environment=(("A", "1"),))
    here = harness.Contender("ours", lambda: lambda: None)
    options = quick(start=lambda contender: lambda: float(dict(contender.environment)["A"]))
    assert harness.measure("op", fake_case([here, apart]), CEILINGS, options)[1].median_s == 1.0

    def absent(contender: Any) -> Any:
        raise harness.Skip("ended with -4")

    assert len(harness.measure("op", fake_case([here, apart]), CEILINGS, quick(start=absent))) == 1


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_red_tests_refuse_speed(
    ok: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, bench = script("run"), script("bench_rvq_decode")
    test = tmp_path / "test_it.py"
    test.write_text(f"def test_it():\n    assert {ok}\n")
    monkeypatch.setattr(bench, "TESTS", [str(test)], raising=False)
    out = tmp_path / "out.json"
    assert run.main(run.Arguments(("rvq_decode",), out=out, quick=True, device="cpu")) == code
    assert out.exists() == out.with_suffix(".png").exists() == ok
    printed = capsys.readouterr()
    assert ("by ours" in printed.out) == ok
    assert ok or "rvq_decode: its tests fail, so its speed is not reported" in printed.err


def test_all_tests_of_an_op_are_run_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    run, commands = script("run"), []
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: commands.append(command) or done)
    assert run.tests_pass("rvq_encode", SimpleNamespace())
    wanted = {"contract", "rvq_encode", "rvq_encode_backward", "rvq_encode_bound"}
    assert {f"tests/test_{name}.py" for name in wanted} <= set(commands[0])


def test_every_op_has_a_benchmark() -> None:
    assert [op.name for op in OPS if not (FOLDER / f"bench_{op.name}.py").is_file()] == []


def test_an_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run = script("run")
    assert run.main(run.Arguments(("rvq_encod",))) == 2
    assert "benchmarks of depth_decode, ema_update, " in capsys.readouterr().err


@pytest.mark.parametrize("ref", ["no-such-commit", "--all", "HEAD:README.md", ""])
def test_an_unknown_commit_is_refused_before_anything_is_measured(
    ref: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = script("run")
    for module, work in ((run, "tests_pass"), (run, "bench"), (run.machine, "ceilings")):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("work"))
    assert run.main(run.Arguments(("rvq_decode",), against=ref)) == 2
    assert f"--against must name a commit of this repository, got {ref!r}" in capsys.readouterr().err


def test_a_commit_that_does_not_build_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = script("run")

    @contextlib.contextmanager
    def broken(_: str) -> Iterator[Path]:
        raise RuntimeError("setup.py failed")
        yield

    monkeypatch.setattr(run.machine, "checkout", broken)
    monkeypatch.setattr(run.machine, "ceilings", lambda *_: pytest.fail("work"))
    assert run.main(run.Arguments(("rvq_decode",), against="HEAD", tested=True)) == 1
    assert "run.py: setup.py failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("op", "least"),
    [
        ("rvq_encode", 8),
        ("ema_update", 8),
        ("fused_moe", 8),
        ("grouped_mm", 5),
        ("ngram_embedding", 5),
        ("moe_route", 3),
        ("moe_plan", 3),
    ],
)
def test_a_tiny_case_of_each_op_runs(op: str, least: int) -> None:
    run, bench = script("run"), script(f"bench_{op}")
    arguments = run.Arguments(quick=True)
    rows = [row for rows in run.bench(op, bench, dict(CEILINGS), arguments, "cpu") for row in rows]
    by_name = {row.contender: row for row in rows if row.precision == "highest"}
    assert by_name["ours"].ratio_to_ours == 1 and len(by_name) >= least
    if op in ("fused_moe", "grouped_mm", "ngram_embedding"):
        assert 0 < by_name["ours"].error < 1e-6 and {row.precision for row in rows} == {"highest", "medium"}
    if op == "rvq_encode":
        assert all(row.wrong_codes == 0 for row in rows if row.contender.startswith("ours"))


def test_cases_for_a_gpu_run_shrunken_on_the_cpu_and_are_left_out_there() -> None:
    harness, lite, bench = script("harness"), script("lite_moe"), script("bench_fused_moe")
    found = {case.name.split()[1] for case in bench.CASES if case.only_gpu}
    assert found == {"decode", "forward", "backward", "train"}
    for case in lite.cases((64, 32, 8, 4, 3), dict.fromkeys(found, (32,))):
        errors = {row.contender: row.error for row in harness.measure("fused_moe", case, CEILINGS, quick())}
        assert {"ours", "transformers grouped_mm"} <= set(errors) and 0 < errors["ours"] < 1e-2
    arguments = script("run").Arguments(case="Lite")
    assert not list(script("run").bench("fused_moe", bench, dict(CEILINGS), arguments, "cpu"))


@pytest.mark.parametrize("title", ["forward", "backward", "train"])
def test_the_judge_of_a_few_tokens_finds_identities_left_out(title: str) -> None:
    harness, lite, peers = script("harness"), script("lite_moe"), script("peers_moe")
    arguments = lite.arguments_of(lite.spec.Case(9, 64, 32, 4, 12, 3, dtype=torch.bfloat16), "cpu")
    grad = torch.ones_like(arguments["x"]) if title in lite.PASSES else None
    judge = lite.Judge(arguments, grad)

    def results(experts: Any) -> Any:
        return (peers.forward(experts, arguments) if grad is None else lite.PASSES[title](experts, arguments, grad))()

    assert judge.error(results(peers.ours()))["error"] < 1e-2
    assert judge.error(results(lite.hf_grouped()))["error"] < 2e-2
    with pytest.raises(harness.WrongResult, match="is off by"):
        judge.error(results(peers.hf_grouped(beyond=True)))


def test_memory_of_a_call_is_measured_in_its_own_process() -> None:
    machine = script("machine")
    case = script("bench_rvq_decode").CASES[1].name
    worker = machine.Worker("rvq_decode", case, "embedding a level", "cpu", 1, more=machine.PLAIN_MALLOC)
    try:
        grown = worker.ask("memory")  # one [4096, 256] float32 for the sum, one for the codewords added
    finally:
        worker.close()
    assert 8 <= grown <= 24


def test_a_worker_that_fails_says_why() -> None:
    worker = script("machine").Worker("rvq_decode", "no such case", "ours", "cpu", 1)
    with pytest.raises(RuntimeError, match="ValueError"):
        worker.ask("time")
    worker.close()


def document(**more: Any) -> dict[str, Any]:
    row = {
        "op": "op", "case": "8x8", "contender": "ours", "device": "cpu", "threads": 1, "precision": "highest",
        "rounds": 7, "median_s": 0.002, "ratio_to_ours": 1.0, "gflops": 5.0, "gbytes_s": 0.5,
        "fraction_of_ceiling": 0.5, "extra_mb": None, "wrong_codes": 0.0,
    }  # fmt: skip
    peer = {**row, "contender": "peer", "precision": "medium", "median_s": 0.009, "ratio_to_ours": 4.5}
    environment = {
        "device": "CPU X",
        "processors": 2,
        "threads": 1,
        "torch": "2",
        "commit": "abc",
        "date": "2026-01-01",
    }
    return {"environment": environment, "ceilings": {"copy": 1e10, "fma": 1e10}, "rows": [row, peer], **more}


def test_the_table_is_made_from_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "cpu-x"
    folder.mkdir(parents=True)
    (folder / "op.json").write_text(json.dumps(document()))
    (folder / "demo.json").write_text("{}")  # results of another kind
    table = script("report").markdown(tmp_path / "results")
    assert (
        "1 thread(s) of 2. " in table and "## op, CPU X" in table and "copy: 10 GB/s" in table and "demo" not in table
    )
    assert "| peer, medium | 9 ms | 4.50x | 5.0 | 0.50 | 50% | - | 0.00% |" in table


def test_the_readme_says_nothing_of_a_device_without_the_peers_that_it_shows(tmp_path: Path) -> None:
    report = script("report")
    start, peers = report.SUMMARIES["rvq_encode"]
    row = {**document()["rows"][0], "case": f"{start}8x8"}
    for device, contenders in (("cpu-x", ["ours", *peers]), ("gpu-x", ["ours"])):
        (tmp_path / device).mkdir()
        rows = [{**row, "contender": contender} for contender in contenders]
        found = document(rows=rows) | {"environment": {**document()["environment"], "device": device}}
        (tmp_path / device / "rvq_encode.json").write_text(json.dumps(found))
    summary = report.summary(tmp_path)
    assert "| 8x8 | 2 ms | 5 | 50% |" in summary and "On cpu-x" in summary and "gpu-x" not in summary


def test_a_judge_may_fill_columns_of_its_own(tmp_path: Path) -> None:
    harness, report = script("harness"), script("report")
    judged = harness.Contender("ours", lambda: lambda: None, lambda result: {"error": 2e-3, "saved_mb": 1.5})
    rows = harness.measure("op", fake_case([judged]), CEILINGS, quick())
    assert (rows[0].error, rows[0].saved_mb, rows[0].wrong_codes) == (2e-3, 1.5, None)
    header, line = report.text(rows).splitlines()[2:]
    assert header.split()[-3:] == ["error", "saved", "MB"] and line.split()[-2:] == ["2.0e-03", "1.5"]


def test_the_plot_stands_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "op.json").write_text(json.dumps(document()))
    script("report").plot(tmp_path / "op.json")
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")


def test_parts_are_kept_beside_what_was_measured_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts, report, folder = script("parts"), script("report"), tmp_path / "results" / "cpu-x"
    tables = {"first": [{"who": "ours", "s": 0.5}], "second": [{"who": "peer", "s": 0.25, "MB": None}]}
    module = SimpleNamespace(PARTS={name: lambda name=name: tables[name] for name in tables}, QUICK="second")
    module.PLOTTED = {"first": ("who", ("s",))}
    for date, case in (("today", "first"), ("later", "sec")):
        environment = {"device": "CPU X", "commit": "abc", "date": date, "load": 0.1}
        parts.run(module, folder / "op.json", case, False, environment)
    parts.run(module, None, "", True, {})
    assert capsys.readouterr().out.count("peer | 0.25 | -") == 2
    parts.plot(folder / "op.json", module)
    assert (folder / "op.png").read_bytes().startswith(b"\x89PNG")
    table = report.markdown(tmp_path / "results")
    assert "**first** (commit `abc`, today, load before 0.1)" in table and "**second** (commit `abc`, later, " in table
    assert "| who | s |\n| --- | ---: |\n| ours | 0.5 |" in table and "| peer | 0.25 | - |" in table


def test_the_pipelines_runtime_keeps_what_its_plan_says() -> None:
    """In bytes, within 5 %; no more with more microbatches; and of logits nothing between two actions."""
    found = script("pipeline_memory").memory()
    assert 0.95 < found.by_plan < 1.05
    assert found.growth == 1.0
    assert found.logits == 0


def test_a_file_of_several_ops_without_arithmetic_has_a_plot_too(tmp_path: Path) -> None:
    found = document()
    rows = [{**row, "op": op, "gflops": 0.0} for op in ("one", "other") for row in found["rows"]]
    (tmp_path / "all.json").write_text(json.dumps({**found, "rows": rows}))
    report = script("report")
    assert list(report._by_case(rows)) == ["one: 8x8", "other: 8x8"]
    report.plot(tmp_path / "all.json")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_a_results_file_is_whole_or_not_there(tmp_path: Path) -> None:
    harness = script("harness")
    with pytest.raises(TypeError):
        harness.save(tmp_path / "a" / "op.json", {"date": object()}, {}, [])
    assert not list(tmp_path.rglob("*.json"))
    harness.save(tmp_path / "a" / "op.json", {}, {}, [])
    assert json.loads((tmp_path / "a" / "op.json").read_text()) == {"environment": {}, "ceilings": {}, "rows": []}


def test_the_committed_table_is_the_one_of_the_committed_results() -> None:
    table = FOLDER / "RESULTS.md"
    assert not table.exists() or table.read_text() == script("report").markdown(FOLDER / "results")


def test_help_names_every_option() -> None:
    run = subprocess.run([sys.executable, str(FOLDER / "run.py"), "--help"], capture_output=True, text=True, check=True)
    for option in ("--out", "--threads", "--quick", "--brief", "--tested", "--case", "--against", "--device"):
        assert option in run.stdout


@pytest.mark.parametrize(("kind", "isa"), [("fma", "avx2"), ("fma", "avx512"), ("bf16_dot", "avx512")])
def test_a_peak_is_plausible_or_refused_by_name(kind: str, isa: str) -> None:
    try:
        found = native.module().peak(kind, isa, 1)
    except ValueError as error:
        assert str(error).endswith(f"got '{kind}' by '{isa}'")
    else:
        assert 1e9 < found < 5e12


def test_a_peak_of_no_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match="peak: kind and isa must be what this processor has, got 'fma' by 'sse9'"):
        native.module().peak("fma", "sse9", 1)
