"""The arithmetic of an edit step outside the networks: each operation beside its definition in plain torch."""
