# tools/packages.sh - sourced by ./quickstart and ./check: the Debian packages that they need, and
# how to install what is missing. Offline, nothing is asked of the network when all are there.

packages_build="gcc pkg-config meson ninja-build libc6-dev libuv1-dev liburing-dev libmsgpack-dev
    libconfuse-dev libpcre2-dev libutf8proc-dev libjansson-dev libxxhash-dev libsystemd-dev libncurses-dev scdoc"
packages_test="libcriterion-dev libsimde-dev clang clang-format libclang-rt-14-dev python3 systemd
    procps g++ man-db abigail-tools"
packages_optional="python3-fusepy" # tests say aloud what they leave out without them

# install_packages NAME...: installs those that are missing, as root or through sudo.
install_packages() {
    local missing="" name
    for name in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed ||
            missing="$missing $name"
    done
    [ -n "$missing" ] || return 0
    local as_root=""
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || {
            echo "packages are missing, and this is neither root nor has sudo:$missing" >&2
            return 1
        }
        as_root=sudo
    fi
    echo "installing:$missing"
    # A list of packages that is too old (or absent) names versions that are gone: refresh once.
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        $missing >/dev/null 2>&1 && return 0
    $as_root apt-get -qq update
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        $missing >/dev/null
}
