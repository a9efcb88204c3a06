"""Recipes: what becomes of a block of prompts in a stage that makes records. All of it is functions of text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from data import committee
from data.committee import (
    Ballot,
    Judge,
    Messages,
    Pair,
    Rule,
    Tally,
    Vote,
    by_questions,
    by_score,
    fold,
    question,
    transcript,
)
from data.constitution import label, read_principles, revise
from data.errors import InputError, did_you_mean
from data.files import Record
from data.mixture import as_dict
from data.rewriting import INTO, template_of
from data.tasks import Prompt, Task
from train.act.members import CheckpointMember, Members, chosen, likelihood_judge, reward_judge


class Block(NamedTuple):
    """Prompts that are worked on together, with the task and its problems if it posed them, and a seed of their own."""

    prompts: list[Messages]
    task: Task | None
    problems: list[Prompt]
    seed: int


Made = tuple[list[Record], Tally]  # the tally's cost is empty: who runs the recipe knows what members spend
Recipe = Callable[[Mapping[str, Any], Members, Block], Made]  # the stage's config, members, prompts -> records


def _verifier(use: Any, block: Block) -> Judge:
    if block.task is None:
        raise InputError('verifier: expected a task, whose verifier it is')
    return committee.verifier_judge(block.task, block.problems)


def _checkpoint(member: Any) -> CheckpointMember:
    if not isinstance(member, CheckpointMember):
        raise InputError('judges: an endpoint gives whole answers no likelihood or reward: expected a checkpoint')
    return member


# Judges by the type in their spec, made of (member by name and how it samples, block, options): of answers, and of
# pairs. Of pairs 'prompt' counts the letters in replies and 'letters' reads their probabilities; the others compare
# the scores of both.
JUDGES: dict[str, Callable[..., Judge]] = {
    'verifier': _verifier,
    'prompt': lambda use, _, model, samples=1, temperature=1.0, max_tokens=256, template=committee.VERDICT_TEMPLATE: (
        committee.PromptJudge(use(model, temperature, max_tokens), template, samples)
    ),
    'likelihood': lambda use, _, model, threshold: likelihood_judge(_checkpoint(use(model)), threshold),
    'reward': lambda use, _, model, threshold=0.0: reward_judge(_checkpoint(use(model)), threshold),
}
QUESTIONS: dict[str, Callable[..., committee.Ask]] = {
    'prompt': lambda use, _, model, samples=1, temperature=1.0, max_tokens=256: committee.voted(
        use(model, temperature, max_tokens), samples
    ),
    'letters': lambda use, _, model: committee.scored(use(model).logprobs),
}
RULES: dict[str, Callable[[Mapping[str, Any]], Rule]] = {
    'majority': lambda c: committee.majority(c['quorum']),
    'unanimous': lambda c: committee.unanimous(c['quorum']),
    'weighted': lambda c: committee.weighted(as_dict(c['weights']), c['quorum']),
}
# Of a chat that ends with an answer: a form of `data.packing.encode_record`.
FORMATS: dict[str, Callable[[Messages], Record]] = {
    'chat': lambda m: {'messages': m},
    'completion': lambda m: {'prompt': f'{transcript(m[:-1])}\n', 'completion': m[-1]['content']},
    'text': lambda m: {'text': f'{transcript(m[:-1])}\n{m[-1]["content"]}'},
}


def _judges(c: Mapping[str, Any], members: Members, block: Block, table: Mapping[str, Any]) -> dict[str, Any]:
    if not c['judges']:
        raise InputError("judges is empty: expected some, by name, such as {'verifier': {'type': 'verifier'}}")
    uses = {name: functools.partial(members.member, f'judge {name}') for name in c['judges']}
    return {name: chosen(table, c['judges'][name], f'judges.{name}', use, block) for name, use in uses.items()}


def attempts(c: Mapping[str, Any], members: Members, block: Block) -> Made:
    """Answers that the judges accept (rejection sampling): all of them, or of each prompt the best one."""
    for field, known in (('select', ('all', 'best')), ('format', FORMATS), ('rule', RULES)):
        if c[field] not in known:
            raise InputError(f'{field} is {c[field]!r}{did_you_mean(c[field], known)}')
    judges, decide = _judges(c, members, block, JUDGES), RULES[c['rule']](c)
    if c['truth'] and c['truth'] not in judges:
        raise InputError(f'truth is {c["truth"]!r}{did_you_mean(c["truth"], judges)}')

    def rule(votes: Mapping[str, Vote]) -> Vote:
        return decide({name: vote for name, vote in votes.items() if name != c['truth']})

    rule(dict.fromkeys(judges, Vote(True)))  # where one has no weight, that shows now
    records, tally = committee.filtered(block.prompts, members.generators(), judges, rule, c['samples'], block.seed)
    kept = best(records) if c['select'] == 'best' else records
    form = FORMATS[c['format']]
    return [{**form(record['messages']), 'provenance': record['provenance']} for record in kept], tally


def rewrites(c: Mapping[str, Any], members: Members, block: Block) -> Made:
    """Texts made into others (see `data.rewriting`), of which the judges accept some; without judges, all."""
    if c['into'] not in INTO:
        raise InputError(f'into is {c["into"]!r}{did_you_mean(c["into"], INTO)}')
    template, (item, form) = template_of(c['template']), INTO[c['into']]
    judges = _judges(c, members, block, JUDGES) if c['judges'] else {}
    texts = [transcript(prompt) for prompt in block.prompts]
    asked = [question(template, text=text) for text in texts]
    records, tally = committee.filtered(
        asked,
        members.generators(),
        judges,
        committee.unanimous() if judges else lambda votes: Vote(True),
        c['samples'],
        block.seed,
        item=lambda i, reply: item(asked[i], texts[i], reply),
    )
    return [{**form(record['messages']), 'provenance': record['provenance']} for record in records], tally


def best(records: Sequence[Record]) -> list[Record]:
    """Of each prompt the record with the highest score; of equals the one that judges give more on average, or the
    first."""
    kept: dict[int, tuple[tuple[float, float], Record]] = {}
    for record in records:
        origin = record['provenance']
        given = [score for accept, score in origin['votes'].values() if accept is not None]
        rank = (origin['score'], sum(given) / max(len(given), 1))
        if origin['prompt'] not in kept or rank > kept[origin['prompt']][0]:
            kept[origin['prompt']] = rank, record
    return [record for _, record in kept.values()]


def revisions(c: Mapping[str, Any], members: Members, block: Block) -> Made:
    """Each generator's answers, criticised and revised by itself (see `data.constitution.revise`). Every answer becomes
    a record; what the report calls accepted are those that were changed."""
    principles, records, ballots = read_principles(c['principles']), [], []
    generators = members.generators()
    for name, generator in generators.items():
        for record in revise(block.prompts, generator, principles, c['rounds'], fold(block.seed, name)):
            record['provenance']['generator'] = name
            changed = record['messages'][-1]['content'] != record['provenance']['first']
            records.append(record)
            ballots.append(Ballot(name, Vote(changed, float(changed)), {}))
    return records, Tally(dict.fromkeys(generators, len(block.prompts)), ballots, {})


def labels(c: Mapping[str, Any], members: Members, block: Block) -> Made:
    """Pairs of different answers to a prompt, with the probability that the chosen one is better (see
    `data.constitution.label`). What the report calls accepted are answers that were preferred."""
    principles = read_principles(c['principles']) if c['principles'] else [committee.CRITERION]
    made = _judges(c, members, block, JUDGES | QUESTIONS)
    judges = {
        name: (by_questions if c['judges'][name]['type'] in QUESTIONS else by_score)(judge)
        for name, judge in made.items()
    }
    generators = members.generators()
    found: list[dict[str, tuple[str, int]]] = [{} for _ in block.prompts]
    for name, generator in generators.items():
        for i, answers in enumerate(generator(block.prompts, c['samples'], fold(block.seed, 'generator', name))):
            found[i] |= {answer: (name, k) for k, answer in enumerate(answers) if answer and answer not in found[i]}
    pairs: list[Pair] = []
    origins: list[dict[str, Any]] = []
    for i, some in enumerate(found):
        answers = list(some)
        for one, other in zip(answers[::2], answers[1::2], strict=False):
            pairs.append((block.prompts[i], one, other))
            origins.append({'prompt': i, 'answers': [some[one], some[other]]})
    records = label(pairs, judges, principles, block.seed)
    said: list[dict[str, float | None]] = [dict.fromkeys(['', *judges]) for _ in pairs]  # '': all of them together
    for record in records:
        number = record['provenance'].pop('pair')
        p = record['probability'] if record['chosen'] == pairs[number][1] else 1 - record['probability']
        said[number] = {'': p, **record['provenance']['votes']}
        record['provenance'] |= origins[number]
    ballots = []
    for votes, origin in zip(said, origins, strict=True):
        for second, (name, _) in enumerate(origin['answers']):
            cast = {judge: _vote(p, bool(second)) for judge, p in votes.items()}
            ballots.append(Ballot(name, cast.pop(''), cast))
    return records, Tally(dict.fromkeys(generators, len(block.prompts) * c['samples']), ballots, {})


def _vote(p: float | None, second: bool) -> Vote:
    """On one of two answers, of which the first is the better one with probability p."""
    if p is None or p == 0.5:
        return Vote(None)
    return Vote((p > 0.5) != second, 1 - p if second else p)
