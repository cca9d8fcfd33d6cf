#!/usr/bin/env bash
# A whole cluster as plain processes of one Linux machine, without Docker: PostgreSQL, an MLflow
# server with basic auth, a Ray head and workers, each node with an address of its own.
#
#   one-machine.sh up       start what does not run, make secrets and databases the first time
#   one-machine.sh status   what runs
#   one-machine.sh down     stop everything; databases, artifacts and results stay
#
# Needs topotune's environment active and PostgreSQL's server programs (Debian: the package
# postgresql). Settings, by environment:
#   TOPOTUNE_CLUSTER      folder of everything: secrets, databases, results (~/topotune-cluster)
#   TOPOTUNE_WORKERS      worker nodes (2), with TOPOTUNE_WORKER_CPUS each (1)
#   TOPOTUNE_GPUS         GPUs of the first worker (0)
#   JOBS_PORT, MLFLOW_PORT, POSTGRES_PORT, RAY_PORT, RAY_CLIENT_PORT (8265, 5000, 5433, 6379, 10001)
#   AGENT_PORT            node N's agent listens on this port plus N (52400)
#   NODE_NETWORK          first three numbers of the nodes' loopback addresses (127.0.1)
#
# What listens: Ray's dashboard and Jobs API, MLflow and PostgreSQL on the loopback only. Ray's own
# ports are open on all interfaces, as Ray has it, and ask for the token.
set -euo pipefail
umask 077

here="$(cd "$(dirname "$0")" && pwd)"
root="${TOPOTUNE_CLUSTER:-$HOME/topotune-cluster}"
workers="${TOPOTUNE_WORKERS:-2}"
jobs_port="${JOBS_PORT:-8265}" mlflow_port="${MLFLOW_PORT:-5000}"
postgres_port="${POSTGRES_PORT:-5433}" ray_port="${RAY_PORT:-6379}"
client_port="${RAY_CLIENT_PORT:-10001}" agent_port="${AGENT_PORT:-52400}"
network="${NODE_NETWORK:-127.0.1}"
secrets="$root/secrets" run="$root/run" logs="$root/logs" postgres="$root/postgres"
# PostgreSQL refuses to run as root: then it runs as the account of its package, at that one's home.
if [ "$(id -u)" = 0 ]
then
  postgres="/var/lib/postgresql/topotune-$(printf %s "$root" | cksum | cut -d' ' -f1)"
fi
temp="${TMPDIR:-/tmp}/topotune-$ray_port"   # Ray's sockets: a path of theirs must be short

fail() { echo "one-machine.sh: $*" >&2; exit 2; }

secret() { cat "$secrets/$1"; }

make_secrets() {
  local name
  for name in ray_token postgres_password mlflow_db_password study_db_password \
    mlflow_admin_password mlflow_password mlflow_secret_key
  do
    if [ ! -s "$secrets/$name" ]
    then
      python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$secrets/$name"
    fi
  done
}

alive() {
  local pid
  [ -s "$run/$1" ] || return 1
  pid="$(cat "$run/$1")"
  # The word that marks our processes: a number that is another process's by now does not count.
  { tr '\0' '\n' < "/proc/$pid/environ"; } 2> /dev/null | grep -qx "TOPOTUNE_CLUSTER_PART=$root/$1"
}

# Start a part in a session of its own, so that a closed terminal does not end it.
start() {
  local name="$1"
  shift
  # shellcheck disable=SC2016 # expanded by the inner shell
  TOPOTUNE_CLUSTER_PART="$root/$name" setsid --fork bash -c \
    'echo $$ > "$1"; exec "${@:3}" > "$2" 2>&1 < /dev/null' start "$run/$name" "$logs/$name.log" "$@"
  until [ -s "$run/$name" ]; do sleep 0.1; done
}

# Wait until a command succeeds, as long as the part lives.
await() {
  local name="$1" count
  shift
  for count in $(seq 240)
  do
    if "$@" > /dev/null 2>&1; then return; fi
    if ! alive "$name" && [ "$count" -gt 4 ]; then break; fi
    sleep 0.5
  done
  tail -n 20 "$logs/$name.log" >&2
  fail "$name does not start; its log is $logs/$name.log"
}

