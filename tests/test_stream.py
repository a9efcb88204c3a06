"""The row stream: exact resumption, process-count independence, proportions, and packing."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import FrozenConfigDict

from data.errors import InputError
from data.mixture import validate_mixture, weights_at
from data.rows import Order
from data.stream import Prefetch, RowStream, merged
from tests.text import small_tokenizer, token_records

ONE = ((0.0, {'a': 1.0}),)


def totals(state, field):
    """'consumed' tokens or 'skipped' records so far, by source."""
    rows = [row['sources'] for row in state['rows'].values()]
    return {name: sum(row[name][field] for row in rows) for name in rows[0]}


class Endless:
    """Records of one growing text each; never shuffled."""

    endless = True

    def __init__(self):
        self.read = []

    def __len__(self):
        return 2**31

    def __getitem__(self, index):
        self.read.append(index)
        return {'text': f'number {index} ' * (index % 5)}


def make(sources, mixture=ONE, *, rows=4, length=32, steps=10, seed=0, **options):
    return RowStream(
        sources, mixture, small_tokenizer(), rows=rows, sequence_length=length, steps=steps, seed=seed, **options
    )


def mixed(**options):
    """Short and long records of three kinds, one of them endless, with weights that change halfway."""
    sources = {
        'a': token_records([3, 50, 7, 100, 1, 20, 300]),
        'b': token_records([5] * 11, first=100),
        'c': Endless(),
    }
    mixture = ((0.0, {'a': 0.7, 'b': 0.3}), (0.5, {'b': 0.2, 'c': 0.8}))
    return make(sources, mixture, **options)


def take(stream, begin, end):
    return [stream.next(step) for step in range(begin, end)]


def same(left, right):
    for (batch, state), (other, other_state) in zip(left, right, strict=True):
        assert state == other_state
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
    return True


def segments_of(batch):
    """(tokens, positions, loss weights) of every segment, rows in order."""
    for row in range(len(batch['tokens'])):
        for number in range(1, batch['segments'][row].max() + 1):
            here = batch['segments'][row] == number
            yield tuple(batch[name][row][here] for name in ('tokens', 'positions', 'loss_weight'))


class TestBatch:
    def test_invariants(self):
        for batch, _ in take(mixed(), 0, 10):
            assert {name: array.dtype.name for name, array in batch.items()} == {
                'tokens': 'int32', 'positions': 'int32', 'segments': 'int32', 'loss_weight': 'float32'
            }  # fmt: skip
            assert all(array.shape == (4, 32) for array in batch.values())
            assert (batch['segments'] > 0).all()  # documents may be cut: no padding
            assert (np.diff(batch['segments'], axis=1) >= 0).all() and (batch['segments'][:, 0] == 1).all()
            for _, positions, weight in segments_of(batch):
                np.testing.assert_array_equal(positions, np.arange(len(positions)))
                assert weight[0] == 0 and (weight[1:] == 1).all()

    def test_long_documents_go_on_in_later_rows(self):
        tokens = list(range(100))
        stream = make({'a': [{'tokens': tokens}]}, rows=1)
        seen = np.concatenate([batch['tokens'][0] for batch, _ in take(stream, 0, 6)])
        np.testing.assert_array_equal(seen[:100], tokens)
        np.testing.assert_array_equal(seen[100:], tokens[:92])

    def test_a_process_needs_no_other_rows(self):
        whole = take(mixed(), 0, 10)
        parts = [take(mixed(rows_here=rows), 0, 10) for rows in (range(0, 1), range(1, 4))]
        for step, (batch, state) in enumerate(whole):
            for name, array in batch.items():
                np.testing.assert_array_equal(array, np.concatenate([part[step][0][name] for part in parts]))
            assert state['rows'] == parts[0][step][1]['rows'] | parts[1][step][1]['rows']


class TestResume:
    @settings(max_examples=25, deadline=None)
    @given(cut=st.integers(1, 9), seed=st.integers(0, 2**31), split=st.booleans(), data=st.data())
    def test_identical_from_any_step(self, cut, seed, split, data):
        lengths = st.lists(st.integers(1, 60), min_size=1, max_size=9)
        sources = {name: token_records(data.draw(lengths), first) for name, first in (('a', 0), ('b', 100))}
        sources['a'].append({'tokens': [1, 2]})  # something that fits
        sources['b'].append({'tokens': [1, 2]})
        mixture = ((0.0, {'a': 0.5, 'b': 0.5}), (0.4, {'b': 1.0}), (0.7, {'a': 0.9, 'b': 0.1}))
        options = {'seed': seed, 'split_documents': split, 'rows': 3, 'length': 24}
        whole = take(make(sources, mixture, **options), 0, 10)
        resumed = make(sources, mixture, **options)
        resumed.restore(json.loads(json.dumps(whole[cut - 1][1])))
        assert same(take(resumed, cut, 10), whole[cut:])

    def test_on_another_process_count(self):
        whole = take(mixed(), 0, 10)
        part = mixed(rows_here=range(2, 4))
        part.restore(whole[3][1])
        for step in range(4, 10):
            np.testing.assert_array_equal(part.next(step)[0]['tokens'], whole[step][0]['tokens'][2:])

    @pytest.mark.parametrize('processes', [1, 2, 4])
    def test_another_schedule_from_the_middle_on(self, processes):
        """What came before stays as it was, and what comes is the same for any number of processes."""
        sources = {'a': token_records([5] * 30), 'b': token_records([7] * 30, first=100)}
        now, then = ({'a': 0.9, 'b': 0.1}, {'a': 0.1, 'b': 0.9})
        parts = [range(4)[i::processes] for i in range(processes)]

        def streams(mixture):
            return [make(sources, mixture, rows_here=rows) for rows in parts]

        def joined(streams, begin, end):
            """Batches of all processes, rows in their order, and the merged states."""
            made = [take(stream, begin, end) for stream in streams]
            rows = np.argsort(np.concatenate(parts))
            return [
                (np.concatenate([batch['tokens'] for batch, _ in step])[rows], merged([state for _, state in step]))
                for step in zip(*made, strict=True)
            ]

        before = joined(streams(((0.0, now),)), 0, 10)
        changed = streams(((0.0, now), (0.5, then)))
        for stream in changed:
            stream.restore(before[4][1])
        after = joined(changed, 5, 10)
        whole = [(batch['tokens'], state) for batch, state in take(make(sources, ((0.0, now), (0.5, then))), 0, 10)]
        for (tokens, state), (expected, expected_state) in zip(before[:5] + after, whole, strict=True):
            np.testing.assert_array_equal(tokens, expected)
            assert state == expected_state
        assert any((tokens != old).any() for (tokens, _), (old, _) in zip(after, before[5:], strict=True))

    def test_shares_of_tokens_are_told(self):
        state = take(mixed(), 0, 10)[-1][1]
        taken = totals(state, 'consumed')
        assert state['metrics'] == {f'consumed/{name}': x / sum(taken.values()) for name, x in taken.items()}
        assert all(taken.values()) and 'metrics' not in take(make({'a': token_records([3, 50])}), 0, 1)[0][1]

    def test_states_do_not_change_behind_ones_back(self):
        stream = mixed()
        _, state = stream.next(0)
        kept = json.dumps(state)
        take(stream, 1, 5)
        assert json.dumps(state) == kept
        stream.restore(state)
        take(stream, 1, 5)
        assert json.dumps(state) == kept

    def test_in_another_process(self):
        code = (
            'import json; from tests.test_stream import mixed, take;'
            'print(json.dumps([[b["tokens"].tolist(), s] for b, s in take(mixed(), 0, 10)]))'
        )
        out = subprocess.run(
            [sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': '3'}, capture_output=True, check=True
        )
        assert json.loads(out.stdout) == [[batch['tokens'].tolist(), state] for batch, state in take(mixed(), 0, 10)]

    def test_state_stays_small(self):
        stream = make({'a': [{'tokens': [1] * 100_000}]})
        assert len(json.dumps(take(stream, 0, 5)[-1][1])) < 1000

    def test_mismatches(self):
        _, state = mixed().next(0)
        with pytest.raises(InputError, match='made with rows=4, now rows=8'):
            mixed(rows=8).restore(state)
        with pytest.raises(InputError, match='made with sources a, b, c; now they are a'):
            make({'a': token_records([3])}).restore(state)
        with pytest.raises(InputError, match='no row 3'):
            mixed().restore({**state, 'rows': {key: state['rows'][key] for key in '012'}})
        with pytest.raises(ValueError, match='asked for step 5, but step 0'):
            mixed().next(5)


class TestOrder:
    def test_every_epoch_has_every_record_once_in_another_order(self):
        order = Order('a', range(1000), seed=3)
        epochs = [[order.index(epoch * 1000 + i) for i in range(1000)] for epoch in range(3)]
        assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != [Order('b', range(1000), seed=3).index(i) for i in range(1000)]
        assert epochs[0] != [Order('a', range(1000), seed=4).index(i) for i in range(1000)]

    @pytest.mark.parametrize('size', [1, 2, 3, 2**16 + 1])
    def test_exact_at_awkward_sizes(self, size):
        order = Order('a', range(size), seed=0)
        assert sorted(order.index(i) for i in range(size)) == list(range(size))

    def test_sources_of_billions(self):
        order = Order('a', range(3 * 10**9), seed=0)
        seen = [order.index(i) for i in range(2000)]
        assert len(set(seen)) == 2000 and 0 <= min(seen) < 10**7 and 2.9 * 10**9 < max(seen) < 3 * 10**9

    def test_rows_own_disjoint_records(self):
        stream = make({'a': token_records([32] * 40)})
        seen = np.concatenate([batch['tokens'][:, 0] for batch, _ in take(stream, 0, 10)])
        assert sorted(seen) == list(range(40))

    def test_endless_sources_never_repeat_and_differ_by_seed(self):
        reads = []
        for seed in (0, 1):
            source = Endless()
            take(make({'a': source}, seed=seed), 0, 10)
            assert len(set(source.read)) == len(source.read)  # each tokenised once, too
            reads.append(set(source.read))
        assert not reads[0] & reads[1]


class TestMixture:
    def test_proportions_by_tokens(self):
        sources = {'a': token_records([1000, 20]), 'b': token_records([7] * 5, 100), 'c': token_records([90] * 3, 200)}
        mixture = ((0.0, {'a': 2.0, 'b': 1.0, 'c': 1.0}), (0.5, {'a': 1.0, 'c': 3.0}))
        stream = make(sources, mixture, rows=8, length=64, steps=40)
        states = [state for _, state in take(stream, 0, 40)]
        half, whole = totals(states[19], 'consumed'), totals(states[39], 'consumed')
        total = 20 * 8 * 64
        np.testing.assert_allclose([half[name] / total for name in 'abc'], [0.5, 0.25, 0.25], atol=0.03)
        second = [(whole[name] - half[name]) / total for name in 'abc']
        np.testing.assert_allclose(second, [0.25, 0, 0.75], atol=0.03)

    def test_rows_do_not_move_in_step(self):
        sources = {'a': token_records([64] * 9), 'b': token_records([64] * 9, 100)}
        stream = make(sources, ((0.0, {'a': 0.5, 'b': 0.5}),), rows=16, length=64, steps=50)
        shares = [(batch['tokens'][:, 0] < 100).mean() for batch, _ in take(stream, 0, 50)]
        assert np.std(shares) < 0.2 and 0.2 < shares[0] < 0.8

    @given(st.floats(0, 2))
    def test_weights_at(self, fraction):
        mixture = ((0.0, {'a': 3, 'b': 1}), (0.25, {'b': 0.5, 'a': 0}))
        assert weights_at(mixture, fraction) == ({'a': 0.75, 'b': 0.25} if fraction < 0.25 else {'b': 1.0})

    def test_config_dicts_are_mappings(self):
        mixture = ((0.0, FrozenConfigDict({'a': 1.0, 'b': 3.0})),)
        validate_mixture(mixture, ['a', 'b'])
        assert weights_at(mixture, 0.5) == {'a': 0.25, 'b': 0.75}

    @pytest.mark.parametrize(
        ('mixture', 'message'),
        [
            ((), 'expected ..start_fraction'),
            ({'a': 1.0}, 'expected ..start_fraction'),
            (((0.0, 'a'),), r'mixture\[0\]: expected .start_fraction'),
            (((0.1, {'a': 1.0}),), r'mixture\[0\]: the first entry must start at 0'),
            (((0.0, {'a': 1.0}), (1.5, {'a': 1.0})), r'mixture\[1\]: expected a start fraction'),
            (((0.0, {'a': 1.0}), (0.5, {'a': 1.0}), (0.4, {'a': 1.0})), r'mixture\[2\]: start fractions must rise'),
            (((0.0, {'alpha': 1.0}),), "no source 'alpha'"),
            (((0.0, {'a': -1.0}),), "weight of 'a': expected a number of at least 0, got -1.0"),
            (((0.0, {'a': float('nan')}),), "weight of 'a'"),
            (((0.0, {'a': '1'}),), "weight of 'a'"),
            (((0.0, {'a': 0.0}),), 'a source of positive weight'),
        ],
    )
    def test_bad_mixtures(self, mixture, message):
        with pytest.raises(InputError, match=message):
            make({'a': token_records([3])}, mixture)

    def test_empty_source(self):
        with pytest.raises(InputError, match="source 'a': no records"):
            make({'a': []})


class TestUncut:
    def test_records_stay_whole(self):
        lengths = [3, 9, 31, 32, 33, 12, 70, 5, 5, 20]
        stream = make({'a': token_records(lengths)}, split_documents=False, rows=2, steps=30)
        batches = take(stream, 0, 30)
        seen = set()
        for batch, _ in batches:
            for tokens, _, _ in segments_of(batch):
                assert len(tokens) == lengths[tokens[0]]
                seen.add(int(tokens[0]))
            padding = batch['segments'] == 0
            assert (batch['tokens'][padding] == small_tokenizer().pad_id).all()
            assert not batch['loss_weight'][padding].any()
        assert seen == {i for i, length in enumerate(lengths) if length <= 32}
        assert totals(batches[-1][1], 'skipped')['a'] > 0

    def test_nothing_is_lost_between_rows(self):
        stream = make({'a': token_records([20] * 12)}, split_documents=False, rows=2, steps=6)
        seen = [int(tokens[0]) for batch, _ in take(stream, 0, 6) for tokens, _, _ in segments_of(batch)]
        assert sorted(seen) == list(range(12))

    def test_nothing_fits(self):
        with pytest.raises(InputError, match="source 'a': 1000 records on end are longer than sequence_length=32"):
            make({'a': token_records([33])}, split_documents=False).next(0)


def test_bad_record_is_named():
    stream = make({'a': [{'text': 'x'}, {'txet': 'y'}]})
    with pytest.raises(InputError, match="source 'a', record 1: record has .'txet'"):
        stream.next(0)


class TestPrefetch:
    def test_same_batches(self):
        assert same(take(Prefetch(mixed()), 0, 10), take(mixed(), 0, 10))

    def test_restore_drops_what_was_made_ahead(self):
        whole = take(mixed(), 0, 10)
        stream = Prefetch(mixed(), depth=3)
        take(stream, 0, 6)
        stream.restore(whole[1][1])
        assert same(take(stream, 2, 10), whole[2:])
        stream.close()

    def test_it_works_ahead_in_a_thread(self):
        calls = []

        class Recorder:
            rows = range(1)

            def next(self, step, variables=None):
                calls.append((step, threading.current_thread().name))
                return {}, {'step': step}

        stream = Prefetch(Recorder(), depth=2)
        assert not calls
        stream.next(0)
        deadline = time.monotonic() + 5
        while len(calls) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert calls[:4] == [(step, 'prefetch') for step in range(4)]
        stream.close()

    def test_errors_surface_where_they_belong(self):
        class Failing:
            rows = range(1)

            def next(self, step, variables=None):
                if step == 2:
                    raise InputError('record 7 is broken')
                return {}, {'step': step}

        stream = Prefetch(Failing())
        assert [stream.next(step)[1]['step'] for step in range(2)] == [0, 1]
        with pytest.raises(InputError, match='record 7'):
            stream.next(2)

    def test_steps_in_order(self):
        stream = Prefetch(mixed())
        stream.next(0)
        with pytest.raises(ValueError, match='asked for step 3, but step 1'):
            stream.next(3)
        stream.close()

    def test_exit_is_clean_while_the_thread_works(self):
        code = (
            'from data.stream import Prefetch; from tests.test_stream import make, token_records;'
            'Prefetch(make({"a": [{"text": "word " * 50_000}]}, length=100), depth=10_000).next(0)'
        )
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
        assert out.returncode == 0 and not out.stderr
