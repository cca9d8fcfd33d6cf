#!/usr/bin/env bash
# Runs a command with secrets that lie in files: for each variable NAME_FILE of the list below, NAME
# is set to what the file holds. So no secret stands in a compose file, in `docker inspect` or in a
# command line. Ray reads its own token's file (RAY_AUTH_TOKEN_PATH).
set -euo pipefail

for name in PGPASSWORD MLFLOW_TRACKING_PASSWORD MLFLOW_AUTH_ADMIN_PASSWORD \
  MLFLOW_FLASK_SERVER_SECRET_KEY AWS_SECRET_ACCESS_KEY
do
  file="${name}_FILE"
  if [ -n "${!file:-}" ]
  then
    if [ ! -r "${!file}" ]
    then
      echo "entrypoint.sh: $file: ${!file}: no file that this user can read" >&2
      exit 2
    fi
    export "$name=$(< "${!file}")"
    unset "$file"
  fi
done

exec "$@"
