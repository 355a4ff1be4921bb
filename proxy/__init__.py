"""The OpenAI endpoint: route, split, stream, recover. Imports neither torch nor vllm."""
