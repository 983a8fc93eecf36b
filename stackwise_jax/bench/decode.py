"""How fast a finished rack is read: prefill and one token after another, by the very program of `generate`.

A rack of random weights in the storage of a frozen trunk, made on the device: milliseconds a token, tokens/s, and the
bytes of weights that a token must read over the time that it takes, beside the rate of a large copy on the same device.
By default the 70B shape in nvfp4, which needs about 42 GiB of device memory:
python -m stackwise_jax.bench decode --precision=nvfp4 --prompt=512 --tokens=64
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax import config as config_lib
from stackwise_jax.bench.live_step import program_bytes
from stackwise_jax.checks.choices import PRECISIONS, TRUNK_PRECISIONS
from stackwise_jax.errors import UserError
from stackwise_jax.schema import RunConfig

COPY_BYTES = {"cpu": 2**26}  # of the array that is copied to measure the device's rate, by backend
LARGE_COPY_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class Figures:
    """What reading took.

    Attributes:
      prefill_seconds: until the first new token of all rows was there.
      token_seconds: of each later one.
      compile_seconds: of the two programs together: one new token, and all of them.
      token_bytes: of weights that a token must read, however many rows there are: stored blocks and the output table.
      copy_rate: bytes a second that a large copy reads and writes.
      rack_bytes, store_bytes: of all weights, and of keys and values.
      program_bytes: all that the program has on the device, by the compiler's count; None: unknown.
      peak_bytes: by the allocator, the making of the rack included; None where there is none (CPU).
    """

    prefill_seconds: float
    token_seconds: float
    compile_seconds: float
    token_bytes: int
    copy_rate: float
    rack_bytes: int
    store_bytes: int
    program_bytes: int | None
    peak_bytes: int | None


def make_options() -> flags.FlagValues:
    """The flags of this benchmark."""
    options = flags.FlagValues()
    flags.DEFINE_integer("blocks", 80, "Blocks of the model.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("d_model", 8192, "Width.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer("n_heads", 64, "Query heads.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("n_kv_heads", 8, "Key-value heads.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("d_ff", 28672, "Width of the feed-forward.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("vocab_size", 32000, "Rows of the token table.", lower_bound=16, flag_values=options)
    flags.DEFINE_enum("precision", "nvfp4", TRUNK_PRECISIONS, "Storage of the blocks.", flag_values=options)
    flags.DEFINE_enum("compute", "bf16", PRECISIONS, "Of arithmetic, keys and values.", flag_values=options)
    flags.DEFINE_integer("batch_size", 1, "Rows that are continued.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("prompt", 512, "Tokens of each prompt.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("tokens", 64, "New tokens a row.", lower_bound=2, flag_values=options)
    flags.DEFINE_integer(
        "repeats", 3, "Timed runs of each program, after one of warm-up.", lower_bound=1, flag_values=options
    )
    flags.DEFINE_string("json", "", "A file that the figures are written to.", flag_values=options)
    return options


def main(options: Any) -> None:
    """Measures and prints a few lines."""
    config = make_config(options)
    import jax

    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.models.rack import count_parameters

    start_backend()
    check_room(config, options)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {options.blocks} blocks of width {options.d_model} in "
        f"{options.precision}, {count_parameters(config.model):,} parameters; {options.batch_size} row(s), prompts of "
        f"{options.prompt} tokens and {options.tokens} new ones in {options.compute}",
        flush=True,
    )
    figures = measure(config, options)
    print(describe(figures, options))
    if options.json:
        document = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        document |= {"config": dataclasses.asdict(config), **dataclasses.asdict(figures)}
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def make_config(options: Any) -> RunConfig:
    """A causal run of the asked shape.

    Raises:
      UserError: sizes that do not fit.
    """
    entries = config_lib.default()
    entries.name = "bench_decode"
    for name in ("d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size"):
        entries.model[name] = options[name].value
    entries.model.architecture.update({"n_stacks": options.blocks, "blocks_per_stack": 1})
    entries.data.seq_len = options.prompt + options.tokens
    entries.precision.update({"compute": options.compute, "trunk": options.precision})
    return config_lib.resolve(entries)


def check_room(config: RunConfig, options: Any) -> None:
    """UserError where the rack, with keys and values, is larger than the memory that is free."""
    from stackwise_jax.memory.budget import readable_bytes
    from stackwise_jax.memory.placement import device_room, host_room

    room, needed = device_room(), sum(planned_bytes(config, options))
    room = host_room() if room is None else room
    if room is not None and needed > room:
        raise UserError(
            f"--blocks={options.blocks} of --d_model={options.d_model} in --precision={options.precision} take "
            f"{readable_bytes(needed)} with keys and values, and {readable_bytes(room)} are free; lower one of them"
        )


def planned_bytes(config: RunConfig, options: Any) -> tuple[int, int]:
    """Bytes of the rack, and of keys and values, from shapes alone."""
    import jax

    from stackwise_jax.bench.random_rack import random_rack
    from stackwise_jax.memory.precision import DTYPES
    from stackwise_jax.models.rack import init_key_values

    def make() -> tuple[list[Any], list[Any]]:
        rack, slots = random_rack(config), options.prompt + options.tokens - 1
        dtype = DTYPES[config.precision.compute]
        store = init_key_values(rack, config.model, options.batch_size, slots, dtype=dtype)
        return jax.tree.leaves(rack), jax.tree.leaves(store)

    rack, store = (sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) for leaves in jax.eval_shape(make))
    return rack, store


def measure(config: RunConfig, options: Any) -> Figures:
    """Makes the rack, compiles and times both programs: one new token, and all of them."""
    import jax

    from stackwise_jax.bench.random_rack import block_bytes, random_rack
    from stackwise_jax.memory.precision import item_bytes
    from stackwise_jax.models.rack import output_table

    rate = copy_rate()
    rack = jax.block_until_ready(random_rack(config))
    first, first_seconds = compile_reading(config, options, rack, 1)
    whole, whole_seconds = compile_reading(config, options, rack, options.tokens)
    prefill, all_tokens = (median_seconds(run, options.repeats) for run in (first, whole))
    table = output_table(rack["head"], rack["embedding"])
    rack_bytes, store_bytes = planned_bytes(config, options)
    stats = jax.local_devices()[0].memory_stats()
    return Figures(
        prefill_seconds=prefill,
        token_seconds=(all_tokens - prefill) / (options.tokens - 1),
        compile_seconds=first_seconds + whole_seconds,
        token_bytes=block_bytes(rack) + table.size * item_bytes(config.precision.compute),
        copy_rate=rate,
        rack_bytes=rack_bytes,
        store_bytes=store_bytes,
        program_bytes=program_bytes(whole.compiled),
        peak_bytes=stats["peak_bytes_in_use"] if stats else None,
    )


@dataclasses.dataclass(frozen=True)
class Reading:
    """A compiled reading of prompts, with what it is called with."""

    compiled: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)


def compile_reading(config: RunConfig, options: Any, rack: Any, n_tokens: int) -> tuple[Reading, float]:
    """The program that continues random prompts by `n_tokens`, and the seconds that compiling it took."""
    import jax
    import numpy as np

    from stackwise_jax.generate.autoregressive import generate_rows
    from stackwise_jax.memory.precision import DTYPES

    B, V = options.batch_size, config.model.vocab_size
    prompts = np.random.default_rng(0).integers(V, size=(B, options.prompt), dtype=np.int32)
    arguments = jax.device_put((rack, prompts, np.zeros(B, np.int32), jax.random.key(0), np.ones(V, bool)))
    drawing = (1.0, 0, 1.0, 1.0)  # temperature, top-k, top-p, penalty: plain draws, which sort nothing
    started = time.perf_counter()
    lowered = generate_rows.lower(*arguments, config.model, n_tokens, drawing, None, DTYPES[config.precision.compute])
    return Reading(lowered.compile(), arguments), time.perf_counter() - started


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of several runs to their ends, after one of warm-up."""
    import jax

    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def copy_rate(repeats: int = 10) -> float:
    """Bytes a second that copying a large array reads and writes together."""
    import jax
    import jax.numpy as jnp

    size = COPY_BYTES.get(jax.default_backend(), LARGE_COPY_BYTES)
    array = jnp.zeros(size // 4, jnp.uint32)
    copy = jax.jit(jnp.copy)
    return 2 * size / median_seconds(lambda: copy(array), repeats)


def describe(figures: Figures, options: Any) -> str:
    """The figures as a few lines."""
    from stackwise_jax.memory.budget import readable_bytes

    seconds, rate = figures.token_seconds, figures.token_bytes / figures.token_seconds
    held = [
        f"rack {readable_bytes(figures.rack_bytes)}",
        f"keys and values {readable_bytes(figures.store_bytes)}",
        f"the program with both {readable_bytes(figures.program_bytes)}" if figures.program_bytes else "",
        f"the allocator's peak {readable_bytes(figures.peak_bytes)}" if figures.peak_bytes else "",
    ]
    read = options.batch_size * options.prompt
    return "\n".join(
        [
            f"a large copy: {figures.copy_rate / 1e9:.0f} GB/s",
            f"prefill: {1e3 * figures.prefill_seconds:.1f} ms, {read / figures.prefill_seconds:.0f} tokens/s",
            f"decode: {1e3 * seconds:.2f} ms a token, {options.batch_size / seconds:.1f} tokens/s",
            f"weights: {figures.token_bytes / 1e9:.4g} GB a token at {rate / 1e9:.4g} GB/s, "
            f"{100 * rate / figures.copy_rate:.1f} % of the copy",
            f"memory: {', '.join(filter(None, held))}",
            f"compiled in {figures.compile_seconds:.1f} s, both programs",
        ]
    )
