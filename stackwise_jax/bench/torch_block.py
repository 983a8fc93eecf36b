"""One block in PyTorch: `transformers`' LlamaDecoderLayer under `torch.compile`, what `bench block` stands beside.

A process of its own that prints one JSON object a measurement, with the same clock, optimiser and attention as
`bench/torch_step.py`.

The block is trained on a random hidden input, which takes no gradient, against a linear loss: the sum over its output
times a fixed random direction, divided by the number of places. Its gradient is that direction, so that nothing but the
block is computed. Neither the norm of the gradient is taken nor is it clipped.
"""

import sys
from collections.abc import Callable
from typing import Any

from stackwise_jax.bench.torch_step import (
    WEIGHTS,
    make_optimizer,
    print_measurements,
    register_plain_causal,
    run_process,
)


def run(
    shape: dict[str, Any], *, timeout_seconds: int | float, command: list[str] | None = None
) -> list[dict[str, Any]]:
    """Measures in a process of its own.

    Args:
      shape: d_model, n_heads, n_kv_heads, d_ff, seq_len, batch_size, steps.
      command: what is started, the shape as JSON its last argument; None: this file.

    Returns:
      as `torch_step.run_process`, for float32 master weights under autocast to bfloat16, and for bfloat16 weights.
    """
    command = [sys.executable, "-m", "stackwise_jax.bench.torch_block"] if command is None else command
    names = [row_name(weights) for weights in WEIGHTS]
    return run_process(command, shape, names, timeout_seconds=timeout_seconds)


def row_name(weights: str) -> str:
    """How a measurement is called in the table."""
    return f"LlamaDecoderLayer, {weights} weights"


def make_block(shape: dict[str, Any], weights: str, device: str) -> tuple[Any, Any]:
    """(the block with random weights; cosines and sines of the places, in bfloat16)."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
    from transformers.models.llama import modeling_llama  # pyright: ignore[reportMissingImports]

    config = transformers.LlamaConfig(
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=1,
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        max_position_embeddings=shape["seq_len"],
        attention_dropout=0.0,
        use_cache=False,
    )
    config._attn_implementation = register_plain_causal()
    with torch.device(device):
        block = modeling_llama.LlamaDecoderLayer(config, layer_idx=0)
        rotary = modeling_llama.LlamaRotaryEmbedding(config)
        places = torch.arange(shape["seq_len"])[None]
        rotations = rotary(torch.zeros(1, dtype=torch.bfloat16), places)
    return block.to(getattr(torch, weights)).train(), rotations


def make_step(shape: dict[str, Any], weights: str, device: str) -> tuple[Callable[[], Any], int]:
    """Returns (one update on a random hidden input, giving the sum over the first place; parameters that it trains).

    The loss itself is not computed: it is of no use to the update.
    """
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    block, rotations = make_block(shape, weights, device)
    parameters = list(block.parameters())
    optimizer = make_optimizer(parameters)
    compiled = torch.compile(block)
    places = shape["batch_size"] * shape["seq_len"]
    rows = (shape["batch_size"], shape["seq_len"], shape["d_model"])
    hidden = torch.randn(rows, device=device, dtype=torch.bfloat16)
    direction = torch.randn(rows, device=device, dtype=torch.bfloat16) / places

    def step() -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=weights == "float32"):
            output = compiled(hidden, position_embeddings=rotations)
        output = output[0] if isinstance(output, tuple) else output  # releases differ
        output.backward(direction)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return output[0, 0].detach().sum()

    return step, sum(parameter.numel() for parameter in parameters)


if __name__ == "__main__":
    print_measurements(sys.argv, row_name, make_step)
