#!/usr/bin/env bash
# Best effort: install what some tests need and nothing else does, a real Slurm and network namespaces. Always succeeds;
# tests whose facility is missing are skipped and say so. MEGALLM_FACILITIES=no leaves the machine alone.
set -uo pipefail
packages=(slurmctld slurmd slurm-client munge iproute2 iptables zsh fish)
lacking=()
for name in slurmctld slurmd sbatch munged ip iptables zsh fish; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$name" > /dev/null || lacking+=("$name")
done
[ ${#lacking[@]} -eq 0 ] && exit 0
if [ "${MEGALLM_FACILITIES:-yes}" = no ] || [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
  echo "*** tests/install_facilities.sh: ${lacking[*]} not installed; their tests are skipped. ***"
  exit 0
fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
# A package of this list that starts a daemon would leave it behind: policy-rc.d forbids that while we install.
policy=/usr/sbin/policy-rc.d
if ! [ -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy
  trap 'rm -f $policy' EXIT
fi
{ timeout 300 apt-get update -q && timeout 600 apt-get install -y -q --no-install-recommends "${packages[@]}"; } > "$log" 2>&1 ||
  echo "*** tests/install_facilities.sh: ${packages[*]} could not be installed ($log says why); their tests are skipped. ***"
exit 0
