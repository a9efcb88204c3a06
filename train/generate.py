"""Text from a checkpoint: answers to one prompt, or a session.

python -m train.generate --checkpoint=DIR/STAGE [--prompt=TEXT] [--chat] [--n=4] [--temperature=0.7] [--max_tokens=64]

Without --prompt it reads one prompt a line from standard input, until an empty line or the end. With --chat a prompt is
the user's turn, and a session remembers the turns before; without it a prompt is text to go on with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from data.chat import render_chat
from data.errors import InputError
from train.checkpoint import Loaded, load
from train.launch.command import command
from train.launch.host import prepare
from train.sampler import Completion, row_keys, sample_tokens

MAX_TOKENS = 256


class Session:
    """A conversation, or a row of prompts that have nothing to do with each other.

    Args:
        chat: whether prompts are turns of a chat. The first of the n answers is the one the chat goes on from.
        max_tokens: the most an answer may have; 0 stands for MAX_TOKENS, or half the context where that is less.
        seed: with the number of the prompt, it decides every draw.
    """

    def __init__(self, loaded: Loaded, chat: bool, n: int, temperature: float, max_tokens: int, seed: int):
        context = loaded.model.config.max_position_embeddings
        self._loaded, self._chat, self._n, self._temperature, self._seed = loaded, chat, n, temperature, seed
        self._max_tokens = max_tokens or min(MAX_TOKENS, context // 2)
        self._room = context - self._max_tokens
        self._history: list[dict[str, str]] = []
        self._prompts = 0

    def answer(self, prompt: str) -> list[Completion]:
        """The n answers to the next prompt. A chat forgets its oldest turns where the context is too short for all.

        Raises:
            InputError: a prompt that by itself is too long; it leaves the session as it was.
        """
        history = [*self._history, {'role': 'user', 'content': prompt}]
        tokens = self._tokens(history)
        while len(tokens) > self._room and len(history) > 1:
            history = history[2:]
            tokens = self._tokens(history)
        (answers,) = sample_tokens(
            self._loaded.model,
            self._loaded.variables,
            self._loaded.tokenizer,
            [tokens],
            samples=self._n,
            temperature=self._temperature,
            max_tokens=self._max_tokens,
            keys=row_keys(self._seed, [self._prompts], self._n),
        )
        self._prompts += 1
        if self._chat:
            self._history = [*history, {'role': 'assistant', 'content': answers[0].text}]
        return answers

    def _tokens(self, history: list[dict[str, str]]) -> list[int]:
        tokenizer = self._loaded.tokenizer
        if self._chat:
            return render_chat(history, tokenizer, add_generation_prompt=True)[0]
        return [tokenizer.begin_id, *tokenizer.encode(history[-1]['content'])]


def typed() -> Iterator[str]:
    """Lines of standard input up to an empty one, with a sign to type after on a terminal."""
    while True:
        try:
            line = input('> ' if sys.stdin.isatty() else '')
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def show(answers: Sequence[Completion]) -> None:
    """Prints the answers, numbered where there are several."""
    for number, answer in enumerate(answers, start=1):
        if len(answers) > 1:
            print(f'--- {number}')
        print(answer.text, flush=True)


@command('train.generate')
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog='python -m train.generate', description='Sample from a checkpoint.')
    parser.add_argument('--checkpoint', required=True, help='DIR/STAGE, or DIR/STAGE@STEP')
    parser.add_argument('--prompt', help='a session that reads prompts from standard input when absent')
    parser.add_argument('--chat', action='store_true', help="prompts are the user's turns")
    parser.add_argument('--n', type=int, default=1, help='answers to a prompt; a chat goes on from the first')
    parser.add_argument('--temperature', type=float, default=1.0, help='0: greedy')
    parser.add_argument(
        '--max_tokens', type=int, default=0, help=f'of an answer; {MAX_TOKENS} or half the context when absent'
    )
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args(arguments)
    for name, least in (('n', 1), ('temperature', 0), ('max_tokens', 0)):
        value = getattr(options, name)
        if not value >= least:
            raise InputError(f'--{name} is {value}: expected {least} or more')
    prepare()
    loaded = load(options.checkpoint)
    session = Session(loaded, options.chat, options.n, options.temperature, options.max_tokens, options.seed)
    if options.prompt is not None:
        show(session.answer(options.prompt))
        return 0
    status = 0
    for line in typed():
        try:
            show(session.answer(line))
        except InputError as error:  # one line too many need not end a session
            print(f'train.generate: {error}', file=sys.stderr)
            status = 1
    return status


if __name__ == '__main__':
    sys.exit(main())
