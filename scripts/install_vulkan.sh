#!/usr/bin/env bash
# Install Mesa's software Vulkan driver (lavapipe). ManiSkill 3 needs Mesa 25 or newer; Debian 12 has that in backports.
# Asks before it uses sudo; HEADRACE_YES=1 is the answer for machines without a terminal. Declined or impossible: says so
# and exits 0, for the rest of the set-up does not depend on it.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
say() { printf 'setup: %s\n' "$*"; }

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { say "no Vulkan device, and neither root nor sudo here; ask an administrator for mesa-vulkan-drivers"; exit 0; }
  if [ "${HEADRACE_YES:-}" != 1 ]; then
    [ -t 0 ] || { say "no Vulkan device; run 'HEADRACE_YES=1 make setup' to let me install mesa-vulkan-drivers with sudo"; exit 0; }
    read -r -p "setup: no Vulkan device found. Install Mesa's software driver with sudo apt-get? [y/N] " answer || answer=
    case "$answer" in y | Y | yes) ;; *) say "nothing installed; pictures cannot be rendered without a Vulkan device"; exit 0 ;; esac
  fi
  as_root=(sudo)
fi

. "${HEADRACE_OS_RELEASE:-/etc/os-release}"
target=()
if [ "${ID:-}" = debian ] && [ "${VERSION_CODENAME:-}" = bookworm ]; then
  suite="$VERSION_CODENAME-backports"
  python="$(command -v python3 || echo "$here/../.venv/bin/python")"
  # The address of this machine's own Debian mirror, from the source that serves the main suite.
  stanza="$("$python" "$here/backports_source.py" "$VERSION_CODENAME" "${HEADRACE_APT:-/etc/apt}")" || {
    say "cannot tell this machine's Debian mirror from apt's sources; add $suite by hand"; exit 0
  }
  if [ -n "$stanza" ]; then
    say "adding $suite to apt's sources"
    printf '%s\n' "$stanza" | "${as_root[@]}" tee "/etc/apt/sources.list.d/$suite.sources" >/dev/null
  fi
  target=(-t "$suite")
fi
say "installing mesa-vulkan-drivers (no usable Vulkan device was found)"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${target[@]}" mesa-vulkan-drivers libvulkan1 >/dev/null
