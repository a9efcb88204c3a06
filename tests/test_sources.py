"""Sources: every kind opens, reads in any order, and says plainly what is wrong with a file."""

import gzip
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, FrozenConfigDict
from pyarrow import parquet

from data.constitution import CRITIQUE_TEMPLATE, REVISION_TEMPLATE
from data.corpus import instructions, shared_line_share, standard_library
from data.errors import InputError
from data.packing import encode_record
from data.recast import MIDDLE, PREFIX, SUFFIX, FillInTheMiddle
from data.rows import PROBLEMS, Order, sample_texts
from data.sources import open_source
from tests.text import small_tokenizer


def write_lines(path, lines, packed=False):
    data = '\n'.join(lines).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    return str(path)


class TestCorpus:
    def test_split_is_by_module(self):
        train, heldout = standard_library('train'), standard_library('heldout')
        assert 150_000 < sum(len(record['text']) for record in heldout) < 900_000
        assert sum(len(record['text']) for record in train) > 5_000_000
        tops = [{record['module'].split('.')[0] for record in records} for records in (train, heldout)]
        assert not tops[0] & tops[1]
        assert shared_line_share(train, heldout) < 0.08
        assert [record['path'] for record in train] == sorted(record['path'] for record in train)

    def test_pieces_are_the_files_cut_at_line_ends(self):
        whole, pieces = standard_library('heldout'), standard_library('heldout', 500)
        texts = {file['path']: '' for file in whole}
        for piece in pieces:
            texts[piece['path']] += piece['text']
            assert piece['text'].find('\n', 499) in (-1, len(piece['text']) - 1)
        assert texts == {file['path']: file['text'] for file in whole} and len(pieces) > 100
        for bad in (-1, 0.5, True):
            with pytest.raises(InputError, match='expected a number of characters'):
                standard_library('train', bad)

    def test_no_tests_in_it(self):
        folders = {part for record in standard_library('train') for part in record['path'].split('/')[:-1]}
        assert not folders & {'test', 'tests', 'idle_test', 'site-packages', 'encodings'}

    def test_shared_line_share_counts_long_lines(self):
        line = 'a line that is long enough to count'
        assert shared_line_share([{'text': line}], [{'text': f'  {line}\nshort\n{line} not\n'}]) == 0.5

    def test_instructions(self):
        asked = [{record['messages'][0]['content'] for record in instructions(split)} for split in ('train', 'heldout')]
        assert len(asked[0]) == len(instructions('train')) > 2000
        assert len(asked[1]) > 50 and not asked[0] & asked[1]
        question, answer = instructions('heldout')[0]['messages']
        assert question['role'] == 'user' and answer['role'] == 'assistant' and answer['content']
        assert all(len(record['messages'][1]['content']) <= 600 for record in instructions('train'))

    def test_unknown_split(self):
        with pytest.raises(InputError, match='train, heldout'):
            standard_library('test')


