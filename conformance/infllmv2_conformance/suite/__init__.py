"""The suite: one module per stage, one test per rule. Run it with `infllmv2 check`."""
