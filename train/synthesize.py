"""Records by one stage of a config, without the rest of the run.

python -m train.synthesize --config=FILE --output=DIR [--stage=NAME] [--workdir=RUN] [--config.FIELD=VALUE ...]

The stage is one that makes records: models answer prompts, judges vote on the answers, and what they accept is written
to DIR/NAME/records (ArrayRecord; each record says where it is from), with DIR/NAME/report.json about yield, agreement
and cost. A killed command, started again, goes on with the block of prompts it was at.

  --config     the config; its stage is of the kind attempts, revise, label or rewrite (fields: train/stages.py)
  --output     the folder to write to
  --stage      which stage; may be left out where only one makes records
  --workdir    the run that has the checkpoints, if the config names them as stages: models.generator='sft' is RUN/sft;
               paths with a slash in them are taken as they are
  --config.X   any field of the config, as in `python -m train`
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from data.errors import InputError, did_you_mean
from train.__main__ import EXAMPLES, parse
from train.launch.command import command

EXAMPLES['output'] = 'records'
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write to.')


def alone(config: Mapping[str, Any], stage: str, workdir: str) -> dict[str, Any]:
    """The config with one stage ('' for the only one that makes records), which finds what it needs in a run.

    Raises:
        InputError: no such stage, one that makes no records, or one that needs others where `workdir` is ''.
    """
    from train.act.make import RECORDS
    from train.launch.edges import is_folder
    from train.stages import get_kind

    makers = [name for name, fields in config['stages'].items() if get_kind(fields['kind']).make is not None]
    if not stage and len(makers) != 1:
        raise InputError(f'--stage is missing: {", ".join(makers) or "no stage"} of this config makes records')
    name = stage or makers[0]
    if name not in makers:
        raise InputError(f'--stage: no stage {name!r} that makes records{did_you_mean(name, makers)}')

    def found(needed: str, field: str) -> str:
        if not workdir:
            raise InputError(f'{field} needs stage {needed!r}: expected --workdir=RUN, the folder of the run with it')
        return f'{workdir}/{needed}'

    fields, sources = dict(config['stages'][name]), dict(config['sources'])
    fields['models'] = {
        role: address if not address or is_folder(address) else found(address, f'stages.{name}.models.{role}')
        for role, address in fields['models'].items()
    }
    spec = sources.get(fields['source'], {})
    if spec.get('type') == 'stage':
        path = f'{found(spec["name"], f"stages.{name}.source")}/{RECORDS}'
        sources[fields['source']] = {'type': 'arrayrecord', 'path': path}
    return {**config, 'sources': sources, 'stages': {name: fields}}


@command('train.synthesize', interrupted='the same command goes on from the last block')
def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    if '--help' in arguments or '-h' in arguments:
        print(__doc__)
        return 0
    config = parse(arguments, required=('config', 'output'))
    # Imported late: a typo in a flag should not wait for JAX.
    from train.launch.graph import Run
    from train.launch.host import prepare

    prepare()
    made = alone(config, flags.FLAGS.stage, flags.FLAGS.workdir or '')
    Run(made, Path(flags.FLAGS.output), 'python -m train.synthesize ' + ' '.join(map(shlex.quote, arguments[1:])))()
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
