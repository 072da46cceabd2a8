#!/usr/bin/env bash
# Trains on a Cloud TPU pod by gcloud: queued resources, one or several slices, spot or reserved.
#
#   launch/tpu_pod.sh train CONFIG --name NAME --zone ZONE --accelerator TYPE --bucket BUCKET
#     [options] [-- SETTINGS]
#   launch/tpu_pod.sh status|logs|stop|delete --name NAME --zone ZONE [--slices N]
#
# train asks for the TPUs, waits for them, puts the commit on every host, starts the run there and
# follows it. The run goes on when this script is stopped. The same command again follows it, or
# goes on from its newest checkpoint; TPUs that were preempted are asked for anew.
#
#   --name NAME            of the queued resource and the run: a to z, 0 to 9 and -
#   --zone ZONE            e.g. us-west4-a
#   --accelerator TYPE     of one slice: v5litepod-64, v6e-256 (chips), v5p-128 (cores: 64 chips)
#   --slices N             slices that the data-centre network joins [1]
#   --bucket BUCKET        shared by the hosts, seen as /mnt/BUCKET: work folder, cache, data; it
#                          needs a hierarchical namespace, where folders can be renamed
#   --workdir PATH         of the run, in the bucket [runs/NAME]
#   --spot | --reserved    preemptible, or from a reservation; else on demand
#   --commit REV           what runs [HEAD, if nothing is changed]
#   --restarts N           how often to begin again after preemption or a lost host [20]
#   --delete-when-done     gives the TPUs back when the run has finished
#   --project, --network, --subnetwork, --service-account, --runtime-version: as gcloud takes them
#   --libtpu-flags=FLAGS   instead of launch/lib.sh's
#   --poll SECONDS         between looks at the run [60]
#   --all-hosts            logs: the last lines of each, instead of following the first one's
#   --dry-run              prints the commands and runs nothing; gcloud need not be there
#
# stop saves and ends the run and keeps the TPUs; delete gives them back.

set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

opt_name='' opt_zone='' opt_accelerator='' opt_slices=1 opt_bucket='' opt_workdir='' opt_spot=''
opt_reserved='' opt_commit='' opt_restarts=20 opt_delete_when_done='' opt_project='' opt_network=''
opt_subnetwork='' opt_service_account='' opt_runtime_version='' opt_libtpu_flags='' opt_poll=60
opt_all_hosts=''

