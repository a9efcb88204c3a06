"""What a stage changed in a model: which tokens of its answers, how varied they are, what is solved, which weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.errors import InputError
from data.mixture import as_dict
from data.tasks import Prompt, Task, different, get_task
from data.tokenizer import Tokenizer
from model.transformer import Model, Variables
from train.act.episodes import chat_prompt
from train.checkpoint import Loaded
from train.measure.statistics import counts_to, pass_at_k
from train.measure.traces import traces
from train.sampler import Completion, prompt_width, row_keys, sample_tokens

ROWS = 8  # answers that are read at a time
MARGINAL = 3  # ranks up to which a token is marginal, not shifted
MOST = 20  # tokens in a list of the most shifted
PARTS = 8  # of the answers' length, for what changes along it
LONGEST_WORDS = 4  # n-grams of tokens up to this are counted


class Read(NamedTuple):
    """An answer as two models see it: its tokens, the rank of each under the base (1 is its likeliest), and the KL of
    the base's distribution from the tuned model's at each place, in nats."""

    tokens: list[int]
    ranks: np.ndarray
    kl: np.ndarray


def behaviour(base: Loaded, tuned: Loaded, evaluation: Mapping[str, Any], samples: int = 8) -> dict[str, Any]:
    """Compares two models on the problems of an evaluation of type `task`.

    Returns:
        {'shift', 'routing': of the tuned model's greedy answers (see `shift` and `routing`); 'diversity': {'base',
        'tuned'} of `samples` answers a problem at temperature 1 (see `diversity`), with 'spread' of a problem's answers
        in the base's states (see `spread`), 'spread_across' of the first answers to all problems, and the mean number
        of different right 'solutions'; 'traces': {'base', 'tuned'} (see `train.measure.traces`); 'coverage': what they
        solve (see `coverage`); 'drift': of the weights (see `drift`); 'answers': [(prompt, Read)] to be shown}.

    Raises:
        InputError: other tokenizers; an evaluation of another type.
    """
    if base.tokenizer.fingerprint != tuned.tokenizer.fingerprint:
        raise InputError('the two models have different tokenizers: their tokens cannot be compared')
    if evaluation['type'] != 'task' or evaluation.get('format', 'chat') != 'chat':
        raise InputError('the evaluation is no chat of a task: expected one of type task and format chat')
    options = {'split': 'heldout', **as_dict(evaluation['task'])}
    task = get_task(options.pop('name'), **options)
    problems, longest = different(task, evaluation.get('items', 128)), evaluation.get('max_tokens', 96)
    prompts = [chat_prompt(problem, tuned.tokenizer) for problem in problems]

    def answers(model: Loaded, count: int, temperature: float) -> list[list[Completion]]:
        settings = {'samples': count, 'temperature': temperature, 'max_tokens': longest}
        keys = row_keys(0, range(len(prompts)), count)
        return sample_tokens(model.model, model.variables, model.tokenizer, prompts, keys=keys, **settings)

    reads = read(base, tuned, prompts, [said.tokens for (said,) in answers(tuned, 1, 0.0)])
    drawn = {name: answers(model, samples, 1.0) for name, model in (('base', base), ('tuned', tuned))}
    right = {name: _right(task, problems, groups) for name, groups in drawn.items()}
    written = {name: [[said.tokens for said in group] for group in groups] for name, groups in drawn.items()}
    varied = {
        name: {
            **diversity(groups, tuned.model.config.vocab_size),
            **_apart(base, prompts, groups),  # the base sees both, so that both are seen alike
            'solutions': _solutions(drawn[name], right[name]),
        }
        for name, groups in written.items()
    }
    greedy = [one.tokens for one in reads]
    return {
        'shift': shift(reads, tuned.tokenizer),
        'routing': routing(base, tuned, prompts, greedy),
        'diversity': varied,
        'traces': {name: traces(task, problems, groups) for name, groups in drawn.items()},
        'coverage': coverage(right['base'], right['tuned']),
        'drift': drift(base.variables['params'], tuned.variables['params']),
        'answers': [(problem.text, one) for problem, one in zip(problems, reads, strict=True)],
    }


def read(base: Loaded, tuned: Loaded, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Read]:
    """What both models make of answers to prompts, all of them tokens."""

    def logits(model: Model, variables: Variables, tokens: jax.Array, at: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(jnp.take_along_axis(model.apply(variables, tokens).logits, at[:, :, None], axis=1))

    @jax.jit
    def compared(tokens: jax.Array, at: jax.Array, said: jax.Array) -> tuple[jax.Array, jax.Array]:
        before, after = (logits(x.model, x.variables, tokens, at) for x in (base, tuned))
        own = jnp.take_along_axis(before, said[:, :, None], axis=2)
        return 1 + jnp.sum(before > own, axis=2), jnp.sum(jnp.exp(after) * (after - before), axis=2)

    found: list[Read] = []
    for some, tokens, at, said in _blocks(prompts, answers):
        ranks, kl = map(np.asarray, compared(tokens, at, said))
        found += [Read(a, ranks[row, : len(a)], kl[row, : len(a)]) for row, (_, a) in enumerate(some)]
    return found


Pairs = list[tuple[list[int], list[int]]]


def _blocks(
    prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> Iterator[tuple[Pairs, np.ndarray, np.ndarray, np.ndarray]]:
    """Prompts with answers, ROWS at a time; as rows [ROWS, width] of tokens; of each token of an answer the place that
    predicts it, and the token itself: [ROWS, longest answer]."""
    longest = max(map(len, answers))
    width = prompt_width(max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
    for first in range(0, len(answers), ROWS):
        some = list(zip(prompts[first : first + ROWS], answers[first : first + ROWS], strict=True))
        tokens = np.zeros((ROWS, width), np.int32)
        at, said = np.zeros((ROWS, longest), np.int32), np.zeros((ROWS, longest), np.int32)
        for row, (prompt, answer) in enumerate(some):
            tokens[row, : len(prompt) + len(answer)] = [*prompt, *answer]
            at[row] = np.minimum(len(prompt) - 1 + np.arange(longest), width - 1)
            said[row, : len(answer)] = answer
        yield some, tokens, at, said


def routing(
    base: Loaded, tuned: Loaded, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> dict[str, list[float]]:
    """Which experts read answers in two models, by layer that has some; empty where their experts are not as many.

    Returns:
        'kept': the share of the base's experts of a token that the tuned model sends it to as well; 'moved': the total
        variation distance between the shares of all this that the experts have, 0 to 1.
    """
    counts = [(x.model.config.n_routed_experts, x.model.config.num_hidden_layers) for x in (base, tuned)]
    if counts[0] != counts[1] or not base.model.config.is_moe:
        return {}

    @jax.jit
    def chosen(tokens: jax.Array, at: jax.Array) -> list[jax.Array]:
        outputs = (x.model.apply(x.variables, tokens) for x in (base, tuned))
        return [jnp.take_along_axis(x.expert_ids, at[:, :, None, None], axis=1) for x in outputs]

    found: tuple[list[np.ndarray], ...] = ([], [])
    for some, tokens, at, _ in _blocks(prompts, answers):
        for known, ids in zip(found, map(np.asarray, chosen(tokens, at)), strict=True):
            known += [ids[row, : len(a)] for row, (_, a) in enumerate(some)]
    before, after = (np.concatenate(ids) for ids in found)  # [tokens, layers, experts of a token]
    kept = (before[..., :, None] == after[..., None, :]).any(-1).mean((0, 2))
    loads = [(ids[..., None] == np.arange(counts[0][0])).mean((0, 2)) for ids in (before, after)]
    return {'kept': kept.tolist(), 'moved': (np.abs(loads[0] - loads[1]).sum(1) / 2).tolist()}


def embedded(model: Loaded, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> np.ndarray:
    """Of each answer the mean of the model's last states over its tokens: [answers, hidden_size]."""

    @jax.jit
    def states(tokens: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(model.model.apply(model.variables, tokens).hidden, at[:, :, None], axis=1)

    found: list[np.ndarray] = []
    for some, tokens, at, _ in _blocks(prompts, answers):
        hidden = np.asarray(states(tokens, np.minimum(at + 1, tokens.shape[1] - 1)), np.float64)
        found += [hidden[row, : max(len(a), 1)].mean(0) for row, (_, a) in enumerate(some)]
    return np.array(found)


def spread(vectors: np.ndarray) -> float:
    """The mean over pairs of vectors [n, D] of 1 minus their cosine; 0 of a single one."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    n = len(unit)
    return float(1 - ((unit @ unit.T).sum() - n) / (n * (n - 1))) if n > 1 else 0.0


def shift(reads: Sequence[Read], tokenizer: Tokenizer) -> dict[str, Any]:
    """How far the tuned model's greedy answers are from what the base would have said next (Lin et al. 2023, "The
    Unlocking Spell on Base LLMs", section 2.2).

    Returns:
        shares of tokens 'unshifted' (the base's likeliest), 'marginal' (its second or third) and 'shifted'; 'kl' a
        token in nats; 'along': (share shifted, kl, mean rank) in PARTS parts of the answers; 'most': [token, times
        shifted, times seen].
    """
    ranks, kl = (np.concatenate([getattr(x, name) for x in reads]) for name in ('ranks', 'kl'))
    place = np.concatenate([np.arange(len(x.tokens)) * PARTS // max(len(x.tokens), 1) for x in reads])
    tokens = np.concatenate([x.tokens for x in reads])
    moved, seen = Counter(tokens[ranks > MARGINAL].tolist()), Counter(tokens.tolist())
    return {
        'tokens': len(tokens),
        'unshifted': float(np.mean(ranks == 1)),
        'marginal': float(np.mean((ranks > 1) & (ranks <= MARGINAL))),
        'shifted': float(np.mean(ranks > MARGINAL)),
        'kl': float(kl.mean()),
        'along': [
            (float(np.mean(ranks[there] > MARGINAL)), float(kl[there].mean()), float(ranks[there].mean()))
            for there in (place == part for part in range(PARTS))
            if there.any()
        ],
        'most': [[tokenizer.decode([token]), count, seen[token]] for token, count in moved.most_common(MOST)],
    }


def diversity(groups: Sequence[Sequence[Sequence[int]]], vocabulary: int) -> dict[str, float]:
    """How varied answers are, a group of them for each problem, all of them tokens.

    Returns:
        'distinct_n' for n of 1 to LONGEST_WORDS: different n-grams over all n-grams (Li et al. 2016), within a
        problem's answers, mean over problems; 'distinct_n_across', of all answers together; 'adjusted': different
        tokens over those expected of as many drawn evenly from the vocabulary (Liu et al. 2022, equation 2), across;
        'unique': different answers over answers, within a problem; 'entropy' of a problem's answers, nats; 'self_bleu':
        the mean BLEU of an answer with the problem's others as references (Zhu et al. 2018), 0 of a single answer.
    """
    told: dict[str, float] = {}
    everything = [answer for group in groups for answer in group]
    for n in range(1, LONGEST_WORDS + 1):
        told[f'distinct_{n}'] = float(np.mean([_distinct(group, n) for group in groups]))
        told[f'distinct_{n}_across'] = _distinct(everything, n)
    count, different_ones = sum(map(len, everything)), len({token for answer in everything for token in answer})
    told['adjusted'] = different_ones / (vocabulary * -math.expm1(count * math.log1p(-1 / vocabulary)))
    shares = [np.array(list(Counter(map(tuple, group)).values())) / len(group) for group in groups]
    told['unique'] = float(np.mean([len(share) / len(group) for share, group in zip(shares, groups, strict=True)]))
    told['entropy'] = float(np.mean([-(share * np.log(share)).sum() for share in shares]))
    told['self_bleu'] = float(np.mean([_self_bleu(group) for group in groups]))
    return told


def _self_bleu(group: Sequence[Sequence[int]]) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method1  # n-grams that never match count 0.1
    others = [[*group[:i], *group[i + 1 :]] for i in range(len(group))]
    said = [
        sentence_bleu(rest, answer, smoothing_function=smoothing) if rest and answer else 0.0
        for answer, rest in zip(group, others, strict=True)
    ]
    return float(np.mean(said))


def _distinct(answers: Sequence[Sequence[int]], n: int) -> float:
    grams = [tuple(answer[i : i + n]) for answer in answers for i in range(len(answer) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def _apart(model: Loaded, prompts: Sequence[list[int]], groups: Sequence[Sequence[list[int]]]) -> dict[str, float]:
    each = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    states = embedded(model, each, [answer for group in groups for answer in group])
    vectors = np.split(states, len(groups))
    first = np.array([group[0] for group in vectors])
    return {'spread': float(np.mean([*map(spread, vectors)])), 'spread_across': spread(first)}


def _solutions(groups: Sequence[Sequence[Completion]], right: np.ndarray) -> float:
    """Different right texts, the mean over problems."""
    found = [
        {said.text for said, good in zip(group, row, strict=True) if good}
        for group, row in zip(groups, right, strict=True)
    ]
    return float(np.mean([*map(len, found)]))


def _right(task: Task, problems: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> np.ndarray:
    """Which answers are right, and ended by themselves: bool [problems, samples]."""
    return np.array(
        [
            [said.stopped and task.verify(problem, said.text).score >= 1.0 for said in group]
            for problem, group in zip(problems, groups, strict=True)
        ]
    )


def coverage(base: np.ndarray, tuned: np.ndarray) -> dict[str, Any]:
    """What two models solve; both arrays are bool [problems, samples].

    Returns:
        {'base', 'tuned': pass@k by k of 1, 2, 4, ... and the samples; 'crossing': the least k at which the base is
        ahead, None where it never is; 'only_base', 'only_tuned': problems that one alone solved at least once}.
    """
    samples = base.shape[1]
    ks = counts_to(samples)
    curves = {
        name: {k: float(pass_at_k(samples, right.sum(1), k).mean()) for k in ks}
        for name, right in (('base', base), ('tuned', tuned))
    }
    ever, now = base.any(1), tuned.any(1)
    return {
        **curves,
        'crossing': next((k for k in ks if curves['base'][k] > curves['tuned'][k]), None),
        'only_base': int((ever & ~now).sum()),
        'only_tuned': int((now & ~ever).sum()),
    }


def drift(base: Variables, tuned: Variables) -> dict[str, Any]:
    """How far weights have moved: of each layer (or part outside of the layers) the norm of the change over that of the
    base; 'changed': the share of all numbers that are not the same. Only parameters that both have."""
    before = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(base)}
    after = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tuned)}
    moved: dict[str, list[float]] = {}
    changed = total = 0
    for path in before.keys() & after.keys():
        if before[path].shape != after[path].shape:
            continue
        old, new = (np.asarray(x[path], np.float64) for x in (before, after))
        changed, total = changed + int((old != new).sum()), total + old.size
        part = path.split("'")[1]
        layers = part.endswith('layers')  # whose weights are stacked
        for i in range(len(old)) if layers else (None,):
            name = part if i is None else f'{part} {i}'
            square = ((new[i] - old[i]) ** 2).sum() if layers else ((new - old) ** 2).sum()
            both = moved.setdefault(name, [0.0, 0.0])
            both[0] += float(square)
            both[1] += float((old[i] ** 2).sum() if layers else (old**2).sum())
    relative = {name: math.sqrt(a / max(b, 1e-30)) for name, (a, b) in sorted(moved.items())}
    return {'changed': changed / max(total, 1), 'relative': relative}


def page(found: Mapping[str, Any], tokenizer: Tokenizer, title: str) -> str:
    """The answers as one HTML page without network, each token coloured by its rank under the base."""
    colors = {'unshifted': '#fff', 'marginal': '#fde68a', 'shifted': '#fca5a5'}
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><h1>{escape(title)}</h1>'
    ]
    shares = ', '.join(
        f'<span style="background:{c}">{name} {found["shift"][name]:.1%}</span>' for name, c in colors.items()
    )
    parts.append(f'<p>Tokens of the tuned model by their rank under the base: {shares}.</p>')
    for prompt, one in found['answers']:
        spans = []
        for token, rank, kl in zip(one.tokens, one.ranks.tolist(), one.kl.tolist(), strict=True):
            kind = 'unshifted' if rank == 1 else 'marginal' if rank <= MARGINAL else 'shifted'
            text = escape(tokenizer.decode([token])) or '·'
            spans.append(f'<span style="background:{colors[kind]}" title="rank {rank}, KL {kl:.2f}">{text}</span>')
        parts.append(f'<h2>Prompt</h2><pre>{escape(prompt)}</pre><pre>{"".join(spans)}</pre>')
    return '\n'.join(parts) + '</html>\n'
