"""The dialects of the API: thin files between a wire format and `rollout_server.api.turn`."""
