"""How answers reason: how long they are, which of their steps are right, how often they turn round."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from data.tasks import Prompt, Task
from train.sampler import Completion

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


def traces(task: Task, problems: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> dict[str, float]:
    """What a model's answers, a group of them for each problem, are like.

    Returns:
        'tokens' of an answer; 'ended': the share that ended by itself; 'corrections' and 'backtracking': phrases of
        CORRECTION and BACKTRACKING for a thousand tokens; where the task's verifier judges parts of an answer (lines of
        work, or constraints), 'steps' of an answer and 'steps_right', the share of all that are right.
    """
    answers = [said for group in groups for said in group]
    tokens = sum(len(said.tokens) for said in answers)
    found = {
        'tokens': tokens / len(answers),
        'ended': float(np.mean([said.stopped for said in answers])),
        'corrections': 1000 * sum(len(CORRECTION.findall(said.text)) for said in answers) / max(tokens, 1),
        'backtracking': 1000 * sum(len(BACKTRACKING.findall(said.text)) for said in answers) / max(tokens, 1),
    }
    parts = [
        part.score
        for problem, group in zip(problems, groups, strict=True)
        for said in group
        for part in task.verify(problem, said.text).parts
    ]
    if parts:
        found |= {'steps': len(parts) / len(answers), 'steps_right': float(np.mean(np.array(parts) >= 1))}
    return found
