"""Curation: what every step shares, and deduplication: planted copies found, nothing else lost."""

import json
import random

import numpy as np
import pytest

from data.curate import passes
from data.curate.__main__ import main
from data.curate.dedup import Dedup
from data.curate.grams import grams, hashes, text_of, words
from data.curate.passes import curate
from data.curate.repetition import Repetition
from data.errors import InputError
from data.packing import encode_record
from data.sources import open_source
from data.words import WORDS
from tests.text import small_tokenizer

pytest.importorskip('rensa')


def document(rng, length=150):
    return [rng.choice(WORDS) for _ in range(length)]


def changed(rng, text, count):
    """A copy with `count` words replaced."""
    places = set(rng.sample(range(len(text)), count))
    return [rng.choice(WORDS) if i in places else word for i, word in enumerate(text)]


def similarity(one, other):
    """Exact Jaccard similarity of sets of runs of five words, by Python's sets."""
    runs = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def write(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return {'type': 'jsonl', 'path': str(path)}


def read(folder):
    source = open_source({'type': 'arrayrecord', 'path': str(folder)})
    return [source[i] for i in range(len(source))]


def notes(folder):
    return [json.loads(line) for line in (folder / passes.NOTES).read_text().splitlines()]


def texts(count, seed=0):
    rng = random.Random(seed)
    return [{'text': ' '.join(document(rng))} for _ in range(count)]


def test_planted_duplicates_are_found_and_nothing_else_is(tmp_path):
    rng = random.Random(1)
    originals = [document(rng) for _ in range(300)]
    planted = [(i, changed(rng, originals[i], i % 6)) for i in range(150)]  # none to five words: Jaccard from 1 to 0.7
    records = [{'text': ' '.join(text)} for text in originals]
    records += [{'text': '  '.join(text).upper()} for _, text in planted]
    told = curate(Dedup(), write(tmp_path / 'in.jsonl', records), tmp_path / 'out', shard_records=100)
    dropped = {note['record']: note for note in notes(tmp_path / 'out')}
    exact = {300 + i: similarity(originals[i], text) for i, text in planted}
    wanted = [record for record, similar in exact.items() if similar >= 0.85]
    assert len(wanted) > 70 and sum(similar < 0.8 for similar in exact.values()) > 20
    assert sum(record in dropped for record in wanted) >= 0.95 * len(wanted)  # recall
    assert all(exact[record] >= 0.8 for record in dropped)  # precision
    for record, note in dropped.items():
        assert note['twin'] == planted[record - 300][0] and note['similarity'] == pytest.approx(exact[record], abs=1e-4)
        assert note['reason'] == ('exact' if exact[record] == 1 else 'near')
    kept = read(tmp_path / 'out')
    assert [r['text'] for r in kept] == [r['text'] for i, r in enumerate(records) if i not in dropped]
    assert told['records'] == len(kept) == told['curated'][0]['kept'] and told['curated'][0]['records'] == 450


def test_exact_duplicates_alone(tmp_path):
    rng = random.Random(2)
    text = document(rng)
    near, same = changed(rng, text, 1), [word.title() for word in text]
    records = [{'text': ' '.join(words)} for words in (text, near, same)]
    records += [{'text': '?!'}, {'text': '...'}]  # without words, and so alike in nothing
    curate(Dedup(similarity=1), write(tmp_path / 'in.jsonl', records), tmp_path / 'out')
    assert [note['record'] for note in notes(tmp_path / 'out')] == [2]
    curate(Dedup(), write(tmp_path / 'in.jsonl', records), tmp_path / 'near')
    assert [(note['record'], note['twin']) for note in notes(tmp_path / 'near')] == [(1, 0), (2, 0)]


def test_paragraphs(tmp_path):
    one, two, three = (' '.join(document(random.Random(i), 20)) for i in range(3))
    records = [
        {'text': f'{one}\n\n{two}'},
        {'text': f'Title\n\n{one}\n\n{three}\n'},
        {'text': f'{two}\n{three}\nTitle'},  # without blank lines: lines
        {'text': one},
        {'messages': [{'role': 'user', 'content': one}]},  # a chat is not cut
        {'messages': [{'role': 'user', 'content': f'{one}, {two}, {three}'}]},
    ]
    curate(Dedup(level='paragraph'), write(tmp_path / 'in.jsonl', records), tmp_path / 'out')
    assert [text_of(r) for r in read(tmp_path / 'out')] == [
        f'{one}\n\n{two}', f'Title\n\n{three}\n', 'Title', f'{one}, {two}, {three}',
    ]  # fmt: skip
    assert [(n['record'], n.get('paragraphs')) for n in notes(tmp_path / 'out')] == [(1, 1), (2, 2), (3, 1), (4, None)]


def test_no_chain_of_small_changes_is_one_text(tmp_path):
    """Each is near the one before it, and the last far from the first: what stays is near none that stays."""
    rng = random.Random(3)
    chain = [document(rng)]
    for _ in range(12):
        chain.append(changed(rng, chain[-1], 2))
    curate(Dedup(), write(tmp_path / 'in.jsonl', [{'text': ' '.join(t)} for t in chain]), tmp_path / 'out')
    kept = [r['text'].split() for r in read(tmp_path / 'out')]
    assert 1 < len(kept) < len(chain) and similarity(chain[0], chain[-1]) < 0.5
    for note in notes(tmp_path / 'out'):
        assert similarity(chain[note['record']], chain[note['twin']]) >= 0.8


def test_workers_change_nothing_and_shards_only_the_files(tmp_path):
    spec = write(tmp_path / 'in.jsonl', texts(40) + texts(15))
    one, two = (curate(Dedup(), spec, tmp_path / f'{n}', shard_records=16, workers=n) for n in (1, 2))
    whole = curate(Dedup(), spec, tmp_path / 'whole')
    assert one == two and len(one['shards']) == 3 and one['records'] == 40
    assert read(tmp_path / '1') == read(tmp_path / '2') == read(tmp_path / 'whole') and len(whole['shards']) == 1


def test_a_command_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    spec = write(tmp_path / 'in.jsonl', texts(40) + texts(15))
    expected = curate(Dedup(), spec, tmp_path / 'whole', shard_records=10)
    written, write_shard = [], passes.write_shard

    def cut_off(path, records):
        if len(written) == 2:
            next(iter(records))
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, records)

    monkeypatch.setattr(passes, 'write_shard', cut_off)
    with pytest.raises(KeyboardInterrupt):
        curate(Dedup(), spec, tmp_path / 'out', shard_records=10)
    assert not (tmp_path / 'out').exists()
    with pytest.raises(InputError, match='out.unfinished: exists already, of other settings'):
        curate(Dedup(level='paragraph'), spec, tmp_path / 'out', shard_records=10)
    again = []
    monkeypatch.setattr(passes, 'write_shard', lambda path, records: again.append(path) or write_shard(path, records))
    assert curate(Dedup(), spec, tmp_path / 'out', shard_records=10) == expected
    assert len(again) == 4 and not {*again} & {*written} and read(tmp_path / 'out') == read(tmp_path / 'whole')
    assert not (tmp_path / 'out.unfinished').exists()
    assert curate(Dedup(), spec, tmp_path / 'out', shard_records=10) == expected and len(again) == 4
    with pytest.raises(InputError, match='out: exists already, of other settings'):
        curate(Dedup(), spec, tmp_path / 'out', shard_records=9)


