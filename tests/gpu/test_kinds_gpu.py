"""A whole train step of every kind of stack on the card, in bf16 with its kernels, against the same step in float32.

The loss and the norm of the gradient stand for all of it: a kernel that reads or writes wrong places moves both by far
more than bf16 does.
"""

import jax
import pytest

from stackwise_jax import config as config_lib
from stackwise_jax.bench.live_step import compile_step
from stackwise_jax.overrides import apply_overrides

pytestmark = pytest.mark.gpu

MLA = ["model.attention_kind=mla", "model.latent.kv_rank=96", "model.latent.query_rank=96"]
KERNEL = ["model.attention_kind=kernel"]
LINEAR = [*KERNEL, "model.kernel.form=linear"]
MASKED = ["model.attention=bidirectional", "objective.mask_variants=1"]
EXPERTS = ["model.experts.count=8", "model.experts.active=2", "model.experts.shared=1", "model.experts.d_ff=128"]
KINDS: dict[str, list[str]] = {
    "llama": [],
    "documents": ["data.isolate_documents=True"],
    "gpt2": ["model.norm=layernorm", "model.ffn=gelu", "model.positions=learned", "model.use_bias=True"],
    "windows": [*MASKED, "objective.name=mlm", "model.window=64", "model.global_every=2"],
    "diffusion": [*MASKED, "objective.name=diffusion", "objective.time=input"],
    "mla": MLA,
    "low_rank": ["model.attention_kind=mla", "model.latent.form=separate", "model.latent.kv_rank=64"],
    "mlgka": ["model.attention_kind=mlgka", "model.n_kv_heads=2", "model.latent.kv_rank=96"],
    "gaussian": KERNEL,
    "laplacian": [*KERNEL, "model.kernel.family=laplacian"],
    "uniform": [*KERNEL, "model.kernel.family=uniform"],
    "gaussian, linear time": LINEAR,
    "linear, linear time": [*LINEAR, "model.kernel.family=linear", "model.kernel.scale=4.0"],
    "experts": EXPERTS,
    "experts of mla": [*EXPERTS, *MLA],
    "adaptive norm of experts": [*EXPERTS, *MASKED, "objective.name=diffusion", "objective.time=input"],
}


def step_metrics(changes: list[str]) -> dict[str, float]:
    """Of the first update of one stack of two blocks on random tokens."""
    entries = config_lib.default()
    entries.name = "kinds"
    entries.model.update({"vocab_size": 512, "d_model": 256, "n_heads": 4, "d_ff": 512})
    entries.model.architecture.update({"n_stacks": 1, "blocks_per_stack": 2})
    entries.data.update({"seq_len": 256, "isolate_documents": False})
    entries.training.update({"mode": "end_to_end", "batch_size": 4, "phase_budget": "4 steps"})
    apply_overrides(entries, changes)
    with jax.default_matmul_precision("highest"):
        metrics = compile_step(config_lib.resolve(entries)).run()
    return {name: float(metrics[name]) for name in ("loss", "gradient_norm")}


@pytest.mark.parametrize("name", KINDS)
def test_a_step_in_bf16_is_the_step_in_float32(name: str):
    exact = step_metrics([*KINDS[name], "precision.compute=fp32", "model.attention_implementation=reference"])
    close = step_metrics([*KINDS[name], "precision.compute=bf16"])
    assert close["loss"] == pytest.approx(exact["loss"], rel=5e-3)
    assert close["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=3e-2)
    assert close != exact  # the second is not the first under another name


def test_a_step_with_fp8_matmuls_is_near_the_step_in_float32():
    exact, close = step_metrics([]), step_metrics(["training.progressive.new_stack_precision=fp8"])
    assert close["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert close["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=0.2)
    assert abs(close["loss"] - exact["loss"]) > 1e-6
