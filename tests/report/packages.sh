#!/usr/bin/env bash
# Installs what the report's test in a browser needs: Chromium. Nothing where it is there.
set -euo pipefail
if command -v chromium; then exit; fi &>/dev/null
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "chromium is needed; as root on Debian it would be installed now" >&2
    exit 1
fi
apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends chromium
