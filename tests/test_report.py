"""The report: complete, self-contained, and safe whatever a model wrote."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from data.errors import InputError
from train.measure.statistics import interval
from train.report import _read_metrics, main, write_report

NASTY = '<script>alert("x")</script>\n</pre> & \x00\x1b[31m \ud800 $x$'
VOID = {'meta', 'path', 'use', 'rect', 'line', 'br'}  # tags without an end


class Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == 'id' and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def evaluation(value: float, low: float | None, high: float | None, direction: str = 'higher') -> dict:
    return {'metric': 'pass@1', 'value': value, 'low': low, 'high': high, 'items': 200, 'unit': 'share'} | {
        'direction': direction,
        'details': {},
    }


def stage(name: str, parent: str = '', **more: object) -> dict:
    return {
        'name': name,
        'kind': name,
        'parent': parent,
        'models': {},
        'records': [],
        'steps': 40,
        'tokens': 40_000,
        'flops': 1e12,
        'seconds': 30.0,
        'parameters': {'total': 3_000_000, 'active': 1_200_000},
        'changed': [],
        'evaluations': {},
    } | more


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A run of three trained stages and a merge that left no files, with a name that needs escaping."""
    stages = [
        stage('pretrain', evaluations={'arithmetic': evaluation(0.02, 0.01, 0.04)}),
        stage(
            'sft',
            'pretrain',
            changed=[['stages.x.steps', 100, 40], ['note', None, NASTY]],
            evaluations={'arithmetic': evaluation(0.5, 0.45, 0.55), 'loss': evaluation(1.25, None, None, 'lower')},
        ),
        stage(
            'grpo', 'sft', evaluations={'arithmetic': evaluation(0.4, 0.36, 0.44), 'loss': evaluation(1.5, None, None)}
        ),
        {'name': 'merge', 'kind': 'merge', 'models': {'a': 'sft', 'b': 'grpo'}},
    ]
    run = {'command': f'python -m train {NASTY}', 'config': 'c', 'created': '2030-01-01T00:00:00', 'device': 'cpu'}
    folder = tmp_path / 'a<b>&c'
    folder.mkdir()
    (folder / 'lineage.json').write_text(json.dumps({'run': run, 'stages': stages}))
    for number, item in enumerate(stages[:3]):
        path = folder / item['name']
        path.mkdir()
        lines = [
            {
                'step': i,
                'tokens': 40_000 * number + 1000 * i,
                'flops': 1e12 * (number + i / 40),
                'loss': 5 / i,
                'experts/max_violation': 0.3,
            }
            | ({'reward/mean': i / 40} if item['name'] == 'grpo' else {})
            for i in range(1, 41)
        ]
        text = '\n'.join(json.dumps(line) for line in [*lines, lines[-1], {'step': 41, 'loss': float('nan')}])
        (path / 'metrics.jsonl').write_text(text + '\n{"step": 42, "lo')
        sample = {'step': 40, 'prompt': NASTY, 'completion': f'{item["name"]} says {NASTY}', 'score': 1.0}
        (path / 'samples.jsonl').write_text(
            json.dumps({**sample, 'step': 1, 'completion': 'first words'}) + '\n' + json.dumps(sample)
        )
    return folder


def test_page_is_complete_and_self_contained(workdir: Path) -> None:
    path = write_report(workdir)
    assert path == workdir / 'report.html' and [p.name for p in workdir.glob('*partial*')] == []
    page = path.read_text('utf-8')
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert tags.seen.count('svg') == 5  # graph, arithmetic, loss, reward, expert load
    assert len(tags.ids) == len(set(tags.ids))
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import|<!DOCTYPE svg', page)
    for expected in ('3M parameters, 1.2M active', '120k tokens', 'merge from sft, grpo', 'FLOPs, ancestors', '40.0%'):
        assert expected in page
    assert 'grpo says' in page and 'first words' not in page


def test_everything_foreign_is_escaped(workdir: Path) -> None:
    page = write_report(workdir).read_text('utf-8')
    assert '<script' not in page and 'a<b>' not in page
    assert '&lt;script&gt;' in page and '\x00' not in page and '\x1b' not in page


def test_events_are_shown(workdir: Path) -> None:
    line = {'step': 7, 'kind': 'save failed', 'detail': 'no <space> left'}
    (workdir / 'sft' / 'events.jsonl').write_text(json.dumps(line) + '\n{"step": 8, "ki')
    page = write_report(workdir).read_text()
    assert 'sft: 1</summary>' in page and '<td>save failed</td><td class="soft">no &lt;space&gt; left</td>' in page


def test_changes_are_judged_by_their_intervals(workdir: Path) -> None:
    page = write_report(workdir).read_text('utf-8')
    assert '<span class="gain">+48.0 points</span>' in page
    assert '<span class="loss">−10.0 points</span>' in page
    assert '<span class="soft">+25.0 points</span>' in page  # no interval: no verdict


