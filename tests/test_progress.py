"""Progress reports: plain lines that do not flood a log, a bar on a terminal."""

import io

import pytest

from train.launch import progress
from train.launch.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    return now


def run(clock: list[float], steps: int, seconds: float, total: int, initial: int = 0) -> list[str]:
    out = io.StringIO()
    with Progress(total, 'pretrain', initial=initial, stream=out) as bar:
        for step in range(initial + 1, initial + steps + 1):
            clock[0] += seconds
            bar.update(step, tokens=500, loss=5.0 / step)
    return out.getvalue().splitlines()


def test_first_and_last_step_and_one_line_every_ten_seconds(clock: list[float]) -> None:
    lines = run(clock, steps=50, seconds=1.0, total=50)
    assert lines[0] == 'pretrain: step 1/50 | loss 5'
    assert [line.split('/')[0] for line in lines[1:]] == [f'pretrain: step {n}' for n in (11, 21, 31, 41, 50)]
    assert '500 tokens/s' in lines[1] and '39 s left' in lines[1]
    assert 'left' not in lines[-1]


def test_rates_cover_a_recent_window_and_not_compilation(clock: list[float]) -> None:
    out = io.StringIO()
    with Progress(1000, 'x', stream=out) as bar:
        clock[0] += 300.0  # compilation
        for step in range(1, 201):
            clock[0] += 1.0 if step < 100 else 0.5
            bar.update(step, tokens=1000)
    assert '1,000 tokens/s' in out.getvalue().splitlines()[5]
    assert '2,000 tokens/s | 7 min left' in out.getvalue().splitlines()[-1]


def test_work_that_ends_early_still_shows_its_last_step(clock: list[float]) -> None:
    lines = run(clock, steps=5, seconds=1.0, total=50, initial=20)
    assert [line.split(' | ')[0] for line in lines] == ['pretrain: step 21/50', 'pretrain: step 25/50']


def test_silent_without_updates_and_after_an_error(clock: list[float]) -> None:
    out = io.StringIO()
    with Progress(3, 'x', stream=out):
        pass
    with pytest.raises(KeyError), Progress(3, 'x', stream=out) as bar:
        bar.update(1)
        bar.update(2)
        raise KeyError
    assert out.getvalue().splitlines() == ['x: step 1/3']


def test_a_terminal_gets_a_bar(clock: list[float]) -> None:
    out = Terminal()
    with Progress(4, 'sft', initial=2, stream=out) as bar:
        for step in (3, 4):
            clock[0] += 1.0
            bar.update(step, tokens=100, loss=float('nan'))
    last = out.getvalue().split('\r')[-1]
    assert 'sft 100%|' in last and '4/4' in last and 'loss nan, 100 tokens/s' in last
