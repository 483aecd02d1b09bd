"""A suite that proves whether an implementation computes InfLLM-V2 attention."""
