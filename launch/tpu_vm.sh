#!/usr/bin/env bash
# A TPU VM slice, from creation to deletion. Needs gcloud, signed in.
#
#   launch/tpu_vm.sh [--dry-run] create|ensure|copy|install|run|logs|status|delete
#   launch/tpu_vm.sh run -- --config=configs/matlm.py:850M --workdir=gs://BUCKET/first
#   launch/tpu_vm.sh all -- ...          ensure, run, delete
#
# Settings, by environment: TPU_NAME, ZONE, PROJECT, ACCELERATOR_TYPE (v5litepod-16), RUNTIME
# (v2-alpha-tpuv5-lite), SPOT=1 for preemptible capacity; TRAIN_ENV, more variables for training.
#
#   ensure   creates the slice unless it is ready; one that was preempted is deleted first;
#            then copies this checkout to all workers and installs it
#   run      trains on all workers, attached: their output appears here and in ~/train.log
#            there, and the exit code is the training's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

parse_action "$@"
need_node
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
where=("$TPU_NAME" "${location[@]}")
tpus=(gcloud compute tpus tpu-vm)

on_all() { run "${tpus[@]}" ssh "${where[@]}" --worker=all "--command=$1"; }

state() { "${tpus[@]}" describe "${where[@]}" '--format=value(state)' 2>/dev/null || echo ABSENT; }

create() {
  local spot=()
  [ "${SPOT:-0}" != 1 ] || spot=(--spot)
  run "${tpus[@]}" create "${where[@]}" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--version=$RUNTIME" "${spot[@]}"
}

delete() { run "${tpus[@]}" delete "${where[@]}" --quiet; }

copy() {
  run mkdir -p build
  # Several slices may be made at the same time (slices.sh), from one name.
  run git archive --format=tar.gz "--output=build/$TPU_NAME.tar.gz" HEAD
  run mv "build/$TPU_NAME.tar.gz" build/matformer_jax.tar.gz
  run "${tpus[@]}" scp build/matformer_jax.tar.gz "$TPU_NAME:" "${location[@]}" --worker=all
}

install() {
  on_all "mkdir -p matformer_jax && tar -xzf matformer_jax.tar.gz -C matformer_jax && python3 -m venv .venv && .venv/bin/pip install -q './matformer_jax[tpu,gcs]' && touch .installed"
}

ensure() {
  local now=ABSENT
  [ "$DRY_RUN" = 1 ] || now=$(state)
  case "$now" in
    READY) say "$TPU_NAME is ready"; return ;;
    ABSENT) ;;
    CREATING | STARTING | RESTARTING | REPAIRING)
      say "$TPU_NAME is $now; waiting"
      sleep "${POLL_SECONDS:-30}"
      ensure
      return ;;
    *) say "$TPU_NAME is $now; deleting it"; delete ;;
  esac
  create
  copy
  install
}

# ready: whether training can be started on all workers.
ready() { on_all "test -e .installed"; }

train() {
  [ ${#train_args[@]} -gt 0 ] || fail "no arguments for training; see $0 --help"
  # exec: the signals of a dying connection reach Python, which saves.
  # exec here, so that a signal to this script ends the connection.
  replace "${tpus[@]}" ssh "${where[@]}" --worker=all "--command=cd matformer_jax && exec ${TRAIN_ENV:+env $TRAIN_ENV }../.venv/bin/python -u -m matformer_jax.train ${train_args[*]@Q} > >(tee -a ~/train.log) 2>&1"
}

case "$action" in
  create | delete | copy | install | ensure | ready) "$action" ;;
  run) train ;;
  logs) run "${tpus[@]}" ssh "${where[@]}" --worker=0 '--command=tail -n 100 -F train.log' ;;
  status) run "${tpus[@]}" describe "${where[@]}" '--format=value(state)' ;;
  all) ensure; (train); delete ;;
  *) fail "unknown action '$action'; see $0 --help" ;;
esac