as_postgres() {
  if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi
}

start_postgres() {
  local programs
  programs="$(command -v initdb || find /usr/lib/postgresql -path '*/bin/initdb' 2> /dev/null |
    sort -V | tail -n 1)"
  [ -n "$programs" ] || fail "PostgreSQL's server is not installed (Debian: postgresql)"
  PATH="$(dirname "$programs"):$PATH"
  # Made is what both sides say is made: databases are never deleted for want of their passwords.
  if [ -e "$postgres/made" ] && [ ! -e "$root/databases-made" ]
  then
    fail "$postgres holds databases whose passwords are not in $secrets. Bring those back, or move \
the databases away"
  fi
  if [ ! -e "$root/databases-made" ]
  then
    as_postgres pg_ctl --pgdata="$postgres/data" --mode=immediate stop > /dev/null 2>&1 || true
    rm -rf "$postgres/data"   # what an interrupted first start left
    as_postgres mkdir -p "$postgres"
    # shellcheck disable=SC2016 # expanded by the inner shell
    secret postgres_password | as_postgres bash -c 'umask 077; cat > "$1"' write "$postgres/password"
    as_postgres env LC_ALL=C.UTF-8 initdb --pgdata="$postgres/data" --username=postgres \
      --auth=scram-sha-256 --pwfile="$postgres/password" --encoding=UTF8 > "$logs/initdb.log" 2>&1 ||
      { tail -n 5 "$logs/initdb.log" >&2; fail "initdb failed"; }
    rm "$postgres/password"
  fi
  if ! as_postgres pg_ctl --pgdata="$postgres/data" status > /dev/null 2>&1
  then
    as_postgres pg_ctl --pgdata="$postgres/data" --log="$postgres/log" --wait --timeout=60 \
      --options="-p $postgres_port -c listen_addresses=127.0.0.1 -c unix_socket_directories=" \
      start > /dev/null || fail "PostgreSQL does not start; its log is $postgres/log"
  fi
  if [ ! -e "$root/databases-made" ]
  then
    PGHOST=127.0.0.1 PGPORT="$postgres_port" PGPASSWORD="$(secret postgres_password)" \
      MLFLOW_DB_PASSWORD="$(secret mlflow_db_password)" \
      STUDY_DB_PASSWORD="$(secret study_db_password)" bash "$here/kuberay/databases.sh"
    as_postgres touch "$postgres/made"
    touch "$root/databases-made"
  fi
}

start_mlflow() {
  local server="http://127.0.0.1:$mlflow_port"
  sed "s|@postgres/|@127.0.0.1:$postgres_port/|" "$here/mlflow-auth.ini" > "$root/mlflow-auth.ini"
  if ! alive mlflow
  then
    PGPASSWORD="$(secret mlflow_db_password)" MLFLOW_AUTH_CONFIG_PATH="$root/mlflow-auth.ini" \
      MLFLOW_AUTH_ADMIN_PASSWORD="$(secret mlflow_admin_password)" \
      MLFLOW_FLASK_SERVER_SECRET_KEY="$(secret mlflow_secret_key)" \
      MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
      start mlflow mlflow server --host=127.0.0.1 --port="$mlflow_port" --workers=1 \
      --backend-store-uri="postgresql://mlflow@127.0.0.1:$postgres_port/mlflow" \
      --serve-artifacts --artifacts-destination="$root/artifacts" --app-name=basic-auth \
      --allowed-hosts="127.0.0.1:*,localhost:*"
    await mlflow python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1])' \
      "$server/health"
    MLFLOW_TRACKING_URI="$server" MLFLOW_TRACKING_USERNAME=topotune \
      MLFLOW_TRACKING_PASSWORD="$(secret mlflow_password)" \
      MLFLOW_AUTH_ADMIN_PASSWORD="$(secret mlflow_admin_password)" \
      bash "$here/mlflow-account.sh" > "$logs/account.log" 2>&1 ||
      { tail -n 5 "$logs/account.log" >&2; fail "MLflow's account cannot be made"; }
  fi
}

