"""Decontamination: planted items are found, word for word or lightly edited, and nothing clean is lost."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from data.corpus import standard_library
from data.curate.__main__ import main
from data.curate.decontaminate import FUZZY, Decontaminate
from data.curate.grams import words
from data.curate.passes import curate
from data.errors import InputError
from data.tasks import different, get_task
from data.words import WORDS
from tests.test_curate import notes, read, write

STORIES = ('constraints', 'wordgraph')  # problems in sentences


def held_out(name, count):
    return [prompt.text for prompt in different(get_task(name, split='heldout'), count)]


def edited(text, rng):
    """In another case, without full stops, a word of twenty replaced, another one dropped."""
    said = text.upper().replace('.', ' ').split()
    for place in rng.sample(range(len(said)), max(len(said) // 20, 1)):
        said[place] = rng.choice(WORDS)
    del said[rng.randrange(len(said))]
    return '  '.join(said)


def inside(texts):
    """Each text in the midst of a document of its own."""
    around = [record['text'] for record in standard_library('train', 1500)]
    return [f'{around[i][:700]}\n{text}\n{around[i][700:1400]}' for i, text in enumerate(texts)]


def found(step, texts):
    return [step.find(words(text)) for text in texts]


@pytest.mark.parametrize('name', ['arithmetic', 'letters', 'sudoku', 'variables', 'code', *STORIES])
def test_held_out_problems_are_found_word_for_word(name):
    hits = found(Decontaminate((name,), most=60), inside(held_out(name, 60)))
    assert [hit and (hit[0].evaluation, hit[0].number, hit[2]) for hit in hits] == [(name, i, 1.0) for i in range(60)]


@pytest.mark.parametrize(('name', 'least'), [('wordgraph', 0.95), ('constraints', 0.7)])
def test_lightly_edited_problems_are_found(name, least):
    """Most of what `constraints` says is the same for many items: few runs are an item's own."""
    rng = random.Random(0)
    texts = [edited(text, rng) for text in held_out(name, 200) if len(words(text)) > 2 * FUZZY]
    hits = found(Decontaminate((name,), most=200), inside(texts))
    assert len(texts) > 60 and sum(map(bool, hits)) >= least * len(texts)


def test_nothing_clean_is_dropped():
    """A thousand documents, and problems of the same tasks that are to be trained on."""
    step = Decontaminate(most=200)
    assert not any(found(step, [record['text'] for record in standard_library('train', 2000)[:1000]]))
    problems = [p.text for name in ('arithmetic', 'code', *STORIES) for p in different(get_task(name), 100)]
    assert sum(map(bool, found(step, problems))) <= 4  # of 400, some of which are all but alike


def test_another_number_is_another_problem(tmp_path):
    asked = 'What is the sum of the positive divisors of 18 that are larger than the number 3?'
    write(tmp_path / 'test.jsonl', [{'question': asked, 'answer': 'short'}, {'question': 'What is 3+4-2?'}])
    step = Decontaminate((str(tmp_path / 'test.jsonl'),))
    held = [asked, asked.replace('larger', 'bigger'), 'Say: what is 3 + 4 - 2? 5.', 'short']
    clean = [asked.replace('18', '24').replace('number 3', 'number 5'), 'What is 3-4+2?', 'What is 3+4-2*7?', 'What']
    assert [bool(hit) for hit in found(step, held)] == [True, True, True, False]  # an answer that anybody gives
    assert not any(found(step, [*clean, '', 'one']))


def test_words_of_an_item_far_apart_are_no_item(tmp_path):
    rng = random.Random(1)
    asked = [rng.choice(WORDS) for _ in range(40)]
    write(tmp_path / 'test.jsonl', [{'question': ' '.join(asked)}])
    step = Decontaminate((str(tmp_path / 'test.jsonl'),))
    scattered = ' '.join(word for i in range(0, 40, 8) for word in [*asked[i : i + 8], *['filler'] * 80])
    assert found(step, [' '.join(asked)])[0] and not found(step, [scattered])[0]


