"""Committees: several generators write, several judges vote, and what the vote accepts becomes records.

All of it is functions of text. `data.endpoint` makes generators and scorers of HTTP endpoints, `train.act.members` of
checkpoints. A member may have an attribute `usage`, counters of what it cost; reports say how they grew.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data.chat import Message
from data.errors import InputError, did_you_mean
from data.files import Record
from data.tasks import Prompt, Task

Messages = Sequence[Message]
Cost = dict[str, dict[str, int]]
Pair = tuple[Messages, str, str]  # a prompt and two answers

# (prompts, n, seed) -> n answers to each prompt. An answer that did not end by itself is ''.
Generator = Callable[[Sequence[Messages], int, int], list[list[str]]]
# (prompts, options) -> the log-probability of each option as the answer to each prompt.
Scorer = Callable[[Sequence[Messages], Sequence[str]], list[list[float]]]

VERDICT_TEMPLATE = """Decide whether the answer below is good enough to learn from: right, complete and to the point.
<conversation>{prompt}</conversation>
<answer>{answer}</answer>
Give your reasons in a few sentences. Then end with one line, either "Verdict: ACCEPT" or "Verdict: REJECT"."""

PREFERENCE_TEMPLATE = """Of two ways to go on with a conversation, choose one by this measure alone: {criterion}
<conversation>{prompt}</conversation>
<answer A>{first}</answer A>
<answer B>{second}</answer B>
Which is better by that measure? Reply with the letter A or B and nothing else."""

CRITERION = 'which answer serves the user better, being right, complete and to the point.'


class Item(NamedTuple):
    prompt: Messages
    answer: str


class Vote(NamedTuple):
    """`accept` is None for an abstention; `score` in [0, 1] says how good the answer seems."""

    accept: bool | None
    score: float = 0.5


class Ballot(NamedTuple):
    """What a committee made of one answer: `votes` by name of the judge."""

    generator: str
    verdict: Vote
    votes: Mapping[str, Vote]


class Tally(NamedTuple):
    """What `report` counts: answers asked of each generator, ballots on finished ones, and what each member cost."""

    answers: Mapping[str, int]
    ballots: list[Ballot]
    cost: Cost


Interval = Callable[[np.ndarray], tuple[float, float]]  # of a mean, as `train.measure.statistics.interval`
Judge = Callable[[Sequence[Item], int], list[Vote]]  # (items, seed) -> a vote on each
Rule = Callable[[Mapping[str, Vote]], Vote]  # the votes on one item by name of the judge -> that of the committee
Ask = Callable[
    [Sequence[Messages], int], list[float | None]
]  # questions 'A or B?' -> the probability of A; None: no say
# (pairs, seed, criteria) -> the probability that the first answer of each pair is the better one; None: no say.
Compare = Callable[[Sequence[Pair], int, Sequence[str]], list[float | None]]


def fold(*parts: Any) -> int:
    """A seed of 31 bits that depends on all the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), 'big') >> 1


def fill(template: str, **fields: str) -> str:
    """A template with its {fields} filled in; braces within them stay. Raises InputError if one is missing."""
    for name in fields:
        if f'{{{name}}}' not in template:
            raise InputError(f'prompt template {template[:40]!r}: expected the field {{{name}}} in it')
    try:
        return template.format_map(fields)
    except (LookupError, ValueError, AttributeError) as error:
        raise InputError(f'prompt template {template[:40]!r}: {error}: expected {", ".join(fields)}') from error


def transcript(messages: Messages) -> str:
    """A conversation as text: what the user says if that is all there is, else turns after their roles."""
    if len(messages) == 1 and messages[0]['role'] == 'user':
        return str(messages[0]['content'])
    return '\n\n'.join(f'{message["role"]}: {message["content"]}' for message in messages)


def question(template: str, **fields: str) -> Messages:
    return [{'role': 'user', 'content': fill(template, **fields)}]


def last_line(text: str) -> str:
    return text.rstrip().rpartition('\n')[2].strip()


