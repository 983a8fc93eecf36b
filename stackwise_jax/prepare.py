"""Prepares a corpus ahead of training: `python -m stackwise_jax.prepare --config=configs/<experiment>.py`.

Training prepares what it needs by itself; this does the same on a machine without an accelerator, and says what came
out.
"""

from stackwise_jax.schema import RunConfig


def main(config: RunConfig) -> None:
    """Prepares or opens the corpus of a config and prints what it holds."""
    from stackwise_jax.data.corpus import prepare_corpus

    corpus = prepare_corpus(config, report=lambda line: print(line, flush=True))
    tokenizer = corpus.tokenizer
    print(f"folder      {corpus.directory}")
    print(f"tokenizer   {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.digest[:16]}")
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        rate = split.text_bytes / int(split.documents[-1])
        print(
            f"{name:<11} {split.n_rows:,} rows of {corpus.seq_len} ({split.n_tokens:,} tokens) from "
            f"{split.n_documents:,} documents, {split.text_bytes:,} bytes of text ({rate:.2f} bytes a token)"
        )


if __name__ == "__main__":
    from stackwise_jax.main import run_program

    run_program(main)
