#!/usr/bin/env bash
# Lints, checks types and runs the tests, on all cores. Arguments go to pytest, for example: launch/test.sh tests/laws -x
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install_extras "[test]"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/pyright" --pythonpath "$VENV/bin/python"
exec "$VENV/bin/python" -m pytest --numprocesses=auto --dist=loadfile "$@"
