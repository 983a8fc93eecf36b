"""Writes what `transformers` computes on every case. Run by an interpreter that has it and torch:

    python tests/reference/make_golden.py          # tests/golden/, anew
    python tests/reference/make_golden.py FOLDER   # elsewhere, with whole gradients; of some cases: FOLDER NAME ..

A golden file holds names and shapes of the weights, the logits, `ENTRIES_PER_GRADIENT` entries of every gradient, and
its Euclidean norm.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from cases import CASES, GOLDEN, LATENT_CASES, chosen_entries, rows_of
from theirs import run


def main(folder: Path, names: list[str], *, whole: bool) -> None:
    """Writes one file a case; all where no names are given."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    every = CASES | LATENT_CASES
    for name in names or every:
        case = every[name]
        logits, gradients = run(case, rows_of(case))
        arrays: dict[str, np.ndarray] = {"logits": logits, "versions": np.array(versions)}
        arrays["shapes"] = np.array(json.dumps({weight: gradient.shape for weight, gradient in gradients.items()}))
        for weight, gradient in gradients.items():
            if whole:
                arrays[f"gradient {weight}"] = gradient
            else:
                arrays[f"gradient {weight}"] = gradient.reshape(-1)[chosen_entries(weight, gradient.size)]
                arrays[f"norm {weight}"] = np.linalg.norm(gradient.astype(np.float64)).astype(np.float32)
        np.savez_compressed(folder / f"{name}.npz", **arrays)
        print(f"{name}: {len(gradients)} weights, largest logit {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else GOLDEN, sys.argv[2:], whole=bool(sys.argv[1:]))
