#!/usr/bin/env bash
# Starts PostgreSQL, in a new database of POSTGRES_USER's where there is none yet, whose password is POSTGRES_PASSWORD.
set -euo pipefail
data=/var/lib/postgresql/data
if [ ! -s "$data/PG_VERSION" ]; then
    initdb --pgdata "$data" --encoding UTF8 --locale C.UTF-8 --username "$POSTGRES_USER" \
        --pwfile <(printf %s "$POSTGRES_PASSWORD") \
        --auth-local trust --auth-host scram-sha-256
    echo "host all all all scram-sha-256" >>"$data/pg_hba.conf"
    pg_ctl --pgdata "$data" --wait --options "-c listen_addresses=''" start
    createdb --username "$POSTGRES_USER" "$POSTGRES_USER"
    pg_ctl --pgdata "$data" --wait stop
fi
exec postgres -D "$data" -c listen_addresses='*'