main() {
  local verb=${1-}
  [ $# -eq 0 ] || shift
  parse 'name zone accelerator slices bucket workdir commit restarts project network subnetwork
    service-account runtime-version libtpu-flags poll' 'spot reserved delete-when-done all-hosts' "$@"
  case $verb in
    train | status | logs | stop | delete) ;;
    --help | -h) usage; exit 0 ;;
    *) die "expected train, status, logs, stop or delete, not '$verb'; --help explains" ;;
  esac
  need name 'a name of the queued resource and the run, e.g. --name stage2'
  [[ $opt_name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--name $opt_name: expected a to z, 0 to 9 and -, at most 40, the first a letter"
  need zone 'where the TPUs are, e.g. --zone us-west4-a (gcloud compute tpus locations list)'
  whole slices
  where=("--zone=$opt_zone")
  [ -z "$opt_project" ] || where+=("--project=$opt_project")
  [ -n "$opt_dry_run" ] || command -v gcloud >/dev/null ||
    die 'gcloud is not installed (https://cloud.google.com/sdk/docs/install); --dry-run needs none'
  "$verb"
}

train() {
  need accelerator 'the type of a slice, e.g. --accelerator v5litepod-64'
  need bucket 'a Cloud Storage bucket that the hosts share, e.g. --bucket my-bucket'
  config_word
  [[ $opt_restarts =~ ^[0-9]+$ ]] || die "--restarts $opt_restarts: expected a whole number"
  [ -z "$opt_spot" ] || [ -z "$opt_reserved" ] || die '--spot and --reserved exclude each other'
  accelerator "$opt_accelerator"
  opt_bucket=${opt_bucket#gs://}
  [[ $opt_bucket != */* ]] ||
    die "--bucket $opt_bucket: expected a bucket's name alone; folders in it go to --workdir"
  opt_workdir=${opt_workdir:-runs/$opt_name}
  [[ $opt_workdir != /* && $opt_workdir != gs:* ]] ||
    die "--workdir $opt_workdir: expected a path in the bucket, e.g. runs/$opt_name"
  local slices=''
  [ "$opt_slices" -eq 1 ] || slices=" --slices $opt_slices"
  note "$chips chips a slice, $topology. Does it fit? regionjax compile ${words[0]}" \
    "--topology $topology$slices"
  check_bucket
  stage
  run gcloud storage cp "$archive" "gs://$opt_bucket/regionjax/source/$commit.tar.gz" --no-clobber
  local starts=0
  while [ "$starts" -le "$opt_restarts" ]; do
    acquire
    begin
    follow
    case $answer in
      'exit 0')
        finished
        return
        ;;
      stopped)
        step 'Stopped on request; the same command goes on'
        return
        ;;
      'exit 1' | 'exit 2')
        die "the run ended with ${answer/exit/code}; why, one host's log tells: launch/tpu_pod.sh" \
          "logs --all-hosts --name $opt_name --zone $opt_zone. Mend it and give the same command again"
        ;;
    esac
    step "The run stopped before its end ($answer); going on from its newest checkpoint"
  done
  die "began again $opt_restarts times; give the same command to go on, or raise --restarts"
}

finished() {
  step "Finished; gs://$opt_bucket/$opt_workdir holds release/, summary.json and checkpoints/"
  if [ -n "$opt_delete_when_done" ]; then
    delete
  else
    note "The TPUs are still yours: launch/tpu_pod.sh delete --name $opt_name --zone $opt_zone"
  fi
}

# Checkpoints are renamed into place when they are complete, which takes real folders.
check_bucket() {
  step 'The bucket'
  ask True gcloud storage buckets describe "gs://$opt_bucket" \
    '--format=value(hierarchical_namespace.enabled)'
  [ "$answer" = True ] || die "bucket $opt_bucket does not exist, may not be seen, or has no" \
    'hierarchical namespace, without which checkpoints cannot be renamed into place; make one:' \
    "gcloud storage buckets create gs://NAME --location=${opt_zone%-*}" \
    '--uniform-bucket-level-access --enable-hierarchical-namespace'
}

# Puts the queued resource's state into `answer`: one word, NONE, or UNKNOWN if gcloud fails.
state() {
  ask "$1" gcloud compute tpus queued-resources list "${where[@]}" "--filter=name~/$opt_name$" \
    '--format=value(state.state)' || answer=UNKNOWN
  answer=${answer:-NONE}
}

# Returns when the TPUs are there.
acquire() {
  step 'The TPUs'
  local told=''
  state NONE
  [ "$answer" != UNKNOWN ] || die 'gcloud cannot list queued resources; it says why above'
  while [ "$answer" != ACTIVE ]; do
    case $answer in
      NONE) create ;;
      SUSPENDED | FAILED) delete ;; # preempted, or not to be had: it has to be asked for anew
    esac
    [ "$answer" = "$told" ] || [ -n "$opt_dry_run" ] || step "$opt_name is $answer"
    told=$answer
    pause
    state ACTIVE
  done
}

create() {
  local wanted=(
    "$opt_name" "${where[@]}" "--accelerator-type=$opt_accelerator"
    "--runtime-version=${opt_runtime_version:-$runtime}"
  )
  if [ "$opt_slices" -eq 1 ]; then
    wanted+=("--node-id=$opt_name")
  else
    wanted+=("--node-count=$opt_slices" "--node-prefix=$opt_name")
  fi
  [ -z "$opt_spot" ] || wanted+=(--spot)
  [ -z "$opt_reserved" ] || wanted+=(--reserved)
  [ -z "$opt_network" ] || wanted+=("--network=$opt_network")
  [ -z "$opt_subnetwork" ] || wanted+=("--subnetwork=$opt_subnetwork")
  [ -z "$opt_service_account" ] || wanted+=("--service-account=$opt_service_account")
  # Copying to the bucket and mounting it take this scope.
  wanted+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  run gcloud compute tpus queued-resources create "${wanted[@]}"
}

# ssh_line HOSTS COMMAND: puts into `line` what runs a command on hosts: all, or 0, the first.
ssh_line() {
  if [ "$opt_slices" -eq 1 ]; then
    line=(gcloud compute tpus tpu-vm ssh "$opt_name" "${where[@]}")
  else
    line=(gcloud alpha compute tpus queued-resources ssh "$opt_name" "${where[@]}" "--node=$1")
  fi
  line+=("--worker=$1" "--command=$2")
}

on() {
  ssh_line "$@"
  run "${line[@]}"
}

# On all hosts, which let nobody in for the first minute or two.
insist() {
  local attempt
  for attempt in 1 2 3 4 5; do
    on all "$1" && return
    [ "$attempt" -eq 5 ] || note "not all hosts did this ($attempt of 5 times); again"
    pause
  done
  die 'hosts cannot be reached, or cannot do this, as said above; if it is about keys, ssh-add' \
    "\$HOME/.ssh/google_compute_engine; then give the same command again"
}

# Puts what the first host says of the run into `answer`: running, absent, `exit CODE` or stopped.
run_state() {
  ssh_line 0 "regionjax/host.sh state $opt_name"
  ask "regionjax: $1" "${line[@]}" || answer=''
  answer=$(sed -n 's/^regionjax: //p' <<<"$answer")
  answer=${answer:-absent}
}

# Starts the run on all hosts, unless it is running.
begin() {
  run_state absent
  [ "$answer" != running ] || return 0
  starts=$((starts + 1))
  local mount=/mnt/$opt_bucket folder=regionjax/$commit
  step 'On every host: the files, the bucket, the packages (nothing is done twice)'
  insist "mkdir -p $folder && gcloud storage cat \
gs://$opt_bucket/regionjax/source/$commit.tar.gz | tar -xzf - -C $folder && \
cp $folder/launch/tpu_host.sh regionjax/host.sh && \
regionjax/host.sh setup $(quoted "$opt_bucket") $commit"
  step 'On every host: the run, which no longer needs this connection'
  tpu_environment "$mount/$(dirname "$opt_workdir")/.xla-cache"
  train_words "$mount/$opt_workdir" "$opt_slices"
  insist "regionjax/host.sh start $opt_name $commit $(quoted "${variables[@]}" \
    "${training[@]}" --stopped-exit-code 42)"
}

# Returns when the run or its TPUs have ended, and says which in `answer`.
follow() {
  step "Following the run; its log: launch/tpu_pod.sh logs --name $opt_name --zone $opt_zone"
  local silent=0
  while [ "$silent" -lt 10 ]; do
    pause
    state ACTIVE
    case $answer in
      ACTIVE) run_state 'exit 0' ;;
      UNKNOWN) continue ;; # the connection may be back next time; the run needs none
      *) answer="TPUs are $answer" ;;
    esac
    case $answer in
      running) silent=0 ;;
      absent) silent=$((silent + 1)) ;; # or a host that didn't answer
      'exit '*)
        cause
        return
        ;;
      *) return 0 ;;
    esac
  done
}

# Where one host fails, jax ends the program on the others with codes of its own: 1 and 2, which
# tell an error that would come again, are looked for on all.
cause() {
  [ "$answer" != 'exit 0' ] || return 0
  local first=$answer
  ssh_line all "regionjax/host.sh state $opt_name"
  ask 'regionjax: exit 0' "${line[@]}" || answer=''
  answer=$(sed -n 's/^regionjax: \(exit [12]\)$/\1/p' <<<"$answer" | sed -n 1p)
  answer=${answer:-$first}
}

pause() { [ -n "$opt_dry_run" ] || sleep "$opt_poll"; }

status() {
  run gcloud compute tpus queued-resources describe "$opt_name" "${where[@]}"
  on all "regionjax/host.sh state $opt_name"
}

logs() {
  local log=regionjax/runs/$opt_name/log
  if [ -n "$opt_all_hosts" ]; then
    on all "tail -n 30 $log | sed \"s/^/\$(hostname): /\""
  else
    on 0 "tail -n 100 -F $log"
  fi
}

stop() { on all "regionjax/host.sh stop $opt_name"; }

delete() {
  run gcloud compute tpus queued-resources delete "$opt_name" "${where[@]}" --force --quiet
  answer=NONE
}

main "$@"
