"""The benchmark of calls itself: its load is what it says, its stages are replayed, a regression is told from none."""

import asyncio
from contextlib import suppress

import msgspec
import pytest

from proxy.units import new_id
from tests.bench import calls, load, stages
from tests.bench.calls import BARE, BIG, CONNECTIONS, DIRECT, PLAIN, SQLITE, STREAM, UNBOOKED, Gateway, Result


@pytest.fixture(scope="module")
def provider():
    """The provider's port."""
    with calls.helper("provider") as process:
        yield int(process.stdout.readline())


def load_of(port: int, scenario: str, **changes: object) -> load.Load:
    gateway = Gateway(DIRECT, port, new_id("key"), None)
    values = {field: getattr(calls.load_of(gateway, scenario, 0.1), field) for field in load.Load.__struct_fields__}
    return load.Load(**{**values, "warming_s": 0.0, **changes})


async def test_a_closed_load_calls_until_its_end(provider):
    """All of its connections are used again, and every answer is whole."""
    measured = await load.drive(load_of(provider, PLAIN, seconds=0.1))
    assert measured.calls > CONNECTIONS
    assert (measured.errors, measured.chunks) == (0, 0)
    assert measured.p50_ms > 0


async def test_a_paced_load_keeps_to_its_rate(provider):
    """It makes no more calls than it says, and on a busy machine not many less."""
    measured = await load.drive(load_of(provider, PLAIN, seconds=0.2, rate=100))
    assert 10 <= measured.calls <= 20
    assert measured.errors == 0


async def test_a_stream_has_all_of_its_chunks(provider):
    """Each is seen once, and the first of them timed."""
    measured = await load.drive(load_of(provider, STREAM, seconds=0.1, connections=2))
    assert (measured.calls, measured.chunks, measured.errors) == (2, 2 * load.CHUNKS, 0)
    assert 0 < measured.first_p50_ms < measured.p50_ms


async def test_an_answer_that_is_no_success_is_an_error():
    """It is counted, and would end the run."""

    async def refuse(reader, writer):
        await reader.readuntil(b"}")
        writer.write(b"HTTP/1.1 402 Payment Required\r\ncontent-length: 2\r\n\r\n{}")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        measured = await load.drive(load_of(port, PLAIN, seconds=0.0, connections=1))
    assert measured.errors == measured.calls == 1


def test_every_stage_is_replayed():
    """And costs something."""
    costs = dict(stages.stages())
    assert len(costs) == 12
    assert all(cost_us > 0 for cost_us in costs.values())


def result(unbooked_us: float) -> Result:
    cpu_us = {(BARE, PLAIN): 100.0, (BARE, STREAM): 20.0, (SQLITE, PLAIN): 300.0}
    cpu_us |= {(UNBOOKED, PLAIN): unbooked_us, (UNBOOKED, BIG): 250.0, (UNBOOKED, STREAM): 30.0}
    return Result(cpu_us, {}, {}, {BARE: 1.0, UNBOOKED: 1.0, SQLITE: 1.0}, {BARE: 1.0, UNBOOKED: 1.0, SQLITE: 1.0})


def test_only_what_is_a_fourth_dearer_is_a_regression():
    """Measured against the relay of the same run, not in µs."""
    baseline = result(200.0).ratios()
    assert baseline == {
        "unbooked ÷ bare, plain": 2.0,
        "unbooked ÷ bare, stream": 1.5,
        "sqlite ÷ bare, plain": 3.0,
        "unbooked, big ÷ plain": 1.25,
    }
    assert calls.regressions(result(249.0).ratios(), baseline) == []
    assert calls.regressions(result(260.0).ratios(), baseline) == [
        "unbooked ÷ bare, plain: 2.60, more than 1.25 × 2.00"
    ]
    assert "| CPU per plain call, µs | 100.00 | 260.00 | 300.00 |" in calls.table(result(260.0))


@pytest.mark.parametrize(("costs_us", "is_missed"), [([260, 260, 260], True), ([260, 260, 200], False), ([200], False)])
def test_a_regression_is_one_in_every_attempt(tmp_path, monkeypatch, capsys, costs_us, is_missed):
    """A machine that was busy for a moment is measured again."""
    baseline = tmp_path / "baseline.json"
    baseline.write_text('{"unbooked ÷ bare, plain": 2.0}')
    monkeypatch.setattr(calls, "BASELINE", baseline)
    turns = iter(costs_us)
    monkeypatch.setattr(calls, "bench", lambda _scale: result(float(next(turns))))
    assert calls.check(calls.SHORT) == (["unbooked ÷ bare, plain"] if is_missed else [])
    assert next(turns, None) is None
    assert capsys.readouterr().out.count("CPU per plain call") == len(costs_us)


def test_the_stored_baseline_can_be_read():
    """It names what a short run measures."""
    stored = msgspec.json.decode(calls.BASELINE.read_bytes(), type=dict[str, float])
    assert stored.keys() >= {"unbooked ÷ bare, plain", "unbooked ÷ bare, stream", "unbooked, big ÷ plain"}
