# Sourced by the scripts beside it: makes or reuses .venv and installs the package with the extras in $1 when that is missing.
# Override the interpreter with PYTHON=..., the environment with VENV=....
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"

find_python() {
  for candidate in ${PYTHON:-} python3.13 python3.12 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.12 or newer is needed; install it or point PYTHON at it" >&2
  exit 2
}

install_extras() {
  local wanted
  wanted="$(cat setup.cfg pyproject.toml | cksum | cut -d' ' -f1) $1"
  if [ ! -x "$VENV/bin/python" ]; then
    "$(find_python)" -m venv "$VENV"
  fi
  touch "$VENV/installed"
  if ! grep -qxF "$wanted" "$VENV/installed"; then
    echo "installing stackwise_jax$1 into $VENV (a minute or two, once)" >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".$1"
    echo "$wanted" >> "$VENV/installed"
  fi
}
