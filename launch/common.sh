# Sourced by the other scripts: messages, dry runs, options.
# shellcheck shell=bash
# shellcheck disable=SC2034  # used by the scripts that source this

DRY_RUN=${DRY_RUN:-0}
# The exit codes of matformer_jax.train that mean: run the same command again.
RETRYABLE="42 143"

say() { printf '%s\n' "$*" >&2; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# usage: prints the comment at the head of the calling script.
usage() { sed -n '2,/^[^#]/{ /^#/s/^# \{0,1\}//p; }' "$0"; }

# run COMMAND...: runs it, or with --dry-run prints exactly what would run.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '%s\n' "${*@Q}"
  else
    "$@"
  fi
}

# replace COMMAND...: as run, in place of this script.
replace() {
  if [ "$DRY_RUN" = 1 ]; then run "$@"; else exec "$@"; fi
}

# parse_action [--dry-run] ACTION [-- TRAIN_ARGS...]: sets action, train_args and DRY_RUN.
parse_action() {
  action='' train_args=()
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --) shift; train_args=("$@"); break ;;
      *) action=$1 ;;
    esac
    shift
  done
}

# need NAME...: fails unless the variables are set.
need() {
  local name
  for name; do
    [ -n "${!name:-}" ] || fail "$name is not set; see $0 --help"
  done
}

# need_node: sets `location`, gcloud's flags of where TPUs are; fails unless TPU_NAME and ZONE are set.
need_node() {
  need TPU_NAME ZONE
  location=("--zone=$ZONE")
  [ -z "${PROJECT:-}" ] || location+=("--project=$PROJECT")
}

# await PID: waits for a child until it has ended, through signals; returns its exit code.
await() {
  local code
  while true; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2>/dev/null || return "$code" # else a signal interrupted the wait
  done
}

is_retryable() { [[ " $RETRYABLE " == *" $1 "* ]]; }