def test_changes_on_the_same_items_are_judged_in_pairs(workdir: Path) -> None:
    """Intervals overlap widely, yet every tenth item got better and none worse."""
    lineage = json.loads((workdir / 'lineage.json').read_text())
    before, after = lineage['stages'][0], lineage['stages'][1]
    scores = [0.0, 1.0] * 100
    for item, value, own in (
        (before, 0.5, scores),
        (after, 0.55, [1.0 if i % 20 == 0 else x for i, x in enumerate(scores)]),
    ):
        item['evaluations'] = {'task': evaluation(value, value - 0.07, value + 0.07) | {'details': {'scores': own}}}
    (workdir / 'lineage.json').write_text(json.dumps(lineage))
    page = write_report(workdir).read_text()
    assert '<span class="gain">+5.0 points</span> <span class="soft">(+2.0 to +8.0)</span>' in page


def test_what_else_evaluations_say(workdir: Path) -> None:
    lineage = json.loads((workdir / 'lineage.json').read_text())
    details = {'pass@4': 0.75, 'stopped': 1.0, 'other': 3, 'intervals': {'pass@4': [0.5, 0.875], 'stopped': [1, 1]}}
    lineage['stages'][1]['evaluations']['arithmetic']['details'] = details
    lineage['stages'][1]['evaluations']['arithmetic']['contamination'] = 'not checked against <web>'
    (workdir / 'lineage.json').write_text(json.dumps(lineage))
    page = write_report(workdir).read_text()
    assert '<summary>more of arithmetic</summary>' in page and page.count('more of') == 1
    assert '<th>pass@4</th><th>stopped</th></tr>' in page
    assert '<tr><th>sft</th><td>0.75<br><span class="soft">0.5 to 0.875</span></td><td>1<br>' in page
    lineage['stages'][2]['evaluations']['arithmetic']['contamination'] = 'not checked against <web>'
    (workdir / 'lineage.json').write_text(json.dumps(lineage))
    assert 'not checked against &lt;web&gt;' in write_report(workdir).read_text()


def test_gains_are_stated_by_the_compute_they_took(workdir: Path) -> None:
    """The child took 4e12 FLOPs; the unit is a power of ten, and less is better where that is the direction."""
    lineage = json.loads((workdir / 'lineage.json').read_text())
    before, after = lineage['stages'][:2]
    after['flops'] = 4e12
    scores = [0.0, 1.0] * 100
    better = [1.0 if i % 20 == 0 else x for i, x in enumerate(scores)]
    for item, value, own, loss in ((before, 0.5, scores, 3.0), (after, 0.55, better, 2.0)):
        task = evaluation(value, None, None) | {'details': {'scores': own}}
        item['evaluations'] = {'task': task, 'bits': evaluation(loss, None, None, 'lower')}
    (workdir / 'lineage.json').write_text(json.dumps(lineage))
    page = write_report(workdir).read_text()
    assert 'gain per 1e+12 FLOPs' in page and '<th>sft</th><td>4T</td>' in page
    low, high = (bound / 4 for bound in interval(np.subtract(better, scores)))
    assert f'<span class="gain">+0.0125</span><br><span class="soft">{low:+.3g} to {high:+.3g}</span>' in page
    assert '<td><span class="soft">+0.25</span></td>' in page  # 1 nat less in 4e12 FLOPs, without an interval
    assert '<th>pretrain</th><td>1T</td>' not in page  # it has no parent to be compared with


