# The answer of `consumer replay --json` as metrics: jq --raw-output --arg topic TOPIC --from-file replay.jq
"{app=\"\(.app)\",topic=\"\($topic)\"}" as $labels
| "idempotent_consumer_replay_verdict\($labels) \(.exit_code)",
  "idempotent_consumer_replay_at_seconds\($labels) \(now | floor)"
