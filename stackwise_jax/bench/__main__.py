"""`python -m stackwise_jax.bench NAME [--flags]`: measures one claim on this machine and prints the figures.

Names: step (the train step, its share of the peak, and PyTorch beside it), block (one live block of a large model,
beside PyTorch's), run70b (a large rack trained, saved and read),
qlora (adapters trained through a whole frozen rack), decode (a finished rack read, token after token), depth (what a
layer-wise step costs at depth k against depth 2), cache (what each tier of the activation cache adds to a step),
memory (the plan's device memory against the allocator's), compare (ways of training one model at equal FLOPs).
"""

import sys

from stackwise_jax.bench import block, cache, compare, decode, depth, memory, qlora, run70b, step
from stackwise_jax.command import run_command
from stackwise_jax.errors import UserError, did_you_mean, one_line_errors

_MODULES = (step, block, run70b, qlora, decode, depth, cache, memory, compare)
BENCHMARKS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}


def main(argv: list[str]) -> None:
    """Runs the benchmark that the first argument names."""
    with one_line_errors():
        if len(argv) < 2 or argv[1].startswith("-"):
            raise UserError(f"name a benchmark: python -m stackwise_jax.bench {'|'.join(BENCHMARKS)}")
        if argv[1] not in BENCHMARKS:
            raise UserError(f"there is no benchmark {argv[1]!r}.{did_you_mean(argv[1], BENCHMARKS)}")
    benchmark = BENCHMARKS[argv[1]]
    run_command(benchmark.main, benchmark.make_options(), benchmark.__doc__ or "", [argv[0], *argv[2:]])


if __name__ == "__main__":
    main(sys.argv)
