#!/usr/bin/env bash
# Trains with N processes on this machine, over loopback, to try what a pod will do.
#
#   launch/local_multiprocess.sh N [--dry-run] --config=configs/matlm.py:tiny --workdir=runs/local
#
# Everything after N goes to matformer_jax.train. DEVICES (default 1) is the number of virtual CPU
# devices per process, PYTHON the interpreter. Each line of output begins with its process.
# SIGTERM and Ctrl-C reach all processes. The exit code is the first one that is not 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  '' | *[!0-9]* | 0) fail "the first argument is the number of processes; see $0 --help" ;;
esac
count=$1
shift
args=()
for arg; do
  if [ "$arg" = --dry-run ]; then DRY_RUN=1; else args+=("$arg"); fi
done

python=${PYTHON:-python3}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
environment=(JAX_PLATFORMS=cpu
             XLA_FLAGS="--xla_force_host_platform_device_count=${DEVICES:-1} ${XLA_FLAGS:-}")
command=("$python" -u -m matformer_jax.train "${args[@]}" "--coordinator=127.0.0.1:$port"
         "--num_processes=$count")

pids=()
# shellcheck disable=SC2329  # by the traps
stop() { kill -"$1" "${pids[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM
trap 'stop INT' INT
for ((i = 0; i < count; i++)); do
  if [ "$DRY_RUN" = 1 ]; then
    run env "${environment[@]}" "${command[@]}" "--process_id=$i"
  else
    # The process itself, not a shell around it, gets the signals.
    env "${environment[@]}" "${command[@]}" "--process_id=$i" > >(sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done

code=0
for pid in "${pids[@]}"; do
  this=0
  await "$pid" || this=$?
  [ "$code" != 0 ] || code=$this
done
exit "$code"
