"""Many runs that differ in some fields: their product, what they share trained once, and a table of what came of it.

python -m train.sweep --config=FILE --workdir=DIR --set model.attention=mla,gqa --set seed=0,1,2 [--stage=NAME]

Each --set names a field of the config and values with commas between them; the arms are their product, and arms that
differ in a seed alone are averaged. Without --set, the function `sweep(add)` of the config file says what the arms are,
by a call of add({FIELD: VALUE, ...}) for each, or add({...}, NAME); where --config names a variant, it is
`sweep(add, variant)`. Stages whose settings are the same in several arms, with all that leads to them, are trained
once. The same command goes on where it was.

  --together  so many arms at a time, which take their steps in one program where they differ in seeds, mixtures and
              learning rates alone: for small models on accelerators (on a CPU it saves start-up time, and no more)
  --print     only prints a command for each arm, for Slurm, GKE or XPK; first those that train what arms share
  --over      on the page, plots over this measure, such as 'cache elements a token'
  --stage     of each arm only this stage and those it needs
  --config.X  any field of the config, in all arms, as in `python -m train`

DIR holds a folder for each arm, which is the workdir of a run; sweep.csv and sweep.md have the table, sweep.html
plots as well.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import config_flags

from data.errors import InputError, did_you_mean
from data.mixture import as_dict, sources_of
from train.__main__ import parse
from train.launch.command import command
from train.launch.edges import needed_for, order, program, stage_model, stages_needed, steps_pinned
from train.launch.graph import Run
from train.launch.host import prepare, say
from train.learn.together import Step, Together, alone
from train.measure.ranking import table, write_page, write_table
from train.report import write_report

_SETS = flags.DEFINE_multi_string('set', [], 'FIELD=VALUE,VALUE,...: a field of the config and what it is set to.')
_OVER = flags.DEFINE_string('over', '', 'The measure over which the page plots the others.')
_TOGETHER = flags.DEFINE_integer('together', 1, 'How many arms run at a time.')
_PRINT = flags.DEFINE_boolean('print', False, 'Print commands instead of running them.')

SHARED = 'shared'  # in the sweep's folder: stages that more than one arm may need
Changes = dict[str, Any]


class Arm(NamedTuple):
    """A run of a sweep: its name, the fields that are changed, the whole config, and the name of all that differ from
    it in a seed alone."""

    name: str
    changes: Changes
    config: dict[str, Any]
    group: str


def product(config: Mapping[str, Any], sets: Sequence[str]) -> list[Changes]:
    """All combinations of what `--set` flags name.

    Raises:
        InputError: a field that is not there or is set twice; a value of another type than the field's.
    """
    named: dict[str, list[Any]] = {}
    for given in sets:
        field, equals, values = given.partition('=')
        if not equals or not values:
            raise InputError(f'--set {given}: expected FIELD=VALUE,VALUE,...')
        if field in named:
            raise InputError(f'--set {field}: given twice')
        old = _get(config, field)
        named[field] = [_value(field, text, old) for text in _apart(values)]
    return [dict(zip(named, values, strict=True)) for values in itertools.product(*named.values())]


def _apart(values: str) -> list[str]:
    """Values between commas; one inside brackets belongs to a value."""
    found, depth = [''], 0
    for letter in values:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == ',' and not depth:
            found.append('')
        else:
            found[-1] += letter
    return found


def _value(field: str, text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(old):
        raise InputError(f'--set {field}={text}: expected {type(old).__name__}, as in {old!r}')
    return value


def _get(config: Mapping[str, Any], field: str) -> Any:
    at: Any = config
    for depth, name in enumerate(names := field.split('.')):
        if not hasattr(at, 'keys') or name not in at:
            near = did_you_mean(name, at.keys()) if hasattr(at, 'keys') else ''
            raise InputError(f'{".".join(names[: depth + 1])}: no such field of the config{near}')
        at = at[name]
    return at


def arms(config: Mapping[str, Any], combinations: Sequence[Changes], names: Sequence[str] = ()) -> list[Arm]:
    """A run for each combination of changes; `names` are what they are called but for their seeds ('': the changes).

    Raises:
        InputError: none at all, twice the same, or a field that is not there.
    """
    if not combinations:
        raise InputError(
            'nothing to sweep over: expected --set FIELD=VALUE,VALUE or a function sweep(add) in the config'
        )
    made: dict[str, Arm] = {}
    for changes, given in zip(combinations, names or [''] * len(combinations), strict=True):
        changed = copy.deepcopy(dict(config))
        for field, value in changes.items():
            _get(config, field)
            *path, last = field.split('.')
            functools.reduce(lambda at, name: at[name], path, changed)[last] = value
        seeds = {field: value for field, value in changes.items() if field.split('.')[-1] == 'seed'}
        group = given or label({field: value for field, value in changes.items() if field not in seeds})
        name = label({'arm': given, **seeds}) if given else label(changes)
        if name in made:
            raise InputError(f'two arms are called {name}: expected different ones')
        made[name] = Arm(name, changes, changed, group)
    return list(made.values())


def label(changes: Mapping[str, Any]) -> str:
    """Changes as a short name that a folder can have; 'all' where there are none."""
    words = [f'{field.removeprefix("stages.").removeprefix("model.")}={value}' for field, value in changes.items()]
    return re.sub(r'[^\w.=+-]+', '_', ','.join(words).replace(',', '__')).strip('_') or 'all'


def identity(config: Mapping[str, Any], name: str) -> str:
    """A hash of all that decides what a stage comes to: its settings and those of all that lead to it."""
    stage, tokenizer = as_dict(config['stages'][name]), as_dict(config['tokenizer'])
    sources = sources_of(stage.get('mixture', ())) | {stage.get('source', '')} | {*tokenizer['sources']}
    evaluations = {e: config['evaluations'][e] for e in stage.get('evaluations', ()) if e in config['evaluations']}
    seed = stage.get('seed', -1)
    told = {
        'name': name,
        'model': stage_model(config, name).to_dict(),
        'stage': stage,
        'seed': config['seed'] if seed < 0 else seed,
        'sources': {source: config['sources'][source] for source in sources if source in config['sources']},
        'evaluations': evaluations,
        'tokenizer': tokenizer,
        'mesh': config['mesh'],
        'pinned': steps_pinned(config, name),  # checkpoints that later stages of this arm want kept
        'needed': {needed: identity(config, needed) for needed in stages_needed(stage, config['sources'])},
    }
    # These look at other stages of the run, whichever they are.
    if any(as_dict(spec).get('type') in ('elo', 'kl') for spec in evaluations.values()):
        told['run'] = {field: config[field] for field in ('model', 'stages', 'sources')}
    return _digest(told)


def _digest(settings: Any) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=as_dict).encode(), digest_size=6).hexdigest()


def link(folder: Path, arm: Arm, names: Sequence[str]) -> dict[str, Path]:
    """Makes an arm's workdir, whose stages are links to folders that all arms with the same stages share."""
    workdir = folder / arm.name
    workdir.mkdir(parents=True, exist_ok=True)
    shared = {name: folder / SHARED / f'{name}-{identity(arm.config, name)}' for name in names}
    for name, target in shared.items():
        target.mkdir(parents=True, exist_ok=True)
        if not (workdir / name).exists():
            (workdir / name).symlink_to(Path('..') / SHARED / target.name, target_is_directory=True)
        elif (workdir / name).resolve() != target.resolve():
            raise InputError(f'{workdir / name} was trained with other settings: expected another --workdir')
    return shared


