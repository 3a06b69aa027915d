#!/usr/bin/env bash
# Installs what the image's tests need: a docker engine, and debootstrap for a base image. Nothing where both are there.
set -euo pipefail
engine() { docker info || command -v dockerd; }
if engine && command -v debootstrap; then exit; fi &>/dev/null
if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "a docker engine and debootstrap are needed; as root on Debian or Ubuntu they would be installed now" >&2
    exit 1
fi
apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends docker.io debootstrap
