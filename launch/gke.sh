#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster by XPK (pip install xpk), one or several slices.
#
#   launch/gke.sh train CONFIG --name NAME --cluster CLUSTER --zone ZONE --project PROJECT
#     --accelerator TYPE --storage STORAGE --workdir PATH [options] [-- SETTINGS]
#   launch/gke.sh status|logs|delete --name NAME --cluster CLUSTER --zone ZONE --project PROJECT
#
# train puts a commit into a container image and submits a JobSet. A pod that is evicted saves and
# ends with code 42, upon which the JobSet begins again and the run goes on from its newest
# checkpoint. After the JobSet has ended, delete and the same train command go on as well.
#
#   --name NAME            of the workload: a to z, 0 to 9 and -
#   --cluster, --zone, --project   where the cluster is, e.g. --zone us-east5-a
#   --accelerator TYPE     of one slice: v5litepod-64, v6e-256 (chips), v5p-128 (cores: 64 chips)
#   --slices N             slices that the data-centre network joins [1]
#   --storage STORAGE      what all pods share, attached to the cluster before by `xpk storage
#                          attach` (Filestore, or a bucket that has a hierarchical namespace)
#   --workdir PATH         of the run, under the storage's mount point, e.g. /mnt/runs/stage2
#   --base-image IMAGE     that the commit is added to [python:3.12]
#   --image IMAGE          instead: one that has the commit and its packages in /app
#   --commit REV           what runs [HEAD, if nothing is changed]
#   --restarts N           how often the JobSet begins again [20]
#   --grace SECONDS        between SIGTERM and SIGKILL, for the last checkpoint [600]
#   --priority P           as xpk takes it [medium]
#   --libtpu-flags=FLAGS   instead of launch/lib.sh's
#   --dry-run              prints the commands and runs nothing; xpk need not be there

set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

opt_name='' opt_cluster='' opt_zone='' opt_project='' opt_accelerator='' opt_slices=1 opt_storage=''
opt_workdir='' opt_base_image=python:3.12 opt_image='' opt_commit='' opt_restarts=20 opt_grace=600
opt_priority=medium opt_libtpu_flags=''

main() {
  local verb=${1-}
  [ $# -eq 0 ] || shift
  parse 'name cluster zone project accelerator slices storage workdir base-image image commit
    restarts grace priority libtpu-flags' '' "$@"
  case $verb in
    train | status | logs | delete) ;;
    --help | -h) usage; exit 0 ;;
    *) die "expected train, status, logs or delete, not '$verb'; --help explains" ;;
  esac
  need name 'a name of the workload, e.g. --name stage2'
  [[ $opt_name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--name $opt_name: expected a to z, 0 to 9 and -, at most 40, the first a letter"
  need cluster 'the GKE cluster, e.g. --cluster tpus (xpk cluster create makes one)'
  need zone 'the zone of its TPUs, e.g. --zone us-east5-a'
  need project 'the Google Cloud project, e.g. --project my-project'
  whole slices
  where=("--cluster=$opt_cluster" "--zone=$opt_zone" "--project=$opt_project")
  if [ -z "$opt_dry_run" ] && [ "$verb" != logs ]; then
    command -v xpk >/dev/null || die 'xpk is not installed (pip install xpk); --dry-run needs none'
  fi
  "$verb"
}

train() {
  need accelerator 'the type of a slice, e.g. --accelerator v5p-128'
  need storage 'what the pods share, e.g. --storage runs (xpk storage attach makes it known)'
  need workdir "the run's folder under the storage's mount point, e.g. --workdir /mnt/runs/stage2"
  config_word
  [[ $opt_workdir == /?*/?* ]] ||
    die "--workdir $opt_workdir: expected a folder under a mount point, e.g. /mnt/runs/stage2"
  [[ $opt_restarts =~ ^[0-9]+$ ]] || die "--restarts $opt_restarts: expected a whole number"
  whole grace
  accelerator "$opt_accelerator"
  local slices=''
  [ "$opt_slices" -eq 1 ] || slices=" --slices $opt_slices"
  note "$chips chips a slice, $topology. Does it fit? regionjax compile ${words[0]}" \
    "--topology $topology$slices"
  stage
  tpu_environment "$(dirname "$opt_workdir")/.xla-cache"
  train_words "$opt_workdir" "$opt_slices"
  local command variable job=(
    xpk workload create "${where[@]}" "--workload=$opt_name" "--tpu-type=$opt_accelerator"
    "--num-slices=$opt_slices" "--storage=$opt_storage" "--priority=$opt_priority"
    "--max-restarts=$opt_restarts" "--termination-grace-period-seconds=$opt_grace"
  )
  for variable in "${variables[@]}"; do
    job+=("--env=$variable")
  done
  # `exec`, so that SIGTERM reaches the program.
  command="exec python -u -m regionjax $(quoted "${training[@]}") --stopped-exit-code 42"
  if [ -n "$opt_image" ]; then
    job+=("--docker-image=$opt_image" "--command=cd /app && $command")
  else
    local folder=${archive%.tar.gz}
    run mkdir -p "$folder"
    run tar -xzf "$archive" -C "$folder"
    job+=("--base-docker-image=$opt_base_image" "--script-dir=$folder")
    job+=("--command=pip install --quiet --editable '.[tpu]' && $command")
  fi
  step 'The workload'
  run "${job[@]}"
  note "Its log: launch/gke.sh logs --name $opt_name --cluster $opt_cluster --zone $opt_zone" \
    "--project $opt_project"
}

status() { run xpk workload list "${where[@]}" "--filter-by-job=$opt_name"; }

# Of the first host of the first slice.
logs() {
  local set=jobset.sigs.k8s.io
  run gcloud container clusters get-credentials "$opt_cluster" "--location=${opt_zone%-*}" \
    "--project=$opt_project" --dns-endpoint
  run kubectl logs --follow --tail=100 --container=jax-tpu \
    "--selector=$set/jobset-name=$opt_name,$set/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

delete() { run xpk workload delete "${where[@]}" "--workload=$opt_name" --force; }

main "$@"