def last_stages(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of the stages that no other one of them needs."""
    needed = {n for name in names for n in stages_needed(config['stages'][name], config['sources'])}
    return [name for name in names if name not in needed]


def compared(made: Sequence[Arm], names: Mapping[str, list[str]]) -> list[str]:
    """The stages that the table shows: each arm's last ones, and evaluated ones that are not the same in all."""
    lasts = {name for arm in made for name in last_stages(arm.config, names[arm.name])}
    shown = []
    for name in dict.fromkeys(name for arm in made for name in names[arm.name]):
        different = len({identity(arm.config, name) for arm in made if name in names[arm.name]}) > 1
        evaluated = any(arm.config['stages'][name].get('evaluations') for arm in made if name in names[arm.name])
        if name in lasts or (different and evaluated):
            shown.append(name)
    return shown


def shared_stages(made: Sequence[Arm], names: Mapping[str, list[str]]) -> list[tuple[Arm, str]]:
    """The stages that several arms share, each with the first arm that has it."""
    owners: dict[str, list[tuple[Arm, str]]] = {}
    for arm in made:
        for name in names[arm.name]:
            owners.setdefault(identity(arm.config, name) + name, []).append((arm, name))
    return [several[0] for several in owners.values() if len(several) > 1]


def side_by_side(made: Sequence[Arm], names: Mapping[str, list[str]], most: int) -> list[list[Arm]]:
    """The arms in groups of up to `most`, whose stages have the same programs."""
    alike: dict[tuple[str, ...], list[Arm]] = {}
    for arm in made:
        alike.setdefault(tuple(program(arm.config, name) for name in names[arm.name]), []).append(arm)
    return [several[i : i + most] for several in alike.values() for i in range(0, len(several), most)]


def check_together(made: Sequence[Arm], names: Mapping[str, list[str]]) -> None:
    """Raises InputError for what arms side by side cannot have: they share devices, and wait for one another."""
    if jax.device_count() > 1:
        raise InputError(f'--together: {jax.device_count()} devices: expected one')
    for arm in made:
        if arm.config.get('wandb'):
            raise InputError("--together: wandb is one run a process: expected wandb=''")
        for name in names[arm.name]:
            stage = arm.config['stages'][name]
            if stage.get('step_deadline'):
                raise InputError(f'--together: stages.{name}.step_deadline: expected 0')
            if 0 < stage.get('replay_every', 0) <= stage['steps']:
                raise InputError(f'--together: stages.{name}.replay_every: expected 0, or more than its steps')


def commands(folder: Path, made: Sequence[Arm], names: Mapping[str, list[str]], shared: Sequence[str]) -> list[str]:
    """Lines for a shell: first what trains stages that several arms share, then a run for each arm.

    names: of each arm its stages; shared: arguments of the sweep that every run takes over.
    """
    first = shared_stages(made, names)

    def run(arm: Arm, stage: str) -> str:
        changes = [f'--config.{field}={value}' for field, value in arm.changes.items()]
        words = ['python', '-m', 'train', *shared, f'--workdir={folder / arm.name}', f'--stage={stage}', *changes]
        return shlex.join(words)

    # Of a chain that is shared the last stage trains the others.
    lasts = {(arm.name, name) for arm, name in first}
    for arm, name in first:
        lasts -= {(arm.name, n) for n in needed_for(arm.config, name) if n != name}
    lines = [run(arm, name) for arm, name in first if (arm.name, name) in lasts]
    if lines:
        lines = ['# first, one after the other: what arms share', *lines, '# then, side by side']
    return lines + [run(arm, name) for arm in made for name in last_stages(arm.config, names[arm.name])]


def declared(path: str, *variant: str) -> tuple[list[Changes], list[str]]:
    """What the function `sweep` of a config file adds, and the names it gives; nothing where it has none."""
    spec = importlib.util.spec_from_file_location('swept_config', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    added: list[tuple[Changes, str]] = []
    declare: Callable[..., None] | None = getattr(module, 'sweep', None)
    if declare is not None:
        declare(lambda changes, name='': added.append((changes, name)), *variant)
    return [changes for changes, _ in added], [name for _, name in added]


@command('train.sweep', interrupted='the same command goes on')
def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    if '--help' in arguments or '-h' in arguments:
        print(__doc__)
        return 0
    config = parse(arguments)
    folder, last = Path(flags.FLAGS.workdir), flags.FLAGS.stage
    path = config_flags.get_config_filename(flags.FLAGS['config']).split(':', 1)
    made = arms(config, *([product(config, _SETS.value)] if _SETS.value else declared(*path)))
    names = {arm.name: needed_for(arm.config, last) if last else order(arm.config) for arm in made}
    given = [word for word in arguments[1:] if word.startswith('--config')]
    for arm in made:
        link(folder, arm, names[arm.name])
    if _PRINT.value:
        print('\n'.join(commands(folder, made, names, given)))
        return 0
    prepare()

    def run(several: Sequence[Arm], stage: str) -> None:
        run_arms(folder, several, stage, [commands(folder, [arm], names, given)[-1] for arm in several])

    groups_of_arms = [[arm] for arm in made]
    if _TOGETHER.value > 1:
        check_together(made, names)
        shared = shared_stages(made, names)
        for stage in dict.fromkeys(name for arm in made for name in names[arm.name]):  # parents before children
            owners = [arm for arm, name in shared if name == stage]
            for several in side_by_side(owners, {arm.name: [stage] for arm in owners}, _TOGETHER.value):
                run(several, stage)
        groups_of_arms = side_by_side(made, names, _TOGETHER.value)
    done = 0
    for several in groups_of_arms:
        for number, arm in enumerate(several, done + 1):
            say(f'arm {number} of {len(made)}: {arm.name}')
        run(several, last)
        done += len(several)
    groups: dict[str, list[Path]] = {}
    for arm in made:
        groups.setdefault(arm.group, []).append(folder / arm.name)
    rows = table(groups, compared(made, names))
    print(write_table(folder, rows), end='')
    print(write_page(folder, rows, _OVER.value))
    return 0


def run_arms(folder: Path, several: Sequence[Arm], last: str, command_lines: Sequence[str]) -> None:
    """Runs arms, side by side where they are more than one."""
    together = Together() if len(several) > 1 else None
    compiled = together.compiled if together else alone
    runs = {arm.name: _begun(folder, arm, line, compiled) for arm, line in zip(several, command_lines, strict=True)}
    if together:
        together({name: functools.partial(run, last) for name, run in runs.items()})
    else:
        runs[several[0].name](last)
    for arm in several:
        write_report(folder / arm.name)
    jax.clear_caches()  # programs of other shapes are of no more use; those on disk stay


def _begun(folder: Path, arm: Arm, command_line: str, compiled: Callable[[Hashable, Step], Step]) -> Run:
    """The run of an arm. Arms with the same settings of the tokenizer have the same one."""
    workdir, settings = folder / arm.name, as_dict(arm.config['tokenizer'])
    sources = {name: arm.config['sources'].get(name) for name in settings['sources']}
    tokenizer = folder / SHARED / f'tokenizer-{_digest([settings, sources])}'
    if tokenizer.exists() and not (workdir / 'tokenizer').exists():
        shutil.copytree(tokenizer, workdir / 'tokenizer')
    run = Run(arm.config, workdir, command_line, compiled)
    if not tokenizer.exists():
        shutil.copytree(workdir / 'tokenizer', tokenizer)
    return run


if __name__ == '__main__':
    sys.exit(main(sys.argv))
