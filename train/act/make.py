"""Stages that make records: recipes are applied to prompts block by block, so that a kill costs one block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.committee import Ballot, Cost, Messages, Tally, Vote, fold, metered, precision, report
from data.errors import InputError
from data.files import Record
from data.mixture import as_dict
from data.preferences import conversation
from data.prepare import prepare
from data.rewriting import text_of
from data.rows import Order
from data.sources import ENDLESS, Awaited, Source
from data.tasks import get_task
from train.act.members import Members
from train.act.recipes import Block, Made, Recipe
from train.checkpoint import read_json, write_json
from train.launch.progress import Progress
from train.measure.statistics import interval

RECORDS = 'records'

MAKE: dict[str, Any] = {  # fields of every kind that makes records
    'models': {'generator': ''},  # checkpoints by name; all whose name begins with 'generator' answer
    'endpoints': {},  # further members by name: arguments of `data.endpoint.Endpoint`
    'seed': -1,  # -1: the run's
    'task': {'name': ''},  # prompts are problems of its train split; or, where it has no name,
    'source': '',  # of each record of this source the conversation before the last answer, or what is rewritten of it
    'prompts': 64,
    'block': 16,  # prompts that are worked on, and lost by a kill, together
    'temperature': 1.0,
    'max_tokens': 256,
}


class Maker:
    """A recipe, its members and the prompts it works on.

    Attributes:
        blocks: how many there are.
        truth: the judge whose word counts as true, '' for none.
    """

    def __init__(self, config: Mapping[str, Any], recipe: Recipe, members: Members, source: Source | None, seed: int):
        """
        Args:
            config: of the stage (see MAKE).
            source: where prompts come from, unless a task poses them; in shuffled order.
            seed: decides, with the number of the block, every draw.

        Raises:
            InputError: settings that cannot work; the recipe is tried on no prompts at all.
        """
        self._config, self._recipe, self._members, self._seed = config, recipe, members, seed
        task = as_dict(config['task'])
        name = task.pop('name')
        if bool(name) == (source is not None):
            raise InputError('task.name and source: expected one of them, to have prompts from')
        for field in ('prompts', 'block'):
            if config[field] < 1:
                raise InputError(f'{field} is {config[field]}: expected 1 or more')
        self._task = get_task(name, split='train', **task) if name else None
        self._order = Order('prompts', source, seed) if source is not None else None
        if source is not None and not isinstance(source, Awaited) and len(source) < config['prompts']:
            raise InputError(f'prompts is {config["prompts"]}: source {config["source"]!r} has {len(source)} records')
        self.blocks = -(-config['prompts'] // config['block'])
        self.truth: str = config.get('truth', '')
        recipe(config, members, Block([], self._task, [], seed))
        members.no_others()

    def __call__(self, number: int) -> Made:
        """The records of a block, and what `data.committee.report` tells of. The same number, the same records."""
        first = number * self._config['block']
        block = self._block(range(first, min(first + self._config['block'], self._config['prompts'])))
        cost: Cost = {}
        with metered(cost, self._members.used):
            records, tally = self._recipe(self._config, self._members, block)
        for record in records:
            origin = record['provenance']
            origin |= {'key': block.problems[origin['prompt']].key} if block.problems else {}
            origin['prompt'] += first
        return records, tally._replace(cost=cost)

    def _block(self, numbers: range) -> Block:
        seed = fold(self._seed, numbers.start)
        if self._task is not None:
            problems = [self._task.prompt((self._seed + number) % ENDLESS) for number in numbers]
            return Block([[{'role': 'user', 'content': p.text}] for p in problems], self._task, problems, seed)
        assert self._order is not None
        prompts: list[Messages] = []
        for number in numbers:
            record = self._order[number]
            if 'template' in self._config:
                prompts.append([{'role': 'user', 'content': text_of(record)}])
                continue
            messages = conversation(record)
            while messages and messages[-1]['role'] == 'assistant':
                messages.pop()
            if not messages:
                index = self._order.index(number)
                raise InputError(f'source {self._config["source"]!r}, record {index}: expected a turn to be answered')
            prompts.append(messages)
        return Block(prompts, None, [], seed)


def write_records(maker: Maker, folder: Path, name: str) -> dict[str, Any]:
    """Makes what is not there yet, and tells of all of it.

    Each block is kept in `folder`/blocks as soon as it is done: its tally, then its records. A record that equals an
    earlier one but for its provenance is left out. In the end `folder`/records has all of them (see `data.prepare`),
    and `folder`/report.json what `data.committee.report` says, with the numbers of records and of duplicates and the
    yield, records for each answer. Gives that report, the records' fingerprint, and all members' tokens and FLOPs.

    Raises:
        InputError: no record is left.
    """
    blocks = folder / 'blocks'
    blocks.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    tallies: list[Tally] = []
    duplicates = 0
    with Progress(maker.blocks, name, unit='block') as progress:
        for number in range(maker.blocks):
            path = blocks / f'{number:06d}.jsonl'
            if not path.exists():
                records, tally = maker(number)
                kept = []
                for record in records:
                    if (key := digest(record)) not in seen:
                        seen.add(key)
                        kept.append(record)
                write_json(path.with_suffix('.json'), {'duplicates': len(records) - len(kept), 'tally': tally})
                temporary = path.with_suffix('.tmp')
                temporary.write_text(''.join(json.dumps(record) + '\n' for record in kept))
                temporary.replace(path)
            said = read_json(path.with_suffix('.json'))
            seen.update(digest(json.loads(line)) for line in path.read_text().splitlines())
            duplicates += said['duplicates']
            answers, cast, cost = said['tally']
            votes = [Ballot(g, Vote(*verdict), {j: Vote(*v) for j, v in given.items()}) for g, verdict, given in cast]
            tallies.append(Tally(answers, votes, cost))
            progress.update(number + 1, _total([cost], 'tokens'), records=len(seen))
    told = report(tallies)
    if maker.truth:
        ballots = [ballot for tally in tallies for ballot in tally.ballots]
        told['precision'] = precision(ballots, maker.truth, interval)
    costs = [tally.cost for tally in tallies]
    told |= {'records': len(seen), 'duplicates': duplicates, 'yield': len(seen) / told['answers']}
    write_json(folder / 'report.json', told)
    if not seen:
        raise InputError(f'{name}: none of {told["answers"]} answers became a record; {folder}/report.json says more')
    if not (folder / RECORDS).exists():
        prepare({'type': 'jsonl', 'path': str(blocks / '*.jsonl')}, folder / RECORDS)
    spent = {'tokens': _total(costs, 'tokens'), 'flops': _total(costs, 'flops')}
    return {**spent, 'report': told, 'fingerprint': read_json(folder / RECORDS / 'metadata.json')['fingerprint']}


def _total(costs: Sequence[Cost], ending: str) -> int:
    """Of all members what they spent under names that end so."""
    return sum(n for cost in costs for spent in cost.values() for name, n in spent.items() if name.endswith(ending))


def digest(record: Record) -> bytes:
    """Of a record, wherever it came from."""
    content = {name: x for name, x in record.items() if name != 'provenance'}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()