def test_provenance_and_history(tmp_path, monkeypatch):
    spec = write(
        tmp_path / 'in.jsonl', [*texts(2), {**texts(3)[2], 'licence': 'MIT', 'provenance': {'generator': 'a'}}]
    )
    first = curate(Dedup(similarity=1), spec, tmp_path / 'one', licence='CC0')
    again = {'type': 'arrayrecord', 'path': str(tmp_path / 'one')}
    second = curate(Dedup(), again, tmp_path / 'two')
    steps = ['dedup 1', 'dedup 1']
    assert [r['provenance'] for r in read(tmp_path / 'two')] == [
        {'source': f'{tmp_path}/in.jsonl:1', 'licence': 'CC0', 'transforms': steps},
        {'source': f'{tmp_path}/in.jsonl:2', 'licence': 'CC0', 'transforms': steps},
        {'source': f'{tmp_path}/in.jsonl:3', 'licence': 'MIT', 'transforms': steps, 'generator': 'a'},
    ]
    assert [step['similarity'] for step in second['curated']] == [1, 0.8] and first['curated'] == second['curated'][:1]
    monkeypatch.setattr(Dedup, 'version', 2)  # a fix makes other data, even of the same records
    fixed = curate(Dedup(similarity=1), spec, tmp_path / 'fixed', licence='CC0')
    assert fixed['fingerprint'] != first['fingerprint']


