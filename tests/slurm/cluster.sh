#!/usr/bin/env bash
# A SLURM of two nodes on this machine, for tests, as root:  cluster.sh up DIR | down DIR | install
# `up` prints the line that points SLURM's commands at it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

install_packages() {
  if command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; then return; fi >/dev/null
  apt-get -o Acquire::Retries=3 update -qq
  DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge >/dev/null
}

up() {
  local dir
  dir=$(mkdir -p "$1" && cd "$1" && pwd)
  mkdir -p "$dir"/{run,log,state,spool/n1,spool/n2} /run/munge
  sed "s#@DIR@#$dir#g" "$here/slurm.conf.in" >"$dir/slurm.conf"
  [ -s /etc/munge/munge.key ] || (umask 077; head -c 128 /dev/urandom >/etc/munge/munge.key)
  chown munge:munge /run/munge /etc/munge/munge.key
  grep -q '^127.0.0.1 n1 n2' /etc/hosts || echo '127.0.0.1 n1 n2' >>/etc/hosts
  export SLURM_CONF=$dir/slurm.conf
  # The daemons would hold on to our output, and a caller that reads it would wait for ever.
  {
    pgrep -x munged || su -s /bin/sh munge -c '/usr/sbin/munged --force'  # a socket may be left of a dead one
    slurmctld
    slurmd -N n1
    slurmd -N n2
  } </dev/null >"$dir/log/start.log" 2>&1 || { cat "$dir/log/start.log" >&2; return 1; }
  for _ in $(seq 300); do
    if [ "$(sinfo -h -o %D -t idle 2>/dev/null)" = 2 ]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return 0
    fi
    sleep 0.1
  done
  { sinfo; tail -n 20 "$dir"/log/*; } >&2 || true
  return 1
}

down() {
  local pid
  for pid in "$1"/run/slurmd-n1.pid "$1"/run/slurmd-n2.pid "$1"/run/slurmctld.pid; do
    if [ -s "$pid" ]; then kill "$(cat "$pid")" 2>/dev/null || true; fi
  done
}

case ${1:-} in
  install) install_packages ;;
  up) up "$2" ;;
  down) down "$2" ;;
  *) echo "usage: cluster.sh install | up DIR | down DIR" >&2; exit 2 ;;
esac
