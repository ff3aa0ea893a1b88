#!/usr/bin/env bash
# Trains on GKE as a JobSet (jobset.yaml). Needs kubectl and the JobSet controller.
#
#   launch/jobset.sh [--dry-run] apply|logs|status|delete -- --config=configs/matlm.py:850M --workdir=gs://BUCKET/first
#
# Settings, by environment: NAME (matformer), IMAGE, TPU_ACCELERATOR (tpu-v5-lite-podslice),
# TPU_TOPOLOGY (4x4), HOSTS (4, of a slice), CHIPS_PER_HOST (4), SLICES (1), SERVICE_ACCOUNT (a
# Kubernetes one that may write to the bucket; unset, the namespace's default), CLAIM (unset; a
# shared volume to mount at /mnt/runs, for a workdir there), MAX_RESTARTS (20).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

parse_action "$@"
NAME=${NAME:-matformer}

manifest() {
  need IMAGE
  [ ${#train_args[@]} -gt 0 ] || fail "no arguments for training; see $0 --help"
  local args='' arg
  for arg in "${train_args[@]}"; do
    arg=${arg//\\/\\\\}
    args+="\"${arg//\"/\\\"}\", "
  done
  local text
  text=$(cat launch/jobset.yaml)
  local optional
  for optional in SERVICE_ACCOUNT CLAIM; do
    [ -n "${!optional:-}" ] || text=$(grep -v " # $optional\$" <<< "$text")
    text=${text//@$optional@/${!optional:-}}
  done
  text=${text//@NAME@/$NAME}
  text=${text//@IMAGE@/$IMAGE}
  text=${text//@TPU_ACCELERATOR@/${TPU_ACCELERATOR:-tpu-v5-lite-podslice}}
  text=${text//@TPU_TOPOLOGY@/${TPU_TOPOLOGY:-4x4}}
  text=${text//@SLICES@/${SLICES:-1}}
  text=${text//@HOSTS@/${HOSTS:-4}}
  text=${text//@CHIPS_PER_HOST@/${CHIPS_PER_HOST:-4}}
  text=${text//@MAX_RESTARTS@/${MAX_RESTARTS:-20}}
  printf '%s\n' "${text//@ARGS@/${args%, }}"
}

case "$action" in
  apply)
    rendered=$(manifest)
    if [ "$DRY_RUN" = 1 ]; then
      printf '%s\n' "$rendered"
      run kubectl apply -f -
    else
      printf '%s\n' "$rendered" | kubectl apply -f -
    fi ;;
  logs) run kubectl logs --follow --tail=100 "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  status) run kubectl get jobset "$NAME" ;;
  delete) run kubectl delete jobset "$NAME" ;;
  *) fail "unknown action '$action'; see $0 --help" ;;
esac