def test_hashes_are_those_of_runs():
    of_words = hashes(words('One two, THREE four 3+4 one two three four'))
    assert words('3+4-x*2') == ['3', '+', '4', '-', 'x', '*', '2']
    runs = grams(of_words, 4)
    assert len(runs) == len(of_words) - 3 and runs[0] == runs[-1] and len({*runs.tolist()}) == len(runs) - 1
    assert grams(of_words[:2], 4).shape == (1,) and grams(of_words[:0], 4).shape == (0,)
    assert grams(of_words[:4], 4)[0] != grams(np.flip(of_words[:4]), 4)[0]
    with pytest.raises(InputError, match='curate before tokens are made'):
        text_of({'tokens': [1]})


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['dedup', '--similarity=1.5'], 'expected similarity in (0, 1]'),
        (['dedup', '--field=title'], "no field 'title'; it has text"),
        (['dedup', '--field={text'], "field '{text': "),
        (['dedup', '--field={text[a]}'], 'cannot be put as'),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, capsys, arguments, message):
    write(tmp_path / 'in.jsonl', texts(2))
    assert main([*arguments, f'--input={tmp_path}/in.jsonl', f'--output={tmp_path}/out']) == 1
    error = capsys.readouterr().err
    assert error.startswith('data.curate: ') and message in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_the_command(tmp_path, capsys):
    records = [{'question': f'What is {n} + 1?', 'answer': str(n + 1), 'tree': {'text': 'x'}} for n in (1, 2, 2)]
    write(tmp_path / 'in.jsonl', records)
    arguments = [
        f'--input={tmp_path}/in.jsonl',
        f'--output={tmp_path}/out',
        '--field={tree[text]}: {question} {answer}',
    ]
    assert main(['dedup', *arguments]) == 0
    assert capsys.readouterr().out.startswith(f'{tmp_path}/out: 2 of 3 records, 1 exact\n0.0 million characters, ')
    assert [r['text'] for r in read(tmp_path / 'out')] == ['x: What is 1 + 1? 2', 'x: What is 2 + 1? 3']


def test_repetition_is_dropped_or_not_learnt(tmp_path):
    table, rule = 'a zero 0 0 0\n' + '0 0 1\n' * 40, 'no ' * 80
    once = f'Before.\n{rule}\nAfter İt.'
    records = [{'text': 'plain words'}, {'text': table}, {'text': once}, {'text': '0 0 1 ' * 31 + '-' * 80}]
    records += [{'messages': [{'role': 'user', 'content': rule}]}]
    spec = write(tmp_path / 'in.jsonl', records)
    curate(Repetition(), spec, tmp_path / 'dropped')
    assert [r['text'] for r in read(tmp_path / 'dropped')] == ['plain words', records[3]['text']]
    curate(Repetition(mask=True), spec, tmp_path / 'masked')
    kept = read(tmp_path / 'masked')
    assert [text_of(r) for r in kept] == [text_of(r) for r in records[:4]]  # nothing is lost; chats are not cut
    assert kept[1]['completion'][0] == 'a zero 0 0 0\n0 0 1\n' and kept[1]['prompt'] == ['', '0 0 1\n' * 38 + '0 0 1']
    assert (kept[2]['prompt'], kept[2]['completion']) == (['', rule[3:-1]], ['Before.\nno ', ' \nAfter İt.'])
    tokens, weight = encode_record(kept[2], small_tokenizer())
    learnt = small_tokenizer().decode(tokens[weight > 0].tolist())
    assert learnt.startswith('Before.\nno  \nAfter') and 0 < (weight == 0).sum() < len(tokens) - 10
    assert [note['reason'] for note in notes(tmp_path / 'masked')] == ['masked', 'masked', 'dropped']


def test_what_repeats_is_found_as_by_hand():
    """Against runs compared word by word."""
    rng = random.Random(5)
    step = Repetition(mask=True, times=3, longest=4)
    for _ in range(200):
        found = [rng.choice('ab') for _ in range(rng.randrange(2, 30))]
        said = set()
        for size in range(1, 5):
            for start in range(len(found)):
                end = start + size
                while end < len(found) and found[end] == found[end - size]:
                    end += 1
                if end - start >= size * 3:
                    said.update(range(start + size, end))
        text = ' '.join(found)
        parts = step.pieces(text)
        assert ''.join(parts) == text and len(parts) % 2 == 0
        masked = [part for i, part in enumerate(parts) for _ in part.split() if i % 2 == 0]
        assert len(masked) == len(said)
