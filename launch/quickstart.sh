#!/usr/bin/env bash
# Trains a small language model on real text, one block at a time, evaluates it and prints what it writes.
# Arguments go to stackwise_jax.main, for example: launch/quickstart.sh --workdir=/tmp/mine --config.seed=1
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install_extras ""
exec "$VENV/bin/python" -m stackwise_jax.main --config=configs/quickstart.py "$@"