@pytest.mark.filterwarnings('error::UserWarning')  # matplotlib's, where a legend leaves a figure no room
def test_fifty_stages_stay_light(tmp_path: Path) -> None:
    stages = []
    for number in range(50):
        name = f'stage_{number}'
        results = {'task': evaluation(0.5, 0.4, 0.6), 'loss': evaluation(1.5, 1.4, 1.6, 'lower')}
        stages.append(stage(name, f'stage_{number - 1}' if number else '', evaluations=results))
        (tmp_path / name).mkdir()
        lines = [
            {'step': i, 'flops': 1e12 * (number + i / 1000), 'loss': 5 / i, 'experts/max_violation': 0.3}
            for i in range(1, 1001)
        ]
        (tmp_path / name / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    (tmp_path / 'lineage.json').write_text(json.dumps({'stages': stages}))
    page = write_report(tmp_path).read_text()
    assert len(page) < 1e6 and page.count('<svg') == 5 and page.count('<th>stage_49</th>') == 2


def test_what_stages_took_and_were_fed(workdir: Path) -> None:
    """Two devices for half an hour at 3 dollars an hour, the files in the folder, a mixture that changes half-way."""
    lineage = json.loads((workdir / 'lineage.json').read_text())
    lineage['run']['price'] = 3.0
    lineage['stages'][1] |= {'seconds': 1800.0, 'devices': 2}
    (workdir / 'lineage.json').write_text(json.dumps(lineage))
    (workdir / 'sft' / 'weights').write_bytes(bytes(5_000_000))
    mixture = [[0.0, {'text': 3.0, 'chats': 1.0}], [0.5, {'chats': 1.0}]]
    (workdir / 'sft' / 'config.json').write_text(json.dumps({'stage': {'mixture': mixture}}))
    with (workdir / 'sft' / 'metrics.jsonl').open('a') as lines:
        lines.write('\n' + json.dumps({'step': 43, 'consumed/text': 0.25, 'consumed/chats': 0.75}))
    page = write_report(workdir).read_text()
    assert re.search(r'sft</h3>.*?30.0 min · 1 device-hours · \$3.00 · 5.01MB stored', page)
    assert '<tr><th>sft</th><td>text</td><td>37.5</td><td>25.0</td></tr>' in page
    assert '<tr><th>sft</th><td>chats</td><td>62.5</td><td>75.0</td></tr>' in page


def test_gains_of_parts_of_a_stage(workdir: Path) -> None:
    """sft gains 0.5 in all: 0.4 by its first quarter of 1e12 FLOPs, 0.1 by the rest."""
    lineage = json.loads((workdir / 'lineage.json').read_text())
    scores = [0.0] * 100 + [1.0] * 100

    def told(lift: float) -> dict:
        own = {'details': {'scores': [x + lift for x in scores]}}
        return {'arithmetic': evaluation(0.1 + lift, lift, 0.2 + lift) | own}

    for item, lift in zip(lineage['stages'], (0.0, 0.5), strict=False):
        item['evaluations'] = told(lift)
    (workdir / 'lineage.json').write_text(json.dumps(lineage))
    line = {'step': 10, 'flops': 1.25e12, 'evaluations': told(0.4)}
    (workdir / 'sft' / 'evaluations.jsonl').write_text(json.dumps(line) + '\n{"step": 20, "ev')
    page = write_report(workdir).read_text()
    rows = [
        (name, float(gain))
        for name, gain in re.findall(r'<th>([^<]*)</th><td>[^<]*</td><td><span class="gain">([^<]*)<', page)
    ]
    assert rows == [('sft', 0.5), ('sft to step 10', 1.6), ('sft to the end', pytest.approx(0.133, abs=1e-3))]
    assert 'sft made it better (higher is better).' in page  # of grpo no items are known


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / 'lineage.json').write_text('{"stages": [{"name": "pretrain"}]}')
    assert 'pretrain' in write_report(tmp_path).read_text('utf-8')
    (tmp_path / 'lineage.json').write_text('{"stages": []}')
    assert '<svg' not in write_report(tmp_path).read_text('utf-8')


@pytest.mark.parametrize('text', ['', '[]', '{"stages": {}}', '{"stages": [{}]}', '{"stages": [1]}'])
def test_a_broken_lineage_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / 'lineage.json').write_text(text)
    with pytest.raises(InputError, match='lineage.json'):
        write_report(tmp_path)


def test_command(workdir: Path, root: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, '-m', 'train.report', *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)

    done = call(str(workdir))
    assert done.returncode == 0 and done.stdout.strip() == str(workdir / 'report.html') and not done.stderr
    missing = call(str(workdir / 'NOSUCH'))
    assert missing.returncode == 1 and len(missing.stderr.splitlines()) == 1 and 'NOSUCH' in missing.stderr
    assert call().returncode == 2


def test_a_figure_of_its_own(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'figures' / 'reward.svg'
    assert main([str(workdir), '--figure=reward/mean', f'--output={path}']) == 0
    figure = ElementTree.fromstring(path.read_text())
    assert figure.tag == '{http://www.w3.org/2000/svg}svg' and figure.get('color')
    assert 'grpo' in path.read_text() and 'pretrain' not in path.read_text()
    assert main([str(workdir), '--figure=reward/meen']) == 1
    chart = workdir / 'chart.md'
    assert main([str(workdir), '--figure=loss', '--stages=sft', f'--output={chart}']) == 0
    lines = chart.read_text('utf-8').splitlines()
    (values,) = [json.loads(line.strip().removeprefix('line ')) for line in lines if line.strip().startswith('line ')]
    logged = [line['loss'] for line in _read_metrics(workdir / 'sft' / 'metrics.jsonl')]
    expected = [np.mean(part) for part in np.array_split(np.array(logged)[np.isfinite(logged)], 12)]
    np.testing.assert_allclose(values, expected, rtol=1e-3)
    assert lines[0] == '```mermaid' and '    title "sft blue"' in lines
    assert main([str(workdir), '--figure=loss', '--stages=stf']) == 1
    assert "no stage has the metric 'reward/meen'; did you mean 'reward/mean'" in capsys.readouterr().err
