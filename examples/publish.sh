#!/usr/bin/env bash
# Convert a checkpoint from the Hub, publish the hybrid, and show that what was published is what
# was made:
#
#   hf auth login                      # or export HF_TOKEN
#   examples/publish.sh moonshotai/Moonlight-16B-A3B my-org/Moonlight-KDA
#
# Everything goes through HTTP to the Hub of HF_ENDPOINT. Each step can be interrupted: run the
# script again, and it goes on. Options for `convert` stand behind the names, as in --no-text.
set -euo pipefail

source=${1:?source on the Hub, as org/name}
target=${2:?repository to publish to, as org/name}
shift 2
work=${WORK:-publish-work}
kimi_convert=${KIMI_CONVERT:-kimi-convert}

mkdir -p "$work"
[ -e "$work/hybrid/config.json" ] || $kimi_convert convert "$source" "$work/hybrid" "$@"
$kimi_convert validate "$work/hybrid" --teacher "$source" --record
$kimi_convert publish "$work/hybrid" "$target" --private
$kimi_convert download "$target" --local-dir "$work/again"
diff --recursive --exclude=.cache "$work/hybrid" "$work/again"
(cd "$work/again" && sha256sum --check --quiet SHA256SUMS)
echo "$target holds what was made in $work/hybrid, byte for byte."
