#!/usr/bin/env bash
# Run by the PostgreSQL image at its first start: one database and one role each for MLflow and for
# the studies. Neither role can enter the other's database, and neither is a superuser. Used by
# compose.yaml and by kuberay/postgres.yaml.
#
# MLFLOW_DB_PASSWORD and STUDY_DB_PASSWORD, or the same names with _FILE for files that hold them.
set -euo pipefail

secret() {
  local file="${1}_FILE"
  if [ -n "${!file:-}" ]; then printf '%s' "$(< "${!file}")"; else printf '%s' "${!1:?}"; fi
}

database() {
  local name="$1"
  # Quoted by psql itself, and through its input: not in a command line.
  PASSWORD="$2" psql --no-psqlrc --quiet -v ON_ERROR_STOP=1 -v name="$name" \
    --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
\getenv password PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
}

mlflow="$(secret MLFLOW_DB_PASSWORD)"
study="$(secret STUDY_DB_PASSWORD)"
database mlflow "$mlflow"
database topotune "$study"