def test_the_command_and_its_report(tmp_path, capsys):
    question = 'How many apples does Ann have if she buys 12 of them and eats 5 before lunch?'
    write(tmp_path / 'test.jsonl', [{'question': 'What else is there to be asked of 17?'}, {'question': question}])
    config = {'evaluations': {'stories': {'task': {'name': 'wordgraph'}}, 'held': {'path': 'x'}}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    clean = standard_library('train', 2000)[0]['text']
    spec = write(tmp_path / 'in.jsonl', [{'text': t} for t in (clean, f'Well. {question}', *held_out('wordgraph', 1))])
    arguments = ['decontaminate', f'--input={tmp_path}/in.jsonl', '--most=20']
    against = [f'{tmp_path}/test.jsonl', f'{tmp_path}/config.json']
    assert main([*arguments, f'--output={tmp_path}/out', '--against', *against]) == 0
    assert capsys.readouterr().out.startswith(f'{tmp_path}/out: 1 of 3 records, 1 stories, 1 test.jsonl\n')
    assert [r['text'] for r in read(tmp_path / 'out')] == [clean]
    hit, _ = notes(tmp_path / 'out')
    assert {**hit, 'words': hit['words'][:20]} == {
        'record': 1, 'reason': 'test.jsonl', 'item': 1, 'share': 1.0, 'words': 'how many apples does',
    }  # fmt: skip
    step = Decontaminate((f'{tmp_path}/test.jsonl',))
    first = curate(step, spec, tmp_path / 'one')
    write(tmp_path / 'test.jsonl', [{'question': question}])
    second = curate(step, spec, tmp_path / 'two')
    assert first['curated'][0]['items'] == {'test.jsonl': 2} and second['curated'][0]['items'] == {'test.jsonl': 1}
    assert first['fingerprint'] != second['fingerprint']


@pytest.mark.parametrize(
    ('against', 'message'),
    [
        ('/none.jsonl', 'no such file'),
        ('{"name": "sudokus"}', "unknown task 'sudokus'; did you mean 'sudoku'"),
        ('{"type": "txt"}', "did you mean 'text'"),
        ('{', '--against: expected a JSON object'),
    ],
)
def test_bad_input(against, message):
    with pytest.raises(InputError, match=message):
        Decontaminate((against,)).settings()


RECORDS = Path(os.environ.get('TORSO_RECORDS', ''))


@pytest.mark.skipif('TORSO_RECORDS' not in os.environ, reason='TORSO_RECORDS names no folder of records')
def test_published_records():
    """MATH's test file holds the whole of MATH-500; GSM8K's training file next to nothing of its test file."""

    def load(name):
        with gzip.open(RECORDS / f'{name}.jsonl.gz') as file:
            return [json.loads(line) for line in file.read().split(b'\n') if line]

    step = Decontaminate(tuple(str(RECORDS / 'eval' / f'{name}.jsonl.gz') for name in ('math500', 'gsm8k_test')))
    same = lambda text: ' '.join(text.split())  # noqa: E731
    planted = {same(record['problem']) for record in load('eval/math500')}
    problems = [record['context'] for record in load('midtrain/math_test_5000')]
    hits = dict(zip(problems, found(step, problems), strict=True))
    assert sum(bool(hits[p]) for p in problems if same(p) in planted) >= 0.99 * len(planted)
    assert sum(bool(hits[p]) for p in problems if same(p) not in planted) <= 0.02 * len(problems)
    rng = random.Random(0)
    for name, field in (('gsm8k_test', 'question'), ('math500', 'problem')):
        texts = [edited(record[field], rng) for record in load(f'eval/{name}') if len(words(record[field])) > 2 * FUZZY]
        assert sum(map(bool, found(step, texts))) >= 0.93 * len(texts)
    assert sum(map(bool, found(step, [r['question'] for r in load('midtrain/gsm8k_train')]))) <= 7
    assert not any(found(step, [r['text'] for r in load('pretrain/c4_en_train')]))
