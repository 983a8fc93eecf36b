"""The step of the same model in PyTorch: `transformers` under `torch.compile`, what `bench step` stands beside.

The parent starts this file as a process of its own, so that the two frameworks never share the device's memory; it
prints one JSON object a measurement. PyTorch and transformers are no dependencies: they are imported in that process.
The model comes as a `config.json` (`interop/configs.py`), so that it is the very one that is measured beside it.

What is measured is meant to be hard to beat: fused AdamW, no mask array where attention needs none (the stock path
builds one under `torch.compile`, which costs it the flash kernels), and the masks of local attention made once, not in
every step. The loss is that of `transformers`, which takes the logits of all places also where few are asked for.
"""

import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

WARMUP_STEPS = 5
WEIGHTS = ("float32", "bfloat16")  # master weights of float32 under autocast; everything in bfloat16
PLAIN = {"plain_causal": True, "plain_bidirectional": False}  # attention without a mask array: whether it is causal
# How each family attends; several are measured one after another, because which of them is fastest is not known.
ATTENTIONS = {
    "gpt2": ("plain_causal",),
    "llama": ("plain_causal",),
    "bert": ("plain_bidirectional",),
    "modernbert": ("sdpa", "flex_attention"),
}

MakeStep = Callable[[str], tuple[Callable[[], Any], int]]
"""(device) -> (one update, giving the loss or what else is finite while all is well; how many parameters it trains)."""


def missing_packages() -> list[str]:
    """Which of the packages needed are not installed."""
    return [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a model is measured with: an attention of its family's `ATTENTIONS`, and one of `WEIGHTS`."""

    attention: str
    weights: str

    @property
    def name(self) -> str:
        """How its measurement is called in the table."""
        library = "transformers" if self.attention in PLAIN else f"transformers with {self.attention}"
        return f"{library}, {self.weights} weights"


def kinds_of(family: str) -> list[Kind]:
    """The measurements of a family, in order."""
    return [Kind(attention, weights) for attention in ATTENTIONS[family] for weights in WEIGHTS]


def run(
    shape: dict[str, Any], *, timeout_seconds: int | float, command: list[str] | None = None
) -> list[dict[str, Any]]:
    """Measures in a process of its own.

    Args:
      shape: model (entries of its `config.json`), masked_share (of the places that are asked for; None: causal),
        seq_len, batch_size, steps.
      command: what is started, the shape as JSON its last argument; None: this file.

    Returns:
      as `run_process`, for each of `kinds_of` the model's family.
    """
    command = [sys.executable, "-m", "stackwise_jax.bench.torch_step"] if command is None else command
    names = [kind.name for kind in kinds_of(shape["model"]["model_type"])]
    return run_process(command, shape, names, timeout_seconds=timeout_seconds)


def run_process(
    command: list[str], shape: dict[str, Any], names: list[str], *, timeout_seconds: int | float
) -> list[dict[str, Any]]:
    """Starts a process that prints a line of JSON a measurement, and reads these.

    Args:
      command: the shape as JSON is added as its last argument.
      names: of the measurements that are expected.

    Returns:
      for each of `names` a dict with `name`, and either `failed`, one line, or what `measure` returns.
    """
    try:
        done = subprocess.run(
            [*command, json.dumps(shape)], capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
        output, complaints = done.stdout, done.stderr
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        complaints = f"not done after {timeout_seconds:.0f} s"
    found = {entry["name"]: entry for entry in map(json.loads, filter(_is_object, output.splitlines()))}
    if any(name not in found for name in names):
        print(complaints[-4000:], file=sys.stderr)
    failed = {"failed": ([line for line in complaints.splitlines() if line.strip()] or ["it ended without a word"])[-1]}
    return [found.get(name, {"name": name, **failed}) for name in names]


def _is_object(line: str) -> bool:
    return line.startswith('{"name"')


def register_plain_causal() -> str:
    """Makes attention that is causal without a mask array known to `transformers`; returns its name there."""
    return _register_plain("plain_causal")


def _register_plain(attention: str) -> str:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    def plain_attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Any, None]:
        grouped = query.shape[1] != key.shape[1]
        attend = torch.nn.functional.scaled_dot_product_attention
        mixed = attend(query, key, value, is_causal=PLAIN[attention], scale=scaling, enable_gqa=grouped)
        return mixed.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register(attention, plain_attention)
    return attention


def make_model(shape: dict[str, Any], attention: str) -> Any:
    """The model with random weights and the head of its objective."""
    import transformers  # pyright: ignore[reportMissingImports]

    entries = {name: value for name, value in shape["model"].items() if name != "model_type"}
    is_causal = shape["masked_share"] is None
    kind = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForMaskedLM
    config = transformers.AutoConfig.for_model(shape["model"]["model_type"], **entries, use_cache=False)
    named = _register_plain(attention) if attention in PLAIN else attention
    model = kind.from_config(config, attn_implementation=named)
    # The name of GPT-2's class does not tell its loss, and a warning about that would cut the graph in two.
    model.loss_type = "ForCausalLM" if is_causal else "ForMaskedLM"
    return model


def make_inputs(shape: dict[str, Any], model: Any, device: str) -> dict[str, Any]:
    """Random tokens and what is asked of them; of masked models the hidden places alone, each at random."""
    import torch  # pyright: ignore[reportMissingImports]

    size = (shape["batch_size"], shape["seq_len"])
    tokens = torch.randint(shape["model"]["vocab_size"], size, device=device)
    if shape["masked_share"] is None:
        return {"input_ids": tokens, "labels": tokens}
    is_hidden = torch.rand(size, device=device) < shape["masked_share"]
    inputs = {"input_ids": tokens.masked_fill(is_hidden, 0), "labels": tokens.masked_fill(~is_hidden, -100)}
    if shape["model"]["model_type"] != "modernbert":
        return inputs
    return inputs | {"attention_mask": make_masks(model, shape["seq_len"], device)}


def make_masks(model: Any, seq_len: int, device: str) -> dict[str, Any]:
    """The masks of a model with local attention by kinds of layers, made by `transformers` as its model would.

    Out of the step, and outside `torch.compile`, where a layer that reaches all places is known to need none.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import masking_utils  # pyright: ignore[reportMissingImports]

    row = torch.empty((1, seq_len, 1), device=device, dtype=model.dtype)  # all rows are masked alike
    given = {"config": model.config, "inputs_embeds": row, "attention_mask": None}
    return {
        "full_attention": masking_utils.create_bidirectional_mask(**given),
        "sliding_attention": masking_utils.create_bidirectional_sliding_window_mask(**given),
    }


def make_step(attention: str, shape: dict[str, Any], weights: str, device: str) -> tuple[Callable[[], Any], int]:
    """Returns (one update on random tokens, giving the loss; how many parameters it trains)."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model = make_model(shape, attention).to(device=device, dtype=getattr(torch, weights)).train()
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters)
    compiled = torch.compile(model)
    inputs = make_inputs(shape, model, device)

    def step() -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=weights == "float32"):
            loss = compiled(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step, sum(parameter.numel() for parameter in parameters)


def make_optimizer(parameters: list[Any]) -> Any:
    """Fused AdamW with decay on matrices alone."""
    import torch  # pyright: ignore[reportMissingImports]

    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-4, betas=(0.9, 0.95), fused=True)


