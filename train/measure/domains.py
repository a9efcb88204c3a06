"""What evaluations are about, what stages were trained on, and what keeps the one apart from the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.mixture import as_dict, sources_of
from train.checkpoint import read_json, split_address
from train.launch.edges import is_folder, parents

Specs = dict[str, dict[str, Any]]


def trained_on(folder: Path, ancestors: bool = True) -> Specs:
    """What a stage learnt from, by name: sources and tasks, and with `ancestors` those of the stages it comes from."""
    record = read_json(folder / 'config.json')
    stage = record.get('stage')
    if stage is None:  # an imported model
        return {str(folder): {'type': 'checkpoint'}}
    found: Specs = {}
    if stage.get('task', {}).get('name'):
        found[f'{folder.name}.task'] = {'type': 'task', **stage['task']}
    for name in sorted(sources_of(stage.get('mixture', ())) | {stage.get('source') or ''}):
        spec = record['sources'].get(name)
        if spec and spec['type'] == 'stage':
            found |= trained_on(folder.parent / spec['name'], ancestors)
        elif spec:
            found[name] = spec
    for address in parents(stage) if ancestors else ():
        name = split_address(address)[0]
        found |= trained_on(Path(name) if is_folder(name) else folder.parent / name)
    return found


def domain(spec: Any) -> str:
    """What a source or an evaluation is about: the name of a task or data set, a path, or a type of corpus."""
    about = _about(spec)
    return str(about.get('name') or about.get('path') or about.get('type', ''))


def contamination(evaluation: Any, name: str, data: Specs) -> str:
    """What keeps the items of an evaluation out of the data a model was trained on, source by source, in one line.

    That is: the other split of the same data; that a program draws its problems, which are neither text of a corpus nor
    another task's; or that `data.curate decontaminate` has held it against this evaluation. Else nothing is known.
    """
    about, given = _about(evaluation), as_dict(evaluation)
    split = about.get('split', 'heldout' if 'task' in given else '')
    names = {name, domain(evaluation), Path(domain(evaluation)).name}
    same, unknown, cleaned = [], [], []
    for source, spec in data.items():
        inner = _about(spec)
        path = Path(str(inner.get('path', ''))) / 'metadata.json'
        steps = read_json(path).get('curated', ()) if path.is_file() else ()
        if domain(inner) == domain(evaluation) and inner.get('path') == about.get('path'):
            if inner.get('split', 'train') == split or split != 'heldout':
                same.append(source)
        elif any(names & {*step.get('items', ())} for step in steps):
            cleaned.append(source)
        elif inner['type'] != 'task' or 'path' in inner or not ('task' in given or given['type'] == 'text'):
            unknown.append(source)
    words = [f'trained on the same data ({", ".join(same)})'] if same else []
    words += [f'removed from {", ".join(cleaned)}'] if cleaned else []
    words += [f'not checked against {", ".join(unknown)}'] if unknown else []
    words += ['held out by its split'] if split == 'heldout' and not same else []
    return '; '.join(words) or 'in no training data'


def _about(spec: Any) -> dict[str, Any]:
    """The innermost source, or the task, of a source or an evaluation."""
    given = as_dict(spec)
    inner = given.get('task') or given.get('source')
    return _about(inner) if hasattr(inner, 'keys') else given
