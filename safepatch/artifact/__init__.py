"""The artifact: a patch as one safetensors file, what its metadata says, and how it is told to people."""
