#!/usr/bin/env bash
# A TPU slice by queued resource: waits in line for capacity, and queues again when preempted.
#
#   launch/queued_resource.sh [--dry-run] create|ensure|status|delete
#   launch/queued_resource.sh run -- --config=configs/matlm.py:850M --workdir=gs://BUCKET/first
#
# Settings as for tpu_vm.sh, and QUEUE_FOR (24h): how long to stay in the queue.
#
#   ensure   queues, waits until the slice is active, copies this checkout and installs it;
#            a request that was suspended (preempted) or has failed is deleted and made again
#   run      ensure, then train once (babysit.sh --queued survives preemptions)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

parse_action "$@"
export DRY_RUN
need_node
where=("$TPU_NAME" "${location[@]}")
queue=(gcloud compute tpus queued-resources)

state() {
  "${queue[@]}" describe "${where[@]}" '--format=value(state.state)' 2>/dev/null || echo ABSENT
}

create() {
  local spot=()
  [ "${SPOT:-0}" != 1 ] || spot=(--spot)
  run "${queue[@]}" create "${where[@]}" "--node-id=$TPU_NAME" \
    "--accelerator-type=${ACCELERATOR_TYPE:-v5litepod-16}" \
    "--runtime-version=${RUNTIME:-v2-alpha-tpuv5-lite}" \
    "--valid-until-duration=${QUEUE_FOR:-24h}" "${spot[@]}"
}

delete() { run "${queue[@]}" delete "${where[@]}" --force --quiet; }

ensure() {
  local now fresh=0
  if [ "$DRY_RUN" = 1 ]; then
    create
    fresh=1
  fi
  while [ "$DRY_RUN" = 0 ]; do
    now=$(state)
    case "$now" in
      ACTIVE) break ;;
      ABSENT) create; fresh=1 ;;
      SUSPENDED | SUSPENDING | FAILED)
        say "queued resource $TPU_NAME is $now; making it again"
        delete ;;
      *) say "queued resource $TPU_NAME is $now; waiting"; sleep "${POLL_SECONDS:-30}" ;;
    esac
  done
  [ "$fresh" = 0 ] || { launch/tpu_vm.sh copy && launch/tpu_vm.sh install; }
}

case "$action" in
  create | delete | ensure) "$action" ;;
  status) run "${queue[@]}" describe "${where[@]}" '--format=value(state.state)' ;;
  run) ensure; exec launch/tpu_vm.sh run -- "${train_args[@]}" ;;
  *) fail "unknown action '$action'; see $0 --help" ;;
esac
