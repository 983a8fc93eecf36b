"""Loads a folder with `transformers` and says what it found; run by an interpreter that has it and torch.

    python load_folder.py FOLDER INPUTS.npz OUTPUTS.npz

Inputs: tokens [B T], text. Outputs: logits, ids of the text, names of missing and unexpected weights.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main(folder: Path, inputs: Path, outputs: Path) -> None:
    """Writes the outputs."""
    given = np.load(inputs, allow_pickle=False)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = transformers.AutoModelForMaskedLM if "MaskedLM" in architecture else transformers.AutoModelForCausalLM
    model, found = auto.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model.float().eval()(torch.from_numpy(given["tokens"]).long()).logits.numpy()
    np.savez(
        outputs,
        logits=logits,
        ids=np.array(tokenizer(str(given["text"]), add_special_tokens=False)["input_ids"]),
        special=np.array([tokenizer.bos_token_id or -1, tokenizer.eos_token_id or -1]),
        faults=np.array(json.dumps({key: sorted(map(str, value)) for key, value in found.items() if value})),
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