class TestOpen:
    def test_stdlib(self):
        assert open_source({'type': 'stdlib'})[0]['licence'] == 'PSF-2.0'
        assert 'messages' in open_source({'type': 'stdlib_instructions', 'split': 'heldout'})[0]

    @pytest.mark.parametrize('kind', [dict, ConfigDict, FrozenConfigDict])
    def test_task(self, kind):
        text = open_source(kind({'type': 'task', 'name': 'arithmetic', 'operations': (1, 2)}))
        chat = open_source(kind({'type': 'task', 'name': 'arithmetic', 'operations': (1, 2), 'format': 'chat'}))
        question, answer = chat[5]['messages']
        assert text[5]['text'] == f'{question["content"]}\n{answer["content"]}'
        assert 'Answer:' in text[10**9]['text']
        answer = open_source(kind({'type': 'task', 'name': 'arithmetic', 'operations': (1, 2), 'format': 'completion'}))
        assert answer[5]['prompt'] + answer[5]['completion'] == text[5]['text']

    def test_a_task_may_have_few_problems(self):
        few, endless = (open_source({'type': 'task', 'name': 'arithmetic', 'records': n}) for n in (3, 0))
        assert [len(few), few.endless, endless.endless] == [3, False, True]
        assert [few[i] for i in range(3)] == [endless[i] for i in range(3)]
        for wrong in (-1, 1.5, True):
            with pytest.raises(InputError, match='^source task: records .*: expected 0'):
                open_source({'type': 'task', 'name': 'arithmetic', 'records': wrong})

    def test_proposals_are_answers(self):
        """What asks for a problem is answered by one of the training split."""
        pair = open_source({'type': 'task', 'name': 'letters', 'format': 'pair'})[5]
        assert pair['chosen'] != pair['rejected'] and sorted(pair['chosen']) == sorted(pair['rejected'])
        assert set(pair['chosen'].split()) < set(pair['prompt'].strip('.').split())
        source = open_source({'type': 'task', 'name': 'arithmetic', 'format': 'proposal'})
        asked, said = source[3]['messages']
        assert asked['content'] == source.task.invitation == source[4]['messages'][0]['content']
        assert source.task.parse(said['content']) == source.task.prompt(3)

    def test_critics_answer_the_questions_of_a_revision(self):
        source = open_source({'type': 'task', 'name': 'errands', 'format': 'revision', 'kind': 'harmful'})
        for index, template in ((4, REVISION_TEMPLATE), (5, CRITIQUE_TEMPLATE)):
            errand, (asked, said) = source.task.prompt(index), source[index]['messages']
            answer, critique, revision = source.task.criticism(errand)
            fields = {'principle': source.task.principle, 'prompt': errand.text, 'answer': answer}
            fields |= {'critique': critique} if index == 4 else {}
            assert asked['content'] == template.format(**fields) and said['content'] == (
                critique if index % 2 else revision
            )

    def test_repeats_show_each_string_and_ask_for_its_rest(self):
        source = open_source({'type': 'repeats', 'words': (2, 4), 'strings': 5})
        record = source[3]
        assert record == source[3] != source[4] and len(record['prompt']) == len(record['completion']) == 5
        for shown, rest in zip(record['prompt'], record['completion'], strict=True):
            *string, first = shown.split()
            assert 2 <= len(string) <= 4 and [first, *rest.split()] == string and not rest.endswith(' ')
        assert list(sample_texts([record]))[0].split()

    def test_texts_for_a_tokenizer(self, tmp_path, monkeypatch):
        write_lines(tmp_path / 'a.jsonl', [json.dumps({'prompt': 'a', 'completion': f'b{i}'}) for i in range(9)])
        source = open_source({'type': 'jsonl', 'path': str(tmp_path / 'a.jsonl')})
        texts = list(sample_texts(source))
        assert texts == list(sample_texts(source)) and sorted(texts) == [f'ab{i}' for i in range(9)] != texts
        monkeypatch.setattr('data.rows.CHARACTERS', 10)  # of texts of three characters
        assert list(sample_texts(source)) == texts[:4]
        monkeypatch.undo()
        with pytest.raises(InputError, match='record 0 has .*tokens.*expected words'):
            list(sample_texts([{'tokens': [1, 2]}]))
        chats = open_source({'type': 'task', 'name': 'arithmetic', 'format': 'chat'})
        texts = list(sample_texts(chats))
        first = Order('tokenizer', chats, 0)[0]
        assert len(texts) == PROBLEMS and texts[0] == '\n'.join(message['content'] for message in first['messages'])

    @pytest.mark.parametrize(
        ('spec', 'message'),
        [
            ({}, 'type None'),
            ({'type': 'jsnol'}, "did you mean 'jsonl'"),
            ({'type': 'jsonl'}, "'path' is missing"),
            ({'type': 'jsonl', 'path': '/none', 'feild': 'x'}, "no option 'feild'; did you mean 'field'"),
            ({'type': 'jsonl', 'path': '/none/*.jsonl'}, 'no such file'),
            (
                {'type': 'task', 'name': 'arithmetic', 'format': 'html'},
                "format 'html'",
            ),
            ({'type': 'task', 'name': 'sudoku', 'format': 'revision'}, "has criticism, not 'sudoku'"),
            ({'type': 'task', 'name': 'sudoku', 'format': 'pair'}, "pairs of answers, not 'sudoku'"),
            ({'type': 'task', 'name': 'sudoku', 'format': 'proposal'}, "takes proposals, not 'sudoku'"),
            ({'type': 'task', 'name': 'arithmetics'}, 'arithmetic'),
            ({'type': 'repeats', 'words': (5, 2)}, 'words .5, 2.: expected .least, most.'),
            ({'type': 'repeats', 'strings': 0}, 'strings 0: expected 1 or more'),
            ({'type': 'tfds'}, 'either name or path'),
            ({'type': 'tfds', 'path': '/none'}, 'no dataset_info.json'),
        ],
    )
    def test_bad_specs(self, spec, message):
        with pytest.raises(InputError, match=message):
            open_source(spec)


