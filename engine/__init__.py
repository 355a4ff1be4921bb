"""The only folder that imports vllm: the connector, the KV layout, starting an instance."""
