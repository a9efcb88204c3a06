"""Problems of the optional package reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760)."""

import functools
import random
from dataclasses import dataclass
from typing import Any

from data.errors import InputError, did_you_mean
from data.tasks import ProceduralTask, Prompt, Verdict, final_answer, register
from data.tasks.records import canonical

# Of the 106 data sets of version 0.1.25, measured in November 2026 with default options on 40 to 150 problems, those
# - whose reference is one line of at most 2,000 characters and scores exactly 1 after a trip through JSON,
# - where nothing of 14 wrong kinds does (noise, the answer cut, continued, negated, the question, another answer, ...),
# - that give any problem by its index, the same each time, in under 0.05 seconds,
# - and that never evaluate an answer as Python, as binary_matrix, spiral_matrix and string_insertion do.
DATASETS = """
aiw arc_1d base_conversion basic_arithmetic bf binary_alternation bitwise_arithmetic caesar_cipher calendar_arithmetic
chain_sum circuit_logic color_cube_rotation count_bits count_primes course_schedule cryptarithm dice emoji_mystery
family_relationships figlet_font game_of_life gcd group_anagrams isomorphic_strings jugs largest_island lcm leg_counting
letter_counting mahjong_puzzle maze needle_haystack number_filtering number_sequence number_sorting
palindrome_generation path_star prime_factorization products ransom_note rectangle_count
rotten_oranges self_reference sentence_reordering shortest_path simple_equations simple_geometry
string_splitting string_synthesis syllogism tsumego word_sequence_reversal word_sorting
""".split()
PROBLEMS = 2**31
MAX_ANSWER = 2000  # characters


@register('reasoning_gym')
@dataclass(kw_only=True)
class ReasoningGym(ProceduralTask):
    """Problems of one of DATASETS, asked as the package asks them; the answer is the X of a last line `Answer: X`.

    The package gives shares of the score to answers that only resemble the right one, or to any: here an answer that
    it does not hold entirely right scores 0. Raises InputError where the package is not installed.
    """

    dataset: str = 'chain_sum'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset not in DATASETS:
            raise InputError(f'task {self.name!r}: dataset {self.dataset!r}{did_you_mean(self.dataset, DATASETS)}')
        self._source = _open(self.dataset)

    def draw(self, rng: random.Random) -> tuple[str, Any]:
        item = self._source[rng.randrange(PROBLEMS)]
        return canonical(item['question']), item

    def pose(self, key: str, problem: Any, rng: random.Random) -> Prompt:
        return Prompt(problem['question'].strip(), f'Answer: {problem["answer"]}', key, {'item': problem})

    def verify(self, prompt: Prompt, completion: str) -> Verdict:
        answer = final_answer(completion)
        if not answer or len(answer) > MAX_ANSWER:
            return Verdict(0.0, (), f'an answer of more than {MAX_ANSWER} characters' if answer else 'no final answer')
        try:
            right = self._source.score_answer(answer, prompt.info['item']) >= 1
        except Exception:  # whatever its parsers make of noise
            right = False
        return Verdict(float(right), (), '' if right else 'wrong answer')


@functools.cache
def _open(dataset: str) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(
            f'task reasoning_gym: the package is not here: pip install -r requirements-reasoning.txt ({error})'
        ) from error
    return reasoning_gym.create_dataset(dataset, seed=0, size=PROBLEMS)
