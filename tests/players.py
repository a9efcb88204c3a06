"""A task of which a random model gets something right: as a game, and with problems that it may propose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data.tasks import ILLEGAL, Prompt, SplitTask, Turn, Verdict, register


@register('parity')
@dataclass(kw_only=True)
class Parity(SplitTask):
    """Each side says something twice; the first wins if they said an even number of bytes in all. Only
    saying nothing is illegal."""

    invitation: ClassVar[str] = 'say 0'

    def prompt(self, index: int) -> Prompt:
        return Prompt(f'say {index}', 'something', f'say {index}')

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        return Verdict(float(len(completion.encode()) % 2 == 0), reason='odd')

    def parse(self, text: str) -> Prompt | None:
        """What is left of a text's bytes when sevens are taken off, unless it is nothing."""
        left = len(text.encode()) % 7
        return self.prompt(left) if left else None

    def proposal(self, prompt: Prompt) -> str:
        return 'x' * int(prompt.key[4:])

    def show(self, prompt: Prompt, moves: Sequence[str]) -> Turn:
        return Turn('user', f'{prompt.text} {len(moves)}', done=len(moves) == 4 or '' in moves)

    def judge(self, prompt: Prompt, moves: Sequence[str]) -> tuple[Verdict, Verdict]:
        foul = '' in moves
        first = len(moves) % 2 == 0 if foul else len(''.join(moves).encode()) % 2 == 0
        lost = Verdict(0.0, reason=ILLEGAL if foul else 'lost')
        return (Verdict(1.0), lost) if first else (lost, Verdict(1.0))
