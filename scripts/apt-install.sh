#!/bin/sh
# Install one system package if this user may; otherwise print the command for it and fail.
#
#   scripts/apt-install.sh PACKAGE
set -eu
package=$1

if ! command -v apt-get >/dev/null; then
    echo "needs the system package $package (Debian's name): install it and run this again" >&2
    exit 1
elif [ "$(id -u)" = 0 ]; then
    as_root=""
elif sudo -n true 2>/dev/null; then
    as_root="sudo"
else
    echo "needs a system package; run: sudo apt-get install -y $package" >&2
    exit 1
fi
echo "installing the system package $package" >&2
$as_root apt-get -qq update >&2
$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$package" >&2
