"""Tasks from records: what a file holds, in which order, in which split."""

import gzip
import json
from dataclasses import dataclass

import pytest

from data.errors import InputError
from data.tasks import Prompt, Verdict
from data.tasks.records import RecordTask, canonical, string


@dataclass(kw_only=True)
class Echo(RecordTask):
    name = 'echo'

    def pose(self, record):
        text = string(record, 'say')
        return 'a shout' if text.isupper() else Prompt(text, text, canonical(text))

    def verify(self, prompt, completion):
        return Verdict(float(completion == prompt.text))


def write(path, records):
    data = ''.join(f'{json.dumps(record)}\n' for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return str(path)


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
def test_records_are_split_by_their_keys_whatever_their_order(tmp_path, name):
    records = [{'say': f'line {i}\u2028'} for i in range(200)]
    path = write(tmp_path / name, [*records, {'say': 'LOUD'}, {'say': 'Line  7\n'}])
    tasks = {split: Echo(path=path, split=split) for split in ('train', 'heldout')}
    found = {split: [task.prompt(i).key for i in range(len(task))] for split, task in tasks.items()}
    assert sorted(found['train'] + found['heldout']) == sorted(canonical(r['say']) for r in records)
    assert 8 <= len(found['heldout']) <= 40 and tasks['train'].skipped == {'a shout': 1}
    assert tasks['train'].prompt(len(tasks['train'])) == tasks['train'].prompt(0)
    assert found['train'] != sorted(found['train'])
    turned = Echo(path=write(tmp_path / f'turned_{name}', records[::-1]), split='heldout')
    assert [turned.prompt(i).key for i in range(len(turned))] == found['heldout']
    assert len(Echo(path=path, split='heldout', evaluation=True)) == 200


def test_bad_records_and_options_say_what_was_expected(tmp_path):
    path = write(tmp_path / 'a.jsonl', [{'say': 'a'}, {'say': 3}])
    for message, options in [
        (r'a.jsonl:2: say: expected a string, got int', {'path': path}),
        (r'b.jsonl:1: say: expected a string, got no such field', {'path': write(tmp_path / 'b.jsonl', [{}])}),
        (r'c.jsonl:1: expected an object, got list', {'path': write(tmp_path / 'c.jsonl', [[]])}),
        (r'no train record among 1', {'path': write(tmp_path / 'd.jsonl', [{'say': 'A'}])}),
        (r'no such file', {'path': str(tmp_path / 'e.jsonl')}),
        (r'path must name', {}),
        (r'evaluation must be True or False', {'path': path, 'evaluation': 1}),
        (r'all records of .* are held out', {'path': path, 'evaluation': True}),
    ]:
        with pytest.raises(InputError, match=message):
            Echo(**options)