@dataclass(frozen=True)
class PromptJudge:
    """A judge that asks a generator `samples` times; a reply whose last line is no verdict, to the letter, abstains."""

    generator: Generator
    template: str = VERDICT_TEMPLATE
    samples: int = 1

    @property
    def usage(self) -> Mapping[str, int]:
        return getattr(self.generator, 'usage', {})

    def __call__(self, items: Sequence[Item], seed: int) -> list[Vote]:
        prompts = [question(self.template, prompt=transcript(item.prompt), answer=item.answer) for item in items]
        votes = []
        for replies in self.generator(prompts, self.samples, seed):
            said = Counter(map(last_line, replies))
            yes, no = said['Verdict: ACCEPT'], said['Verdict: REJECT']
            votes.append(Vote(yes > no, yes / (yes + no)) if yes != no else Vote(None))
        return votes


def verifier_judge(task: Task, problems: Iterable[Prompt]) -> Judge:
    """The vote of a task's verifier, which accepts what earns the full score; it abstains on prompts it does not know.

    `problems` are found by their text in the last message of the prompt.
    """
    known = {problem.text: problem for problem in problems}

    def judge(items: Sequence[Item], seed: int) -> list[Vote]:
        found = [known.get(item.prompt[-1]['content']) for item in items]
        scores = [
            task.verify(problem, item.answer).score if problem else None
            for item, problem in zip(items, found, strict=True)
        ]
        return [Vote(None) if score is None else Vote(score >= 1.0, score) for score in scores]

    return judge


def majority(quorum: int = 1) -> Rule:
    """Accepts what more than half of the judges who do not abstain accept; abstains below `quorum` of them."""
    return _rule(lambda cast: Vote(_mean(cast) > 0.5, _mean(cast)), quorum)


def unanimous(quorum: int = 1) -> Rule:
    """Accepts what all judges who do not abstain accept; abstains below `quorum` of them."""
    return _rule(lambda cast: Vote(all(cast.values()), _mean(cast)), quorum)


def _mean(cast: Mapping[str, bool]) -> float:
    return sum(cast.values()) / len(cast)


def weighted(weights: Mapping[str, float], quorum: int = 1) -> Rule:
    """Accepts where the weights of those for it are more than of those against; score: the logistic of the difference.

    With weights of `log_odds` no rule errs less often, if judges err independently, good and bad items alike, and half
    the items are good (Nitzan & Paroush 1982); the score is then the probability that the item is good.
    """

    def decide(cast: Mapping[str, bool]) -> Vote:
        for name in cast:
            if name not in weights:
                raise InputError(f'weights: none for judge {name!r}{did_you_mean(name, weights)}')
        margin = math.fsum(weights[name] * (1 if accept else -1) for name, accept in cast.items())
        return Vote(margin > 0, 0.5 + math.tanh(margin / 2) / 2)

    return _rule(decide, quorum)


def _rule(decide: Callable[[Mapping[str, bool]], Vote], quorum: int) -> Rule:
    if quorum < 1:
        raise InputError(f'quorum is {quorum}: expected 1 or more')

    def rule(votes: Mapping[str, Vote]) -> Vote:
        cast = {name: vote.accept for name, vote in votes.items() if vote.accept is not None}
        return decide(cast) if len(cast) >= quorum else Vote(None)

    return rule


def log_odds(votes: Mapping[str, Sequence[Vote]], labels: Sequence[bool]) -> dict[str, float]:
    """Weights log(p / (1 - p)) of judges, p being their accuracy on labelled items (Nitzan & Paroush 1982).

    p = (right + 1/2) / (cast + 1), so that a judge who was never wrong has no infinite weight, and one who never voted
    has none. One who is wrong more often than right has a negative weight: his votes count against themselves.
    """
    weights = {}
    for name, given in votes.items():
        hits = [vote.accept == label for vote, label in zip(given, labels, strict=True) if vote.accept is not None]
        weights[name] = math.log((sum(hits) + 0.5) / (len(hits) - sum(hits) + 0.5))
    return weights


def agreement(votes: Mapping[str, Sequence[Vote]]) -> dict[str, Any]:
    """How far judges agree: for each pair the share of equal votes among items both voted on, and Krippendorff's alpha.

    alpha = 1 - observed / expected disagreement, for nominal values and with abstentions as missing values
    (Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C). Values that are not defined are None.
    """
    pairs: dict[str, float | None] = {}
    for one, other in itertools.combinations(votes, 2):
        both = [(a.accept, b.accept) for a, b in zip(votes[one], votes[other], strict=True) if None not in (a[0], b[0])]
        pairs[f'{one}, {other}'] = sum(a == b for a, b in both) / len(both) if both else None
    observed, totals = 0.0, Counter[bool]()
    for item in zip(*votes.values(), strict=True):
        counts = Counter(vote.accept for vote in item if vote.accept is not None)
        if counts.total() > 1:
            observed += counts[True] * counts[False] / (counts.total() - 1)
            totals.update(counts)
    expected = totals[True] * totals[False] / (totals.total() - 1) if totals.total() else 0.0
    return {'pairs': pairs, 'alpha': 1 - observed / expected if expected else None}


