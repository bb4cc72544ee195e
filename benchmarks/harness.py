"""How contenders are timed: interleaved, one sample of each a round, compared within the round.

A benchmark is a file `bench_<op>.py` with
    CASES     a tuple of `Case`, the first a tiny one: `--quick` runs it alone
    TESTS     optional: arguments of pytest that must pass first, in place of the op's contract tests and test file
so that `run.py <op>` finds it. A case names its size and makes its `Contender`s when asked.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import parts
from longcat_kernels.spec import Cost

ROUNDS, QUICK_ROUNDS, MOST_ROUNDS = 7, 3, 400
LONG_ROUNDS, LONG_S = 5, 60.0  # rounds that are enough once they have taken so long
SECONDS, BRIEF_SECONDS, QUICK_SECONDS = 8.0, 0.5, 0.2
SAMPLE_S = 1e-3  # a call shorter than this is repeated within its sample
FLUSHED_BYTES = 1 << 28  # written between samples on a GPU or of a cold case, so that none finds its inputs in a cache

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    Args:
        name: unique in its case; "ours" is what the others are compared with.
        make: builds what a user would have ready, and gives the call that is timed.
        judge: takes the result of the first call: gives the share of wrong codes, None where it has no codes, or what
            goes into other columns of its `Row`, by name; raises WrongResult where it is not what the contender
            promises.
        threads: None for the run's.
        ceiling: name of the ceiling of its arithmetic; None for the highest of the run.
        precisions: of `torch.set_float32_matmul_precision`; it is measured with each.
        only_cpu: says that it cannot run on a GPU.
        slow: made in full runs only.
        environment: it runs in a process of its own with these settings, in the same rounds, its results not judged.
        is_bound: it only moves the bytes that the work must move; at most one of a case.
    """

    name: str
    make: Callable[[], Call]
    judge: Callable[[Any], float | Mapping[str, float] | None] = lambda result: None
    threads: int | None = None
    ceiling: str | None = None
    precisions: tuple[str, ...] = ("highest",)
    only_cpu: bool = False
    slow: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    is_bound: bool = False


@dataclass(frozen=True)
class Case:
    """One problem: `contenders(device)` builds the inputs and says who competes."""

    name: str
    cost: Cost
    contenders: Callable[[str], list[Contender]]
    product: tuple[int, int, int] | None = None  # (N, D, K) of the matrix product that bounds it on a GPU
    memory: bool = False  # measure the memory of its contenders too
    wall: bool = False  # clock on the wall, also with one thread
    cold: bool = False  # caches are emptied before each call
    only_gpu: bool = False  # too large for a processor


class Skip(Exception):
    """A contender cannot run here; the message says why."""


class WrongResult(Exception):
    """A contender's result is not what it promises; the message says by how much."""


@dataclass(frozen=True)
class Row:
    """One contender of one case, as it stands in the JSON file."""

    op: str
    case: str
    contender: str
    device: str
    threads: int
    precision: str
    rounds: int
    median_s: float
    ratio_to_ours: float  # median over rounds of its time by that of ours in that round, at its precision if it has one
    gflops: float
    gbytes_s: float
    fraction_of_ceiling: float | None  # shortest possible time by the ceilings of this run, by its time
    extra_mb: float | None  # growth of resident memory during one call
    wrong_codes: float | None
    error: float | None = None  # relative, against float64 on the same inputs
    saved_mb: float | None = None  # kept for backward, besides weights
    ratio_to_bound: float | None = None  # as `ratio_to_ours`, by the case's bound: about the most that can be


