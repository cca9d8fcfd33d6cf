#!/usr/bin/env bash
# Creates the MLflow account that the drivers of searches log in with, so that the admin's password
# stays with the server. An account that is there gets the given password.
#
# Environment: MLFLOW_TRACKING_URI; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, the
# account; MLFLOW_AUTH_ADMIN_PASSWORD, the admin's.
set -euo pipefail

: "${MLFLOW_TRACKING_URI:?}" "${MLFLOW_AUTH_ADMIN_PASSWORD:?}"
: "${MLFLOW_TRACKING_USERNAME:?}" "${MLFLOW_TRACKING_PASSWORD:?}"

# Through the environment, not the command line, which every process of the machine may read.
export ACCOUNT="$MLFLOW_TRACKING_USERNAME" ACCOUNT_PASSWORD="$MLFLOW_TRACKING_PASSWORD"
export MLFLOW_TRACKING_USERNAME="${MLFLOW_AUTH_ADMIN_USERNAME:-admin}"
export MLFLOW_TRACKING_PASSWORD="$MLFLOW_AUTH_ADMIN_PASSWORD"

exec python - <<'PYTHON'
import os
import sys

from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient

server, name = os.environ["MLFLOW_TRACKING_URI"], os.environ["ACCOUNT"]
password = os.environ["ACCOUNT_PASSWORD"]
client = AuthServiceClient(server)
try:
    client.create_user(name, password)
    print(f"account {name!r} created")
except MlflowException as error:
    if error.error_code != "RESOURCE_ALREADY_EXISTS":
        sys.exit(f"mlflow-account.sh: account {name!r} at {server}: {error}")
    client.update_user_password(name, password)
    print(f"account {name!r} was there; its password is the given one now")
PYTHON
