"""Prepares a corpus ahead of training: `python -m stackwise_jax.prepare --config=configs/<experiment>.py`.

Training prepares what it needs by itself; this does the same on a machine without an accelerator, checks every byte of
what is there already, and says what came out. The folder can be carried to another machine (`data.prepared`).
"""

from absl import flags

from stackwise_jax.schema import RunConfig

FLAGS = flags.FLAGS
flags.DEFINE_bool("download", False, "First download and prepare the TensorFlow Datasets that are not there yet.")


def main(config: RunConfig) -> None:
    """Prepares or opens the corpus of a config, reads all of it, and prints what it holds."""
    from stackwise_jax.checks.text import weighted_sources
    from stackwise_jax.data.catalog import download_datasets
    from stackwise_jax.data.corpus import prepare_corpus

    def report(line: str) -> None:
        print(line, flush=True)

    data = config.data
    if FLAGS["download"].value:
        mixtures = [mixture for mixture in (data.source, data.validation_source) if mixture]
        sources = [source for mixture in mixtures for source, _ in weighted_sources(mixture)]
        download_datasets(sources, data.tfds_dir, report)
    corpus = prepare_corpus(config, report=report, check_all=True)
    tokenizer = corpus.tokenizer
    print(f"folder      {corpus.directory}")
    print(f"tokenizer   {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.digest[:16]}")
    for name, split in (("train", corpus.train), ("validation", corpus.validation)):
        print(f"{name:<11} {split.n_rows:,} rows of {corpus.seq_len} ({split.n_rows * corpus.seq_len:,} tokens)")
        for number, part in enumerate(split.parts, start=1):
            share = part.weight / sum(other.weight for other in split.parts)
            source = f"source {number} ({100 * share:.1f} %): " if len(split.parts) > 1 else ""
            passes = split.n_rows * share / part.n_rows
            print(
                f"            {source}{part.n_rows:,} rows from {part.n_documents:,} document(s), {part.text_bytes:,} "
                f"bytes of text ({part.text_bytes / part.n_tokens:.2f} bytes a token)"
                + (f", drawn {passes:.1f} times an epoch" if passes > 1.05 else "")
            )


if __name__ == "__main__":
    from stackwise_jax.main import run_program

    run_program(main)
