#!/usr/bin/env bash
# Set everything up, once; a second call finds that nothing is left to do. Usage: scripts/setup.sh [run|dev]
# run: what `make demo` needs. dev: also what the tests, benchmarks and comparisons need.
set -euo pipefail
cd "$(dirname "$0")/.."
kind="${1:-run}"
lock="requirements-$kind.lock"
stamp=".venv/.installed-$kind"

say() { printf 'setup: %s\n' "$*"; }

# 1. uv, from pip if absent.
find_uv() {
  command -v uv || { [ -x "$HOME/.local/bin/uv" ] && echo "$HOME/.local/bin/uv"; } || { [ -x .uv/bin/uv ] && echo "$PWD/.uv/bin/uv"; }
}
if ! UV="$(find_uv)"; then
  say "installing uv with pip"
  python3 -m pip install --quiet --user uv 2>/dev/null || {
    python3 -m venv .uv && .uv/bin/pip install --quiet uv
  }
  UV="$(find_uv)" || { say "uv could not be installed; install it by hand: python3 -m pip install uv"; exit 1; }
fi

# 2. Python 3.12: one that is here (pyenv's too), else one that uv brings.
find_python() {
  local candidate
  for candidate in "$(command -v python3.12 || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo 3.12
}
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
  say "making .venv with Python 3.12"
  "$UV" venv --quiet --clear --python "$(find_python)" .venv
fi

# 3. Packages, exactly those of the lock. The dev lock is a superset of the run lock.
want="$(cat "$lock" pyproject.toml | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
  say "installing the packages of $lock (some minutes the first time)"
  "$UV" pip install --quiet --python .venv/bin/python --require-hashes -r "$lock"
  "$UV" pip install --quiet --python .venv/bin/python --no-deps --editable .
  for plugin in plugins/*/; do
    [ -f "$plugin/pyproject.toml" ] && "$UV" pip install --quiet --python .venv/bin/python --no-deps --editable "$plugin"
  done
  echo "$want" >"$stamp"
  if [ "$kind" = dev ]; then cat requirements-run.lock pyproject.toml | sha256sum | cut -d' ' -f1 >.venv/.installed-run; fi
fi

# 4. A Vulkan device: only where none is usable, Mesa's software one through apt. One that was found is noted in
# .venv/.vulkan and not looked for again; `headrace doctor` removes the note when it finds none any more.
has_vulkan() {
  .venv/bin/python - <<'PY' >/dev/null 2>&1
import sapien
scene = sapien.Scene()
sapien.render.RenderCameraComponent(8, 8)
PY
}
if [ ! -f .venv/.vulkan ]; then
  if ! has_vulkan; then
    if command -v apt-get >/dev/null; then
      bash scripts/install_vulkan.sh
    else
      say "no Vulkan device found and no apt here; install Mesa 25 or newer's software Vulkan driver (lavapipe)"
    fi
  fi
  if has_vulkan; then touch .venv/.vulkan; else say "still no usable Vulkan device: pictures cannot be rendered (headrace doctor)"; fi
fi
