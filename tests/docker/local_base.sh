#!/usr/bin/env bash
# Makes two base images where no registry can be reached: NAME:runtime, a minimal Debian, and NAME:build, which also holds
# the host's certificates and the wheels that pip finds on the host's disk. Needs root, debootstrap and a docker engine.
set -euo pipefail
name=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Without DEBIAN_MIRROR debootstrap takes Debian's own.
debootstrap --variant=minbase bookworm "$work/root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/log" 2>&1 ||
    { tail "$work/log" >&2 && exit 1; }
rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/lib/apt/lists/*
tar -C "$work/root" -c . | docker import - "$name:runtime"

mkdir -p "$work/extra/etc/ssl/certs" "$work/extra/usr/local/share" "$work/extra/opt/wheels"
cp /etc/ssl/certs/ca-certificates.crt "$work/extra/etc/ssl/certs/"
cp -r /usr/local/share/ca-certificates "$work/extra/usr/local/share/" # else lost when apt installs ca-certificates
folder=${PIP_FIND_LINKS:-$(pip config get global.find-links 2>/dev/null || true)}
if [[ -d $folder ]]; then cp "$folder"/torch-*.whl "$work/extra/opt/wheels/" || true; fi
cat >"$work/Dockerfile" <<EOF
FROM $name:runtime
COPY extra /
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS=/opt/wheels PIP_DEFAULT_TIMEOUT=180
EOF
DOCKER_BUILDKIT=1 docker build --quiet --tag "$name:build" "$work"
