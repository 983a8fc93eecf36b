"""Logits and gradients of a case by PyTorch and `transformers`. Needs both; imports nothing of this package."""

from typing import Any

import numpy as np
import torch
import transformers
from cases import Case, Rows, draw


def build(case: Case) -> Any:
    """The model of a case in evaluation mode, float32, with the drawn weights."""
    entries = {key: value for key, value in case.config.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(case.config["model_type"], **entries)
    config._attn_implementation = "eager"
    is_masked = case.config["model_type"] in ("bert", "modernbert")
    auto = transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(draw(name, tuple(weight.shape))))
    model.tie_weights()
    return model


def run(case: Case, rows: Rows) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(logits [2 T V], gradients by name of the summed cross-entropy of all places that are not padding)."""
    model = build(case)
    tokens, targets = torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.targets).long()
    logits = model(tokens, **_inputs(case, rows)).logits
    is_real = torch.from_numpy(rows.segments > 0)
    torch.nn.functional.cross_entropy(logits[is_real], targets[is_real], reduction="sum").backward()
    gradients = {name: weight.grad.numpy() for name, weight in model.named_parameters() if weight.grad is not None}
    return logits.detach().numpy(), gradients


def _inputs(case: Case, rows: Rows) -> dict[str, Any]:
    family = case.config["model_type"]
    given: dict[str, Any] = {}
    if case.token_types:
        given["token_type_ids"] = torch.from_numpy(rows.token_types).long()
    if not case.packed:
        return given | {"attention_mask": torch.from_numpy((rows.segments > 0).astype(np.int64))}
    place = np.arange(rows.tokens.shape[1])
    visible = rows.segments[:, None, :, None] == rows.segments[:, None, None, :]
    if family not in ("bert", "modernbert"):
        visible = visible & (place[None, :] <= place[:, None])
    given |= {"position_ids": torch.from_numpy(rows.positions).long(), "attention_mask": _additive(visible)}
    if family == "modernbert":
        near = np.abs(place[:, None] - place[None, :]) <= case.config["local_attention"] // 2
        masks = {"full_attention": _additive(visible), "sliding_attention": _additive(visible & near)}
        given["attention_mask"] = masks
    return given


def _additive(visible: np.ndarray) -> Any:
    return torch.from_numpy(np.where(visible, 0.0, np.finfo(np.float32).min).astype(np.float32))