def step_seconds(step: Callable[[], Any], steps: int, device: str) -> list[float]:
    """Seconds of each of `steps` updates that follow each other without a wait; on a GPU by its own clock."""
    import torch  # pyright: ignore[reportMissingImports]

    if device != "cuda":
        ends = [time.perf_counter()]
        for _ in range(steps):
            step()
            ends.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


def measure(name: str, make: MakeStep, steps: int) -> dict[str, Any]:
    """One measurement: of the median of `steps` steps, after `WARMUP_STEPS`.

    Returns:
      a dict with `name`, `step_seconds`, `compile_seconds`, `peak_bytes` (by the allocator, from the start; None on a
      CPU), `parameters` and `versions`.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step, parameters = make(device)
    started = time.perf_counter()
    step()  # compiles
    if device == "cuda":
        torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - started
    step_seconds(step, WARMUP_STEPS, device)
    seconds = step_seconds(step, steps, device)
    last = float(step().detach())
    if not abs(last) < float("inf"):
        raise FloatingPointError(f"loss={last} after {steps} steps")
    return {
        "name": name,
        "step_seconds": sorted(seconds)[len(seconds) // 2],
        "compile_seconds": compile_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "parameters": parameters,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def print_measurements(
    argv: list[str],
    row_name: Callable[[str], str],
    make_step: Callable[[dict[str, Any], str, str], tuple[Callable[[], Any], int]],
) -> None:
    """Measures the shape that the last argument describes, with each kind of weights; what `run_process` starts."""
    import torch  # pyright: ignore[reportMissingImports]

    shape = json.loads(argv[-1])
    for weights in WEIGHTS:
        make = functools.partial(make_step, shape, weights)
        print(json.dumps(measure(row_name(weights), make, shape["steps"])), flush=True)
        torch._dynamo.reset()
        gc.collect()  # or what the first kind leaves behind would count as the second's
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main(argv: list[str]) -> None:
    """Measures the shape that the last argument describes with every attention of its family."""
    for attention in ATTENTIONS[json.loads(argv[-1])["model"]["model_type"]]:
        names = {weights: Kind(attention, weights).name for weights in WEIGHTS}
        print_measurements(argv, names.__getitem__, functools.partial(make_step, attention))


if __name__ == "__main__":
    main(sys.argv)
