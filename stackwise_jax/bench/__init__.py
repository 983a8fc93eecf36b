"""Measurements that users repeat on their own machine: `python -m stackwise_jax.bench NAME`."""
