"""The suites under pytest: one test for each contender of each case, all contenders of a case measured in turns.

pytest-benchmark times each contender by the wall clock with its own rounds, statistics, storage and options; its table
is grouped by case. What this package reports (in turns, cold, in graphs, held to the oracle) is measured once a case,
stands in each test's ``extra_info`` and is written to one JSON document, ``--twn-json``.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import count
from bench.shapes import SCALES, cases
from twn_kernels.benchmarking import environment, results, roofs
from twn_kernels.benchmarking.measure import Options, PreparedCase, contenders_of
from twn_kernels.errors import OptionError

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported, which the first case does


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("twn", "twn_kernels benchmarks")
    group.addoption("--scale", choices=SCALES, default="full" if HAS_GPU else "tiny", help="which shapes")
    group.addoption("--twn-json", default=str(ROOT / ".benchmarks" / "twn.json"), help="where the document goes")
    group.addoption("--contender", action="append", help="only these contenders")
    group.addoption("--layers", type=count, help="decoder layers that the model suite builds at most")
    group.addoption("--rounds", type=count, default=40, help="samples of each contender at most")
    group.addoption("--seconds", type=float, default=4.0, help="for sampling one case")
    group.addoption("--compile-backend", default="inductor", help="of torch.compile, for the compiled baseline")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    config = metafunc.config
    found = cases(config.option.scale, [metafunc.module.SUITE], layers=config.option.layers)
    try:
        pairs = [(case, contender.name) for case in found for contender in contenders_of(case, _options(config))]
    except OptionError as error:
        raise pytest.Collector.CollectError(str(error)) from None
    metafunc.parametrize("case, contender", pairs, ids=[f"{case.id}-{name}" for case, name in pairs])


def _options(config: pytest.Config) -> Options:
    option = config.option
    return Options(
        torch.device("cuda" if HAS_GPU else "cpu"),
        contenders=None if option.contender is None else tuple(option.contender),
        seconds=option.seconds,
        rounds=option.rounds,
        compile_backend=option.compile_backend,
        command=f"python -m pytest bench --scale {option.scale} -k {{case}}",
    )


class _Session:
    """The case at hand, and the rows of all before it."""

    def __init__(self, config: pytest.Config) -> None:
        self.rows: dict[str, list[results.Row]] = {}
        self.roofs = roofs.measure("cuda" if HAS_GPU else "cpu", seconds=5.0 if HAS_GPU else 0.2)
        self.options = Options(**{**vars(_options(config)), "roofs": self.roofs})
        self.prepared: PreparedCase | None = None

    def case(self, case) -> PreparedCase:
        if self.prepared is None or self.prepared.case != case:
            if self.prepared is not None:
                self.prepared.free()
            self.prepared = PreparedCase(case, self.options)
            self.rows[case.id] = self.prepared.rows()
        return self.prepared


@pytest.fixture(scope="session")
def bench_session(request: pytest.FixtureRequest):
    session = _Session(request.config)
    yield session
    if hasattr(request.config, "workerinput"):
        return  # a worker of xdist has only some of the rows, and times that its siblings disturbed
    commit, dirty = environment.commit_of(ROOT)
    run = results.Run(
        created=environment.now(),
        commit=commit,
        dirty=dirty,
        command=shlex.join(["python", "-m", "pytest", *sys.argv[1:]]),
        environment=environment.stamp(session.options.device) | {"scale": request.config.option.scale},
        roofs=session.roofs,
        peers=environment.peers(),
        cases=tuple(row for rows in session.rows.values() for row in rows),
    )
    results.save(run, request.config.option.twn_json)


@pytest.fixture
def measure(bench_session: _Session, benchmark):
    """Give a function that measures one contender: it fails where this package is wrong and skips what is absent."""

    def run(case, contender: str) -> results.Row:
        prepared = bench_session.case(case)
        row = next(row for row in bench_session.rows[case.id] if row.contender == contender)
        if row.correct is False and not row.is_baseline:
            pytest.fail(f"{row.id}: {row.reason}")
        if row.time_us is None:
            pytest.skip(row.reason)
        timed = prepared.timed[contender]
        benchmark.group = case.id
        benchmark.extra_info.update(row.to_dict(), calls_a_round=timed.calls)

        def once() -> None:
            timed.run()
            prepared.timer.wait()

        benchmark(once)
        return row

    return run
