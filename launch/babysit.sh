#!/usr/bin/env bash
# Runs a training command until it is done, through preemptions and lost machines.
#
#   launch/babysit.sh [--max-restarts=20] [--backoff=10] [--dry-run] -- COMMAND...
#   launch/babysit.sh --tpu=NAME [--queued] [--slices=N [--elastic]] ... -- --config=configs/matlm.py:850M --workdir=gs://BUCKET/{run_id}
#
# Restarts the command when it exits with 42 (a lost peer, a hang) or 143 (preempted), after a
# pause that doubles up to 10 minutes and is reset by a run of 10 minutes. Any other exit code
# ends babysit.sh with that code, and so does reaching --max-restarts. {run_id} in the command is the same string in every
# attempt: RUN_ID, or the time of the first start. SIGTERM to babysit.sh is passed to the command,
# which is then not restarted.
#
# With --tpu=NAME the command is matformer_jax.train's arguments, run on all workers of that TPU
# VM; a node found preempted or gone is deleted and created again first (tpu_vm.sh, or
# queued_resource.sh with --queued; their settings are taken from the environment). With --slices=N
# they are N slices, NAME-0 and so on (slices.sh). With --elastic a restart goes on with the slices
# that are left, on the same samples and draws; one that was made again since then takes part.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

max_restarts=20 backoff=10 tpu='' maker=tpu_vm.sh slices=1 elastic=0
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --backoff=*) backoff=${1#*=} ;;
    --tpu=*) tpu=${1#*=} ;;
    --queued) maker=queued_resource.sh ;;
    --slices=*) slices=${1#*=} ;;
    --elastic) elastic=1 ;;
    --) shift; break ;;
    *) fail "unknown option $1; see $0 --help" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "no command; see $0 --help"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices is not a number of slices"
[ "$elastic" = 0 ] || [ "$slices" -gt 1 ] || fail "--elastic needs --slices=N, of which one may be lost"
[ "$slices" = 1 ] || [ -n "$tpu" ] || fail "--slices=$slices needs --tpu=NAME"
export DRY_RUN
RUN_ID=${RUN_ID:-$(date -u +%Y%m%d-%H%M%S)}
export RUN_ID
command=("${@//\{run_id\}/$RUN_ID}")
if [ -n "$tpu" ]; then
  export TPU_NAME=$tpu
  runner=tpu_vm.sh
  if [ "$slices" -gt 1 ]; then
    export SLICES=$slices QUEUED=0 ELASTIC=0 # all of them at first
    [ "$maker" = tpu_vm.sh ] || QUEUED=1
    maker=slices.sh runner=slices.sh
  fi
  command=(launch/"$runner" run -- "${command[@]}")
fi

child='' stopped=0
forward() {
  stopped=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap forward TERM INT

attempt=0 pause=$backoff
while true; do
  started=$SECONDS
  code=0
  if [ -n "$tpu" ]; then
    launch/"$maker" ensure || fail "$maker could not provide $tpu"
  fi
  if [ "$DRY_RUN" = 1 ]; then
    if [ -n "$tpu" ]; then "${command[@]}"; else run "${command[@]}"; fi
    exit 0
  fi
  "${command[@]}" &
  child=$!
  await "$child" || code=$?
  child=''
  if [ -n "$tpu" ] && [ "$code" = 255 ]; then
    code=42 # the connection broke: the node is probably gone
  fi
  if ! is_retryable "$code" || [ "$stopped" = 1 ]; then
    say "run $RUN_ID: ended with $code after $attempt restarts"
    exit "$code"
  fi
  if [ "$attempt" -ge "$max_restarts" ]; then
    say "run $RUN_ID: ended with $code; giving up after $attempt restarts"
    exit "$code"
  fi
  attempt=$((attempt + 1))
  [ "$elastic" = 0 ] || ELASTIC=1
  [ $((SECONDS - started)) -lt 600 ] || pause=$backoff
  say "run $RUN_ID: ended with $code; restart $attempt of $max_restarts in $pause s"
  sleep "$pause" &
  wait $! || true
  [ "$stopped" = 0 ] || exit 143
  pause=$((pause * 2 > 600 ? 600 : pause * 2))
done