@dataclass(frozen=True)
class Options:
    """How a case is measured."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    brief: bool = False  # as many rounds at least, for a shorter time
    memory: Callable[[str, Call], float | None] = lambda contender, call: None
    start: Callable[[Contender], Callable[[], float]] | None = None  # the sampler of one with an environment
    rivals: dict[str, Callable[[], float]] = field(default_factory=dict)  # samplers of ours at other commits


def interleave(
    samples: dict[Any, Callable[[], float]], rounds: int, seconds: float, on_round: Callable[[], object] = lambda: None
) -> dict[Any, list[float]]:
    """Seconds of each sample, one a round, every other round in reverse order.

    At least `rounds` rounds, or LONG_ROUNDS where they take LONG_S, then more until `seconds` have passed, at most
    MOST_ROUNDS.
    """
    times: dict[Any, list[float]] = {key: [] for key in samples}
    start, done = time.perf_counter(), 0
    while True:
        passed = time.perf_counter() - start
        least = min(rounds, LONG_ROUNDS) if passed > LONG_S else rounds
        if done >= least and (passed >= seconds or done >= MOST_ROUNDS):
            return times
        for key in list(samples)[:: 1 if done % 2 == 0 else -1]:
            times[key].append(samples[key]())
        done += 1
        on_round()


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of time by base of the same round."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def sampler(
    call: Call, *, device: str, threads: int, precision: str, wall: bool, cold: bool = False
) -> Callable[[], float]:
    """A function that gives the mean seconds of a call; an untimed call sets how often a sample repeats it: a cold one
    not at all.

    One thread is timed by the processor time of the process, several by the clock on the wall, a GPU by its events.
    """
    now = time.process_time if threads == 1 and not wall else time.perf_counter
    clock = _clocked(now) if device == "cpu" else _gpu_seconds

    def sample(repeats: int) -> float:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
        if cold and device == "cpu":  # a GPU's are emptied always
            torch.empty(FLUSHED_BYTES, dtype=torch.uint8).fill_(1)
        return clock(call, repeats)

    repeats = math.ceil(SAMPLE_S / max(sample(1), 1e-7)) if device == "cpu" and not cold else 1
    return lambda: sample(repeats)


def _clocked(now: Callable[[], float]) -> Callable[[Call, int], float]:
    def seconds(call: Call, repeats: int) -> float:
        start = now()
        for _ in range(repeats):
            call()
        return (now() - start) / repeats

    return seconds


def _gpu_seconds(call: Call, repeats: int) -> float:
    torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def measure(op: str, case: Case, ceilings: dict[str, float], options: Options) -> list[Row]:
    """The rows of one case; none where ours cannot run. A peer with a wrong result is left out by name.

    Raises:
        WrongResult: one of ours is wrong.
    """
    made = _made(case, options)
    if ("ours", "highest") not in made:
        return []
    judged, samples = _judged(case, made, options)
    samples.update({(name, "highest"): sample for name, sample in options.rivals.items()})
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    seconds = QUICK_SECONDS if options.quick else BRIEF_SECONDS if options.brief else SECONDS
    with tqdm(desc=f"{op}: {case.name}", unit="round", leave=False) as bar:
        times = interleave(samples, rounds, seconds, bar.update)
    bound = next((series for key, series in times.items() if key in made and made[key][0].is_bound), None)
    rows = []
    for key, series in times.items():
        contender = made[key][0] if key in made else made["ours", "highest"][0]
        ours = times.get(("ours", key[1]), times["ours", "highest"])
        row = _row(op, case, contender, series, ours, ceilings, options)
        call = made[key][1] if key in judged and key[1] == "highest" else None
        memory = options.memory(key[0], call) if case.memory and call is not None else None
        found: dict[str, Any] = dict(judged.get(key, {}))
        found["ratio_to_bound"] = None if bound is None else paired_ratio(series, bound)
        rows.append(replace(row, contender=key[0], precision=key[1], extra_mb=memory, **found))
    return rows


def _judged(
    case: Case, made: dict[tuple[str, str], tuple[Contender, Call | None]], options: Options
) -> tuple[dict[tuple[str, str], Mapping[str, float | None]], dict[tuple[str, str], Callable[[], float]]]:
    """What judges found, by column, and samplers, of contenders that are not wrong."""
    judged: dict[tuple[str, str], Mapping[str, float | None]] = {}
    samples: dict[tuple[str, str], Callable[[], float]] = {}
    for key, (contender, call) in made.items():
        threads = contender.threads or options.threads
        torch.set_float32_matmul_precision(key[1])
        torch.set_num_threads(threads)
        try:
            if call is None:
                assert options.start is not None
                samples[key] = options.start(contender)
                continue
            found = contender.judge(call())
            judged[key] = found if isinstance(found, Mapping) else {"wrong_codes": found}
        except Skip as why:
            tqdm.write(f"  {contender.name}: {why}")
            continue
        except WrongResult as how:
            if contender.name.startswith("ours"):
                raise WrongResult(f"{case.name}: {contender.name}: {how}") from how
            tqdm.write(f"  {contender.name}: {how}")
            continue
        except Exception as error:
            _leave_out(contender, error)
            continue
        samples[key] = sampler(
            call, device=options.device, threads=threads, precision=key[1], wall=case.wall, cold=case.cold
        )
    return judged, samples


def _leave_out(contender: Contender, error: Exception) -> None:
    """Says that a peer fails, with whatever its code raises; raises `error` where it is one of ours."""
    if contender.name.startswith("ours"):
        raise error
    first = (str(error).strip().splitlines() or ["no message"])[0]
    tqdm.write(f"  {contender.name}: {type(error).__name__}: {first}")


def _row(
    op: str,
    case: Case,
    contender: Contender,
    times: list[float],
    ours: list[float],
    ceilings: dict[str, float],
    options: Options,
) -> Row:
    median, threads = statistics.median(times), contender.threads or options.threads
    ceiling = contender.ceiling if options.device == "cpu" else None  # names are those of a processor's instructions
    return Row(
        op=op,
        case=case.name,
        contender=contender.name,
        device=options.device,
        threads=threads,
        precision="highest",
        rounds=len(times),
        median_s=median,
        ratio_to_ours=paired_ratio(times, ours),
        gflops=case.cost.flops / median * 1e-9,
        gbytes_s=case.cost.bytes / median * 1e-9,
        fraction_of_ceiling=_fraction(case.cost, median, ceilings, ceiling, threads),
        extra_mb=None,
        wrong_codes=None,
    )


def _made(case: Case, options: Options) -> dict[tuple[str, str], tuple[Contender, Call | None]]:
    """Contenders that can run here, by name and precision, with their calls (None: in a process of its own).

    Says which cannot, and why.
    """
    made: dict[tuple[str, str], tuple[Contender, Call | None]] = {}
    try:
        contenders = list(case.contenders(options.device))
    except Skip as why:  # a case made of a peer's own sizes
        tqdm.write(f"  {case.name}: {why}")
        return made
    for contender in contenders:
        if contender.slow and (options.quick or options.brief):
            continue
        if contender.only_cpu and options.device != "cpu":
            tqdm.write(f"  {contender.name}: not on a GPU")
            continue
        try:
            for precision in contender.precisions:
                torch.set_float32_matmul_precision(precision)
                call = None if contender.environment else contender.make()
                made[contender.name, precision] = (contender, call)
        except Skip as why:
            tqdm.write(f"  {contender.name}: {why}")
        except Exception as error:
            _leave_out(contender, error)
    return made


def _fraction(cost: Cost, seconds: float, ceilings: dict[str, float], name: str | None, threads: int) -> float | None:
    """Ceilings are those of one thread; arithmetic scales with the threads, memory is taken not to."""
    arithmetic = {key: value for key, value in ceilings.items() if key != "copy"}
    top = ceilings.get(name) if name else max(arithmetic.values(), default=None)
    if top is None or not ceilings.get("copy"):
        return None
    return max(cost.flops / (top * threads), cost.bytes / ceilings["copy"]) / seconds


def save(path: Path, environment: dict[str, Any], ceilings: dict[str, float], rows: Iterable[Row]) -> None:
    """Writes a results file whole or not at all."""
    parts.save(path, {"environment": environment, "ceilings": ceilings, "rows": [asdict(row) for row in rows]})
