"""Arithmetic with a tool: the model asks for one operation a turn, a calculator answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.tasks import Prompt, Turn, Verdict, final_answer, register
from data.tasks.arithmetic import Arithmetic

ASKED = re.compile(r'([0-9]{1,12})([-+*])([0-9]{1,12})=')
UNKNOWN = 'Ask like 12*3= or end with Answer: 36.'


@register('calculator')
@dataclass(kw_only=True)
class Calculator(Arithmetic):
    """Compute an expression, with help: `12*3=` as a whole turn is answered by `36`, `Answer: 36` ends the exchange.

    The score is that of the final answer, at the end of the last turn. Problems are those of `arithmetic`.
    """

    digits: int = 3
    max_value: int = 999_999
    turns: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._integer('turns', 1, 64)

    def pose(self, key: str, problem: Any, rng: Any) -> Prompt:
        prompt = super().pose(key, problem, rng)
        return Prompt(
            text=f'{prompt.text} Ask for one operation at a time.',
            reference=f'Answer: {prompt.info["answer"]}',
            key=key,
            info=prompt.info,
        )

    def reply(self, prompt: Prompt, transcript: Sequence[Turn]) -> Turn:
        """The result of the operation asked for; how to ask, where nothing was; nothing more after an answer."""
        said = transcript[-1].text.strip()
        if final_answer(said) is not None:
            return Turn('tool', '', done=True)
        asked = ASKED.fullmatch(said)
        if asked is None:
            return Turn('tool', UNKNOWN)
        left, right = int(asked[1]), int(asked[3])
        return Turn('tool', str({'+': left + right, '-': left - right, '*': left * right}[asked[2]]))

    def judge(self, prompt: Prompt, transcript: Sequence[Turn]) -> Verdict:
        """The verdict on the model's last turn."""
        return self.verify(prompt, transcript[-1].text if transcript[-1].role == 'assistant' else '')
