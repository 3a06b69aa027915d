#!/usr/bin/env bash
# Installs what the image's tests need: a docker engine, and debootstrap for a base image. Nothing where both are there.
set -euo pipefail
command -v docker debootstrap >/dev/null && { docker info >/dev/null 2>&1 || command -v dockerd >/dev/null; } && exit
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "no docker engine and debootstrap: as root on Debian or Ubuntu they would be installed" >&2
    exit 1
fi
apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends docker.io debootstrap
