"""python -m train --config=configs/demo.py --workdir=DIR [--stage=NAME] [--config.FIELD=VALUE ...]

Runs the stage graph of a config. Finished stages are skipped; a killed one goes on from its last checkpoint.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from data.errors import InputError
from data.mixture import as_dict
from train.launch.command import command

EXAMPLES = {'config': 'configs/demo.py', 'workdir': 'runs/demo'}

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, with a variant after a colon if it has any.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, report.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator_address',
    '',
    'For runs of several processes, the same command on each: HOST:PORT of process 0, with --num_processes and '
    '--process_id; on Cloud TPU, GKE and Slurm: auto.',
)
_PROCESSES = flags.DEFINE_integer('num_processes', 1, 'How many processes there are.')
_PROCESS = flags.DEFINE_integer('process_id', 0, 'The number of this one, from 0.')
_STAGE = flags.DEFINE_string('stage', '', 'Run only this stage and those it needs; all stages when empty.')


def parse(arguments: list[str], required: Sequence[str] = ('config', 'workdir')) -> dict[str, Any]:
    """Parses flags; returns the config as a plain dictionary.

    Raises:
        InputError: an unknown flag or field, a value of the wrong type, a config that cannot be read.
    """
    try:
        rest = flags.FLAGS(arguments)
        for flag in required:
            if not flags.FLAGS[flag].value:
                example = ' '.join(f'--{name}={EXAMPLES[name]}' for name in required)
                raise InputError(f'--{flag} is missing: try {example}')
        path = config_flags.get_config_filename(flags.FLAGS['config']).split(':')[0]
        if not Path(path).is_file():
            raise InputError(f'--config={path}: no such file; expected a config such as {EXAMPLES["config"]}')
        config = _CONFIG.value.to_dict()  # where a file that cannot be loaded shows
    except InputError:
        raise
    except Exception as error:  # absl and ml_collections raise a dozen kinds, the config file any
        text = str(error).strip('"\'').replace('\\n', '\n')
        if 'Traceback' in text:  # of the config file: its last line says what was wrong
            text = text.strip().splitlines()[-1]
        line = ' '.join(text.split())
        raise InputError(line or type(error).__name__) from None
    if len(rest) > 1:
        raise InputError(f'{rest[1]!r} is no flag: expected --NAME=VALUE')
    return as_dict(config)


@command('train', interrupted='the same command goes on from the last checkpoint')
def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    if '--help' in arguments or '-h' in arguments:
        print(__doc__)
        print(flags.FLAGS.get_help())
        return 0
    config = parse(arguments)
    # Imported late: a typo in a flag should not wait for JAX.
    from train.launch.graph import Run
    from train.launch.host import is_primary, join, prepare, say
    from train.report import write_report

    prepare()
    join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    workdir = Path(flags.FLAGS.workdir)
    run = Run(config, workdir, 'python -m train ' + ' '.join(map(shlex.quote, arguments[1:])))
    run(flags.FLAGS.stage)
    if is_primary():
        say(f'report: {write_report(workdir)}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
