"""What runs near the tensors: the embedded engine, the trie of KV blocks and tree attention."""
