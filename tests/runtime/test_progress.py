"""Progress lines and Ray metrics of a running stage, on a real local Ray."""

import time

import httpx
import pyarrow as pa
import pytest
import ray

from runtime import progress
from runtime.progress import StageCounters, WithCounters, time_left


def test_workers_count_and_the_driver_shows(local_ray, monkeypatch, capsys):
    class Doubled:
        def __init__(self, column: str):
            self.column = column

        def __call__(self, table: pa.Table) -> pa.Table:
            time.sleep(0.1)
            return pa.table({self.column: [2 * value for value in table["id"].to_pylist()]})

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.2)
    counters = StageCounters("test_stage")
    with counters.shown(lambda counts, seconds: f"{counts['rows']} of 20, {time_left(counts['rows'], 20, seconds)}"):
        rows = (
            ray.data.range(20)
            .repartition(10)
            .map_batches(
                WithCounters,  # pyright: ignore[reportArgumentType]
                fn_constructor_args=(
                    Doubled,
                    ("twice",),
                    counters,
                    lambda t: {"rows": t.num_rows, "rejected: dull": 1},
                ),
                batch_format="pyarrow",
                batch_size=2,
                compute=ray.data.ActorPoolStrategy(size=2),
                num_cpus=0,
            )
            .take_all()
        )
    assert sorted(row["twice"] for row in rows) == list(range(0, 40, 2))
    assert counters.read() == {"rows": 20, "rejected: dull": 10}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test_stage: ")]
    assert lines and all(" of 20, " in line for line in lines)

    address = f"http://{ray.nodes()[0]['NodeManagerAddress']}:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    while total(exported := rejected(address)) != 10:
        assert time.monotonic() < deadline, f"exported: {exported}"
        time.sleep(0.5)
    assert all('reason="dull"' in line for line in exported)


def rejected(address: str) -> list[str]:
    name = "ray_ip2p_test_stage_rejected_total{"
    return [line for line in httpx.get(address).text.splitlines() if line.startswith(name)]


def total(lines: list[str]) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.parametrize(("done", "said"), [(0, "? left"), (5, "0:30 left"), (10, "0:10 left"), (15, "0:00 left")])
def test_time_left(done: float, said: str):
    assert time_left(done, 15, seconds=20 if done == 10 else 15) == said


def test_a_stage_whose_counters_are_lost_runs_on(local_ray, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.2)
    counters = StageCounters("test_lost")
    with counters.shown(lambda counts, _: str(counts["rows"])):
        counters.add({"rows": 1})
        time.sleep(1)
        ray.kill(counters._counters)
        time.sleep(2)
        counters.add({"rows": 1})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["test_lost: 1", "test_lost: the counters are lost; the rest runs unseen"]


def test_lines_count_from_the_start_of_their_block(local_ray, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.2)
    counters = StageCounters("test_passes")
    counters.add({"rows": 5})
    with counters.shown(lambda counts, _: str(counts["rows"])):
        counters.add({"rows": 1})
        time.sleep(1)
    assert "test_passes: 1\n" in capsys.readouterr().out
