"""Train Transformers that should not fit, a few blocks at a time, on one accelerator."""

__version__ = "0.1.0"