def filtered(
    prompts: Sequence[Messages],
    generators: Mapping[str, Generator],
    judges: Mapping[str, Judge],
    rule: Rule,
    n: int = 1,
    seed: int = 0,
    item: Callable[[int, str], Item] | None = None,
) -> tuple[list[Record], Tally]:
    """n answers to each prompt from each generator, the accepted ones as chats, and what `report` tells of.

    `item` makes of the number of a prompt and an answer what is judged and kept, where that is not these two.

    Records have `provenance`: number of the prompt, generator, sample, seed, all votes and the committee's score. The
    same seed and members that keep their word give the same records. Nobody judges unfinished answers.
    """
    cost: Cost = {}
    items: list[Item] = []
    origins: list[dict[str, Any]] = []
    for name, generator in generators.items():
        with metered(cost, {f'generator {name}': generator}):
            answers = generator(prompts, n, fold(seed, 'generator', name))
        for i, k in itertools.product(range(len(prompts)), range(n)):
            if answers[i][k]:
                items.append(item(i, answers[i][k]) if item else Item(prompts[i], answers[i][k]))
                origins.append({'prompt': i, 'generator': name, 'sample': k, 'seed': seed})
    votes: dict[str, list[Vote]] = {}
    for name, judge in judges.items():
        with metered(cost, {f'judge {name}': judge}):
            votes[name] = judge(items, fold(seed, 'judge', name))
    records, ballots = [], []
    for shown, origin, *given in zip(items, origins, *votes.values(), strict=True):
        ballot = dict(zip(votes, given, strict=True))
        verdict = rule(ballot)
        ballots.append(Ballot(origin['generator'], verdict, ballot))
        if verdict.accept:
            cast = {name: list(vote) for name, vote in ballot.items()}
            messages = [*shown.prompt, {'role': 'assistant', 'content': shown.answer}]
            records.append({'messages': messages, 'provenance': {**origin, 'votes': cast, 'score': verdict.score}})
    return records, Tally(dict.fromkeys(generators, len(prompts) * n), ballots, cost)


def report(tallies: Sequence[Tally]) -> dict[str, Any]:
    """The numbers of answers and of unfinished ones; the `rates` of the committee, of what it said to each generator,
    and of each judge; how far judges agree; and what each member cost."""
    ballots = [ballot for tally in tallies for ballot in tally.ballots]
    answers = sum(sum(tally.answers.values()) for tally in tallies)
    by: dict[str, list[Vote]] = {name: [] for tally in tallies for name in tally.answers}
    votes: dict[str, list[Vote]] = {}
    for generator, verdict, ballot in ballots:
        by[generator].append(verdict)
        for name, vote in ballot.items():
            votes.setdefault(name, []).append(vote)
    cost: dict[str, Counter[str]] = {}
    for name, spent in itertools.chain.from_iterable(tally.cost.items() for tally in tallies):
        cost.setdefault(name, Counter()).update(spent)
    return {
        'answers': answers,
        'unfinished': answers - len(ballots),
        'committee': rates([ballot.verdict for ballot in ballots]),
        'generators': {name: rates(given) for name, given in by.items()},
        'judges': {name: rates(given) for name, given in votes.items()},
        'agreement': agreement(votes),
        'cost': {name: dict(spent) for name, spent in cost.items()},
    }


