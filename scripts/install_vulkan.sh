#!/usr/bin/env bash
# Install Mesa's software Vulkan driver (lavapipe). ManiSkill 3 needs Mesa 25 or newer; Debian 12 has that in backports.
set -euo pipefail
say() { printf 'setup: %s\n' "$*"; }

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { say "no Vulkan device, and neither root nor sudo here; ask an administrator for mesa-vulkan-drivers"; exit 0; }
  if [ "${HEADRACE_YES:-}" != 1 ]; then
    [ -t 0 ] || { say "no Vulkan device; run 'HEADRACE_YES=1 make setup' to let me install mesa-vulkan-drivers with sudo"; exit 0; }
    read -r -p "setup: no Vulkan device found. Install Mesa's software driver with sudo apt-get? [y/N] " answer
    case "$answer" in y | Y | yes) ;; *) exit 0 ;; esac
  fi
  as_root=(sudo)
fi

. /etc/os-release
target=()
if [ "${ID:-}" = debian ] && [ "${VERSION_CODENAME:-}" = bookworm ]; then
  suite="$VERSION_CODENAME-backports"
  if ! apt-cache policy | grep -q "n=$suite"; then
    # The address of this machine's own Debian mirror, from the source that serves the main suite.
    mirror="$(apt-get indextargets --format '$(SITE) $(CODENAME) $(REPO_URI)' 2>/dev/null | awk -v s="$VERSION_CODENAME" '$2 == s {print $3; exit}')"
    [ -n "$mirror" ] || { say "cannot tell this machine's Debian mirror from apt's sources; add $suite by hand"; exit 0; }
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    say "adding $suite to apt's sources"
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "$mirror" "$suite" "$keyring" |
      "${as_root[@]}" tee "/etc/apt/sources.list.d/$suite.sources" >/dev/null
  fi
  target=(-t "$suite")
fi
say "installing mesa-vulkan-drivers (no usable Vulkan device was found)"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${target[@]}" mesa-vulkan-drivers libvulkan1 >/dev/null
