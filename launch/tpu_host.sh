#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each host of a TPU pod; it comes there with the files of a commit.
#
#   tpu_host.sh setup BUCKET COMMIT  mounts the bucket, installs the package
#   tpu_host.sh start NAME COMMIT [VARIABLE=VALUE ...] WORDS
#                                    runs `regionjax WORDS` in the commit's files, detached; a run of
#                                    that name is stopped before
#   tpu_host.sh state NAME           prints running, absent, `exit CODE` or stopped
#   tpu_host.sh stop NAME            SIGTERM, upon which training saves; returns when it has ended
#   tpu_host.sh --dry-run ...        prints the commands and runs nothing
#
# Everything lies in ~/regionjax: COMMIT/ (files), venv/, runs/NAME/ (log, pid, exit, stopped).

set -euo pipefail

home=~/regionjax
dry_run=''
patience=${REGIONJAX_STOP_SECONDS:-600} # for the last checkpoint

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

run() {
  printf '%s\n' "+ $*" >&2
  [ -n "$dry_run" ] || "$@"
}

setup() {
  local bucket=$1 commit=$2 mount=/mnt/$1
  # What jax advises on TPUs from v5e on.
  run sudo sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled'
  command -v gcsfuse >/dev/null || install_gcsfuse
  if ! mountpoint -q "$mount"; then
    run sudo mkdir -p "$mount"
    run sudo chown "$USER" "$mount"
    run gcsfuse --implicit-dirs "$bucket" "$mount"
  fi
  # The images' Python is older than ours; uv brings one.
  [ -x "$home/uv/bin/uv" ] || {
    run python3 -m pip install --quiet --target "$home/uv" uv
  }
  run "$home/uv/bin/uv" venv --quiet --allow-existing --python 3.12 "$home/venv"
  run "$home/uv/bin/uv" pip install --quiet --python "$home/venv/bin/python" \
    --editable "$home/${commit}[tpu]"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  run sudo curl -fsSL -o "$key" "$site/doc/apt-key.gpg"
  run sudo sh -c "echo 'deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main' \
>/etc/apt/sources.list.d/gcsfuse.list"
  local lock=DPkg::Lock::Timeout=600 # a fresh host updates itself meanwhile
  run sudo apt-get -qq -o "$lock" update
  run sudo apt-get -qq -o "$lock" install -y gcsfuse
}

# The process of a run, if it lives. A pid means nothing after the host was started anew.
process() {
  local pid boot
  [ -f "$home/runs/$1/pid" ] || return 1
  read -r pid boot <"$home/runs/$1/pid"
  [ "$boot" = "$(cat /proc/sys/kernel/random/boot_id)" ] && kill -0 "$pid" 2>/dev/null || return 1
  echo "$pid"
}

start() {
  local name=$1 commit=$2 folder=$home/runs/$1 variables=()
  shift 2
  while [[ ${1-} =~ ^[A-Z_]+= ]]; do
    variables+=("$1")
    shift
  done
  end "$name"
  set -- env "${variables[@]}" "$home/venv/bin/python" -u -m regionjax "$@"
  run cd "$home/$commit"
  if [ -n "$dry_run" ]; then
    run "$@"
    return
  fi
  mkdir -p "$folder"
  rm -f "$folder/exit" "$folder/stopped"
  # A shell waits and notes the code. It catches SIGTERM, for what is ignored is ignored by what it
  # starts as well.
  # shellcheck disable=SC2016
  setsid nohup bash -c 'trap : TERM; folder=$1; shift; code=0; "$@" || code=$?
    echo "$code" >"$folder/exit"' regionjax "$folder" "$@" >>"$folder/log" 2>&1 </dev/null &
  echo "$! $(cat /proc/sys/kernel/random/boot_id)" >"$folder/pid"
}

state() {
  if process "$1" >/dev/null; then
    echo 'regionjax: running'
  elif [ -f "$home/runs/$1/stopped" ]; then
    echo 'regionjax: stopped'
  elif [ -f "$home/runs/$1/exit" ]; then
    echo "regionjax: exit $(cat "$home/runs/$1/exit")"
  else
    echo 'regionjax: absent'
  fi
}

stop() {
  [ -n "$dry_run" ] || [ ! -d "$home/runs/$1" ] || touch "$home/runs/$1/stopped"
  end "$1"
}

# Ends a run's process, if there is one.
end() {
  local pid second
  pid=$(process "$1") || return 0
  run kill -TERM -- "-$pid" # the group: the shell and what it started
  [ -z "$dry_run" ] || return 0
  for ((second = 0; second < patience; second++)); do
    process "$1" >/dev/null || return 0
    sleep 1
  done
  run kill -KILL -- "-$pid"
}

if [ "${1-}" = --dry-run ]; then
  dry_run=1
  shift
fi
case ${1-}:$# in
  setup:3 | state:2 | stop:2) "$@" ;;
  start:*)
    [ $# -ge 4 ] || die 'start NAME COMMIT WORDS: words are missing'
    "$@"
    ;;
  *) die "'$*': expected setup BUCKET COMMIT, start NAME COMMIT WORDS, state NAME or stop NAME" ;;
esac
