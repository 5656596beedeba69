# Sourced by run.sh of the examples: `say` begins a step, and an exit before the end says at which one.
step=start
say() { step=$1; printf '\n[%3d s] %s\n' "$SECONDS" "$1"; }
on_exit() {
  local status=$?
  if [ $status -ne 0 ]; then
    echo "run.sh: stopped at: $step (exit code $status). The reason is above; once it is removed, the same command goes on from there." >&2
  fi
}
trap on_exit EXIT