def precision(ballots: Sequence[Ballot], truth: str, interval: Interval) -> dict[str, Any]:
    """What the vote is worth beside single judges: of the answers that the committee accepts the share that the judge
    `truth` accepts, and that share of as many answers that each other judge scores highest.

    Returns {accepted: their number, committee: share, judges: {name: {share, gain, low, high}}}; `gain` is how much
    larger the committee's share is, with its `interval` over answers. Answers on which `truth` abstains are left out.
    """
    known = [ballot for ballot in ballots if ballot.votes[truth].accept is not None]
    right = np.array([bool(ballot.votes[truth].accept) for ballot in known])
    kept = np.array([bool(ballot.verdict.accept) for ballot in known])
    count = int(kept.sum())
    told: dict[str, Any] = {'accepted': count, 'committee': _share(int((right & kept).sum()), count), 'judges': {}}
    for name in known[0].votes if count else ():
        if name != truth:
            scores = np.array([b.votes[name].score if b.votes[name].accept is not None else -1.0 for b in known])
            best = np.isin(np.arange(len(known)), np.argsort(-scores, kind='stable')[:count])
            gain = (right & kept).astype(float) - (right & best)
            low, high = interval(gain * len(known) / count)
            share = float((right & best).sum() / count)
            told['judges'][name] = {'share': share, 'gain': float(gain.sum() / count), 'low': low, 'high': high}
    return told


def rates(votes: Sequence[Vote]) -> dict[str, float | None]:
    """The shares accepted, of the votes cast, and abstained on, of all."""
    cast = [vote.accept for vote in votes if vote.accept is not None]
    return {'accepted': _share(sum(cast), len(cast)), 'abstained': _share(len(votes) - len(cast), len(votes))}


@contextlib.contextmanager
def metered(cost: Cost, members: Mapping[str, Any]) -> Iterator[None]:
    """Adds to `cost`, by name, what members use meanwhile."""
    before = {name: dict(getattr(member, 'usage', {})) for name, member in members.items()}
    yield
    for name, member in members.items():
        cost[name] = {key: value - before[name].get(key, 0) for key, value in getattr(member, 'usage', {}).items()}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def voted(generator: Generator, samples: int = 1) -> Ask:
    """The share of A among `samples` replies whose last line is A or B."""

    def ask(questions: Sequence[Messages], seed: int) -> list[float | None]:
        said = [Counter(map(last_line, replies)) for replies in generator(questions, samples, seed)]
        return [_share(counts['A'], counts['A'] + counts['B']) for counts in said]

    return ask


def scored(scorer: Scorer) -> Ask:
    """The probability of A given that the answer is A or B."""

    def ask(questions: Sequence[Messages], seed: int) -> list[float | None]:
        found = scorer(questions, ('A', 'B'))
        return [0.5 + math.tanh((a - b) / 2) / 2 if max(a, b) > -math.inf else None for a, b in found]

    return ask


def prefer(
    pairs: Sequence[Pair],
    ask: Ask,
    seed: int,
    criteria: Sequence[str] | None = None,
    template: str = PREFERENCE_TEMPLATE,
) -> list[float | None]:
    """The probability that the first answer of each (prompt, first, second) is the better one; None: the judge is mute.

    Both orders are asked and averaged: what a judge gives to a place goes to both answers alike.
    `criteria` has one for each pair.
    """
    questions = [
        question(template, prompt=transcript(prompt), first=one, second=other, criterion=criterion)
        for (prompt, a, b), criterion in zip(pairs, criteria or [CRITERION] * len(pairs), strict=True)
        for one, other in ((a, b), (b, a))
    ]
    said = ask(questions, seed)
    both = zip(said[::2], said[1::2], strict=True)
    return [None if a is None or b is None else (a + 1 - b) / 2 for a, b in both]


def by_questions(ask: Ask, template: str = PREFERENCE_TEMPLATE) -> Compare:
    """Compares answers by asking which is better (see `prefer`)."""
    return lambda pairs, seed, criteria: prefer(pairs, ask, seed, criteria, template)


def by_score(judge: Judge) -> Compare:
    """Compares answers by a judge's scores a and b of them, read as probabilities of being good, by no other criterion.

    p = a (1 - b) / (a (1 - b) + b (1 - a)): that the first is the good one, given that one of them is. Of scores that
    are logistics of rewards it is the logistic of their difference (Bradley & Terry 1952). Equal scores say nothing.
    """

    def compare(pairs: Sequence[Pair], seed: int, criteria: Sequence[str]) -> list[float | None]:
        votes = judge([Item(prompt, answer) for prompt, *both in pairs for answer in both], seed)
        said: list[float | None] = []
        for one, other in zip(votes[::2], votes[1::2], strict=True):
            first, second = one.score * (1 - other.score), other.score * (1 - one.score)
            mute = None in (one.accept, other.accept) or first == second
            said.append(None if mute else first / (first + second))
        return said

    return compare
