"""The run: curriculum, optimiser, step, checkpoint, metrics, loop."""
