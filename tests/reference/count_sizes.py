"""Counts the parameters of models by their `config.json` with `transformers`, without their memory.

python count_sizes.py < {"name": {entries of config.json}}     # prints {"name": parameters}
"""

import json
import sys

import torch
import transformers


def count(entries: dict) -> int:
    """Parameters of a model with its language-model head, tied tables counted once."""
    kind = entries.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **entries)
    is_masked = kind in ("bert", "modernbert")
    auto = transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return sum(weight.numel() for weight in auto.from_config(config).parameters())


if __name__ == "__main__":
    print(json.dumps({name: count(entries) for name, entries in json.load(sys.stdin).items()}))
