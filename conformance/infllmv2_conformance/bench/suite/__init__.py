"""The benchmark for pytest-benchmark: `pytest --pyargs infllmv2_conformance.bench --impl IMPL`."""
