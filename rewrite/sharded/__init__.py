"""A folder of `config.json` and sharded safetensors, rewritten tensor by tensor."""
