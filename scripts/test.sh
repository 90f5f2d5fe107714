#!/usr/bin/env bash
# The whole test suite in two halves side by side, one thread each: in one process it leaves half of two cores idle.
# Usage: scripts/test.sh [further pytest options]
set -uo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
first=(tests/robot tests/vlm tests/cli tests/parity tests/scripts)
second=(tests/recipes/test_demo_policy.py tests/recipes/test_demo.py tests/recipes/test_flowchart_vlm.py)  # so that both halves take as long
for path in tests/recipes/test_*.py; do
  case " ${second[*]} " in *" $path "*) ;; *) first+=("$path") ;; esac
done
for path in tests/test_*.py tests/*/; do
  path="${path%/}"
  case " ${first[*]} tests/recipes tests/__pycache__ " in *" $path "*) ;; *) second+=("$path") ;; esac
done
log="$(mktemp)"
trap 'rm -f "$log"; kill $(jobs -p) 2>/dev/null' EXIT
.venv/bin/python -m pytest "${second[@]}" "$@" >"$log" 2>&1 &
other=$!
.venv/bin/python -m pytest "${first[@]}" "$@"
status=$?
wait "$other"
second_status=$?
# 5: nothing collected, as with -k; the run fails on it only if both halves have nothing
[ "$status" = 5 ] && status="$second_status"
[ "$status" = 0 ] && [ "$second_status" != 5 ] && status="$second_status"
printf '\n== the other half: %s\n' "${second[*]}"
cat "$log"
exit "$status"
