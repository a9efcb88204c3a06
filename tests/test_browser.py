"""The report in a real browser, where one is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_report import evaluation, stage

from data.errors import InputError
from train.measure import browser
from train.report import main

with_browser = pytest.mark.skipif(not browser.find_browser(), reason='no Chromium is installed')


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    stages = [stage(name, parent) for name, parent in (('a', ''), ('b', 'a'), ('c', 'a'))]
    for number, item in enumerate(stages):
        item['evaluations'] = {'task': evaluation(0.2 + number / 4, 0.1 + number / 4, 0.3 + number / 4)}
        (tmp_path / item['name']).mkdir()
        lines = [{'step': i, 'flops': 1e12 * number + 1e10 * i, 'loss': 5 / i} for i in range(1, 100)]
        (tmp_path / item['name'] / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    (tmp_path / 'lineage.json').write_text(json.dumps({'run': {'command': 'python'}, 'stages': stages}))
    return tmp_path


@with_browser
def test_the_report_renders_without_complaint(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = workdir / 'pictures' / 'report.png'
    assert main([str(workdir), f'--screenshot={picture}', '--height=1500']) == 0
    assert capsys.readouterr().out.split() == [str(workdir / 'report.html'), str(picture)]
    page, complaints = browser.browse(workdir / 'report.html', '--dump-dom')
    assert complaints == []
    assert page.count('<svg') == 3  # the graph of stages, the evaluation and the loss
    assert picture.stat().st_size < 300_000
    shown = Image.open(picture).convert('RGB')
    assert shown.size == (browser.WIDTH, 1500)
    colours = {colour for _, colour in shown.getcolors(2**24)}
    for hexadecimal in ('#3b82f6', '#f59e0b', '#10b981'):  # of the three stages: boxes, bars and curves are there
        wanted = tuple(int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
        assert any(max(abs(x - y) for x, y in zip(wanted, colour, strict=True)) < 16 for colour in colours)


@with_browser
def test_complaints_are_heard(tmp_path: Path) -> None:
    page = tmp_path / 'page.html'
    page.write_text('<!doctype html><script>console.error("no such luck")</script>')
    assert 'no such luck' in browser.browse(page, '--dump-dom')[1][0]


def test_a_browser_that_is_not_there_is_named(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(browser, 'BROWSERS', ('no-such-browser',))
    with pytest.raises(InputError, match='expected one of no-such-browser'):
        browser.browse(workdir)
    assert main([str(workdir), f'--screenshot={workdir / "x.png"}']) == 1
    assert 'no browser is installed' in capsys.readouterr().err and (workdir / 'report.html').exists()
