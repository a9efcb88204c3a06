"""Low-rank adapters (LoRA: Hu et al. 2021, section 4.1): how they are taken back into the weights they stand beside."""

from __future__ import annotations

import dataclasses
from typing import Any

from model.layers import LORA_A, LORA_B, STACKED, adapted
from model.transformer import Model, Variables


def merge_adapters(model: Model, variables: Variables) -> tuple[Model, Variables]:
    """The same function without adapters: a model with lora_rank 0, and variables with W + alpha / r A B for each W."""
    c = model.config
    if not c.lora_rank:
        return model, variables

    def merged(tree: dict[str, Any], declared: dict[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = {}
        for name, x in tree.items():
            if isinstance(x, dict):
                whole[name] = merged(x, declared[name])
            elif name + LORA_A in tree:
                stacked = sum(axis in STACKED for axis in declared[name].axes)
                whole[name] = adapted(x, tree[name + LORA_A], tree[name + LORA_B], stacked, c)
            elif not name.endswith((LORA_A, LORA_B)):
                whole[name] = x
        return whole

    plain = Model(dataclasses.replace(c, lora_rank=0))
    return plain, {**variables, 'params': merged(variables['params'], model.declared['params'])}
