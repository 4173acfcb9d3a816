#!/usr/bin/env bash
# Tries the images and compose.yaml: two sites tune a tiny random model, and a researcher fetches the adapter.
#
# deploy/docker/build.sh builds the images. Environment: COMPOSE ("docker compose", or "podman-compose"), TAG, OUT (a
# new folder for the result).
set -euo pipefail
cd "$(dirname "$0")"
read -ra compose <<<"${COMPOSE:-docker compose} --profile people"
: "${OUT:=$(mktemp -d)}"
scratch=$(mktemp -d)
chmod 755 "$scratch"
export MODEL=$scratch/model
end() {
    code=$?
    ((code == 0)) || "${compose[@]}" logs --tail 40 || true
    "${compose[@]}" down --volumes --timeout 30 || true
    rm -rf "$scratch"
    exit "$code"
}
trap end EXIT
say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

say "a tiny model"
mkdir -m 777 "$MODEL"
"${compose[@]}" run -T --rm --no-deps --volume "$MODEL:/model" --volume "$PWD:/here:ro" \
    --entrypoint python3 researcher /here/tiny.py /model /here/texts

say "authority, coordinator and sites"
"${compose[@]}" up --detach authority coordinator bank hospital

until "${compose[@]}" run -T --rm --no-deps researcher run sites; do
    ((SECONDS < 600)) || exit 9
    sleep 2
done

say "a run"
"${compose[@]}" run -T --rm --no-deps researcher run submit /srv/offsite/run.toml --watch

say "its result"
mkdir -p "$OUT"
chmod 777 "$OUT"
run=$("${compose[@]}" run -T --rm --no-deps researcher run list --format json |
    python3 -c 'import json, sys; print(json.load(sys.stdin)[-1]["id"])')
"${compose[@]}" run -T --rm --no-deps --volume "$OUT:/out" researcher run fetch "$run" /out/outcome
ls -l "$OUT/outcome/adapter"
say "done: $OUT/outcome"
