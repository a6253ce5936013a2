"""What runs near the tensors: the embedded engine, later the trie KV cache and tree attention."""
