#!/usr/bin/env bash
# Builds the images offsite-coordinator and offsite-site from this checkout: deploy/docker/build.sh [ARGUMENT ...]
#
# The arguments go to the builder, such as --build-arg TORCH_INDEX=URL, --build-arg BASE=IMAGE, or --secret
# id=pip,src=FILE. Environment: BUILDER (docker, podman or buildah, with arguments of its own such as "buildah
# --storage-driver vfs"), and TAG.
set -euo pipefail
cd "$(dirname "$0")/../.."
read -ra builder <<<"${BUILDER:-docker}"
case "${builder[0]##*/}" in
    docker) more=() ;;
    *) more=(--format docker --layers) ;; # the other format has no HEALTHCHECK
esac
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
for target in coordinator site; do
    "${builder[@]}" build "${more[@]}" --file deploy/docker/Dockerfile --target "$target" \
        --label "org.opencontainers.image.version=$version" \
        --label "org.opencontainers.image.revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
        --tag "offsite-$target:${TAG:-$version}" "$@" .
done