class TestJsonLines:
    @pytest.mark.parametrize('packed', [False, True])
    def test_reads_in_any_order(self, tmp_path, packed):
        # A line separator inside a string is no end of line; a blank line is no record.
        texts = [f'text {i}\u2028\r' for i in range(50)]
        lines = [json.dumps({'text': text, 'id': i}, ensure_ascii=False) for i, text in enumerate(texts)]
        suffix = '.jsonl.gz' if packed else '.jsonl'
        write_lines(tmp_path / f'a{suffix}', [*lines[:20], '', *lines[20:30], ''], packed)
        write_lines(tmp_path / f'b{suffix}', lines[30:], packed)
        source = open_source({'type': 'jsonl', 'path': str(tmp_path / f'*{suffix}')})
        assert len(source) == 50
        order = [i * 7 % 50 for i in range(2000)]
        with ThreadPoolExecutor(8) as pool:
            assert [record['text'] for record in pool.map(source.__getitem__, order)] == [texts[i] for i in order]

    @pytest.mark.parametrize(
        ('line', 'message'),
        [
            ('{"text": "x"', r'a.jsonl:3: expected a JSON object'),
            ('[1]', r'a.jsonl:3: expected an object, got list'),
            ('{"txet": "x"}', r'a.jsonl:3: expected text, messages.*it has txet'),
            ('{"text": 3}', r'a.jsonl:3: text: expected a string, got int'),
            ('{"prompt": "x"}', r'a.jsonl:3: expected text, messages'),
            ('{"messages": [{"role": "human", "content": "x"}]}', r"a.jsonl:3: messages\[0\]: role 'human'"),
        ],
    )
    def test_broken_line(self, tmp_path, line, message):
        path = write_lines(tmp_path / 'a.jsonl', ['{"text": "fine"}', '', line])
        with pytest.raises(InputError, match=message):
            open_source({'type': 'jsonl', 'path': path})

    def test_field(self, tmp_path):
        path = write_lines(tmp_path / 'a.jsonl', ['{"body": "b", "text": "t", "url": "u"}'])
        assert open_source({'type': 'jsonl', 'path': path, 'field': 'body'})[0] == {'text': 'b', 'url': 'u'}
        with pytest.raises(InputError, match=r"a.jsonl:1: no field 'story'; it has body, text, url"):
            open_source({'type': 'jsonl', 'path': path, 'field': 'story'})

    def test_truncated_gzip(self, tmp_path):
        path = tmp_path / 'a.jsonl.gz'
        path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
        with pytest.raises(InputError, match='a.jsonl.gz: cannot be read'):
            open_source({'type': 'jsonl', 'path': str(path)})

    def test_empty(self, tmp_path):
        with pytest.raises(InputError, match='no records'):
            open_source({'type': 'jsonl', 'path': write_lines(tmp_path / 'a.jsonl', [])})


def test_parquet(tmp_path):
    texts = [f'text {i}' for i in range(30)]
    parquet.write_table(pyarrow.table({'body': texts, 'n': range(30)}), tmp_path / 'a.parquet', row_group_size=7)
    source = open_source({'type': 'parquet', 'path': str(tmp_path / 'a.parquet'), 'field': 'body'})
    assert [source[i]['text'] for i in reversed(range(len(source)))] == texts[::-1]
    with pytest.raises(InputError, match='a.parquet: expected text, messages.*it has body, n'):
        open_source({'type': 'parquet', 'path': str(tmp_path / 'a.parquet')})
    (tmp_path / 'b.parquet').write_bytes(b'not this')
    with pytest.raises(InputError, match='b.parquet: not a Parquet file'):
        open_source({'type': 'parquet', 'path': str(tmp_path / 'b.parquet')})


def test_parquet_chats(tmp_path):
    messages = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]
    parquet.write_table(pyarrow.table({'messages': [messages] * 2}), tmp_path / 'a.parquet')
    assert open_source({'type': 'parquet', 'path': str(tmp_path / 'a.parquet')})[1] == {'messages': messages}


def test_text_folder(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'b.md').write_text('bé\r\n', newline='')
    (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'a'))
    (tmp_path / 'c.png').write_bytes(b'\xff')
    source = open_source({'type': 'text', 'path': str(tmp_path)})
    assert [source[i]['text'] for i in range(len(source))] == ['a', 'bé\r\n']
    (tmp_path / 'd.txt').write_bytes(b'\xff')
    with pytest.raises(InputError, match='d.txt: expected UTF-8'):
        open_source({'type': 'text', 'path': str(tmp_path)})
    with pytest.raises(InputError, match='no file that ends in'):
        (tmp_path / 'empty').mkdir()
        open_source({'type': 'text', 'path': str(tmp_path / 'empty')})


