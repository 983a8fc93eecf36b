"""Weights, config and tokenizer between a folder of Hugging Face's `transformers` and a run folder, either way.

    python -m stackwise_jax.convert --from=gpt2 --to=runs/gpt2             # then generate and evaluate read runs/gpt2
    python -m stackwise_jax.convert --from=runs/quickstart --to=exported   # then AutoModelForCausalLM.from_pretrained

BERT, ModernBERT, GPT-2 and LLaMA, as safetensors; pickle files are refused. Needs the `hf` extra.
"""

from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax.command import run_command
from stackwise_jax.errors import UserError


def make_options() -> flags.FlagValues:
    """The flags of this program."""
    options = flags.FlagValues()
    flags.DEFINE_string("from", None, "A folder of transformers, or a finished run folder.", flag_values=options)
    flags.DEFINE_string("to", None, "The folder to write; it must not exist.", flag_values=options)
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    dtype_help = "Of exported weights. auto: as the blocks of the run are stored."
    flags.DEFINE_enum("dtype", "auto", dtypes, dtype_help, flag_values=options)
    size_help = "Gigabytes of an exported file, at most."
    flags.DEFINE_float("shard_gb", 5.0, size_help, lower_bound=1e-6, flag_values=options)
    return options


def main(options: Any) -> None:
    """Tells by its config.json which of the two a folder is, and writes the other."""
    from stackwise_jax.interop.huggingface import export_folder, import_folder, is_run

    source, target = _folder(options, "from"), _folder(options, "to")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to={target} exists; give a folder that does not")
    if target.exists():
        target.rmdir()

    def say(line: str) -> None:
        print(line, flush=True)

    if is_run(source):
        export_folder(source, target, dtype=options.dtype, shard_bytes=round(1e9 * options.shard_gb), say=say)
    else:
        import_folder(source, target, say)
    say(f"written: {target}")


def _folder(options: Any, flag: str) -> Path:
    value = options[flag].value
    if not value:
        raise UserError(f"--{flag} is missing; give a folder")
    return Path(value).expanduser()


if __name__ == "__main__":
    run_command(main, make_options(), __doc__ or "")
