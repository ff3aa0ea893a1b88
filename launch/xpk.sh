#!/usr/bin/env bash
# Trains on GKE through xpk, which makes the JobSet itself.
#
#   launch/xpk.sh [--dry-run] create|list|delete -- --config=configs/matlm.py:850M --workdir=gs://BUCKET/first
#
# Settings, by environment: CLUSTER, ZONE, PROJECT, IMAGE, NAME (matformer), TPU_TYPE
# (v5litepod-16), SLICES (1), MAX_RESTARTS (20), PRIORITY (medium).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

parse_action "$@"
need CLUSTER ZONE PROJECT
where=("--cluster=$CLUSTER" "--zone=$ZONE" "--project=$PROJECT")
NAME=${NAME:-matformer}

case "$action" in
  create)
    need IMAGE
    [ ${#train_args[@]} -gt 0 ] || fail "no arguments for training; see $0 --help"
    # exec: the pod's SIGTERM reaches Python.
    run xpk workload create "${where[@]}" "--workload=$NAME" \
      "--tpu-type=${TPU_TYPE:-v5litepod-16}" "--num-slices=${SLICES:-1}" \
      "--docker-image=$IMAGE" "--max-restarts=${MAX_RESTARTS:-20}" \
      "--priority=${PRIORITY:-medium}" \
      "--command=exec python -u -m matformer_jax.train ${train_args[*]@Q}" ;;
  list) run xpk workload list "${where[@]}" ;;
  delete) run xpk workload delete "${where[@]}" "--workload=$NAME" ;;
  *) fail "unknown action '$action'; see $0 --help" ;;
esac