start_node() {
  local name="$1" number="$2"
  shift 2
  # An agent's port of its own, too: Ray opens it on 127.0.0.1 as well, for every node.
  start "$name" ray start --block --disable-usage-stats --node-ip-address="$network.$number" \
    --dashboard-agent-listen-port="$((agent_port + number))" "$@"
  await "$name" grep -q "block forever" "$logs/$name.log"
}

start_ray() {
  local number gpus="${TOPOTUNE_GPUS:-0}"
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secrets/ray_token"
  export TOPOTUNE_STORAGE="$root/results"
  if ! alive head
  then
    # The head alone, where drivers run, has the passwords of the stores; trials run on workers.
    TOPOTUNE_STUDY_URI="postgresql://topotune@127.0.0.1:$postgres_port/topotune" \
      PGPASSWORD="$(secret study_db_password)" \
      MLFLOW_TRACKING_URI="http://127.0.0.1:$mlflow_port" MLFLOW_TRACKING_USERNAME=topotune \
      MLFLOW_TRACKING_PASSWORD="$(secret mlflow_password)" \
      start_node head 1 --head --port="$ray_port" --num-cpus=0 --temp-dir="$temp/head" \
      --ray-client-server-port="$client_port" \
      --dashboard-host=127.0.0.1 --dashboard-port="$jobs_port"
  fi
  for number in $(seq "$workers")
  do
    if ! alive "worker-$number"
    then
      start_node "worker-$number" "$((number + 1))" --address="$network.1:$ray_port" \
        --temp-dir="$temp/w$number" \
        --num-cpus="${TOPOTUNE_WORKER_CPUS:-1}" --num-gpus="$gpus"
    fi
    gpus=0
  done
}

up() {
  command -v topotune > /dev/null || fail "activate topotune's environment first"
  mkdir -p "$temp"
  [ -O "$temp" ] || fail "$temp belongs to another user; choose another RAY_PORT or TMPDIR"
  mkdir -p "$secrets" "$run" "$logs" "$root/artifacts" "$root/results"
  make_secrets
  start_postgres
  start_mlflow
  start_ray
  cat > "$root/client.env" <<END
export TOPOTUNE_ADDRESS=http://127.0.0.1:$jobs_port
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$secrets/ray_token
END
  echo "Up. In every terminal that talks to the cluster:"
  echo "  source $root/client.env"
  echo "MLflow: http://127.0.0.1:$mlflow_port, user topotune, password in $secrets/mlflow_password"
}

stop() {
  local name="$1" pid
  if alive "$name"
  then
    pid="$(cat "$run/$name")"
    kill -TERM -- "-$pid"
    for _ in $(seq 100); do alive "$name" || break; sleep 0.2; done
    if alive "$name"; then kill -KILL -- "-$pid"; fi
  fi
  rm -f "$run/$name"
}

down() {
  local name
  if alive head
  then
    # Searches first: their trials finish an epoch, and all is saved.
    TOPOTUNE_ADDRESS="http://127.0.0.1:$jobs_port" RAY_AUTH_TOKEN_PATH="$secrets/ray_token" \
      topotune stop --all || echo "one-machine.sh: some searches were not drained" >&2
  fi
  for name in "$run"/worker-* "$run/head" "$run/mlflow"; do stop "${name##*/}"; done
  if [ -s "$postgres/data/postmaster.pid" ]
  then
    PATH="$PATH:$(find /usr/lib/postgresql -maxdepth 2 -name bin 2> /dev/null | paste -sd :)"
    as_postgres pg_ctl --pgdata="$postgres/data" --mode=fast --wait stop > /dev/null
  fi
  rm -rf "$temp"
  echo "Down. Results, runs and studies stay in $root."
}

status() {
  local name
  for name in mlflow head $(seq -f 'worker-%g' "$workers")
  do
    if alive "$name"; then echo "$name runs"; else echo "$name does not run"; fi
  done
  if [ -s "$postgres/data/postmaster.pid" ]; then echo "postgres runs"; else echo "postgres does not run"; fi
}

case "${1:-}" in
  up) up ;;
  down) down ;;
  status) status ;;
  *) fail "say up, status or down" ;;
esac