def test_tfds(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        'text': tfds.features.Text(),
        'messages': tfds.features.Sequence({'role': tfds.features.Text(), 'content': tfds.features.Text()}),
    }
    messages = [{'role': 'user', 'content': 'é'}, {'role': 'assistant', 'content': 'a'}]

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Five records."""

        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {'train': ((i, {'text': f'text {i}', 'messages': messages}) for i in range(5))}

        def _generate_examples(self):
            raise AssertionError('the generator is given')

    builder = Tiny(data_dir=str(tmp_path), file_format='array_record')
    builder.download_and_prepare()
    source = open_source({'type': 'tfds', 'path': str(builder.data_dir)})
    assert sorted(source[i]['text'] for i in range(len(source))) == [f'text {i}' for i in range(5)]
    assert source[3]['messages'] == messages
    assert len(open_source({'type': 'tfds', 'path': str(builder.data_dir), 'split': 'train[:2]'})) == 2
    with pytest.raises(InputError, match="train: record 0: no field 'body'; it has"):
        open_source({'type': 'tfds', 'path': str(builder.data_dir), 'field': 'body'})
    with pytest.raises(InputError, match='valid'):
        open_source({'type': 'tfds', 'path': str(builder.data_dir), 'split': 'valid'})


class TestEncodeRecord:
    def test_kinds(self):
        tokenizer = small_tokenizer()
        show = lambda ids: tokenizer.decode(ids, skip_control=False)  # noqa: E731
        for record, text, learnt in (
            ({'text': 'ab'}, '<|begin|>ab<|end|>', 'ab<|end|>'),
            ({'prompt': ['ab', 'ef'], 'completion': ['cd', 'g']}, '<|begin|>abcdefg<|end|>', 'cdg<|end|>'),
            ({'prompt': 'ab', 'completion': 'cd'}, '<|begin|>abcd<|end|>', 'cd<|end|>'),
            ({'messages': [{'role': 'assistant', 'content': 'x'}]}, '<|begin|><|assistant|>x<|end|>', 'x<|end|>'),
        ):
            tokens, weight = encode_record(record, tokenizer)
            assert tokens.dtype == 'int32' and weight.dtype == 'float32'
            assert show(tokens) == text and show(tokens[weight > 0]) == learnt
        tokens, weight = encode_record({'tokens': [5, 6, 7], 'loss_weight': [1, 0, 0.5]}, tokenizer)
        assert tokens.tolist() == [5, 6, 7] and weight.tolist() == [0, 0, 0.5]

    @pytest.mark.parametrize(
        ('record', 'message'),
        [
            ({'title': 'x'}, "has .'title'.: expected text"),
            ({'text': None}, 'text: expected a string'),
            ({'prompt': ['a', 'b'], 'completion': ['c']}, 'prompt: expected a string'),
            ({'tokens': []}, 'non-empty list'),
            ({'tokens': [1.5]}, 'non-empty list'),
            ({'tokens': [1, 400]}, 'expected ids from 0 to 399, got 1 to 400'),
            ({'tokens': [1, 2], 'loss_weight': [1]}, 'expected one per token'),
        ],
    )
    def test_bad_records(self, record, message):
        with pytest.raises(InputError, match=message):
            encode_record(record, small_tokenizer())


class TestNoisy:
    TEXT = {'type': 'stdlib', 'split': 'heldout', 'piece': 800}

    @pytest.mark.parametrize('kind', ['shuffled', 'random', 'repeated'])
    @pytest.mark.parametrize('share', [0.0, 0.25, 1.0])
    def test_so_large_a_share_of_words_is_spoilt(self, kind, share):
        clean, noisy = (open_source(spec) for spec in (self.TEXT, self.spec(kind, share)))
        words = changed = 0
        for index in range(20):
            old, new = clean[index], noisy[index]
            assert {**old, 'text': ''} == {**new, 'text': ''} and noisy[index] == new
            before, after = old['text'].split(), new['text'].split()
            assert len(before) == len(after)
            words, changed = words + len(before), changed + sum(a != b for a, b in zip(before, after, strict=True))
            if kind == 'shuffled':
                assert sorted(before) == sorted(after)
            elif kind == 'random':
                assert len(old['text']) == len(new['text'])
            elif share == 1:
                assert len(set(after)) == 1
        # Words may be put in the place of equal ones, above all where all of them are shuffled.
        assert 0.8 * share * words <= changed <= share * words + 20
        assert len(noisy) == len(clean)

    def test_sums_may_keep_their_form_alone(self):
        sums = {'type': 'task', 'name': 'arithmetic', 'format': 'text'}
        clean, noisy = open_source(sums), open_source({**self.spec('digits', 1.0), 'source': sums})
        right = 0
        for index in range(50):
            old, new = clean[index]['text'], noisy[index]['text']
            assert re.sub(r'\d', '0', old) == re.sub(r'\d', '0', new)
            right += old == new
        assert right < 5

    def test_bad_options_are_named(self):
        for kind, share, message in (('shufled', 1.0, 'did you mean'), ('random', 1.5, 'share 1.5: expected 0 to 1')):
            with pytest.raises(InputError, match=message):
                open_source(self.spec(kind, share))
        with pytest.raises(InputError, match='expected records with a text'):
            open_source({'type': 'noisy', 'source': {'type': 'task', 'name': 'arithmetic', 'format': 'chat'}})

    def spec(self, kind, share):
        return {'type': 'noisy', 'source': self.TEXT, 'kind': kind, 'share': share}


class TestRecast:
    TEXT = {'type': 'stdlib', 'piece': 300}
    SUMS = {'type': 'task', 'name': 'arithmetic', 'format': 'completion'}

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 500), st.floats(0, 1))
    def test_a_text_that_was_cut_can_be_put_together(self, index, rate):
        source = open_source(self.TEXT)
        whole, cut = source[index], FillInTheMiddle(source, rate)[index]
        text = cut['text']
        assert {**cut, 'text': ''} == {**whole, 'text': ''}
        if text.startswith(PREFIX + SUFFIX):
            suffix, rest = text.removeprefix(PREFIX + SUFFIX).split(MIDDLE)
            text = rest + suffix
        elif text.startswith(PREFIX):
            prefix, rest = text.removeprefix(PREFIX).split(SUFFIX)
            suffix, middle = rest.split(MIDDLE)
            text = prefix + middle + suffix
        assert text == whole['text']

    def test_as_many_are_cut_as_were_asked_for(self):
        for rate in (0.0, 0.3, 1.0):
            source = open_source({'type': 'fim', 'source': self.TEXT, 'rate': rate})
            texts = [source[index]['text'] for index in range(600)]
            cut = [text for text in texts if text.startswith(PREFIX)]
            assert len(cut) / len(texts) == pytest.approx(rate, abs=0.06)
            if cut:
                assert sum(t.startswith(PREFIX + SUFFIX) for t in cut) / len(cut) == pytest.approx(0.5, abs=0.12)
        assert source[7] == source[7]

    @settings(deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from(['one', 'all']))
    def test_a_long_problem_is_made_of_short_ones(self, index, ask):
        short = open_source(self.SUMS)
        long = open_source({'type': 'composed', 'source': self.SUMS, 'parts': (2, 5), 'ask': ask})
        record = long[index]
        assert record == long[index] and long.endless
        own = [short[5 * index + place] for place in range(5)]
        count = sum(one['prompt'].strip() in record['prompt'] for one in own)
        assert 2 <= count <= 5 and f'Number {count}:' in record['prompt']
        asked = re.search(r'\n\nSolve (all|number (\d))\.\n$', record['prompt'])
        if ask == 'one':
            assert record['completion'] == own[int(asked[2]) - 1]['completion']
        else:
            expected = [f'{i}: {one["completion"]}' for i, one in enumerate(own[:count], 1)]
            assert record['completion'] == '\n'.join(expected)

    def test_texts_are_repeated(self):
        texts = open_source(self.TEXT)
        long = open_source({'type': 'composed', 'source': self.TEXT, 'parts': (3, 3)})
        assert len(long) == len(texts) // 3 and not long.endless
        record = long[4]
        assert record['completion'] in [texts[i]['text'].strip() for i in (12, 13, 14)]
        assert record['prompt'].count(record['completion']) == 1

    @pytest.mark.parametrize(
        ('spec', 'said'),
        [
            ({'type': 'fim', 'rate': 1.5}, 'rate 1.5: expected 0 to 1'),
            ({'type': 'fim', 'source': SUMS}, 'expected records with a text'),
            ({'type': 'composed', 'parts': (1, 3)}, r'parts \(1, 3\): expected'),
            ({'type': 'composed', 'parts': (9, 3)}, r'parts \(9, 3\): expected'),
            ({'type': 'composed', 'ask': 'two'}, "ask 'two': expected 'one' or 'all'"),
            ({'type': 'composed', 'source': {**SUMS, 'format': 'chat'}}, 'expected records with a text, or with'),
            ({'type': 'composed', 'source': {**SUMS, 'records': 3}}, '3 records: expected at least parts = 8'),
        ],
    )
    def test_bad_settings_are_named(self, spec, said):
        with pytest.raises(InputError, match=f'^source {spec["type"]}: {said}'):
            open_source({'source': self.TEXT, **spec})
