"""How a mode is carried out: async generators of deltas over one port."""
