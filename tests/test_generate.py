"""The generate command: single prompts, piped sessions, chats that outgrow the context."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from small import model_config
from text import small_tokenizer

from data.chat import render_chat
from model.sharding import make_mesh
from model.transformer import Model
from train import generate
from train.checkpoint import Checkpoints, load, write_json
from train.generate import main
from train.launch.command import command
from train.learn.step import initial_state
from train.sampler import Completion, sample


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model where a stage would have left it."""
    folder = tmp_path_factory.mktemp('run') / 'stage'
    folder.mkdir()
    small_tokenizer().save(folder.parent / 'tokenizer')
    config = model_config()
    write_json(folder / 'config.json', {'model': config.to_dict()})
    variables = Model(config).init(0, make_mesh({'data': 1}, jax.devices()[:1]))
    checkpoints = Checkpoints(folder / 'checkpoints')
    checkpoints.save(1, initial_state(variables, optax.identity()), {}, {'stage': 'stage'})
    checkpoints.close()
    return str(folder)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Puts a parrot in the place of the sampler; the prompts it is asked."""
    prompts: list[list[int]] = []

    def parrot(*_: Any, samples: int, **__: Any) -> list[list[Completion]]:
        prompts.extend(_[3])
        return [[Completion(f'answer {number}', [], [], True) for number in range(samples)]]

    monkeypatch.setattr(generate, 'sample_tokens', parrot)
    return prompts


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr('sys.stdin', io.StringIO(''.join(line + '\n' for line in lines)))


def turns(*contents: str) -> list[int]:
    messages = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(contents)]
    return render_chat(messages, small_tokenizer(), add_generation_prompt=True)[0]


def test_one_prompt_prints_what_the_sampler_draws(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ['--n=2', '--temperature=0.7', '--max_tokens=8', '--seed=3']
    assert main([f'--checkpoint={checkpoint}', '--prompt=import', *options]) == 0
    ((one, two),) = sample(load(checkpoint), ['import'], n=2, temperature=0.7, max_tokens=8, seed=3)
    assert one.text != two.text
    assert capsys.readouterr().out == f'--- 1\n{one.text}\n--- 2\n{two.text}\n'


def test_a_prompt_longer_than_the_context_is_one_line(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f'--checkpoint={checkpoint}', '--prompt=' + 'x1' * 300, '--max_tokens=8']) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count('\n') == 1
    assert '601 tokens' in err and '256' in err


@pytest.mark.parametrize(
    ('option', 'named'), [('--n=0', '--n'), ('--temperature=-1', '--temperature'), ('--checkpoint=nowhere', 'nowhere')]
)
def test_bad_options_are_one_line(checkpoint: str, option: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f'--checkpoint={checkpoint}', '--prompt=x', option]) == 1
    err = capsys.readouterr().err
    assert err.startswith('train.generate: ') and named in err and err.count('\n') == 1


def test_a_piped_chat_remembers(
    checkpoint: str, asked: list[list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, 'one', 'two')
    assert main([f'--checkpoint={checkpoint}', '--chat', '--n=2']) == 0
    assert asked == [turns('one'), turns('one', 'answer 0', 'two')]
    assert capsys.readouterr().out == '--- 1\nanswer 0\n--- 2\nanswer 1\n' * 2


def test_without_chat_every_line_stands_alone_until_an_empty_one(
    checkpoint: str, asked: list[list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, 'one', 'two', '', 'three')
    assert main([f'--checkpoint={checkpoint}']) == 0
    tokenizer = small_tokenizer()
    assert asked == [[tokenizer.begin_id, *tokenizer.encode(text)] for text in ('one', 'two')]
    assert capsys.readouterr().out == 'answer 0\n' * 2


def test_a_chat_forgets_its_oldest_turns_first(checkpoint: str, asked: list[list[int]]) -> None:
    session = generate.Session(load(checkpoint), chat=True, n=1, temperature=1.0, max_tokens=56, seed=0)  # room for 200
    long = '7' * 90
    for prompt in (long, 'two', long):
        session.answer(prompt)
    assert asked[2] == turns('two', 'answer 0', long)


def test_a_line_too_long_does_not_end_a_session(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, asked = generate.sample_tokens, []

    def watched(*args: Any, **kwargs: Any) -> list[list[Completion]]:
        asked.append(args[3][0])
        return real(*args, **kwargs)

    monkeypatch.setattr(generate, 'sample_tokens', watched)
    type_in(monkeypatch, '7' * 300, 'two')
    assert main([f'--checkpoint={checkpoint}', '--chat', '--max_tokens=8']) == 1
    out, err = capsys.readouterr()
    assert asked[1] == turns('two')
    assert out and err.count('\n') == 1 and 'tokens' in err


def test_an_interruption_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    @command('train.toy', interrupted='nothing is lost')
    def interrupted(arguments: Sequence[str]) -> int:
        raise KeyboardInterrupt

    assert interrupted([]) == 130
    assert capsys.readouterr().err == 'train.toy: interrupted; nothing is lost\n'


def test_a_step_can_be_named(checkpoint: str, asked: list[list[int]], tmp_path: Path) -> None:
    assert main([f'--checkpoint={checkpoint}@1', '--prompt=x']) == 0
    assert main([f'--checkpoint={checkpoint}@x', '--prompt=x']) == 1
