#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lints, tests, documentation.
# Needs a Rust toolchain and a GPU API; where there is no Vulkan driver on Debian or Ubuntu and this
# runs as root, it installs Mesa's software driver. MOEWE_ADAPTER picks an adapter by a part of its name.
# With arguments it only runs `cargo test` with them.
set -euo pipefail
cd "$(dirname "$0")/.."

# Debian keeps ldconfig out of a user's path.
PATH=$PATH:/usr/sbin:/sbin

step() { printf '\n== %s\n' "$*"; "$@"; }

# Succeeds if some Vulkan driver is announced on this machine.
vulkan_driver() {
    [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] && return 0
    local folder
    for folder in /usr/share/vulkan/icd.d /usr/local/share/vulkan/icd.d /etc/vulkan/icd.d /run/opengl-driver/share/vulkan/icd.d; do
        compgen -G "$folder/*.json" > /dev/null && return 0
    done
    return 1
}

if [ "$(uname -s)" = Linux ] && ! { vulkan_driver && ldconfig -p | grep 'libvulkan\.so\.1' > /dev/null; }; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        step apt-get update -qq
        step env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq mesa-vulkan-drivers libvulkan1
    else
        echo 'No Vulkan driver found. Install your GPU vendor'\''s driver, or a software one:' >&2
        echo '  Debian, Ubuntu: sudo apt-get install mesa-vulkan-drivers' >&2
        echo '  Fedora: sudo dnf install mesa-vulkan-drivers      Arch: sudo pacman -S vulkan-swrast' >&2
        exit 1
    fi
fi

# A software driver may crash on its own account (not a failed assertion): then once more, and say so.
tests() {
    local log status=0
    log=$(mktemp)
    "$@" 2>&1 | tee "$log" || status=$?
    if [ "$status" != 0 ] && grep -q '(signal: ' "$log"; then
        echo "NOTE: the process was killed by a signal, as faulty drivers cause; running it once more"
        status=0
        "$@" || status=$?
    fi
    rm -f "$log"
    return "$status"
}

if [ $# -gt 0 ]; then
    step tests cargo test --locked "$@"
    exit
fi

command -v tint > /dev/null || echo 'NOT RUN: tint is not installed, so no kernel is checked by it'
step cargo fmt --check
for features in '--all-features' '--no-default-features' '--no-default-features --features wgpu' '--no-default-features --features cli'; do
    # shellcheck disable=SC2086
    step cargo clippy --locked $features --lib --bins -- -D warnings
done
step cargo clippy --locked --all-targets -- -D warnings
step tests cargo test --locked --lib --bins --tests
step cargo test --locked --doc
RUSTDOCFLAGS='-D warnings' step cargo doc --locked --no-deps --all-features
echo
echo 'All checks passed.'
