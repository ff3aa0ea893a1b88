#!/usr/bin/env bash
# Several TPU slices that train together over the data-center network: NAME-0, NAME-1, ...
#
#   launch/slices.sh [--dry-run] ensure|run|status|delete
#   launch/slices.sh run -- --config=configs/matlm.py:850M --workdir=gs://bucket/first
#
# Each is a slice of its own, as tpu_vm.sh makes it, so that one which is lost takes no other with
# it. Settings as for tpu_vm.sh, TPU_NAME being NAME, and SLICES (2), QUEUED=1 to make them by
# queued_resource.sh, ELASTIC=1 to go on with those that are ready.
#
#   ensure   makes all slices ready, at the same time; with ELASTIC=1 only where none is
#   run      trains on all slices, or with ELASTIC=1 on those that are ready; exits as training does
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

parse_action "$@"
export DRY_RUN
need_node
maker=tpu_vm.sh
[ "${QUEUED:-0}" != 1 ] || maker=queued_resource.sh
describe=(gcloud compute tpus tpu-vm describe)
nodes=()
for ((i = 0; i < ${SLICES:-2}; i++)); do nodes+=("$TPU_NAME-$i"); done

# on_each COMMAND...: the command for every slice at the same time, by its TPU_NAME.
on_each() {
  local node pids=() failed=0
  for node in "${nodes[@]}"; do
    TPU_NAME=$node "$@" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  [ "$failed" = 0 ]
}

# keep_ready: leaves in `nodes` those that are ready, and on which this checkout is installed.
keep_ready() {
  local node state ready=()
  for node in "${nodes[@]}"; do
    state=$("${describe[@]}" "$node" "${location[@]}" '--format=value(state)' 2>/dev/null || echo ABSENT)
    if [ "$state" != READY ]; then
      say "$node is $state"
    elif TPU_NAME=$node launch/tpu_vm.sh ready; then
      ready+=("$node")
    else
      say "$node is being installed"
    fi
  done
  nodes=("${ready[@]}")
}

ensure() {
  local all=("${nodes[@]}")
  if [ "${ELASTIC:-0}" = 1 ] && [ "$DRY_RUN" = 0 ]; then
    keep_ready
    if [ ${#nodes[@]} -gt 0 ]; then
      say "going on with ${#nodes[@]} of ${#all[@]} slices"
      return
    fi
    nodes=("${all[@]}")
  fi
  on_each "launch/$maker" ensure
}

train() {
  [ ${#train_args[@]} -gt 0 ] || fail "no arguments for training; see $0 --help"
  if [ "${ELASTIC:-0}" = 1 ] && [ "$DRY_RUN" = 0 ]; then keep_ready; fi
  [ ${#nodes[@]} -gt 0 ] || fail "no slice of $TPU_NAME is ready; run $0 ensure"
  local address="(the address of ${nodes[0]})" code=0 one i
  local ask=("${describe[@]}" "${nodes[0]}" "${location[@]}" '--format=value(networkEndpoints[0].ipAddress)')
  if [ "$DRY_RUN" = 1 ]; then run "${ask[@]}"; else address=$("${ask[@]}"); fi
  pids=()
  trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
  for i in "${!nodes[@]}"; do
    # What JAX and libtpu would find in the metadata of slices that were made together.
    TRAIN_ENV="MEGASCALE_COORDINATOR_ADDRESS=${address@Q} MEGASCALE_NUM_SLICES=${#nodes[@]} MEGASCALE_SLICE_ID=$i" \
      TPU_NAME=${nodes[$i]} launch/tpu_vm.sh run -- "${train_args[@]}" &
    pids+=($!)
  done
  for i in "${!pids[@]}"; do
    one=0
    await "${pids[$i]}" || one=$?
    [ "$one" != 255 ] || one=42 # the connection broke: the slice is probably gone
    # An error to fix first outweighs what a restart may mend.
    if [ "$code" = 0 ] || { is_retryable "$code" && [ "$one" != 0 ]; }; then code=$one; fi
  done
  exit "$code"
}

case "$action" in
  ensure) ensure ;;
  run) train ;;
  status) on_each "launch/$maker" status ;;
  delete) on_each "launch/$maker" delete ;;
  *) fail "unknown action '$action'; see $0 --help" ;;
esac
