"""How answers reason: how long they are, which of their steps are right, how often they turn round."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data.tasks import ANSWER, Prompt, Task
from data.tokenizer import Tokenizer
from train.act.episodes import LEAST_ROWS, Sample, chat_prompt, in_threads, padded
from train.sampler import Completion

FORCED = 16  # tokens of an answer that had to be given

# Phrases in which a writer takes something back, and in which one leaves a way for another, after the kinds that Gandhi
# et al. 2025 (arXiv 2503.01307, section 3) count with a language model; words alone miss what is said otherwise.
CORRECTION = re.compile(
    r"\b(wait|actually|hold on|correction|that(?:'s| is| was) (?:wrong|not right|incorrect)|"
    r'let me (?:re-?check|double-check|correct|fix)|i (?:made|have made) (?:a mistake|an error))\b',
    re.IGNORECASE,
)
BACKTRACKING = re.compile(
    r'\b((?:go|going|went) back|start(?:ing)? over|try (?:again|another|a different)|alternatively|'
    r'another (?:way|approach)|a different (?:way|approach)|scratch that)\b',
    re.IGNORECASE,
)


def cut_short(
    task: Task,
    problems: Sequence[Prompt],
    groups: Sequence[Sequence[Any]],
    scores: np.ndarray,
    tokenizer: Tokenizer,
    sample: Sample,
    keys: jax.Array,
    budget: int,
) -> tuple[np.ndarray, np.ndarray]:
    """How answers score that have `budget` tokens for work: those that have neither begun their `Answer:` line by then
    nor ended are cut off there and made to begin it (budget forcing; Muennighoff et al. 2025, "s1", section 3.1). Of a
    task that judges the work as well, little is left.

    Args:
        groups, scores: answers to each problem, Completions or Episodes, and what they score uncut, [problems, samples]
            as are `keys`.
        sample: for what follows `Answer:`.

    Returns:
        Of each problem the mean score, and the share of its answers that were cut: float [problems] each.
    """
    marker = tokenizer.encode(f'\n{ANSWER}')
    cut: dict[tuple[int, int], list[int]] = {}
    for i, group in enumerate(groups):
        for j, said in enumerate(group):
            begun = ANSWER in tokenizer.decode(said.tokens[: budget + len(marker)])
            if not begun and not (said.stopped and len(said.tokens) <= budget):
                cut[i, j] = [*said.tokens[:budget], *(marker if budget else tokenizer.encode(ANSWER))]
    result, share = np.array(scores, float), np.zeros(scores.shape)
    if cut:
        rows = padded(list(cut), LEAST_ROWS)
        drawn = jax.vmap(lambda key: jax.random.fold_in(key, budget))(keys[tuple(np.array(rows).T)])
        said = sample([chat_prompt(problems[i], tokenizer) + cut[i, j] for i, j in rows], drawn[:, None])
        whole = [(place, tokenizer.decode(cut[place]), x) for place, (x,) in zip(cut, said, strict=False)]
        verdicts = in_threads(lambda one: task.verify(problems[one[0][0]], one[1] + one[2].text), whole)
        for (place, _, x), verdict in zip(whole, verdicts, strict=True):
            result[place], share[place] = verdict.score * x.stopped, 1.0
    return result.mean(1), share.mean(1)


def traces(task: Task, problems: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> dict[str, float]:
    """What a model's answers, a group of them for each problem, are like.

    Returns:
        'tokens' of an answer; 'ended': the share that ended by itself; 'corrections' and 'backtracking': phrases of
        CORRECTION and BACKTRACKING for a thousand tokens; 'corrects_ever' and 'backtracks_ever': the share of problems
        with such a phrase in at least one of the group's answers; where the task's verifier judges parts of an answer
        (lines of work, or constraints), 'steps' of an answer and 'steps_right', the share of all that are right.
    """
    answers = [said for group in groups for said in group]
    tokens = sum(len(said.tokens) for said in answers)
    found = {
        'tokens': tokens / len(answers),
        'ended': float(np.mean([said.stopped for said in answers])),
        'corrections': 1000 * sum(len(CORRECTION.findall(said.text)) for said in answers) / max(tokens, 1),
        'backtracking': 1000 * sum(len(BACKTRACKING.findall(said.text)) for said in answers) / max(tokens, 1),
    }
    for name, pattern in (('corrects_ever', CORRECTION), ('backtracks_ever', BACKTRACKING)):
        found[name] = float(np.mean([any(pattern.search(said.text) for said in group) for group in groups]))
    parts = [
        part.score
        for problem, group in zip(problems, groups, strict=True)
        for said in group
        for part in task.verify(problem, said.text).parts
    ]
    if parts:
        found |= {'steps': len(parts) / len(answers), 'steps_right': float(np.mean(np.array(parts) >= 1))}
    return found
